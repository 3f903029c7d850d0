"""Which training rows lie in which coarse cluster ("cell"), as files that every rank reads in slices.

Legend: n rows, C cells.

The rows are cut into parts whose size follows from n alone, so that any number of ranks can share them and go on with
what others have left. Of every part two arrays are kept: its rows in order of their cell, and where each cell begins.
"""

from __future__ import annotations

import math

import numpy as np

from megacid.offline.files import PartialResults

PARTS = 256  # at most
PART_TILES = 16  # at least, of all parts but the last: each is two files


class Cells:
    """The rows of each cell. `save` every part (on any rank), then `open` on every rank, then `members`.

    `.sizes`: int64 [C] rows of each cell, after `open`.
    """

    def __init__(self, partial: PartialResults, num_rows: int, count: int, tile: int) -> None:
        """tile: parts are whole tiles of so many rows, the last one excepted."""
        self.partial, self.num_rows, self.count = partial, num_rows, count
        self.part_rows = max(PART_TILES, math.ceil(num_rows / (PARTS * tile))) * tile
        self.parts = math.ceil(num_rows / self.part_rows)
        self.sizes = np.zeros(count, np.int64)
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def bounds(self, part: int) -> tuple[int, int]:
        """Rows [start, stop) of a part."""
        return part * self.part_rows, min((part + 1) * self.part_rows, self.num_rows)

    def load(self, part: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(rows by cell int32 [part], first place of each cell int64 [C + 1]); None when it is missing or not whole."""
        start, stop = self.bounds(part)
        order = self.partial.array(f"rows_{part:03d}", (stop - start,), "i")
        begins = self.partial.array(f"begins_{part:03d}", (self.count + 1,), "i")
        return None if order is None or begins is None else (order, begins)

    def save(self, part: int, label: np.ndarray) -> None:
        """label: integer [part], the cell of each row of the part. UserError when the disk does not take it."""
        order, begins = by_label(label, self.count)
        self.partial.save_array(f"rows_{part:03d}", order.astype(np.int32))
        self.partial.save_array(f"begins_{part:03d}", begins)

    def open(self) -> None:
        """Map all parts. RuntimeError when one is missing."""
        parts = [self.load(part) for part in range(self.parts)]
        missing = [part for part, found in enumerate(parts) if found is None]
        if missing:
            raise RuntimeError(f"parts {missing} of {self.parts} are missing in {self.partial.folder}")
        self._parts = [found for found in parts if found is not None]
        self.sizes = np.sum([np.diff(begins) for _, begins in self._parts], axis=0, dtype=np.int64)

    def members(self, cell: int) -> np.ndarray:
        """Numbers of the rows of a cell, int64, ascending."""
        found = [
            global_rows(part, self.part_rows, order[int(begins[cell]) : int(begins[cell + 1])])
            for part, (order, begins) in enumerate(self._parts)
        ]
        return np.concatenate(found)


def by_label(label: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(things in order of their label int64 [m], of one label ascending; first place of each label int64 [count + 1])."""
    order = np.argsort(label, kind="stable")
    begins = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(label, minlength=count), out=begins[1:])
    return order, begins


def global_rows(part: int, part_rows: int, inside: np.ndarray) -> np.ndarray:
    """Numbers among all rows, int64: `inside` is int32 on disk, the sum may lie above 2^31."""
    return inside.astype(np.int64) + np.int64(part) * np.int64(part_rows)


def budgets(sizes: np.ndarray, k: int) -> np.ndarray:
    """How many of k centroids each cell gets, int64 [C]: its share by size (largest remainder), at least 1 unless it is
    empty, never more than its rows, k together.

    sizes: int64 [C]. ValueError unless filled cells <= k <= rows.
    """
    # Python's integers: rows times k is above 2^63 for data that is not out of reach.
    size, total = [int(s) for s in sizes], int(sizes.sum())
    filled = [c for c, s in enumerate(size) if s]
    if not len(filled) <= k <= total:
        raise ValueError(f"k is {k}, wanted {len(filled)} filled cells to {total} rows")
    # k <= total, so the exact share is at most the size, and rounding it up is as well.
    given = [max(1, k * s // total) if s else 0 for s in size]
    owed = [k * size[c] - given[c] * total for c in range(len(size))]  # exact share minus given, in 1/total
    left = k - sum(given)
    for cell in sorted(filled, key=lambda c: (-owed[c], c))[: max(left, 0)]:
        given[cell] += 1
    while left < 0:  # small cells took more than their share: those that have most above theirs give back
        cell = min((c for c in filled if given[c] > 1), key=lambda c: (owed[c], c))
        given[cell], owed[cell], left = given[cell] - 1, owed[cell] + total, left + 1
    return np.array(given, np.int64)


def deal(work: np.ndarray, world: int) -> np.ndarray:
    """The rank that does each thing, int64: largest first, each to the rank with the least so far."""
    load: list[float] = [0] * world
    rank_of = np.zeros(len(work), np.int64)
    for thing in np.argsort(-work, kind="stable").tolist():
        least = min(range(world), key=lambda r: (load[r], r))
        rank_of[thing] = least
        load[least] += work[thing].item()
    return rank_of
