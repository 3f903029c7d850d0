"""Ranks for tests: `run_ranks` forks gloo ranks, which takes a tenth of a second instead of the seconds of a launcher."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import queue
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    fn: Callable[..., Any], rank: int, world: int, meeting: str, results: Any, timeout_s: float, args: tuple[Any, ...]
) -> None:
    # A parent that used several threads leaves a thread pool that does not exist in the child: it would wait for ever.
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
        )
        # Bytes, not tensors: torch would send a file descriptor that dies with this process.
        results.put((rank, True, pickle.dumps(fn(*args))))
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 60) -> list[Any]:
    """Run fn(*args) on `world` forked gloo ranks and return their results by rank.
    An exception on a rank is raised here with its traceback; a rank that says nothing is a TimeoutError."""
    context = mp.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meet")
        ranks = [
            context.Process(target=_rank_main, args=(fn, r, world, meeting, results, timeout_s, args))
            for r in range(world)
        ]
        for process in ranks:
            process.start()
        out: dict[int, Any] = {}
        try:
            for _ in range(world):
                try:
                    rank, ok, value = results.get(timeout=timeout_s)
                except queue.Empty:
                    raise TimeoutError(
                        f"ranks {sorted(set(range(world)) - set(out))} of {world} said nothing for {timeout_s} s"
                    ) from None
                if not ok:
                    raise AssertionError(f"rank {rank} of {world} failed:\n{value}")
                out[rank] = pickle.loads(value)
            for process in ranks:
                process.join(timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
    return [out[r] for r in range(world)]
