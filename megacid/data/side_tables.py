"""Side tables of the shards: teacher embeddings, cluster labels, and which samples to keep.

Each is opened shard by shard when it is needed and joined BY KEY inside the shard: a global dictionary of 400 M
keys would cost gigabytes in every worker, and the order of rows in another file is not the order of the tar.
Shapes: m requested rows, d embedding width, l labels per sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megacid.data.decode import BadSample
from megacid.data.index import ShardIndex
from megacid.data.lru import LRUCache
from megacid.data.memmap import gather_rows
from megacid.errors import UserError
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy
from megacid.storage.parquet import join_by_key, key_column, label_column, read_parquet

_OPEN_SHARDS = 64
_EMBED_AGAIN, _CLUSTER_AGAIN, _BALANCE_AGAIN = (
    f"run tools/{tool}.py again" for tool in ("embed", "cluster", "balance")
)


def _checked_meta(directory: str | Path, index: ShardIndex, made_by: str) -> dict[str, Any]:
    """meta.json of a stage, after checking that the stage was made from these shards, or from those they are a copy of."""
    meta = read_meta(directory, expect=made_by)
    # What was kept has the tar names and keys it had, so that embeddings and labels still join; masks of rows do not.
    fitting = [index.digest] if made_by == "balance" else [index.digest, _copied_from(index)]
    if meta.get("shards_digest") not in fitting:
        raise UserError(
            f"{directory} was made from other shards (digest {str(meta.get('shards_digest'))[:12]}) than {index.root} "
            f"(digest {index.digest[:12]}): run tools/{made_by}.py again for these shards"
        )
    return meta


def _copied_from(index: ShardIndex) -> str:
    """Digest of the shards whose kept samples `tools/balance.py --reshard` copied to these; their own for any others."""
    if (index.root / "meta.json").is_file():
        meta = read_meta(index.root)
        if meta.get("made_by") == "reshard" and meta.get("digest") == index.digest:
            return str(meta.get("shards_digest"))
    return index.digest


def _fact(meta: dict[str, Any], directory: Path, name: str) -> int:
    """A number of meta.json, at least 1."""
    value = meta.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise UserError(
            f"{directory}/meta.json has {name} {str(value)[:40]!r}, expected a whole number above 0: make {directory} again"
        )
    return value


class _TeacherShard(NamedTuple):
    row_of: np.ndarray  # int64 [n]: row in the partition of each sample of the tar, -1 for none
    image: np.ndarray  # float16 [rows, d], memory-mapped
    text: np.ndarray | None


class TeacherTable:
    """Teacher embeddings of `tools/embed.py`: float16, L2-normalised.

    `.dim` is their width d; `.has_text` says whether texts were embedded.
    """

    def __init__(self, directory: str | Path, index: ShardIndex) -> None:
        self.directory, self.index = Path(directory), index
        self.meta = _checked_meta(directory, index, "embed")
        self.dim = _fact(self.meta, self.directory, "dim")
        self.has_text = (self.directory / "text_emb").is_dir()
        # Numbers are padded to different widths by different writers of this layout, so files are found by number.
        self._image_files = _by_number(self.directory / "img_emb", "img_emb_*.npy")
        self._text_files = _by_number(self.directory / "text_emb", "text_emb_*.npy")
        self._metadata_files = _by_number(self.directory / "metadata", "metadata_*.parquet")
        self._partitions = self._checked_partitions()
        self._empty = frozenset(self.meta.get("empty", ()))  # tars of which nothing could be embedded: without files
        needed = [self._image_files] + [self._text_files] * self.has_text
        missing = [
            name
            for name in index.names
            if name not in self._empty and any(self._partitions.get(name) not in files for files in needed)
        ]
        if missing:
            raise UserError(
                f"{directory} has no embeddings of {len(missing)} shards ({', '.join(missing[:5])}): "
                "run tools/embed.py again"
            )
        self._shards: LRUCache[_TeacherShard] = LRUCache(_OPEN_SHARDS)

    def _checked_partitions(self) -> dict[str, int]:
        found = self.meta.get("partitions")
        if not isinstance(found, dict) or not all(isinstance(number, int) for number in found.values()):
            raise UserError(
                f"{self.directory}/meta.json has partitions {str(found)[:40]!r}, expected a number for every shard: "
                "run tools/embed.py again"
            )
        return found

    def _open(self, shard: int) -> _TeacherShard:
        if self.index.names[shard] in self._empty:
            none = np.empty((0, self.dim), np.float16)
            return _TeacherShard(np.full(int(self.index.sizes[shard]), -1), none, none if self.has_text else None)
        number = self._partitions[self.index.names[shard]]
        image = load_npy(self._image_files[number], _EMBED_AGAIN)
        text = load_npy(self._text_files[number], _EMBED_AGAIN) if self.has_text else None
        metadata = self._metadata_files.get(number, self.directory / "metadata" / f"metadata_{number:05d}.parquet")
        keys = key_column(read_parquet(metadata, _EMBED_AGAIN, ["image_path"]), "image_path", metadata, _EMBED_AGAIN)
        files = (self._image_files[number], image), (self._text_files.get(number), text)
        for path, array in files:
            if array is not None and (array.shape != (len(keys), self.dim) or array.dtype.kind != "f"):
                raise UserError(
                    f"{path} has shape {array.shape} of {array.dtype}, "
                    f"but {(len(keys), self.dim)} of floating point fits its metadata: run tools/embed.py again"
                )
        row_of = join_by_key(self.index.table(shard).keys, keys, metadata, _EMBED_AGAIN)
        return _TeacherShard(row_of, image, text)

    def has(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """bool [m]: which rows of the tar have an embedding."""
        return self._shards.get(shard, lambda: self._open(shard)).row_of[rows] >= 0

    def rows(self, shard: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(image, text) embeddings of rows of the tar, float16 [m, d] each; text is None when no texts were embedded.

        Raises BadSample for a row without an embedding (`has` tells), OSError when the file was cut since it was opened.
        """
        opened = self._shards.get(shard, lambda: self._open(shard))
        at = opened.row_of[rows]
        if (at < 0).any():
            row = int(np.asarray(rows)[at < 0][0])
            raise BadSample(
                self.index.names[shard], self.index.table(shard).keys[row], f"no teacher embedding in {self.directory}"
            )
        return gather_rows(opened.image, at), None if opened.text is None else gather_rows(opened.text, at)


def _by_number(folder: Path, pattern: str) -> dict[int, Path]:
    stem = pattern.partition("*")[0]
    found = {}
    for path in folder.glob(pattern) if folder.is_dir() else ():
        digits = path.name[len(stem) :].partition(".")[0]
        if digits.isdigit():
            found[int(digits)] = path
    return found


class LabelTable:
    """Cluster labels of `tools/cluster.py`. `.num_classes`; `.labels_per_sample` is l.

    labels_per_sample: use so many of the nearest clusters; None: all that were written. UserError when there are fewer.
    """

    def __init__(self, directory: str | Path, index: ShardIndex, labels_per_sample: int | None = None) -> None:
        self.directory, self.index = Path(directory), index
        self.meta = _checked_meta(directory, index, "cluster")
        self.num_classes = _fact(self.meta, self.directory, "k")
        self._shards: LRUCache[np.ndarray] = LRUCache(_OPEN_SHARDS)
        self._wanted = labels_per_sample
        # All shards as the first one, when nothing was asked for.
        self._wanted = self.labels_per_sample = self._labels(0).shape[1]

    def _open(self, shard: int) -> np.ndarray:
        path = self.directory / "labels" / f"{self.index.names[shard]}.parquet"
        table = read_parquet(path, _CLUSTER_AGAIN)
        names = [name for name in table.column_names if name == "label" or name.removeprefix("label_").isdigit()]
        if "key" not in table.column_names or "label" not in names:
            raise UserError(
                f"{path} has the columns {table.column_names}, but `key` and `label` are needed: "
                "run tools/cluster.py again"
            )
        names.sort(key=lambda name: int(name.removeprefix("label_")) if name != "label" else 0)
        if self._wanted is not None and len(names) < self._wanted:
            raise UserError(
                f"{path} has {len(names)} labels per sample, expected {self._wanted}: "
                f"run tools/cluster.py with --top-labels {self._wanted}, or use fewer"
            )
        names = names[: self._wanted]
        keys = key_column(table, "key", path, _CLUSTER_AGAIN)
        at = join_by_key(self.index.table(shard).keys, keys, path, _CLUSTER_AGAIN)
        columns = [label_column(table, name, keys, self.num_classes, path, _CLUSTER_AGAIN) for name in names]
        stored = np.stack(columns, axis=1)
        labels = np.full((len(at), len(names)), -1, np.int64)
        labels[at >= 0] = stored[at[at >= 0]]
        return labels

    def _labels(self, shard: int) -> np.ndarray:
        return self._shards.get(shard, lambda: self._open(shard))

    def rows(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """int64 [m], or [m, l] when several labels per sample were written; -1 for none."""
        labels = self._labels(shard)[rows]
        return labels[:, 0] if labels.shape[1] == 1 else labels


class KeepTable:
    """Which samples the redundancy removal of `tools/balance.py` kept. `.counts`: int64 kept per shard."""

    def __init__(self, directory: str | Path, index: ShardIndex) -> None:
        self.directory, self.index = Path(directory), index
        self.meta = _checked_meta(directory, index, "balance")
        self._shards: LRUCache[np.ndarray] = LRUCache(_OPEN_SHARDS)
        self.counts = np.array([np.count_nonzero(self._mask(shard)) for shard in range(len(index.names))], np.int64)

    def _mask(self, shard: int) -> np.ndarray:
        path = self.directory / "keep" / f"{self.index.names[shard]}.npy"
        mask = load_npy(path, _BALANCE_AGAIN)
        if mask.dtype != np.bool_ or mask.shape != (int(self.index.sizes[shard]),):
            raise UserError(
                f"{path} is {mask.dtype} {mask.shape}, "
                f"but bool ({int(self.index.sizes[shard])},) fits the shard: run tools/balance.py again"
            )
        return np.array(mask)  # all of it, so that nothing is mapped that may be cut

    def kept(self, shard: int) -> np.ndarray:
        """int64: rows of the tar that are kept, ascending."""
        return self._shards.get(shard, lambda: np.flatnonzero(self._mask(shard)))
