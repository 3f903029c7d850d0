"""Fetching ahead: what has to fit into the cache, and what the process does when the cache fails."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
from remote_data import cached, remote_shards

from megacid.data.order import SampleOrder
from megacid.data.remote.ahead import FetchAhead, _Fetcher
from megacid.data.remote.cache import CachedTar, ShardCache


def test_no_epoch_needs_more_tars_than_the_cache_is_asked_to_hold(tmp_path: Path) -> None:
    sizes = np.array([1, 2, 1, 0, 1, 3, 1, 2] + [40] * 24)
    order = SampleOrder(sizes, seed=0, block_shards=2)
    cache = ShardCache.open(tmp_path / "cache", 1)
    tars = {shard: CachedTar(f"https://host/{shard}.tar", 1, "0" * 64) for shard in np.flatnonzero(sizes).tolist()}
    allowed = FetchAhead(cache, tars, order, in_flight=10, stop=1 << 40)._most_needed()
    fetcher = _Fetcher(cache, tars, order, in_flight=10, stop=1 << 40)
    needed = [
        len(fetcher._needed_and_later(end - 1)[1])
        for epoch in range(200)
        for _, end, _ in (next(order.blocks(epoch * order.num_samples + start)) for start in range(0, 992, 40))
    ]
    assert max(needed[: len(needed) // 200]) < max(needed) <= allowed < len(tars)


@pytest.fixture
def tars(tmp_path: Path) -> dict[int, CachedTar]:
    """Eight tars on a server that has ended, and a cache that has them."""
    pytest.importorskip("aiohttp")
    with remote_shards(tmp_path) as remote:
        index = remote.index()
    found = (index.paths.cached(tar, entry) for tar, entry in zip(index.paths.tars, index.shards))
    return {shard: tar for shard, tar in enumerate(found) if tar is not None}


def fetcher_of(tmp_path: Path, tars: dict[int, CachedTar]) -> _Fetcher:
    order = SampleOrder([8] * len(tars), seed=0, block_shards=1)
    return _Fetcher(ShardCache.open(tmp_path / "cache", 1), tars, order, in_flight=4, stop=1 << 40)


def test_the_process_renews_the_marks_of_prefetched_tars(tmp_path: Path, tars: dict[int, CachedTar]) -> None:
    fetcher, paths = fetcher_of(tmp_path, tars), cached(tmp_path / "cache")

    def prefetched() -> int:
        return sum(path.stat().st_mtime > time.time() + 60 for path in paths)

    assert not fetcher.step(0) and prefetched() == len(paths) - len(fetcher._held) > 0
    for path in paths:
        os.utime(path, (1, 1))
    assert not fetcher.step(0) and prefetched() == 0
    fetcher._renew_at = 0.0
    assert not fetcher.step(0) and prefetched() == len(paths) - len(fetcher._held)


def test_a_fault_of_the_cache_does_not_end_the_process(
    tmp_path: Path, tars: dict[int, CachedTar], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in cached(tmp_path / "cache"):
        path.unlink()

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    fetcher = fetcher_of(tmp_path, tars)
    assert not fetcher.step(0) and len(fetcher.failed) == len(tars) - 6
