"""Runs a suite's module on several ranks, and times their steps in turns."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from benchmarks import measure
from megacid.distributed.consensus import gather_json
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError

Steps = Callable[[int], float]  # takes this many training steps and returns the last loss of this rank


def ask_ranks(module: str, request: dict[str, Any], world: int, device: str = "cpu") -> dict[str, Any]:
    """The answer of `module` on `world` ranks, that of rank 0. Raises UserError when a rank fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    if device == "cpu":
        shared["DS_ACCELERATOR"] = "cpu"

    def ask(rank: int) -> dict[str, Any]:
        return measure.ask_process(module, request, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})

    with ThreadPoolExecutor(world) as pool:
        answers = list(pool.map(ask, range(world)))
    for answer in answers:
        if "skipped" in answer:
            raise UserError(f"a rank of {module} failed ({answer['skipped']}): see the message")
    return answers[0]


def take_turns(
    steps: Mapping[str, Steps], rounds: int, repeats: int, parallel: Parallel
) -> dict[str, dict[str, list[float]]]:
    """{name: wall seconds of a step, CPU seconds of a step over all ranks}, by round. A turn begins with an uncounted
    step. A collective."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall_s": [], "cpu_s": []} for name in steps}
    for _, name in itertools.product(range(rounds), steps):
        steps[name](1)
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        steps[name](repeats)
        own = [(time.perf_counter() - wall), (time.process_time() - cpu)]
        everyone = gather_json(own, parallel.group)
        found[name]["wall_s"].append(max(wall for wall, _ in everyone) / repeats)
        found[name]["cpu_s"].append(sum(cpu for _, cpu in everyone) / repeats)
    return found
