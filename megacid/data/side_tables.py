"""Side tables of the shards: cluster labels, and masks of the samples to keep; `teacher_table.py` has the embeddings.

They are joined to the samples of one tar at a time, by key: a global dictionary of 400 M keys would cost gigabytes, and
the rows of another file need not be in the order of the tar. The loader reads the result, see `joined.py`. A directory
of theirs is on a disk or in an object store, of which the join reads whole files except embeddings.
Shapes: n samples of a tar, d embedding width, l labels per sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megacid.data.captions import recorded_caption
from megacid.data.index import ShardIndex
from megacid.data.remote.cache import CachedFile, ShardCache
from megacid.errors import UserError
from megacid.storage.atomic import file_sha256
from megacid.storage.metadata import read_meta, size_field
from megacid.storage.npy import load_npy, parse_npy
from megacid.storage.parquet import join_by_key, key_column, label_column, read_parquet, row_by_key
from megacid.storage.remote_path import STAGES, AnyPath, RemotePath, any_path

EMBED_AGAIN, CLUSTER_AGAIN, BALANCE_AGAIN = (f"run tools/{tool}.py again" for tool in ("embed", "cluster", "balance"))


def checked_meta(directory: AnyPath, index: ShardIndex, made_by: str) -> dict[str, Any]:
    """meta.json of a stage. UserError when it was made from other shards than these or those they are a copy of."""
    meta = read_meta(directory, expect=made_by)
    if made_by == "embed" and (caption := recorded_caption(meta)) != index.caption.spec:
        raise UserError(
            f"{directory} was made from the captions in {caption!r}, this run reads them from {index.caption.spec!r}: "
            f'set data.caption to "{caption}", or run tools/embed.py with --caption {index.caption.spec}'
        )
    # Copied samples keep their tar names and keys, so embeddings and labels can be joined; masks of rows cannot.
    accepted = [index.digest] if made_by == "balance" else [index.digest, _copied_from(index)]
    if meta.get("shards_digest") not in accepted:
        raise UserError(
            f"{directory} was made from other shards (digest {str(meta.get('shards_digest'))[:12]}) than {index.root} "
            f"(digest {index.digest[:12]}): run tools/{made_by}.py again for these shards"
        )
    return meta


def _copied_from(index: ShardIndex) -> str:
    """Digest of the shards that `tools/balance.py --reshard` copied these from; their own digest otherwise."""
    if (index.root / "meta.json").is_file():
        meta = read_meta(index.root)
        if meta.get("made_by") == "reshard" and meta.get("digest") == index.digest:
            return str(meta.get("shards_digest"))
    return index.digest


class LabelFiles:
    """Cluster labels written by `tools/cluster.py`, by the name of a tar.

    Args:
        meta: its meta.json.
        first: name of the tar that decides how many labels per sample were written.
        labels_per_sample: number l of nearest clusters to use; None uses all that were written.
        cache: for centroids in an object store; None: the one that the environment names.

    Attributes:
        num_classes: number of clusters.
        labels_per_sample: l.
        stored: number of labels per sample that were written.

    Raises:
        UserError: fewer labels per sample were written.
    """

    def __init__(
        self,
        directory: AnyPath,
        meta: dict[str, Any],
        first: str,
        labels_per_sample: int | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        self.directory, self.meta, self._cache = directory, meta, cache
        self.num_classes = size_field(self.meta, self.directory, "k", CLUSTER_AGAIN)
        self.labels_per_sample, self.stored = labels_per_sample or 1, 0
        keys, labels = self.read(first)
        row_by_key(keys, self.path(first), CLUSTER_AGAIN)
        self.stored = labels.shape[1]
        self.labels_per_sample = labels_per_sample or self.stored

    def path(self, name: str) -> AnyPath:
        """The file with the labels of a tar."""
        return self.directory / "labels" / f"{name}.parquet"

    def read(self, name: str) -> tuple[list[str], np.ndarray]:
        """The labels of a tar as they are stored: r keys, and int64 [r, stored], nearest first, -1 for none."""
        path = self.path(name)
        table = read_parquet(path, CLUSTER_AGAIN)
        names = [name for name in table.column_names if name == "label" or name.removeprefix("label_").isdigit()]
        if "key" not in table.column_names or "label" not in names:
            raise UserError(f"{path} has the columns {table.column_names}, expected `key` and `label`: {CLUSTER_AGAIN}")
        names.sort(key=lambda name: int(name.removeprefix("label_")) if name != "label" else 0)
        if len(names) < (expected := max(self.stored, self.labels_per_sample)):
            raise UserError(
                f"{path} has {len(names)} labels per sample, expected {expected}: "
                f"run tools/cluster.py with --top-labels {expected}, or use fewer"
            )
        names = names[: self.stored or None]
        keys = key_column(table, "key", path, CLUSTER_AGAIN)
        columns = [label_column(table, name, keys, self.num_classes, path, CLUSTER_AGAIN) for name in names]
        return keys, np.stack(columns, axis=1)

    @contextlib.contextmanager
    def centroids(self) -> Iterator[Path]:
        """The path of the centroids of the clusters, which can be read there during the block.

        Raises:
            UserError: they are in an object store and cannot be fetched, or their sha256 is not known.
        """
        path = self.directory / "centroids.npy"
        if isinstance(path, Path):
            yield path
        else:
            cache = self._cache or ShardCache.of_environment(path.url)
            size, sha256 = self._recorded_centroids()
            with cache.local(CachedFile(path.url, size, sha256, STAGES)) as local:
                yield local

    @cached_property
    def centroids_sha256(self) -> str:
        """sha256 of centroids.npy. UserError when it cannot be read."""
        path = self.directory / "centroids.npy"
        if isinstance(path, RemotePath):
            return self._recorded_centroids()[1]
        try:
            return file_sha256(path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}), expected the centroids of the labels: {CLUSTER_AGAIN}"
            ) from None

    def _recorded_centroids(self) -> tuple[int, str]:
        """(size in bytes, sha256) of centroids.npy."""
        match self.meta.get("centroids"):
            case {"bytes": int(size), "sha256": str(sha256)}:
                return size, sha256
        raise UserError(
            f"{self.directory}/meta.json has no size and sha256 of centroids.npy, which are needed to read it from a "
            "store, since an earlier version of megacid wrote it: copy the directory to a disk, or run "
            "tools/cluster.py into another one"
        )


class LabelTable(LabelFiles):
    """Cluster labels of indexed shards; labels_per_sample and cache are those of `LabelFiles`."""

    def __init__(
        self,
        directory: str | AnyPath,
        index: ShardIndex,
        labels_per_sample: int | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        self.index, directory = index, any_path(directory)
        meta = checked_meta(directory, index, "cluster")
        super().__init__(directory, meta, index.names[0], labels_per_sample, cache)

    def join(self, shard: int) -> np.ndarray:
        """The labels of the samples of a tar: int64 [n, stored], nearest first, -1 for none."""
        name = self.index.names[shard]
        keys, stored = self.read(name)
        at = join_by_key(self.index.table(shard).keys, keys, self.path(name), CLUSTER_AGAIN)
        labels = np.full((len(at), stored.shape[1]), -1, np.int64)
        labels[at >= 0] = stored[at[at >= 0]]
        return labels


class KeepTable:
    """Masks of the samples that `tools/balance.py` kept."""

    def __init__(self, directory: str | AnyPath, index: ShardIndex) -> None:
        self.directory, self.index = any_path(directory), index
        self.meta = checked_meta(self.directory, index, "balance")

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [shards], kept samples per shard. Reads all masks. UserError when one is damaged."""
        return np.array([np.count_nonzero(self._mask(shard)) for shard in range(len(self.index.names))], np.int64)

    def _mask(self, shard: int) -> np.ndarray:
        path = self.directory / "keep" / f"{self.index.names[shard]}.npy"
        if isinstance(path, RemotePath):
            mask = parse_npy(path.read(BALANCE_AGAIN), str(path), BALANCE_AGAIN)
        else:
            mask = load_npy(path, BALANCE_AGAIN)
        if mask.dtype != np.bool_ or mask.shape != (int(self.index.sizes[shard]),):
            raise UserError(
                f"{path} is {mask.dtype} {mask.shape}, "
                f"expected bool ({int(self.index.sizes[shard])},) to match the shard: {BALANCE_AGAIN}"
            )
        return np.array(mask)  # a copy: a mapped file could be cut later

    def kept(self, shard: int) -> np.ndarray:
        """int64, kept rows of the tar, ascending."""
        return np.flatnonzero(self._mask(shard))
