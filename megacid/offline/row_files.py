"""Rows in binary files, read with few system calls: files stay open, and rows near each other are one read.

Legend: n rows, D width, m requested rows.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import numpy as np

from megacid.data.lru import LRUCache, open_file_budget
from megacid.errors import UserError

_READ_BYTES = 1 << 22  # of one read of chosen rows, at most: those that are not consecutive are copied once more


class RowFiles:
    """Consecutive rows in several files of one width, as one matrix.

    Read calls instead of memory maps: touching a mapped page behind the end of a truncated file would kill the process,
    and a map of a file takes thousands of times as long as reading a row of it.

    Attributes:
        starts: First row of each file, int64 [files + 1].
    """

    def __init__(
        self,
        paths: Sequence[str],
        rows_of: Sequence[int],
        offsets: Sequence[int],
        dtypes: Sequence[np.dtype],
        dim: int,
        remedy: str,
        gap_bytes: int,
    ) -> None:
        """
        Args:
            paths, rows_of, offsets, dtypes: Of every file: path, number of rows, byte of the first row, and dtype.
            remedy: End of the message when a file cannot be read.
            gap_bytes: Rows that are not needed are read when they are fewer than this between two that are.
        """
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(rows_of, np.int64))]).astype(np.int64)
        self.num_rows, self.dim = int(self.starts[-1]), dim
        self.dtype = np.result_type(*set(dtypes)) if len(dtypes) else np.dtype(np.float16)
        self._paths, self._offsets, self._dtypes, self._remedy = paths, offsets, dtypes, remedy
        self._open: LRUCache[int] = LRUCache(open_file_budget(max(len(paths), 1)), os.close)
        weakref.finalize(self, self._open.clear)
        row_bytes = max(dim * self.dtype.itemsize, 1)
        self._gap, self._most = gap_bytes // row_bytes + 1, max(_READ_BYTES // row_bytes, 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), floating point [stop - start, D]. Raises UserError when a file has become shorter."""
        stop = min(stop, self.num_rows)
        out = np.empty((max(stop - start, 0), self.dim), self.dtype)
        file, at = int(np.searchsorted(self.starts, start, side="right")) - 1, start
        while at < stop:
            end = min(stop, int(self.starts[file + 1]))
            if end > at:
                self._read(file, at - int(self.starts[file]), out[at - start : end - start])
            file, at = file + 1, end
        return out

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The given rows (int64 [m], any order), floating point [m, D]. Raises as `read`."""
        out = np.empty((len(rows), self.dim), self.dtype)
        if not len(rows):
            return out
        step = np.diff(rows)
        order = None if (step >= 0).all() else np.argsort(rows, kind="stable")
        if order is not None:
            rows = rows[order]
            step = np.diff(rows)
        file = np.searchsorted(self.starts, rows, side="right") - 1
        inside = rows - self.starts[file]
        cut = (step > self._gap) | (np.diff(file) != 0) | (np.diff(rows // self._most) != 0)
        bounds = np.concatenate([[0], np.flatnonzero(cut) + 1, [len(rows)]])
        lows, highs = bounds[:-1], bounds[1:]
        gaps = np.concatenate([[0], np.cumsum(step != 1)])
        direct = (highs - lows == 1) | ((gaps[highs - 1] == gaps[lows]) & (order is None))
        spans = (lows, highs, file[lows], inside[lows], inside[highs - 1], direct)
        for low, high, number, first, last, is_direct in zip(*(values.tolist() for values in spans)):
            at = low if order is None else int(order[low])
            if is_direct:
                self._read(number, first, out[at : at + high - low])
                continue
            block = np.empty((last - first + 1, self.dim), self.dtype)
            self._read(number, first, block)
            out[slice(low, high) if order is None else order[low:high]] = block[inside[low:high] - first]
        return out

    def _read(self, file: int, first: int, out: np.ndarray) -> None:
        """Fill `out` [rows, D], contiguous, with the rows of a file from `first` on."""
        dtype = self._dtypes[file]
        into = out if dtype == self.dtype else np.empty(out.shape, dtype)
        view = into.reshape(-1).view(np.uint8).data
        at = self._offsets[file] + first * self.dim * dtype.itemsize
        try:
            descriptor = self._open.get(file, lambda: os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC))
            while len(view):
                count = os.preadv(descriptor, [view], at)
                if not count:
                    raise OSError(f"it ends before row {first + len(out)}")
                view, at = view[count:], at + count
        except OSError as error:
            raise UserError(f"{self._paths[file]} cannot be read ({error}): {self._remedy}") from None
        if into is not out:
            out[:] = into
