"""One pass of k-means over the rows: the nearest centroid of each row and exact sums per cluster.

Every value is rounded to a fixed grid (2^-26 of the largest) before it is added in float64. Such sums are exact for up
to 2^27 rows per cluster, so they do not depend on the order of additions: not on block size, number of ranks or GPU
atomics.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megacid.distributed import collectives
from megacid.distributed.parallel import shard_range
from megacid.distributed.stopping import Group, stop_together
from megacid.offline.cluster.memory import pass_rows
from megacid.offline.cluster.run import KMeansRun
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import prepare, tile_rows

_GRID_BITS = 26


class Accumulator:
    """Sums of one pass over the rows of this rank, in one buffer for a single all-reduce.

    Attributes:
        flat: float64 [K * D + 2 K + 2] = sums, counts, values, objective, moved rows.
        sums_KD: Sums of the rows of each cluster, whole numbers in units of 1 / `grid`.
        counts_K: Rows of each cluster.
        values_K: Sums of the cosine (or squared distance) of each row to its centroid, in units of 1 / `grid`.
    """

    def __init__(self, settings: KMeansSettings, dim: int, device: torch.device, scale: float) -> None:
        k = settings.k
        self.k, self.metric, self.grid = k, settings.metric, 2.0**_GRID_BITS / scale
        self.flat = torch.zeros(k * dim + 2 * k + 2, dtype=torch.float64, device=device)
        self.sums_KD = self.flat[: k * dim].view(k, dim)
        self.counts_K, self.values_K = self.flat[k * dim : -2].view(2, k)

    def add(self, x_TD: Tensor, label_T: Tensor, value_T: Tensor) -> None:
        # The grid is a power of two: neither the product nor the rounding loses a bit in fp32.
        self.sums_KD.index_add_(0, label_T, (x_TD * self.grid).round_().double())
        self.counts_K.index_add_(0, label_T, torch.ones_like(label_T, dtype=torch.float64))
        value_T = value_T.double()
        self.values_K.index_add_(0, label_T, (value_T * self.grid).round_())
        self.flat[-2] += value_T.sum()

    def all_reduce(self, moved: int, group: Group) -> None:
        """Sum over all ranks. moved: rows of this rank whose label has changed."""
        self.flat[-1] = moved
        collectives.all_reduce_sum(self.flat, group)

    def moved(self) -> float:
        return float(self.flat[-1])

    def errors(self) -> np.ndarray:
        """Summed error of each cluster, float64 [K]: 1 - cosine, or squared distance."""
        error_K = self.values_K / self.grid
        return (self.counts_K - error_K if self.metric == "cosine" else error_K).cpu().numpy()

    def means(self) -> Tensor:
        """Mean row of each cluster, float64 [K, D], 0 for an empty one; overwrites the sums."""
        return self.sums_KD.div_(self.counts_K.clamp_min(1)[:, None] * self.grid)

    def objective(self, n: int) -> float:
        """Mean cosine or squared distance of n rows, rounded to 12 digits: the sum behind it is the only one that is
        not on the grid, and rounding removes what depends on the order of additions."""
        return float(f"{float(self.flat[-2]) / n:.12g}")


def one_pass(run: KMeansRun, centroids_KD: Tensor, previous: np.ndarray) -> Accumulator:
    """Assign the rows to their nearest centroids; the sums over all ranks.

    Args:
        previous: int32 labels of this rank's rows after the pass before, -1 for unknown; updated in place.
    """
    rows, device = run.rows, run.device
    tile, part_rows = pass_rows(run.settings, rows.dim, device), tile_rows(device)
    x_TD = torch.zeros(tile, rows.dim, device=device)
    assigner = run.assigner(centroids_KD)
    total = Accumulator(run.settings, rows.dim, device, run.scale)
    start, stop = rows_of_rank(run)
    moved = 0
    with stop_together(run.group):
        for low in range(start, stop, run.block):
            block = rows.read(low, min(low + run.block, stop))
            for at in range(0, len(block), tile):
                count = min(tile, len(block) - at)
                parts = [slice(begin, min(begin + part_rows, count)) for begin in range(0, count, part_rows)]
                for part in parts:
                    # A part at a time fits the processor's cache.
                    x_TD[part] = prepare(block[at + part.start : at + part.stop], run.settings.metric, device)
                x_TD[count:] = 0
                value_TL, label_TL = assigner.tile(x_TD)
                for part in parts:
                    total.add(x_TD[part], label_TL[part, 0], value_TL[part, 0])
                labels = label_TL[:count, 0].cpu().numpy().astype(np.int32)
                where = slice(low + at - start, low + at - start + len(labels))
                moved += int((previous[where] != labels).sum())
                previous[where] = labels
                run.progress(len(labels))
    total.all_reduce(moved, run.group)
    return total


def rows_of_rank(run: KMeansRun) -> tuple[int, int]:
    """The rows [start, stop) of this rank in `one_pass`: whole tiles."""
    tile, n = pass_rows(run.settings, run.rows.dim, run.device), run.rows.num_rows
    first, last = shard_range(math.ceil(n / tile), run.rank, run.world)
    return min(first * tile, n), min(last * tile, n)
