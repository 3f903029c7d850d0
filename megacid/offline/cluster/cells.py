"""Which training rows lie in which coarse cluster ("cell"), as files that every rank reads in slices.

Legend: n rows, C cells.

The rows are cut into parts whose size follows from n alone, so that any number of ranks can share them and go on with
what others have left. Of every part two arrays are kept: its rows in order of their cell, and where each cell begins.
"""

from __future__ import annotations

import math

import numpy as np

from megacid.storage.stage_directory import PartialResults

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


def budgets(left: list[np.ndarray], k: int) -> np.ndarray:
    """How many of k centroids each cell gets, int64 [C], k together: each goes where it takes away most summed error.

    left: float64 [m] of each cell, the summed error with 1, 2, ... m centroids; empty for an empty cell, which gets none.
    Every other one gets at least 1. ValueError unless filled cells <= k <= all m together.
    """
    filled = sum(len(curve) > 0 for curve in left)
    if not filled <= k <= sum(map(len, left)):
        raise ValueError(f"k is {k}, expected {filled} filled cells to {sum(map(len, left))} centroids")
    gains = [_falling(curve[:-1] - curve[1:]) for curve in left]
    cell = np.repeat(np.arange(len(left)), [len(gain) for gain in gains])
    best = np.argsort(-np.concatenate([*gains, np.empty(0)]), kind="stable")[: k - filled]
    given = np.bincount(cell[best], minlength=len(left)) + np.array([len(curve) > 0 for curve in left])
    return given.astype(np.int64)


def _falling(gain: np.ndarray) -> np.ndarray:
    """float64 [m]: the gains with rises averaged away (pool adjacent violators): a large one may come after a small one
    that was drawn badly, and both have to be taken for it."""
    pools: list[tuple[float, int]] = []
    for value in gain.tolist():
        total, count = value, 1
        while pools and pools[-1][0] * count <= total * pools[-1][1]:
            more, others = pools.pop()
            total, count = total + more, count + others
        pools.append((total, count))
    return np.repeat([total / count for total, count in pools], [count for _, count in pools]).astype(np.float64)


def deal(work: np.ndarray, world: int) -> np.ndarray:
    """The rank that does each thing, int64: largest first, each to the rank with the least so far."""
    load: list[float] = [0] * world
    rank_of = np.zeros(len(work), np.int64)
    for thing in np.argsort(-work, kind="stable").tolist():
        least = min(range(world), key=lambda r: (load[r], r))
        rank_of[thing] = least
        load[least] += work[thing].item()
    return rank_of
