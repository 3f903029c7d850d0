"""Divides independent pieces of work over ranks and over processes of each rank.

A long piece of work does not run into the timeout of a collective: every few seconds all ranks exchange the results
that they have, whether or not they are done, and an error or a request to stop on one rank ends the work of all.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from megacid.distributed.collectives import Group, world_size
from megacid.distributed.consensus import agree, agree_on_mapping, broadcast_json, gather_json
from megacid.distributed.parallel import Parallel
from megacid.distributed.parent_process import start_child_process
from megacid.distributed.stopping import stop_together
from megacid.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
_ROUND_S = 5.0  # between two exchanges of results
_POLL_S = 0.5


@dataclass(frozen=True)
class Workers:
    """Who does the work: ranks, and processes of each rank. Methods are collectives if there are several ranks.

    Attributes:
        parallel: the ranks, all of which call; None: this process alone, also if the job has several ranks.
        processes: of each rank, if there is work for as many; None: the cores of its host, shared by the ranks there.
        poll: called about twice a second; may raise Stopped.
    """

    parallel: Parallel | None = None
    processes: int | None = None
    poll: Callable[[], object] = lambda: None

    @property
    def rank(self) -> int:
        return 0 if self.parallel is None else self.parallel.rank

    @property
    def world(self) -> int:
        return 1 if self.parallel is None else self.parallel.world

    @property
    def each_alone(self) -> bool:
        """Whether every rank of the job may be doing the same work."""
        return self.parallel is None and world_size() > 1

    @property
    def _group(self) -> Group:
        return self.parallel.group if self.parallel else None

    def together(self) -> AbstractContextManager[None]:
        """`stop_together` for several ranks; for one a block without collectives."""
        return stop_together(self._group) if self.world > 1 else contextlib.nullcontext()

    def gather(self, value: Any) -> list[Any]:
        """The JSON-able value of every rank."""
        return gather_json(value, self._group) if self.world > 1 else [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-able value."""
        return broadcast_json(value, self._group) if self.world > 1 else value

    def agree(self, value: str, what: str) -> None:
        """Raise RanksDisagree on every rank when `value` differs between ranks."""
        if self.world > 1:
            agree(value, what, self._group)

    def agree_on_mapping(self, mapping: dict[str, Any], what: str) -> None:
        """`agree` for a flat dict of JSON values: the message names only the keys that differ."""
        if self.world > 1:
            agree_on_mapping(mapping, what, self._group)

    def max_processes(self) -> int:
        """`processes`, or the cores for this rank."""
        hosts = self.gather(socket.gethostname())
        return self.processes or max(1, len(os.sched_getaffinity(0)) // hosts.count(hosts[self.rank]))

    def divide(
        self,
        work: Callable[[T], R],
        own: dict[int, T],
        processes: int,
        on_done: Callable[[dict[int, R]], object] = lambda results: None,
    ) -> dict[int, R]:
        """The results of `work` for the items of all ranks, by number, on every rank.

        Args:
            work: is pickled, like items and results; with several ranks results must be JSON-able.
            own: the items of this rank, by number. Ranks may have the same item.
            processes: number of forked processes; 0: work in this one if it is alone. With several ranks it is at
                least one, since a single item may take longer than a collective may wait.
            on_done: called with the results that are new, of any rank.

        Raises:
            UserError: a process was killed. What `work` raises on one rank, a UserError or a RuntimeError, all ranks
                raise.
        """
        results: dict[int, R] = {}
        with contextlib.ExitStack() as stack:
            with self.together():
                runner = stack.enter_context(_Runner(work, own, max(processes, int(self.world > 1))))
            left = 1
            while left:
                with self.together():
                    done = runner.advance(_ROUND_S if self.world > 1 else _POLL_S, self.poll)
                reports = self.gather([done, runner.left])
                new = {number: result for part, _ in reports for number, result in part}
                on_done(new)
                results |= new
                left = sum(count for _, count in reports)
        return results


ALONE = Workers()


class _Runner(AbstractContextManager["_Runner[T, R]"], Generic[T, R]):
    """The items of one rank, in this process or in a pool of processes. left: number of items without a result."""

    def __init__(self, work: Callable[[T], R], items: dict[int, T], processes: int) -> None:
        self.left = len(items)
        self._work, self._items = work, iter(items.items())
        self._finished: queue.SimpleQueue[tuple[int, Future[R]]] = queue.SimpleQueue()
        self._pool: ProcessPoolExecutor | None = None
        if processes and items:
            self._pool = ProcessPoolExecutor(
                min(processes, len(items)),
                multiprocessing.get_context("fork"),
                initializer=start_child_process,
                initargs=(os.getpid(),),
            )

    def __enter__(self) -> _Runner[T, R]:
        if self._pool is not None:
            for number, item in self._items:
                future = self._pool.submit(self._work, item)
                future.add_done_callback(partial(self._put, number))
        return self

    def _put(self, number: int, future: Future[R]) -> None:
        self._finished.put((number, future))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:  # an item may take long; what it writes is complete or not there
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def advance(self, seconds: float, poll: Callable[[], object]) -> list[tuple[int, R]]:
        """Work for some seconds, or until all is done. Returns (number, result) of what was done."""
        done: list[tuple[int, R]] = []
        end = time.monotonic() + seconds
        for number, result in self._in_pool(end, poll) if self._pool else self._in_this_process(end, poll):
            done.append((number, result))
            self.left -= 1
        return done

    def _in_this_process(self, end: float, poll: Callable[[], object]) -> Iterator[tuple[int, R]]:
        for number, item in self._items:
            yield number, self._work(item)
            poll()
            if time.monotonic() > end:
                return

    def _in_pool(self, end: float, poll: Callable[[], object]) -> Iterator[tuple[int, R]]:
        while self.left and time.monotonic() < end:
            poll()
            with contextlib.suppress(queue.Empty):
                while self.left:
                    number, future = self._finished.get(timeout=min(_POLL_S, max(0.0, end - time.monotonic())))
                    yield number, _result(future)


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process was killed, such as for lack of memory, expected it to finish its work: free memory or use "
            "fewer processes, and run the same command again to continue"
        ) from None
