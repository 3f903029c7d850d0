"""Remote shards for tests: the tars of `pair_data` behind a server, side tables of them, caches of a size in bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pair_data import same, save, source, stream, stream_of, write_parquet, write_shards
from shard_server import ShardServer, serve

from megacid.data.batch import Batch
from megacid.data.index import ShardIndex, load_index
from megacid.data.loader import PairStream
from megacid.data.remote import cache as remote_cache
from megacid.data.remote.cache import ShardCache
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.offline.embed.partitions import Partition, SampleInfo, partition_files
from megacid.storage import object_store as store
from megacid.storage.atomic import file_sha256
from megacid.storage.metadata import write_meta

SIZES = {f"{number:05d}": 7 + number % 3 for number in range(8)}
TAR = 30_720  # bytes of each
EMPTY = "00005"  # a tar without an embedding
CLASSES, WIDTH = 63, 512


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


def short_waits(patch: pytest.MonkeyPatch) -> None:
    """Attempts end after two seconds, and the first waits are short.

    A busy machine can keep a healthy server silent for half a second, twice.
    """
    patch.setattr(store, "RETRY_S", 2.5)
    patch.setattr(store, "SILENCE_S", 2.0)
    patch.setattr(store, "_BACKOFF_S", 0.1)
    patch.setattr(remote_cache, "ROOM_S", 0.5)


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


# ---- side tables ----


def write_side_tables(folder: Path, index: ShardIndex) -> None:
    """Embeddings, labels and masks as the tools write them: a value is the number of the sample."""
    numbers = {name: number for number, name in enumerate(index.names)}
    for name, number in numbers.items():
        rows = np.arange(index.starts[number], index.starts[number + 1])
        keys = [f"k{row}" for row in rows]
        emb = np.tile(rows[:, None], WIDTH).astype(np.float16)
        if name != EMPTY:
            partition = Partition([emb[::-1]], [-emb[::-1]], samples=[SampleInfo(key, "x") for key in keys[::-1]])
            partition.save(partition_files(folder / "teacher", number, len(numbers)), number, name)
        write_parquet(folder / "clusters" / "labels" / f"{name}.parquet", key=keys, label=rows.tolist())
        save(folder / "balance" / "keep" / f"{name}.npy", rows % 7 != 3)
    facts: dict[str, Any] = {"shards_digest": index.digest}
    write_meta(folder / "teacher", "embed", {}, dim=WIDTH, partitions=numbers, empty=[EMPTY], **facts)
    path = folder / "clusters" / "centroids.npy"
    save(path, np.random.default_rng(0).standard_normal((CLASSES, 2)))
    centroids = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_meta(folder / "clusters", "cluster", {}, k=CLASSES, centroids=centroids, **facts)
    write_meta(folder / "balance", "balance", {}, **facts)


def tables(where: str | Path, index: ShardIndex, cache: ShardCache | None = None) -> dict[str, Any]:
    """The side tables in a directory or under a URL."""
    return {
        "teacher": TeacherTable(f"{where}/teacher", index, cache),
        "labels": LabelTable(f"{where}/clusters", index, cache=cache),
        "keep": KeepTable(f"{where}/balance", index),
    }


def read(index: ShardIndex, side: dict[str, Any], **changes: Any) -> list[Batch]:
    """20 steps of 4 samples, in blocks of one tar."""
    plan = {"global_batch": 4, "micro_batch": 4, "block_shards": 1, "total_steps": 20, **changes}
    return list(stream_of(source(index, **side, block_shards=plan["block_shards"]), **plan))


def check_same(want: list[Batch], got: list[Batch]) -> None:
    assert [batch.failure for batch in got] == [None] * len(got) and len(want) == len(got)
    for one, other in zip(want, got):
        for name in ("image", "text", "sample_id", "label", "teacher_image", "teacher_text"):
            assert getattr(one, name).equal(getattr(other, name))
