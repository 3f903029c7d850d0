"""Remote shards for tests: the tars of `pair_data` behind a server, and caches of a size in bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pair_data import same, stream, write_shards
from shard_server import ShardServer, serve

from megacid.data.batch import Batch
from megacid.data.index import ShardIndex, load_index
from megacid.data.loader import PairStream
from megacid.data.remote.cache import ShardCache

SIZES = {f"{number:05d}": 7 + number % 3 for number in range(8)}
TAR = 30_720  # bytes of each


@dataclass
class Remote:
    """The same tars on a disk and on a server."""

    root: Path
    local: ShardIndex
    server: ShardServer

    @property
    def url(self) -> str:
        return self.server.url

    def cache(self, tars: float = 100, name: str = "cache") -> ShardCache:
        """A cache with room for so many tars."""
        return ShardCache(ShardCache.open(self.root / name, 1).directory, int(tars * TAR))

    def index(self, tars: float = 100, name: str = "cache", **options: Any) -> ShardIndex:
        return load_index(options.pop("shards", self.url), cache=self.cache(tars, name), **options)

    def forget(self, name: str = "cache") -> None:
        """Remove the tars of a cache; the index stays."""
        for path in cached(self.root / name):
            path.unlink()


def cached(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.tar"))


@contextlib.contextmanager
def remote_shards(root: Path) -> Iterator[Remote]:
    local = write_shards(root / "store", sizes=SIZES)
    with serve(root / "store") as server:
        yield Remote(root, local, server)


def batches(index: ShardIndex, **changes: Any) -> list[Batch]:
    return list(small_steps(index, **changes))


def small_steps(index: ShardIndex, **changes: Any) -> PairStream:
    """20 steps of 4 of 63 samples in blocks of one tar."""
    return stream(index, **{"global_batch": 4, "micro_batch": 4, "block_shards": 1, "total_steps": 20, **changes})


def all_same(want: list[Batch], got: list[Batch]) -> bool:
    assert [batch.failure for batch in got] == [None] * len(got)
    return len(want) == len(got) and all(map(same, want, got))
