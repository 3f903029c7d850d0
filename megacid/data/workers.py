"""Supervision of the loader's worker processes: death and hangs are detected, and no worker outlives its parent.

The trainer never waits for a worker without a time limit, and a lost worker becomes a `WorkersLost` with its cause.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from megacid.distributed.parent_process import start_child_process

_POLL_S = 0.5
_SHUTDOWN_S = 5.0
_DYING_S = 1.0  # a killed process closes its files shortly before its exit code is available


class WorkersLost(RuntimeError):  # noqa: N818  becomes the failure of a batch, not an error of the program
    """A worker died, or no batch arrived in time; the message names the cause and the remedy."""


def start_worker(parent: int, _: int) -> None:
    """The worker_init_fn of a loader's workers, given the parent's pid: the kernel ends a worker with its parent.

    torch checks for the parent between two batches only, so a worker that hangs would never end.
    """
    start_child_process(parent)
    torch.set_num_threads(1)


def worker_start() -> functools.partial[None]:
    """The worker_init_fn of workers that this process is about to start."""
    return functools.partial(start_worker, os.getpid())


def watched(loader: DataLoader[Any], count: int, timeout_s: float) -> Iterator[Any]:
    """The first `count` items of a loader with workers.

    The loader's iterator lives in a thread. To unpickle a batch it asks the worker for shared memory, and a worker that
    is stopped or busy in C code never answers; torch's timeout does not cover that. The caller waits for the thread
    with a time limit. The calling thread starts the workers, since the kernel ends them with the thread that started
    them.

    Args:
        timeout_s: longest time to wait for one item.

    Raises:
        WorkersLost: a worker died, or no item arrived in time. Exceptions that a worker raises are raised unchanged.
    """
    before = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except OSError as error:
        raise WorkersLost(
            f"loader workers cannot be started ({error}): use fewer data.workers, or raise the limit on processes or "
            "memory"
        ) from None
    workers = [process for process in multiprocessing.active_children() if process not in before]
    handler = _quiet_sigchld()
    requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
    replies: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    thread = threading.Thread(target=_serve, args=([iterator], requests, replies), name="megacid-loader", daemon=True)
    del iterator  # only the thread holds it: its finaliser may hang when workers are dead
    thread.start()
    try:
        for _ in range(count):
            requests.put(True)
            ok, item = _wait(replies, workers, timeout_s)
            if not ok:
                if isinstance(item, Exception) and (dead := _dead(workers, _DYING_S)):
                    raise WorkersLost(dead)
                # An error of the transfer: `Pairs` returns errors of reading as text.
                if isinstance(item, OSError | EOFError):
                    raise WorkersLost(
                        f"a batch cannot be received from a loader worker ({item}), usually because of too many open "
                        "files or too little shared memory: raise the limit (ulimit -n), or use fewer data.workers"
                    )
                raise item
            yield item
    except WorkersLost:
        for process in workers:
            process.kill()
        raise
    finally:
        requests.put(False)
        # Healthy workers end on request; killing one that holds a shared lock would block the others.
        deadline = time.monotonic() + _SHUTDOWN_S
        while thread.is_alive() and time.monotonic() < deadline and not _dead(workers):
            thread.join(0.05)
        for process in workers:
            process.kill()
            process.join(_SHUTDOWN_S)
        if handler is not None:
            with contextlib.suppress(ValueError):  # closed by another thread
                signal.signal(signal.SIGCHLD, handler)


def _serve(
    iterators: list[Any], requests: queue.SimpleQueue[bool], replies: queue.SimpleQueue[tuple[bool, Any]]
) -> None:
    iterator = iterators.pop()
    while requests.get():
        try:
            replies.put((True, next(iterator)))
        except BaseException as error:  # the caller raises it
            replies.put((False, error))


def _wait(
    replies: queue.SimpleQueue[tuple[bool, Any]], workers: list[BaseProcess], timeout_s: float
) -> tuple[bool, Any]:
    """The thread's reply. WorkersLost when a worker has died, or after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return replies.get(timeout=max(0.0, min(_POLL_S, deadline - time.monotonic())))
        except queue.Empty:
            if dead := _dead(workers):
                raise WorkersLost(dead) from None
            if time.monotonic() >= deadline:
                raise WorkersLost(
                    f"no batch from {len(workers)} loader workers for {timeout_s:g} s (data.worker_timeout_s), usually "
                    "because storage does not respond: check it, or raise data.worker_timeout_s if decoding is slow"
                ) from None


def _dead(workers: list[BaseProcess], within_s: float = 0.0) -> str | None:
    """A description of the first worker that is dead, or dies within that time."""
    deadline = time.monotonic() + within_s
    while not any(process.exitcode is not None for process in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in workers:
        if (code := process.exitcode) is not None:
            cause = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
            if code == -signal.SIGTERM:
                return f"loader worker {process.pid} {cause}: send signals to the ranks only, not to their workers"
            if code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL):
                return f"loader worker {process.pid} {cause}, which is a fault of a library that it uses"
            resource = "shared memory (/dev/shm)" if code == -signal.SIGBUS else "memory"
            return (
                f"loader worker {process.pid} {cause}, usually because the machine or container ran out of {resource}: "
                f"see the kernel log (dmesg), use fewer data.workers, or provide more {resource}"
            )
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has none
        return f"signal {number}"


def _quiet_sigchld() -> Any:
    """Disable torch's SIGCHLD handler and return it; None outside of the main thread.

    When a worker dies it raises wherever the trainer is, possibly inside of a collective.
    """
    try:
        return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except ValueError:
        return None
