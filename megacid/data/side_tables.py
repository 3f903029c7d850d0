"""Side tables of the shards: teacher embeddings, cluster labels, and which samples to keep.

Each is opened shard by shard when it is needed and joined BY KEY inside the shard: a global dictionary of 400 M
keys would cost gigabytes in every worker, and the order of rows in another file is not the order of the tar.
Shapes: m requested rows, d embedding width, l labels per sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacid.data.decode import BadSample
from megacid.data.index import ShardIndex
from megacid.data.lru import LRUCache
from megacid.data.memmap import gather_rows
from megacid.errors import UserError
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy

_OPEN_SHARDS = 64


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


def _again(path: Path) -> str:
    return f"run the tool that made {path.parents[1]} again"


def _check_present(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing although the stage is complete: {_again(path)}")


def _load_npy(path: Path) -> np.ndarray:
    """A read-only memory map."""
    _check_present(path)
    return load_npy(path, _again(path))


def _read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    _check_present(path)
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is not a readable parquet file ({said}): {_again(path)}") from None


def _keys(table: pa.Table, column: str, path: Path) -> list[str]:
    """A column of keys. UserError when it is missing or holds no strings: nothing would ever match."""
    kind = table.schema.field(column).type if column in table.column_names else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path} has the column {column} of type {kind}, expected strings: {_again(path)}")
    return list(table[column].to_pylist())


def _labels(table: pa.Table, column: str, keys: list[str], classes: int, path: Path) -> np.ndarray:
    """int64 [rows] of a column of labels: integers, -1 .. classes - 1. UserError names the sample otherwise."""
    values = table[column]
    if not pa.types.is_integer(values.type) or values.null_count:
        what = f"{values.null_count} nulls" if values.null_count else f"{values.type}"
        row = next((i for i, value in enumerate(values.to_pylist()) if not isinstance(value, int)), 0)
        named = f", the first one of sample {keys[row]}" if keys else ""
        raise UserError(f"{path} has the column {column} with {what}{named}, expected integers: {_again(path)}")
    found = values.to_numpy()
    outside = (
        np.flatnonzero((found < -1) | (found >= classes))
        if found.dtype != np.uint64
        else np.flatnonzero(found >= classes)
    )
    if outside.size:
        raise UserError(
            f"{path} holds labels {found.min()} .. {found.max()}, but -1 .. {classes - 1} is allowed by meta.json; the "
            f"first one outside is {column} {found[outside[0]]} of sample {keys[outside[0]]}: run tools/cluster.py again"
        )
    return found.astype(np.int64)


def _match(wanted: list[str], present: list[str], where: Path) -> np.ndarray:
    """int64 [len(wanted)]: row of each wanted key in `present`, -1 where there is none."""
    if wanted == present:
        return np.arange(len(wanted))
    row_of = {key: row for row, key in enumerate(present)}
    if len(row_of) != len(present):
        raise UserError(
            f"{where} names {len(present) - len(row_of)} keys twice, but keys must be unique in a shard: make it again"
        )
    return np.array([row_of.get(key, -1) for key in wanted], np.int64)


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
        image = _load_npy(self._image_files[number])
        text = _load_npy(self._text_files[number]) if self.has_text else None
        metadata = self._metadata_files.get(number, self.directory / "metadata" / f"metadata_{number:05d}.parquet")
        keys = _keys(_read_parquet(metadata, ["image_path"]), "image_path", metadata)
        files = (self._image_files[number], image), (self._text_files.get(number), text)
        for path, array in files:
            if array is not None and (array.shape != (len(keys), self.dim) or array.dtype.kind != "f"):
                raise UserError(
                    f"{path} has shape {array.shape} of {array.dtype}, "
                    f"but {(len(keys), self.dim)} of floating point fits its metadata: run tools/embed.py again"
                )
        return _TeacherShard(_match(self.index.table(shard).keys, keys, metadata), image, text)

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
        table = _read_parquet(path)
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
        keys = _keys(table, "key", path)
        at = _match(self.index.table(shard).keys, keys, path)
        stored = np.stack([_labels(table, name, keys, self.num_classes, path) for name in names], axis=1)
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
        mask = _load_npy(path)
        if mask.dtype != np.bool_ or mask.shape != (int(self.index.sizes[shard]),):
            raise UserError(
                f"{path} is {mask.dtype} {mask.shape}, "
                f"but bool ({int(self.index.sizes[shard])},) fits the shard: run tools/balance.py again"
            )
        return np.array(mask)  # all of it, so that nothing is mapped that may be cut

    def kept(self, shard: int) -> np.ndarray:
        """int64: rows of the tar that are kept, ascending."""
        return self._shards.get(shard, lambda: np.flatnonzero(self._mask(shard)))
