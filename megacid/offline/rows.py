"""Rows of embeddings, as long as the disk is large: the partitions of an embedding folder read as one matrix.

Legend: n rows, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacid.checkpoint.store import read_meta
from megacid.data.arrays import load_npy
from megacid.data.mapped import MappedRows
from megacid.errors import UserError

_LENGTH_SLACK = 0.02  # of a unit vector in float16; the widest rows are off by less than 0.002


def odd_row(x_BD: np.ndarray, *, zero_is_odd: bool, unit: bool) -> tuple[int, str] | None:
    """(number, what is wrong with it) of the first row that holds NaN or infinity, is zero, or (unit) has not length 1.

    x_BD: fp32. None when all rows are as they should be.
    """
    if not x_BD.size:
        return None
    peak = np.abs(x_BD).max(axis=1)
    bad = ~np.isfinite(peak)
    if zero_is_odd:
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


class EmbeddingRows(MappedRows):
    """One modality ("img" or "text") of a folder written by `tools/embed.py`, partitions in order of their number.

    `.meta`: its meta.json; `.stems`: tar stem of each partition; `.starts`: int64 [partitions + 1] first row of each.
    Arrays are memory-mapped: nothing is read before it is asked for. UserError for a missing or torn partition.
    """

    def __init__(self, directory: str | Path, modality: str = "img") -> None:
        self.directory, self.modality = Path(directory), modality
        self.meta = read_meta(directory, expect="embed")
        dim = int(self.meta["dim"])
        numbers: dict[str, int] = self.meta["partitions"]
        self.stems = sorted(numbers, key=lambda stem: numbers[stem])
        self.numbers = [numbers[stem] for stem in self.stems]
        super().__init__([self._map(number, dim) for number in self.numbers], dim)
        for number, array in zip(self.numbers, self.maps):
            self._check_keys(number, len(array))
        if self.num_rows != int(self.meta["num_samples"]):
            raise UserError(
                f"{self.directory} holds {self.num_rows} rows, its meta.json says {self.meta['num_samples']}: run tools/embed.py again"
            )

    def _check_keys(self, number: int, rows: int) -> None:
        """Before hours of work, not after: only the footer of the file is read."""
        path = self._metadata_path(number)
        try:
            have = pq.read_metadata(path).num_rows
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{path} cannot be read ({error}): run tools/embed.py again, it redoes what is missing"
            ) from None
        if have != rows:
            raise UserError(
                f"{path} has {have} rows, {self._path(number)} has {rows}: run tools/embed.py again, it redoes what does not fit"
            )

    def _metadata_path(self, number: int) -> Path:
        return self.directory / "metadata" / f"metadata_{number:05d}.parquet"

    def _path(self, number: int) -> Path:
        return self.directory / f"{self.modality}_emb" / f"{self.modality}_emb_{number:05d}.npy"

    def _map(self, number: int, dim: int) -> np.ndarray:
        path = self._path(number)
        array = load_npy(path, "run tools/embed.py again, it redoes what is missing")
        if array.ndim != 2 or array.shape[1] != dim or array.dtype.kind != "f":
            raise UserError(
                f"{path} is {array.dtype} of shape {array.shape}, wanted floating point and (n, {dim}), the width in "
                f"meta.json: run tools/embed.py again with another --out"
            )
        return array

    def keys(self, partition: int) -> list[str]:
        """The keys of one partition, in row order."""
        path = self._metadata_path(self.numbers[partition])
        try:
            keys: list[str] = pq.read_table(path, columns=["image_path"])["image_path"].to_pylist()
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read ({error}): run tools/embed.py again") from None
        if len(keys) != len(self.maps[partition]):
            raise UserError(
                f"{path} has {len(keys)} rows, its embeddings have {len(self.maps[partition])}: run tools/embed.py again"
            )
        return keys

    def name(self, row: int) -> str:
        partition, inside = self.partition_of(row)
        return f"row {inside} of {self._path(self.numbers[partition])} (shard {self.stems[partition]})"
