"""Fetching ahead: what has to fit into the cache, and what the process does when the cache fails."""

from __future__ import annotations

import errno
import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest
from pair_data import source, stream_of, write_shards
from remote_data import all_same, cached, remote_shards

from megacid.data.batch import Batch
from megacid.data.index import ShardIndex
from megacid.data.mixture import Mixture
from megacid.data.order import SampleOrder
from megacid.data.remote.ahead import FetchAhead, RemoteSource, _Fetcher
from megacid.data.remote.cache import CachedFile, ShardCache

ALONE = Mixture([1.0])


def test_no_epoch_needs_more_tars_than_the_cache_is_asked_to_hold(tmp_path: Path) -> None:
    sizes = np.array([1, 2, 1, 0, 1, 3, 1, 2] + [40] * 24)
    order = SampleOrder(sizes, seed=0, block_shards=2)
    cache = ShardCache.open(tmp_path / "cache", 1)
    tars = {shard: (CachedFile(f"https://host/{shard}.tar", 1, "0" * 64),) for shard in np.flatnonzero(sizes).tolist()}
    sources = [RemoteSource(tars, order)]
    allowed = FetchAhead(cache, sources, ALONE, in_flight=10, stop=1 << 40)._most_needed(0)
    fetcher = _Fetcher(cache, sources, ALONE, in_flight=10, stop=1 << 40)
    needed = [
        len(fetcher._needed_and_later(end - 1)[1])
        for epoch in range(200)
        for _, end, _ in (next(order.blocks(epoch * order.num_samples + start)) for start in range(0, 992, 40))
    ]
    assert max(needed[: len(needed) // 200]) < max(needed) <= allowed < len(tars)


@pytest.mark.parametrize("weights", [(9, 1), (2, 7)])
def test_the_tars_of_all_sources_that_a_run_reads_next_are_needed_and_fit(
    tmp_path: Path, weights: tuple[int, int]
) -> None:
    """The small source begins again and again while the large one is in its first epoch."""
    sizes, mixture, in_flight = ([40] * 24, [3, 5, 1, 4]), Mixture(weights), 30
    cache = ShardCache.open(tmp_path / "cache", 1)
    sources = []
    for number, of_source in enumerate(sizes):
        urls = (f"https://host/{number}-{shard}.tar" for shard in range(len(of_source)))
        tars = {shard: (CachedFile(url, 1, "0" * 64),) for shard, url in enumerate(urls)}
        sources.append(RemoteSource(tars, SampleOrder(of_source, seed=number, block_shards=2)))
    ahead = FetchAhead(cache, sources, mixture, in_flight=in_flight, stop=900)
    allowed = [ahead._most_needed(number) for number in range(2)]
    fetcher = _Fetcher(cache, sources, mixture, in_flight=in_flight, stop=900)
    for position in range(0, 900, 23):
        _, needed, later = fetcher._needed_and_later(position)
        of, places = mixture.locate(np.arange(position, min(900, position + in_flight)))
        read = {
            one.files[shard][0]
            for number, one in enumerate(sources)
            for shard in one.order.locate_many(places[of == number])[1].tolist()
        }
        assert read <= needed.keys()
        for number, one in enumerate(sources):
            assert len(needed.keys() & set(itertools.chain(*one.files.values()))) <= allowed[number]
        following = list(later)
        assert len({*following, *needed}) == len(following) + len(needed) <= 28


def test_a_remote_source_gives_the_batches_that_a_local_one_gives(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    with remote_shards(tmp_path) as remote:
        small = write_shards(tmp_path / "small", sizes={"00000": 6, "00001": 5})

        def read(index: ShardIndex) -> list[Batch]:
            sources = source(index, "large", 2, block_shards=1), source(small, "small", 1)
            return list(stream_of(*sources, block_shards=1, total_steps=10))

        index, want = remote.index(tars=8), read(remote.local)
        remote.forget()
        assert all_same(want, read(index)) and len(want) == 10


@pytest.fixture
def tars(tmp_path: Path) -> dict[int, CachedFile]:
    """Eight tars on a server that has ended, and a cache that has them."""
    pytest.importorskip("aiohttp")
    with remote_shards(tmp_path) as remote:
        index = remote.index()
    found = (index.paths.cached(tar, entry) for tar, entry in zip(index.paths.tars, index.shards))
    return {shard: tar for shard, tar in enumerate(found) if tar is not None}


def fetcher_of(tmp_path: Path, tars: dict[int, CachedFile]) -> _Fetcher:
    source = RemoteSource(
        {shard: (tar,) for shard, tar in tars.items()}, SampleOrder([8] * len(tars), seed=0, block_shards=1)
    )
    return _Fetcher(ShardCache.open(tmp_path / "cache", 1), [source], ALONE, in_flight=4, stop=1 << 40)


def test_the_process_renews_the_marks_of_prefetched_tars(tmp_path: Path, tars: dict[int, CachedFile]) -> None:
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
    tmp_path: Path, tars: dict[int, CachedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in cached(tmp_path / "cache"):
        path.unlink()

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    fetcher = fetcher_of(tmp_path, tars)
    assert not fetcher.step(0) and len(fetcher.failed) == len(tars) - 6
