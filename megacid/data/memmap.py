"""Access to several memory-mapped arrays as one matrix. Shapes: n rows, m requested rows, D width."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np


class MappedRows:
    """Partitions [n_i, D] concatenated along the rows; rows are read on demand.

    Attributes:
        maps: the partitions.
        starts: int64 [partitions + 1], first row of each.
        num_rows, dim: the shape of the matrix.
    """

    def __init__(self, maps: Sequence[np.ndarray], dim: int) -> None:
        self.maps, self.dim = maps, dim
        self.starts = np.concatenate([[0], np.cumsum([len(array) for array in maps])]).astype(np.int64)
        self.num_rows = int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), in the dtype of the files."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        for partition in range(first, len(self.maps)):
            low = int(self.starts[partition])
            if low >= stop:
                break
            parts.append(self.maps[partition][max(start - low, 0) : stop - low])
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float16)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows (int64 [m], any order) as [m, D]."""
        return take_rows(self.maps, self.starts, rows)

    def partition_of(self, row: int) -> tuple[int, int]:
        """(partition, row inside it)."""
        partition = int(np.searchsorted(self.starts, row, side="right")) - 1
        return partition, row - int(self.starts[partition])


def take_rows(maps: Sequence[np.ndarray], starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows (int64 [m], any order) of the concatenated arrays `maps`; starts: int64 [len(maps) + 1]."""
    out = np.empty((len(rows), *maps[0].shape[1:]), maps[0].dtype)
    # Ascending order turns random access into one pass through the files.
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    bounds = np.searchsorted(ascending, starts)
    for partition in np.flatnonzero(np.diff(bounds)).tolist():
        low, high = bounds[partition], bounds[partition + 1]
        out[order[low:high]] = gather_rows(maps[partition], ascending[low:high] - starts[partition])
    return out


def gather_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """array[rows] (rows: int64 [m], not negative); a mapped file is read through read calls.

    A page fault maps sixteen pages for one row of a few hundred bytes: reading single rows of a large file would make
    all of it resident and look like a leak. Touching a page behind the end of a truncated file would kill the process.

    Raises:
        OSError: the file was cut after it was opened.
    """
    if not (isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and array.flags.c_contiguous):
        return np.asarray(array[rows])
    out = np.empty((len(rows), *array.shape[1:]), array.dtype)
    size = out[:1].nbytes
    view = memoryview(out).cast("B")
    file = os.open(str(array.filename), os.O_RDONLY)
    try:
        for place, row in enumerate(rows.tolist()):
            if os.preadv(file, [view[place * size : (place + 1) * size]], array.offset + row * size) != size:
                raise OSError(f"{array.filename} ends before row {row}: it was cut off after it was opened")
    finally:
        os.close(file)
    return out
