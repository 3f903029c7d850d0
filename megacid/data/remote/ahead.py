"""A process per rank that fetches the remote files of the next blocks into the cache: tars, and their embeddings."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import multiprocessing
import operator
import os
import resource
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from typing import Any, NamedTuple

import numpy as np

from megacid.data.batch import Positions
from megacid.data.mixture import Mixture
from megacid.data.order import Block, SampleOrder
from megacid.data.remote.cache import GB, CachedFile, ShardCache
from megacid.data.workers import start_worker
from megacid.errors import UserError

log = logging.getLogger(__name__)

_POLL_S = 0.1
_FIRST_S, _LOG_S = 120.0, 10.0  # longest wait for one file of the first block; between two lines about it
_FAILED_S = 60.0  # before a file that could not be fetched is tried again
_MAX_STARTS = 4
_OTHER_FILES = 256  # descriptors that are left for what is not held
_MAX_PREFETCHED = 4096  # files beyond the next block
_RENEW_S = 600.0  # between two marks of the prefetched files


class RemoteSource(NamedTuple):
    """The remote files of a source by shard number, and the order that decides which of its shards come next."""

    files: dict[int, tuple[CachedFile, ...]]
    order: SampleOrder

    def of(self, shards: np.ndarray) -> list[CachedFile]:
        """The remote files of shards."""
        return [file for shard in shards.tolist() for file in self.files.get(shard, ())]


class FetchAhead:
    """Fetches the files of the blocks that are being read and of the next one, then more while there is room.

    The ranks of a node divide the files by file locks. Without the process, readers fetch the files themselves:
    after it was killed the run goes on with the same batches.

    Args:
        sources: of the stream, also those without remote tars.
        mixture: divides the positions of the stream among the sources.
        in_flight: number of positions that loader workers may be ahead of the last batch.
        stop: first position that is not read.

    Raises:
        UserError: the files of these blocks do not fit into the cache.
    """

    def __init__(
        self, cache: ShardCache, sources: Sequence[RemoteSource], mixture: Mixture, *, in_flight: int, stop: int
    ) -> None:
        self._cache, self._sources, self._mixture = cache, sources, mixture
        self._in_flight, self._stop = in_flight, stop
        self._position, self._failed = RawValue("q", 0), RawValue("q", 0)
        self._process: BaseProcess | None = None
        self._starts = 0
        self._check_size()

    def _check_size(self) -> None:
        needed = []
        for number, source in enumerate(self._sources):
            shards = sorted(source.files.values(), key=lambda files: -sum(file.size for file in files))
            needed += [file.size for files in shards[: self._most_needed(number)] for file in files]
        least = sum(needed)
        if least > self._cache.limit:
            raise UserError(
                f'"megacid.data.cache_gb" is {self._cache.limit / GB:g}, expected at least {least / GB:.3g}, the size '
                f"of the {len(needed)} files that are read and fetched at a time: raise it, or lower "
                "data.block_shards, data.workers or data.prefetch"
            )

    def _most_needed(self, number: int) -> int:
        """The largest number of shards of a source, in any epoch, of the blocks that are read at a time and the next.

        These are the first and the last block that are read, those between, which are whole and thus have at most as
        many samples as are in flight, and the next one. Most shards are between when each has few samples.
        """
        order = self._sources[number].order
        sizes = np.sort(order.sizes[order.sizes > 0])
        in_flight = self._mixture.at_most(number, self._in_flight)
        between = int(np.searchsorted(np.cumsum(sizes), in_flight, side="right"))
        return 3 * order.block_shards + between

    def over(self, plan: Iterable[list[int]]) -> Generator[list[int], None, None]:
        """The items of `plan`; the process fetches what follows each until the iteration ends.

        The first one waits for the files of its block, so that their transfer does not count as a stall of the workers.
        """
        first = True
        try:
            for positions in plan:
                self._position.value = positions[0]
                self._keep_running()
                if first:
                    self._wait_for_first_block()
                    first = False
                yield positions
        finally:
            if self._process is not None:
                self._process.kill()
                self._process.join()
                self._process, self._starts = None, 0

    def _wait_for_first_block(self) -> None:
        missing: list[CachedFile] = []
        for source, place in zip(self._sources, self._mixture.counts(int(self._position.value))):
            _, _, shards = next(source.order.blocks(place))
            missing += source.of(shards)
        total, logged, arrived = len(missing), time.monotonic(), time.monotonic()
        while left := [file for file in missing if not os.path.exists(self._cache.path(file))]:
            assert self._process is not None
            now = time.monotonic()
            arrived = now if len(left) < len(missing) else arrived
            if self._failed.value or not self._process.is_alive() or now - arrived > _FIRST_S:
                return  # the reader of a missing file fetches it, or raises the error
            if now - logged > _LOG_S:
                log.info("%d of %d files of the first block are in the cache", total - len(left), total)
                logged = now
            missing = left
            time.sleep(_POLL_S)

    def _keep_running(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        if self._starts == _MAX_STARTS:
            return
        if self._process is not None:
            last = self._starts + 1 == _MAX_STARTS
            log.warning(
                "the process that fetches files ahead ended with exit code %s: starting it again%s",
                *(self._process.exitcode, " for the last time" if last else ""),
            )
        self._starts += 1
        context: Any = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._run, args=(os.getpid(),), name="megacid-fetch", daemon=True)
        assert self._process is not None
        self._process.start()

    # ---- in the process --------------------------------------------------------------------------------------

    def _run(self, parent: int) -> None:
        start_worker(parent, 0)
        with contextlib.suppress(ValueError, OSError):  # each file that is held takes a descriptor
            resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        fetcher = _Fetcher(self._cache, self._sources, self._mixture, self._in_flight, self._stop)
        while True:
            fetched = fetcher.step(int(self._position.value))
            self._failed.value = len(fetcher.failed)
            if not fetched:
                time.sleep(_POLL_S)


def fetch_ahead(
    sources: Sequence[RemoteSource], cache: ShardCache | None, mixture: Mixture, plan: Positions, prefetched: int
) -> FetchAhead | None:
    """The `FetchAhead` of a plan; None without remote files.

    Args:
        cache: of all sources; None: they have no remote files.
        prefetched: number of micro-batches that the loader workers of a rank prepare ahead.
    """
    if cache is None:
        return None
    steps = 2 + -(-prefetched // plan.accumulation)  # a batch may be copied to the device one ahead
    return FetchAhead(
        *(cache, sources, mixture),
        in_flight=steps * plan.global_batch,
        stop=plan.total_steps * plan.global_batch,
    )


class _Fetcher:
    """Holds the files of the blocks that are read and of the next one, and fetches one file at a step."""

    def __init__(
        self, cache: ShardCache, sources: Sequence[RemoteSource], mixture: Mixture, in_flight: int, stop: int
    ) -> None:
        self._cache, self._sources, self._mixture, self._in_flight = cache, sources, mixture, in_flight
        self._stops = mixture.counts(stop)
        self._number = len({file for source in sources for files in source.files.values() for file in files})
        self._held: dict[CachedFile, int] = {}  # -> descriptor
        self.failed: dict[CachedFile, float] = {}  # -> when it may be tried again
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_held = sys.maxsize if limit == resource.RLIM_INFINITY else max(0, limit - _OTHER_FILES)
        # Ends of the blocks for which the later files are in the cache or do not fit, and when they are marked again.
        self._prefetched_until: list[int] = []
        self._renew_at = 0.0

    def step(self, position: int) -> bool:
        """Fetch one file. False when there is none to fetch now."""
        ends, needed, later = self._needed_and_later(position)
        for file in self._held.keys() - needed.keys():
            self._cache.mark(file)
            os.close(self._held.pop(file))
        missing = []
        for file in (file for file in needed if file not in self._held):
            if len(self._held) >= self._max_held:
                break
            if (descriptor := self._cache.hold(file)) is None:
                missing.append(file)
            else:
                self._held[file] = descriptor
        if missing:
            return any(self._fetch(file, remove_prefetched=True) for file in missing)
        if self._prefetched_until == ends and time.monotonic() < self._renew_at:
            return False
        for place, file in enumerate(later):
            if self._cache.mark(file, place):
                continue
            if self._fetch(file, remove_prefetched=False):
                self._cache.mark(file, place)
                return True
        self._prefetched_until, self._renew_at = ends, time.monotonic() + _RENEW_S
        return False

    def _needed_and_later(self, position: int) -> tuple[list[int], dict[CachedFile, None], Iterator[CachedFile]]:
        """(End of the first block of each source, files of the blocks that are read and of the next ones, those that
        follow)."""
        ends, following = [], []
        needed: dict[CachedFile, None] = {}
        places, in_flight = self._mixture.counts(position), self._mixture.counts(position + self._in_flight)
        for number, source in enumerate(self._sources):
            blocks = self._blocks(number, places[number])
            first_end, is_read = -1, True
            for _, end, shards in blocks:
                needed |= dict.fromkeys(source.of(shards))
                first_end = end if first_end < 0 else first_end
                if not is_read:
                    break
                is_read = end < in_flight[number]  # the next one
            ends.append(first_end)
            following.append(self._by_start(number, blocks))
        return ends, needed, self._later(following, needed)

    def _blocks(self, number: int, place: int) -> Iterator[Block]:
        """The blocks of a source from the one that holds a position of it, to the end of the run."""
        stop = self._stops[number]
        return itertools.takewhile(lambda block: block[0] < stop, self._sources[number].order.blocks(place))

    def _by_start(self, number: int, blocks: Iterator[Block]) -> Iterator[tuple[float, list[CachedFile]]]:
        """(About where it begins in the stream of all sources, remote files) of blocks of a source."""
        for start, _, shards in blocks:
            yield start / self._mixture.weights[number], self._sources[number].of(shards)

    def _later(
        self, following: list[Iterator[tuple[float, list[CachedFile]]]], needed: dict[CachedFile, None]
    ) -> Iterator[CachedFile]:
        given, size = set(needed), 0
        for _, files in heapq.merge(*following, key=operator.itemgetter(0)):
            for file in (file for file in files if file not in given):
                given.add(file)
                size += file.size
                if len(given) > len(needed) + _MAX_PREFETCHED or size > self._cache.limit:
                    return
                yield file
            if len(given) == self._number:
                return

    def _fetch(self, file: CachedFile, *, remove_prefetched: bool) -> bool:
        if time.monotonic() < self.failed.get(file, 0.0):
            return False
        try:
            return self._cache.fetch(file, remove_prefetched=remove_prefetched)
        except UserError as error:  # the reader that needs the file raises it
            log.warning("%s", error)
            self.failed[file] = time.monotonic() + _FAILED_S
            return False
