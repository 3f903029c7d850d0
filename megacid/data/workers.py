"""Loader processes that may die or hang, and that never outlive the process that started them."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from megacid.distributed.parent_process import set_parent_death_signal

_LOOK_EVERY_S = 0.5
_FAREWELL_S = 5.0
_DYING_S = 1.0  # a process that was killed closes its files a moment before it is known to be dead


class WorkersLost(RuntimeError):  # noqa: N818  becomes the failure of a batch, not an error of the program
    """A worker was killed, or none gave anything in time; the text names the cause and the remedy."""


def start_worker(parent: int, _: int) -> None:
    """worker_init_fn, with the parent's pid. A worker is ended by its parent only, and does not outlive it.

    It must neither run the trainer's signal handlers nor print at Ctrl-C.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # torch's own look at the parent happens between two batches only: a worker that hangs would stay for ever.
        set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)
    torch.set_num_threads(1)


def worker_start() -> functools.partial[None]:
    """The worker_init_fn of workers that this process is about to start."""
    return functools.partial(start_worker, os.getpid())


def watched(loader: DataLoader[Any], count: int, timeout_s: float) -> Iterator[Any]:
    """The first `count` items of a loader with workers. Raises WorkersLost; what a worker raises passes.

    The loader's iterator lives in a thread: unpickling what a worker sent asks that worker for its shared memory, which
    one that is stopped, or busy in C code, never answers, and torch's timeout does not cover that. Here nothing is ever
    waited for without an end. The workers are started by the calling thread, since the kernel ends them with the thread
    that started them.
    """
    before = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except OSError as error:
        raise WorkersLost(
            f"loader workers cannot be started ({error}): use fewer data.workers, or raise the limit on processes or memory"
        ) from None
    workers = [process for process in multiprocessing.active_children() if process not in before]
    handler = _quiet_sigchld()
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    given: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    thread = threading.Thread(target=_serve, args=([iterator], wanted, given), name="megacid-loader", daemon=True)
    del iterator  # the thread's alone: taking leave of dead workers may hang, too
    thread.start()
    try:
        for _ in range(count):
            wanted.put(True)
            ok, item = _wait(given, workers, timeout_s)
            if not ok:
                if isinstance(item, Exception) and (dead := _dead(workers, _DYING_S)):
                    raise WorkersLost(dead)
                # On the way: what went wrong while reading is a sentence already, see `Pairs`.
                if isinstance(item, OSError | EOFError):
                    raise WorkersLost(
                        f"what loader workers made cannot be taken over ({item}): mostly too many open files or too "
                        "little shared memory; raise the limit (ulimit -n), or use fewer data.workers"
                    )
                raise item
            yield item
    except WorkersLost:
        for process in workers:
            process.kill()
        raise
    finally:
        wanted.put(False)
        # Others that are well are told to end, which a kill in the middle of a lock that they share would spoil.
        deadline = time.monotonic() + _FAREWELL_S
        while thread.is_alive() and time.monotonic() < deadline and not _dead(workers):
            thread.join(0.05)
        for process in workers:
            process.kill()
            process.join(_FAREWELL_S)
        if handler is not None:
            with contextlib.suppress(ValueError):  # closed by another thread
                signal.signal(signal.SIGCHLD, handler)


def _serve(held: list[Any], wanted: queue.SimpleQueue[bool], given: queue.SimpleQueue[tuple[bool, Any]]) -> None:
    iterator = held.pop()
    while wanted.get():
        try:
            given.put((True, next(iterator)))
        except BaseException as error:  # the caller raises it
            given.put((False, error))


def _wait(given: queue.SimpleQueue[tuple[bool, Any]], workers: list[BaseProcess], timeout_s: float) -> tuple[bool, Any]:
    """The thread's answer. WorkersLost when a worker is gone, or after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return given.get(timeout=max(0.0, min(_LOOK_EVERY_S, deadline - time.monotonic())))
        except queue.Empty:
            if dead := _dead(workers):
                raise WorkersLost(dead) from None
            if time.monotonic() >= deadline:
                raise WorkersLost(
                    f"{len(workers)} loader workers gave nothing for {timeout_s:g} s (data.worker_timeout_s): mostly storage "
                    "that does not answer; look at it, or raise data.worker_timeout_s where decoding is that slow"
                ) from None


def _dead(workers: list[BaseProcess], within_s: float = 0.0) -> str | None:
    """A sentence about the first worker that is dead, or is within that time."""
    deadline = time.monotonic() + within_s
    while not any(process.exitcode is not None for process in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in workers:
        if (code := process.exitcode) is not None:
            how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
            short = "shared memory (/dev/shm)" if code == -signal.SIGBUS else "memory"
            return (
                f"loader worker {process.pid} {how}: mostly the {short} of the machine or container was used up; see its "
                "log (dmesg), use fewer data.workers, or give it more"
            )
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has none
        return f"signal {number}"


def _quiet_sigchld() -> Any:
    """Switch off the handler with which torch raises an error wherever the trainer is when a worker dies, in the middle
    of a collective perhaps; returns it, None outside of the main thread."""
    try:
        return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except ValueError:
        return None
