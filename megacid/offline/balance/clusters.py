"""The samples of every cluster, in order of preference.

Legend: n samples with an embedding, m of them chosen, k clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Clusters:
    """Samples sorted by cluster, inside a cluster by preference. `order`: int64 [n] row numbers; cluster c is order[starts[c]:starts[c+1]].
    `priority`: [n] by row number, smaller is preferred."""

    order: np.ndarray
    starts: np.ndarray
    priority: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts)

    def of(self, chosen: list[int]) -> tuple[np.ndarray, Clusters]:
        """(row numbers int64 [m], ascending, of the samples of these clusters; the k clusters with those alone, by place among them)."""
        inside = np.isin(np.arange(len(self.sizes)), chosen)
        order = self.order[self.starts[0] :][np.repeat(inside, self.sizes)]
        rows = np.sort(order)
        starts = np.concatenate([[0], np.cumsum(self.sizes * inside)]).astype(np.int64)
        return rows, Clusters(np.searchsorted(rows, order), starts, self.priority[rows])

    def labels(self, num_rows: int) -> np.ndarray:
        """int32 [n]: the cluster of every sample, -1 for none."""
        label = np.full(num_rows, -1, np.int32)
        label[self.order[self.starts[0] :]] = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)
        return label
