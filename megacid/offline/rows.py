"""Out-of-core access to an embedding folder as one matrix of rows.

Legend: n rows, D width, B rows of a block.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np

from megacid.errors import UserError
from megacid.offline.embed.partitions import PartitionFiles, partition_files
from megacid.offline.row_files import RowFiles
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy
from megacid.storage.parquet import key_column, parquet_shape, read_parquet

_REMEDY = "run tools/embed.py again, it embeds only what is missing or damaged"
_GAP_BYTES = 1 << 15  # from the page cache these take about as long as another call
LENGTH_TOLERANCE = 0.02  # of a float16 unit vector; the widest rows deviate by less than 0.002


def find_invalid_row(x_BD: np.ndarray, *, allow_zero: bool, unit: bool) -> tuple[int, str] | None:
    """(index, problem) of the first invalid row of x_BD (fp32); None when all rows are valid.

    Args:
        allow_zero: Accept zero rows.
        unit: Require rows of length 1.
    """
    if not x_BD.size:
        return None
    peak = np.abs(x_BD).max(axis=1)
    bad = ~np.isfinite(peak)
    if not allow_zero:
        bad |= peak == 0
    length = np.sqrt(np.einsum("bd,bd->b", x_BD, x_BD, dtype=np.float64)) if unit else peak
    if unit:
        bad |= ~(np.abs(length - 1) < LENGTH_TOLERANCE)
    if not bad.any():
        return None
    row = int(np.flatnonzero(bad)[0])
    if not np.isfinite(peak[row]):
        return row, "holds NaN or infinity"
    return row, "is zero" if peak[row] == 0 else f"has length {length[row]:.4g}"


class Rows(Protocol):
    """A matrix that is read in blocks."""

    num_rows: int
    dim: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), floating point [stop - start, D]."""
        ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The given rows (int64 [m], any order), floating point [m, D]."""
        ...

    def name(self, row: int) -> str:
        """The file and place of a row, for error messages."""
        ...


class PartitionedRows(Rows, Protocol):
    """Rows in several files. `starts`: first row of each partition, int64 [partitions + 1]."""

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
    """A subset of the rows of another matrix. chosen: int64, ascending."""

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        self.rows, self.chosen = rows, chosen
        self.num_rows, self.dim = len(chosen), rows.dim

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.rows.take(self.chosen[start:stop])

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.rows.take(self.chosen[rows])

    def name(self, row: int) -> str:
        return self.rows.name(int(self.chosen[row]))


class EmbeddingRows(RowFiles):
    """One modality ("img" or "text") of a folder written by `tools/embed.py`, partitions in order of their number.

    Attributes:
        meta: Content of its meta.json.
        stems: Tar stem of each partition.
        starts: First row of each partition, int64 [partitions + 1].
        rows_of: Number of rows of each partition, int64 [partitions].

    Raises:
        UserError: A partition is missing or damaged.
    """

    def __init__(self, directory: str | Path, modality: str = "img") -> None:
        self.directory, self.modality = Path(directory), modality
        self.meta = read_meta(directory, expect="embed")
        dim = int(self.meta["dim"])
        numbers: dict[str, int] = self.meta["partitions"]
        self.stems = sorted(numbers, key=lambda stem: numbers[stem])
        self.numbers = [numbers[stem] for stem in self.stems]
        self._empty = set(self.meta.get("empty", ()))  # tars without any embedded sample have no files
        self._check_present()
        headers = [self._header(partition, dim) for partition in range(len(self.stems))]
        rows_of, offsets, dtypes = zip(*headers)
        paths = [str(self._path(number)) for number in self.numbers]
        super().__init__(paths, rows_of, offsets, dtypes, dim, _REMEDY, _GAP_BYTES)
        self.rows_of = np.diff(self.starts)
        for partition, stem in enumerate(self.stems):
            if stem not in self._empty:
                self._check_keys(self.numbers[partition], int(self.rows_of[partition]))
        if self.num_rows != int(self.meta["num_samples"]):
            raise UserError(
                f"{self.directory} has {self.num_rows} rows, expected {self.meta['num_samples']} as in its meta.json: "
                f"{_REMEDY}"
            )

    def _check_present(self) -> None:
        """One error for all missing files, from two directory listings: there may be a hundred thousand partitions."""
        for kind in ("image" if self.modality == "img" else "text", "metadata"):
            paths = {stem: getattr(self._files(number), kind) for stem, number in zip(self.stems, self.numbers)}
            folder = next(iter(paths.values())).parent
            present = set(os.listdir(folder)) if folder.is_dir() else set()
            missing = [stem for stem, path in paths.items() if path.name not in present and stem not in self._empty]
            if missing:
                raise UserError(
                    f"{folder} lacks {len(missing)} of {len(paths)} partitions, those of the shards "
                    f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}: {_REMEDY}"
                )

    def _check_keys(self, number: int, rows: int) -> None:
        """Check the number of keys before hours of work: reads only the footer of the file."""
        path = self._files(number).metadata
        keys, _ = parquet_shape(path, _REMEDY)
        if keys != rows:
            raise UserError(f"{path} has {keys} rows, expected {rows} as in {self._path(number)}: {_REMEDY}")

    def _files(self, number: int) -> PartitionFiles:
        return partition_files(self.directory, number, len(self.numbers))

    def _path(self, number: int) -> Path:
        files = self._files(number)
        return files.image if self.modality == "img" else files.text

    def _header(self, partition: int, dim: int) -> tuple[int, int, np.dtype]:
        """(rows, byte of the first row, dtype) of a partition."""
        if self.stems[partition] in self._empty:
            return 0, 0, np.dtype(np.float16)
        path = self._path(self.numbers[partition])
        array = load_npy(path, _REMEDY)
        fits = array.ndim == 2 and array.shape[1] == dim and array.dtype.kind == "f" and array.flags.c_contiguous
        if not (fits and isinstance(array, np.memmap)):
            raise UserError(
                f"{path} is {array.dtype} of shape {array.shape}, expected floating point and (n, {dim}) as in "
                f"meta.json, in C order: {_REMEDY}"
            )
        return len(array), array.offset, array.dtype

    def keys(self, partition: int) -> list[str]:
        """The keys of one partition, in row order."""
        if self.stems[partition] in self._empty:
            return []
        path = self._files(self.numbers[partition]).metadata
        keys = key_column(read_parquet(path, _REMEDY, ["image_path"]), "image_path", path, _REMEDY)
        if len(keys) != self.rows_of[partition]:
            raise UserError(
                f"{path} has {len(keys)} rows, expected {self.rows_of[partition]} as its embeddings: {_REMEDY}"
            )
        return keys

    def name(self, row: int) -> str:
        partition = int(np.searchsorted(self.starts, row, side="right")) - 1
        inside = row - int(self.starts[partition])
        return f"row {inside} of {self._path(self.numbers[partition])} (shard {self.stems[partition]})"
