"""Ranks for tests: `run_ranks` forks gloo ranks, which takes a tenth of a second instead of the seconds of a launcher.

`rank_fates` is for ranks that are meant to die.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import queue
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
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
        dist.barrier()  # a rank that leaves at once must not meet one that is still connecting
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


def _fated_main(
    fn: Callable[..., Any], rank: int, world: int, meeting: str, timeout_s: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    code = 1
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
        )
        dist.barrier()
        code = int(fn(*args) or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no goodbye to ranks that may be gone


def rank_fates(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout_s: float = 60,
    group_timeout_s: float | None = None,
    meanwhile: Callable[[list[int]], None] | None = None,
) -> list[int]:
    """Run fn(*args) on `world` forked gloo ranks and return how each ended: its exit code (what fn returned, 1 for an
    exception) or minus the signal that killed it. meanwhile: called with the process ids once all have started. A rank
    that is still there after timeout_s is killed and raises TimeoutError. No process is left behind."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meet")
        ranks = [
            context.Process(target=_fated_main, args=(fn, r, world, meeting, group_timeout_s or timeout_s, args))
            for r in range(world)
        ]
        try:
            for process in ranks:
                process.start()
            if meanwhile is not None:
                meanwhile([int(process.pid or 0) for process in ranks])
            deadline = time.monotonic() + timeout_s
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
            left = [r for r, process in enumerate(ranks) if process.is_alive()]
            if left:
                raise TimeoutError(f"ranks {left} of {world} had not ended after {timeout_s} s")
        finally:
            for process in ranks:
                if process.pid is not None:
                    if process.is_alive():
                        process.kill()
                    process.join()
    return [int(process.exitcode or 0) for process in ranks]


def living(mark: str) -> dict[int, str]:
    """Process id -> command line of the living processes that mention `mark`."""
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in line and int(entry.name) != os.getpid():
            found[int(entry.name)] = line
    return found
