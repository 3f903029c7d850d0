"""The rows of each coarse cluster ("cell") on disk, and how centroids and work are divided among cells and ranks.

Legend: n rows, C cells.

The rows are cut into parts whose size depends on n alone, so any number of ranks can divide them and continue what
others have left. Each part is stored as two arrays: its rows sorted by cell, and the first place of each cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from megacid.storage.stage_directory import PartialResults

MAX_PARTS = 256
MIN_PART_TILES = 16  # of every part but the last: a part is two files


class Cells:
    """The rows of each cell. `save` every part (on any rank), then `open` on every rank, then read `members`.

    Attributes:
        sizes: Number of rows of each cell, int64 [C]; valid after `open`.
    """

    def __init__(self, partial: PartialResults, num_rows: int, count: int, tile: int) -> None:
        """tile: every part but the last is a multiple of this many rows."""
        self.partial, self.num_rows, self.count = partial, num_rows, count
        self.part_rows = max(MIN_PART_TILES, math.ceil(num_rows / (MAX_PARTS * tile))) * tile
        self.parts = math.ceil(num_rows / self.part_rows)
        self.sizes = np.zeros(count, np.int64)
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def bounds(self, part: int) -> tuple[int, int]:
        """Rows [start, stop) of a part."""
        return part * self.part_rows, min((part + 1) * self.part_rows, self.num_rows)

    def load(self, part: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(rows sorted by cell int32 [part], first place of each cell int64 [C + 1]); None if missing or incomplete."""
        start, stop = self.bounds(part)
        order = self.partial.array(f"rows_{part:03d}", (stop - start,), "i")
        begins = self.partial.array(f"begins_{part:03d}", (self.count + 1,), "i")
        return None if order is None or begins is None else (order, begins)

    def save(self, part: int, label: np.ndarray) -> None:
        """Store the cell of each row of a part, an integer array. UserError when the disk is full."""
        order, begins = group_by_label(label, self.count)
        self.partial.save_array(f"rows_{part:03d}", order.astype(np.int32))
        self.partial.save_array(f"begins_{part:03d}", begins)

    def open(self) -> None:
        """Memory-map all parts. RuntimeError when one is missing."""
        parts = [self.load(part) for part in range(self.parts)]
        missing = [part for part, arrays in enumerate(parts) if arrays is None]
        if missing:
            raise RuntimeError(f"parts {missing} of {self.parts} are missing in {self.partial.folder}")
        self._parts = [arrays for arrays in parts if arrays is not None]
        self.sizes = np.sum([np.diff(begins) for _, begins in self._parts], axis=0, dtype=np.int64)

    def members(self, cell: int) -> np.ndarray:
        """Row numbers of a cell, int64, ascending."""
        members = [
            global_rows(part, self.part_rows, order[int(begins[cell]) : int(begins[cell + 1])])
            for part, (order, begins) in enumerate(self._parts)
        ]
        return np.concatenate(members)

    def places(self) -> Iterator[np.ndarray]:
        """The place of every row among all rows sorted by cell and number, int64, part by part; after `open`."""
        first_C = np.cumsum(self.sizes) - self.sizes  # of the rows of this part in each cell
        for order, begins in self._parts:
            count_C = np.diff(begins)
            place = np.empty(len(order), np.int64)
            place[order] = np.arange(len(order)) + np.repeat(first_C - begins[:-1], count_C)
            first_C = first_C + count_C
            yield place


def group_by_label(label: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices stably sorted by label int64 [m], first place of each label int64 [count + 1])."""
    order = np.argsort(label, kind="stable")
    begins = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(label, minlength=count), out=begins[1:])
    return order, begins


def global_rows(part: int, part_rows: int, inside: np.ndarray) -> np.ndarray:
    """Row numbers int64 of rows `inside` a part: int32 on disk, but the sum may exceed 2^31."""
    return inside.astype(np.int64) + np.int64(part) * np.int64(part_rows)


def centroid_budgets(errors: list[np.ndarray], k: int) -> np.ndarray:
    """Divide k centroids among the cells: each goes where it reduces the summed error most.

    Args:
        errors: For each cell float64 [m], its summed error with 1, 2, ... m centroids; empty for an empty cell.

    Returns:
        int64 [C] with sum k; 0 for an empty cell, at least 1 for every other.

    Raises:
        ValueError: Not (filled cells <= k <= sum of all m).
    """
    filled = sum(len(curve) > 0 for curve in errors)
    if not filled <= k <= sum(map(len, errors)):
        raise ValueError(f"k is {k}, expected {filled} (filled cells) to {sum(map(len, errors))} (centroids)")
    gains = [_non_increasing(curve[:-1] - curve[1:]) for curve in errors]
    cell = np.repeat(np.arange(len(errors)), [len(gain) for gain in gains])
    best = np.argsort(-np.concatenate([*gains, np.empty(0)]), kind="stable")[: k - filled]
    budget = np.bincount(cell[best], minlength=len(errors)) + np.array([len(curve) > 0 for curve in errors])
    return budget.astype(np.int64)


def _non_increasing(gain: np.ndarray) -> np.ndarray:
    """The gains float64 [m] with rises averaged away (pool adjacent violators): a large gain may follow the small gain
    of a badly drawn centroid, and can only be had together with it."""
    pools: list[tuple[float, int]] = []
    for value in gain.tolist():
        total, count = value, 1
        while pools and pools[-1][0] * count <= total * pools[-1][1]:
            more, others = pools.pop()
            total, count = total + more, count + others
        pools.append((total, count))
    return np.repeat([total / count for total, count in pools], [count for _, count in pools]).astype(np.float64)


def balance_load(costs: np.ndarray, world: int) -> np.ndarray:
    """The rank of each task, int64: the most expensive task first, each to the rank with the least load so far."""
    load: list[float] = [0] * world
    rank_of = np.zeros(len(costs), np.int64)
    for task in np.argsort(-costs, kind="stable").tolist():
        least = min(range(world), key=lambda rank: (load[rank], rank))
        rank_of[task] = least
        load[least] += costs[task].item()
    return rank_of
