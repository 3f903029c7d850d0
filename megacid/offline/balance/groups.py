"""Groups of redundant samples: perceptual ones (copies of an image) and semantic ones, ordered by spread.

Of a large set the groups are a sample, those whose representative has a small hash: they do not depend on the number of
ranks, and few rows are read.

Legend: n samples with an embedding, m of them in the groups that are shown or counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megacid.data.order import splitmix64
from megacid.errors import UserError
from megacid.offline.nearest import prepare
from megacid.offline.row_numbers import removed_rows
from megacid.offline.rows import Rows, SubsetRows

SAMPLED_ROWS = 100_000  # removed samples in the groups of a large set, about
PERCEPTUAL_SHARE = 0.5  # default limit of perceptual redundancy, as a share of the threshold


@dataclass(frozen=True)
class Group:
    """One group, or a selection of its samples."""

    rows: np.ndarray  # int64, the kept one first, then removed ones, nearest first
    distances: np.ndarray  # float [len(rows)], to the kept one
    size: int  # samples in the whole group
    spread: float  # largest distance of a removed sample to the kept one


def representative_distance(image: Rows, representative: np.ndarray, block: int = 16384) -> np.ndarray:
    """Euclidean distance of every sample to its representative, float32 [n]; 0 where that is itself or -1."""
    out = np.zeros(len(representative), np.float32)
    linked = np.flatnonzero((representative >= 0) & (representative != np.arange(len(representative))))
    for low in range(0, len(linked), block):
        part = linked[low : low + block]
        a, b = (prepare(image.take(rows), "cosine", torch.device("cpu")) for rows in (part, representative[part]))
        out[part] = (a - b).norm(dim=1).numpy()
    return out


def perceptual_distance(threshold: float, requested: float | None = None) -> float:
    """The spread below which a group is perceptual: `requested`, or PERCEPTUAL_SHARE of the threshold.

    Raises:
        UserError: `requested` is not in (0, threshold].
    """
    if requested is None:
        return PERCEPTUAL_SHARE * threshold
    if not 0 < requested <= threshold:
        raise UserError(
            f"--perceptual is {requested:g}, expected above 0 and at most the threshold of the links, {threshold:g}"
        )
    return requested


def sample_groups(image: Rows, representative: np.ndarray) -> Groups:
    """The groups of at least two samples, all or about as many as have SAMPLED_ROWS removed samples.

    representative: int [n], of the rows of `image`.
    """
    removed = sum(len(rows) for rows, _ in removed_rows(representative))
    share = min(1.0, SAMPLED_ROWS / max(removed, 1))
    parts = [np.empty(0, np.int64)]
    for rows, own in removed_rows(representative):
        if share < 1:
            rows = rows[splitmix64(own.astype(np.uint64)) < np.uint64(share * 2.0**64)]
        parts.append(rows)
    members = np.concatenate(parts)
    rows = np.union1d(members, representative[members])
    place = np.searchsorted(rows, representative[rows])
    return Groups(place, representative_distance(SubsetRows(image, rows), place), rows, share)


class Groups:
    """Groups of at least two samples, ordered by spread.

    A group is *perceptual* when its spread is below a limit, else *semantic*.

    Attributes:
        spread: float [groups], ascending.
        note: For texts that count groups: empty, or that they are a sample.
    """

    def __init__(
        self, representative: np.ndarray, distance: np.ndarray, rows: np.ndarray | None = None, share: float = 1.0
    ) -> None:
        """
        Args:
            representative: int [m], place of the sample that represents each.
            distance: float [m], of each sample to its representative.
            rows: int [m], ascending, row number of each sample; None: its place.
            share: of all groups, about.
        """
        self._rows = np.arange(len(representative)) if rows is None else rows
        self.note = f" (of a sample of about {share:.2g} of all groups)" if share < 1 else ""
        linked = np.flatnonzero(representative != np.arange(len(representative)))
        self._kept, group = np.unique(representative[linked], return_inverse=True)
        self._distance = distance
        spread = np.zeros(len(self._kept))
        np.maximum.at(spread, group, distance[linked])
        self._members = linked[np.lexsort((distance[linked], group))]
        self._ends = np.cumsum(np.bincount(group, minlength=len(self._kept)))
        self._ranked = np.argsort(spread, kind="stable")
        self.spread = spread[self._ranked]

    def __len__(self) -> int:
        return len(self._ranked)

    def at(self, place: int, members: int) -> Group:
        """The group at a place of the order, with at most `members` samples, evenly spaced by distance."""
        number = int(self._ranked[place])
        removed = self._members[self._ends[number - 1] if number else 0 : self._ends[number]]
        shown = removed[np.unique(np.linspace(0, len(removed) - 1, min(members - 1, len(removed))).astype(int))]
        rows = np.concatenate([[self._kept[number]], shown])
        distances = np.concatenate([[0.0], self._distance[shown]])
        return Group(self._rows[rows], distances, len(removed) + 1, float(self.spread[place]))

    def count_perceptual(self, limit: float) -> int:
        return int(np.searchsorted(self.spread, limit, side="left"))

    def perceptual(self, limit: float, count: int, members: int) -> list[Group]:
        """`count` perceptual groups, evenly spaced from the tightest to the loosest."""
        return self._spaced(0, self.count_perceptual(limit), count, members)

    def semantic(self, limit: float, count: int, members: int) -> list[Group]:
        """`count` semantic groups, evenly spaced from the tightest to the loosest."""
        return self._spaced(self.count_perceptual(limit), len(self), count, members)

    def near(self, threshold: float, limit: float, count: int, members: int) -> list[Group]:
        """The `count` semantic groups whose spread is nearest to the threshold, by spread."""
        first = self.count_perceptual(limit)
        gap = np.abs(self.spread[first:] - threshold)
        return [self.at(first + int(g), members) for g in np.sort(np.argsort(gap, kind="stable")[:count])]

    def _spaced(self, low: int, high: int, count: int, members: int) -> list[Group]:
        places = np.unique(np.linspace(low, high - 1, max(min(count, high - low), 0)).astype(int))
        return [self.at(int(place), members) for place in places]
