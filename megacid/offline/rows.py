"""Rows of embeddings, as long as the disk is large: the partitions of an embedding folder read as one matrix.

Legend: n rows, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megacid.data.lru import LRUCache
from megacid.data.memmap import MappedRows
from megacid.errors import UserError
from megacid.offline.embed.partitions import PartitionFiles, partition_files
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy
from megacid.storage.parquet import key_column, parquet_shape, read_parquet

_OPEN_MAPS = 128
_LENGTH_SLACK = 0.02  # of a unit vector in float16; the widest rows are off by less than 0.002


def find_invalid_row(x_BD: np.ndarray, *, allow_zero: bool, unit: bool) -> tuple[int, str] | None:
    """(number, what is wrong with it) of the first row that holds NaN or infinity, is zero, or (unit) has not length 1.

    x_BD: fp32. None when all rows are as they should be.
    """
    if not x_BD.size:
        return None
    peak = np.abs(x_BD).max(axis=1)
    bad = ~np.isfinite(peak)
    if not allow_zero:
        bad |= peak == 0
    length = np.sqrt(np.einsum("bd,bd->b", x_BD, x_BD, dtype=np.float64)) if unit else peak
    if unit:
        bad |= ~(np.abs(length - 1) < _LENGTH_SLACK)
    if not bad.any():
        return None
    row = int(np.flatnonzero(bad)[0])
    if not np.isfinite(peak[row]):
        return row, "holds NaN or infinity"
    return row, "is zero" if peak[row] == 0 else f"has length {length[row]:.4g}"


class Rows(Protocol):
    """A matrix that is read in pieces."""

    num_rows: int
    dim: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as a floating array [stop - start, D]."""
        ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows of these numbers (int64 [m], any order), floating [m, D]."""
        ...

    def name(self, row: int) -> str:
        """Where a row lies, for error messages."""
        ...


class PartitionedRows(Rows, Protocol):
    """Rows that lie in several files. `starts`: int64 [partitions + 1] first row of each."""

    starts: np.ndarray


class ArrayRows:
    """Rows of one array (or memory map)."""

    def __init__(self, array: np.ndarray, label: str = "the array") -> None:
        self.array, self.label = array, label
        self.num_rows, self.dim = array.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.array[start:stop])

    def take(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.array[rows])

    def name(self, row: int) -> str:
        return f"row {row} of {self.label}"


class SubsetRows:
    """Chosen rows of another matrix (`chosen`: int64, ascending), for training on a sample."""

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        self.rows, self.chosen = rows, chosen
        self.num_rows, self.dim = len(chosen), rows.dim

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.rows.take(self.chosen[start:stop])

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.rows.take(self.chosen[rows])

    def name(self, row: int) -> str:
        return self.rows.name(int(self.chosen[row]))


class _Maps(Sequence[np.ndarray]):
    """Arrays that are mapped when they are asked for, and kept a while. A map holds its file open, of which a process may
    have 1,024 (and 65,530 maps); the images and texts of LAION400M are 82,816 files."""

    def __init__(self, count: int, map_one: Callable[[int], np.ndarray]) -> None:
        self._count, self._map_one = count, map_one
        self._open: LRUCache[np.ndarray] = LRUCache(_OPEN_MAPS)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, partition: Any) -> Any:
        if not 0 <= partition < self._count:
            raise IndexError(partition)
        return self._open.get(partition, lambda: self._map_one(partition))


class EmbeddingRows(MappedRows):
    """One modality ("img" or "text") of a folder written by `tools/embed.py`, partitions in order of their number.

    `.meta`: its meta.json; `.stems`: tar stem of each partition; `.starts`: int64 [partitions + 1] first row of each,
    `.rows_of`: int64 [partitions] rows of each. Arrays are memory-mapped: nothing is read before it is asked for.
    UserError for a missing or torn partition.
    """

    def __init__(self, directory: str | Path, modality: str = "img") -> None:
        self.directory, self.modality = Path(directory), modality
        self.meta = read_meta(directory, expect="embed")
        dim = int(self.meta["dim"])
        numbers: dict[str, int] = self.meta["partitions"]
        self.stems = sorted(numbers, key=lambda stem: numbers[stem])
        self.numbers = [numbers[stem] for stem in self.stems]
        self._empty = set(self.meta.get("empty", ()))  # tars of which nothing could be embedded: they have no files
        self._check_present()
        super().__init__(_Maps(len(self.stems), lambda partition: self._map(partition, dim)), dim)
        self.rows_of = np.diff(self.starts)
        for partition, stem in enumerate(self.stems):
            if stem not in self._empty:
                self._check_keys(self.numbers[partition], int(self.rows_of[partition]))
        if self.num_rows != int(self.meta["num_samples"]):
            raise UserError(
                f"{self.directory} holds {self.num_rows} rows, its meta.json says {self.meta['num_samples']}: run tools/embed.py again"
            )

    def _check_present(self) -> None:
        """One sentence for all that is missing, from two listings: there may be a hundred thousand partitions."""
        for place in ("image" if self.modality == "img" else "text", "metadata"):
            paths = {stem: getattr(self._files(number), place) for stem, number in zip(self.stems, self.numbers)}
            folder = next(iter(paths.values())).parent
            present = set(os.listdir(folder)) if folder.is_dir() else set()
            missing = [stem for stem, path in paths.items() if path.name not in present and stem not in self._empty]
            if missing:
                raise UserError(
                    f"{folder} lacks {len(missing)} of {len(paths)} partitions, those of the shards {', '.join(missing[:5])}"
                    f"{' ...' if len(missing) > 5 else ''}: run tools/embed.py again, it redoes what is missing"
                )

    def _check_keys(self, number: int, rows: int) -> None:
        """Before hours of work, not after: only the footer of the file is read."""
        path = self._metadata_path(number)
        have, _ = parquet_shape(path, "run tools/embed.py again, it redoes what is missing")
        if have != rows:
            raise UserError(
                f"{path} has {have} rows, {self._path(number)} has {rows}: run tools/embed.py again, it redoes what does not fit"
            )

    def _files(self, number: int) -> PartitionFiles:
        return partition_files(self.directory, number, len(self.numbers))

    def _metadata_path(self, number: int) -> Path:
        return self._files(number).metadata

    def _path(self, number: int) -> Path:
        files = self._files(number)
        return files.image if self.modality == "img" else files.text

    def _map(self, partition: int, dim: int) -> np.ndarray:
        if self.stems[partition] in self._empty:
            return np.empty((0, dim), np.float16)
        path = self._path(self.numbers[partition])
        array = load_npy(path, "run tools/embed.py again, it redoes what is missing")
        if array.ndim != 2 or array.shape[1] != dim or array.dtype.kind != "f":
            raise UserError(
                f"{path} is {array.dtype} of shape {array.shape}, expected floating point and (n, {dim}), the width in "
                "meta.json: run tools/embed.py again, it redoes what does not fit"
            )
        return array

    def keys(self, partition: int) -> list[str]:
        """The keys of one partition, in row order."""
        if self.stems[partition] in self._empty:
            return []
        path = self._metadata_path(self.numbers[partition])
        remedy = "run tools/embed.py again"
        keys = key_column(read_parquet(path, remedy, ["image_path"]), "image_path", path, remedy)
        if len(keys) != self.rows_of[partition]:
            raise UserError(
                f"{path} has {len(keys)} rows, its embeddings have {self.rows_of[partition]}: run tools/embed.py again"
            )
        return keys

    def name(self, row: int) -> str:
        partition, inside = self.partition_of(row)
        return f"row {inside} of {self._path(self.numbers[partition])} (shard {self.stems[partition]})"
