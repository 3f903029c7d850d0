"""A process per rank that fetches the remote tars of the next blocks into the cache."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from typing import Any

import numpy as np

from megacid.data.batch import Positions
from megacid.data.order import Block, SampleOrder
from megacid.data.remote.cache import GB, CachedTar, ShardCache
from megacid.data.shard_paths import ShardPaths
from megacid.data.workers import start_worker
from megacid.errors import UserError

log = logging.getLogger(__name__)

_POLL_S = 0.1
_FIRST_S, _LOG_S = 120.0, 10.0  # longest wait for one tar of the first block; between two lines about it
_FAILED_S = 60.0  # before a tar that could not be fetched is tried again
_MAX_STARTS = 4
_OTHER_FILES = 256  # descriptors that are left for other files than the tars that are held
_MAX_PREFETCHED = 4096  # tars beyond the next block
_RENEW_S = 600.0  # between two marks of the prefetched tars


class FetchAhead:
    """Fetches the tars of the blocks that are being read and of the next one, then more while there is room.

    The ranks of a node divide the tars by file locks. Without the process, readers fetch the tars themselves: after it
    was killed the run goes on with the same batches.

    Args:
        tars: by shard number, for the remote ones.
        order: decides which tars come next.
        in_flight: number of positions that loader workers may be ahead of the last batch.
        stop: first position that is not read.

    Raises:
        UserError: the tars of these blocks do not fit into the cache.
    """

    def __init__(
        self, cache: ShardCache, tars: dict[int, CachedTar], order: SampleOrder, *, in_flight: int, stop: int
    ) -> None:
        self._cache, self._tars, self._order = cache, tars, order
        self._in_flight, self._stop = in_flight, stop
        self._position, self._failed = RawValue("q", 0), RawValue("q", 0)
        self._process: BaseProcess | None = None
        self._starts = 0
        self._check_size()

    def _check_size(self) -> None:
        number = self._most_needed()
        sizes = sorted((tar.size for tar in self._tars.values()), reverse=True)
        least = sum(sizes[:number])
        if least > self._cache.limit:
            raise UserError(
                f'"megacid.data.cache_gb" is {self._cache.limit / GB:g}, expected at least {least / GB:.3g}, the size '
                f"of the {min(number, len(sizes))} tars that are read and fetched at a time: raise it, or lower "
                "data.block_shards, data.workers or data.prefetch"
            )

    def _most_needed(self) -> int:
        """The largest number of shards, in any epoch, of the blocks that are read at a time and the next one.

        These are the first and the last block that are read, those between, which are whole and thus have at most as
        many samples as are in flight, and the next one. Most shards are between when each has few samples.
        """
        sizes = np.sort(self._order.sizes[self._order.sizes > 0])
        between = int(np.searchsorted(np.cumsum(sizes), self._in_flight, side="right"))
        return 3 * self._order.block_shards + between

    def over(self, plan: Iterable[list[int]]) -> Generator[list[int], None, None]:
        """The items of `plan`; the process fetches what follows each until the iteration ends.

        The first one waits for the tars of its block, so that their transfer does not count as a stall of the workers.
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
        _, _, shards = next(self._order.blocks(int(self._position.value)))
        missing = [self._tars[shard] for shard in shards.tolist() if shard in self._tars]
        total, logged, arrived = len(missing), time.monotonic(), time.monotonic()
        while left := [tar for tar in missing if not os.path.exists(self._cache.path(tar))]:
            assert self._process is not None
            now = time.monotonic()
            arrived = now if len(left) < len(missing) else arrived
            if self._failed.value or not self._process.is_alive() or now - arrived > _FIRST_S:
                return  # the reader of a missing tar fetches it, or raises the error
            if now - logged > _LOG_S:
                log.info("%d of %d tars of the first block are in the cache", total - len(left), total)
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
                "the process that fetches tars ahead ended with exit code %s: starting it again%s",
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
        with contextlib.suppress(ValueError, OSError):  # each tar that is held takes a descriptor
            resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        fetcher = _Fetcher(self._cache, self._tars, self._order, self._in_flight, self._stop)
        while True:
            fetched = fetcher.step(int(self._position.value))
            self._failed.value = len(fetcher.failed)
            if not fetched:
                time.sleep(_POLL_S)


def fetch_ahead(
    paths: ShardPaths, entries: list[dict[str, Any]], order: SampleOrder, plan: Positions, prefetched: int
) -> FetchAhead | None:
    """The `FetchAhead` of a plan; None without remote tars.

    Args:
        entries: of the index.
        prefetched: number of micro-batches that the loader workers of a rank prepare ahead.
    """
    tars = {shard: cached for shard, tar in enumerate(paths.tars) if (cached := paths.cached(tar, entries[shard]))}
    if not tars or paths.cache is None:
        return None
    steps = 2 + -(-prefetched // plan.accumulation)  # a batch may be copied to the device one ahead
    return FetchAhead(
        *(paths.cache, tars, order),
        in_flight=steps * plan.global_batch,
        stop=plan.total_steps * plan.global_batch,
    )


class _Fetcher:
    """Holds the tars of the blocks that are read and of the next one, and fetches one tar at a step."""

    def __init__(
        self, cache: ShardCache, tars: dict[int, CachedTar], order: SampleOrder, in_flight: int, stop: int
    ) -> None:
        self._cache, self._tars, self._order, self._in_flight, self._stop = cache, tars, order, in_flight, stop
        self._held: dict[int, int] = {}  # shard -> descriptor
        self.failed: dict[int, float] = {}  # shard -> when it may be tried again
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_held = sys.maxsize if limit == resource.RLIM_INFINITY else max(0, limit - _OTHER_FILES)
        # End of the block for which the later tars are in the cache or do not fit, and when they are marked again.
        self._prefetched_until, self._renew_at = -1, 0.0

    def step(self, position: int) -> bool:
        """Fetch one tar. False when there is none to fetch now."""
        end, needed, later = self._needed_and_later(position)
        for shard in self._held.keys() - needed.keys():
            self._cache.mark(self._tars[shard])
            os.close(self._held.pop(shard))
        missing = []
        for shard in (shard for shard in needed if shard not in self._held):
            if len(self._held) >= self._max_held:
                break
            if (descriptor := self._cache.hold(self._tars[shard])) is None:
                missing.append(shard)
            else:
                self._held[shard] = descriptor
        if missing:
            return any(self._fetch(shard, remove_prefetched=True) for shard in missing)
        if self._prefetched_until == end and time.monotonic() < self._renew_at:
            return False
        for place, shard in enumerate(later):
            if self._cache.mark(self._tars[shard], place):
                continue
            if self._fetch(shard, remove_prefetched=False):
                self._cache.mark(self._tars[shard], place)
                return True
        self._prefetched_until, self._renew_at = end, time.monotonic() + _RENEW_S
        return False

    def _needed_and_later(self, position: int) -> tuple[int, dict[int, None], Iterator[int]]:
        """(End of the first block, shards of the blocks that are read and of the next one, those that follow)."""
        blocks = itertools.takewhile(lambda block: block[0] < self._stop, self._order.blocks(position))
        needed: dict[int, None] = {}
        first_end, is_read = -1, True
        for _, end, shards in blocks:
            needed |= dict.fromkeys(self._remote(shards))
            first_end = end if first_end < 0 else first_end
            if not is_read:
                break
            is_read = end < position + self._in_flight  # the next one
        return first_end, needed, self._later(blocks, needed)

    def _later(self, blocks: Iterator[Block], needed: dict[int, None]) -> Iterator[int]:
        given, size = set(needed), 0
        for _, _, shards in blocks:
            for shard in (shard for shard in self._remote(shards) if shard not in given):
                given.add(shard)
                size += self._tars[shard].size
                if len(given) > len(needed) + _MAX_PREFETCHED or size > self._cache.limit:
                    return
                yield shard
            if len(given) == len(self._tars):
                return

    def _remote(self, shards: np.ndarray) -> list[int]:
        return [shard for shard in shards.tolist() if shard in self._tars]

    def _fetch(self, shard: int, *, remove_prefetched: bool) -> bool:
        if time.monotonic() < self.failed.get(shard, 0.0):
            return False
        try:
            return self._cache.fetch(self._tars[shard], remove_prefetched=remove_prefetched)
        except UserError as error:  # the reader that needs the tar raises it
            log.warning("%s", error)
            self.failed[shard] = time.monotonic() + _FAILED_S
            return False
