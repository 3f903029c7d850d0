"""The samples of every cluster, in order of preference.

Legend: n samples with an embedding, m of them chosen, k clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megacid.offline.row_numbers import is_own, row_blocks, row_dtype


@dataclass(frozen=True)
class Clusters:
    """Samples sorted by cluster, then by preference. Cluster c is order[starts[c]:starts[c+1]]."""

    order: np.ndarray  # int32 [n] (int64 from 2^31 rows), row numbers, those without a cluster first
    starts: np.ndarray  # int64 [k + 1]
    priority: np.ndarray  # [n] by row number; smaller is preferred
    label: np.ndarray  # int [n] by row number, -1 for none

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def rows(self) -> np.ndarray:
        """The rows that have a cluster, in order."""
        return self.order[self.starts[0] :]

    def span(self, low: int, high: int) -> slice:
        """The place of the clusters [low, high) in `order`."""
        return slice(int(self.starts[low]), int(self.starts[high]))

    def members(self, cluster: int) -> np.ndarray:
        """int64: the rows of a cluster, the most preferred first."""
        return self.order[self.span(cluster, cluster + 1)].astype(np.int64)

    def of(self, chosen: list[int]) -> tuple[np.ndarray, Clusters]:
        """The row numbers of some clusters, int64 [m], ascending, and all k clusters of those rows alone, by place."""
        inside = np.isin(np.arange(len(self.sizes)), chosen)
        order = self.rows[np.repeat(inside, self.sizes)]
        rows = np.sort(order).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(self.sizes * inside)]).astype(np.int64)
        return rows, Clusters(np.searchsorted(rows, order), starts, self.priority[rows], self.label[rows])

    def places(self) -> list[np.ndarray]:
        """The place of every row in `order`, in one array, int [n]."""
        place = np.empty_like(self.order)
        for block in row_blocks(0, len(place)):
            place[self.order[block]] = np.arange(block.start, block.stop)
        return [place]

    def keep_mask(self, representative: np.ndarray, cap: int | None) -> np.ndarray:
        """bool [n]: rows that are their own representative, of every cluster at most the `cap` most preferred."""
        keep = is_own(representative)
        if cap is not None:
            for cluster in np.flatnonzero(self.sizes > cap).tolist():
                members = self.members(cluster)
                own = keep[members]
                keep[members] = own & (np.cumsum(own) <= cap)
        return keep


def group_by_cluster(label: np.ndarray, priority: np.ndarray, k: int) -> Clusters:
    """Sorts samples by cluster, preference and row. label: int [n], -1 for none; priority: [n], smaller first."""
    order = np.lexsort((priority, label))
    starts = np.searchsorted(label[order], np.arange(k + 1))
    return Clusters(order.astype(row_dtype(len(label))), starts.astype(np.int64), priority, label)
