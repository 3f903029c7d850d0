"""One pass of k-means over the rows: nearest centroids, exact sums per cluster."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megacid.distributed import collectives
from megacid.distributed.parallel import shard_range
from megacid.distributed.stopping import Progress, stop_together
from megacid.offline.cluster.state import KMeansSettings, KMeansState
from megacid.offline.nearest import Assigner, Metric, chosen_backend, prepare, tile_rows
from megacid.offline.rows import Rows

Group = dist.ProcessGroup | None
_GRID_BITS = 26
_FAISS_TILES = 4


def pass_rows(settings: KMeansSettings, dim: int, device: torch.device) -> int:
    """Rows of one tile of a pass over all of them. For faiss more than elsewhere: its threads and torch's, which wait
    for each other's cores after every search, then take turns less often."""
    by_faiss = device.type == "cpu" and chosen_backend(settings.backend, device, dim) == "faiss"
    return tile_rows(device) * (_FAISS_TILES if by_faiss else 1)


def grid_scale(metric: Metric, largest: float) -> float:
    """A power of two that no value is above: what the grid of the sums is laid over."""
    return 1.0 if metric == "cosine" else 2.0 ** math.ceil(math.log2(largest or 1.0))


class Accumulator:
    """Sums of one pass over this rank's rows: flat float64 [K * D + 2 K + 2] = sums, counts, values, objective, moved rows.

    Values: the cosine or squared distance of each row to its centroid. Sums and values are whole numbers, in units of
    1 / `grid`.
    """

    def __init__(self, settings: KMeansSettings, dim: int, device: torch.device, scale: float) -> None:
        k = settings.k
        self.k, self.metric, self.grid = k, settings.metric, 2.0**_GRID_BITS / scale
        self.flat = torch.zeros(k * dim + 2 * k + 2, dtype=torch.float64, device=device)
        self.sums_KD = self.flat[: k * dim].view(k, dim)
        self.counts_K, self.values_K = self.flat[k * dim : -2].view(2, k)

    def add(self, x_TD: Tensor, label_T: Tensor, value_T: Tensor) -> None:
        # A power of two: neither the product nor the rounding loses a bit in fp32.
        self.sums_KD.index_add_(0, label_T, (x_TD * self.grid).round_().double())
        self.counts_K.index_add_(0, label_T, torch.ones_like(label_T, dtype=torch.float64))
        value_T = value_T.double()
        self.values_K.index_add_(0, label_T, (value_T * self.grid).round_())
        self.flat[-2] += value_T.sum()

    def errors(self) -> np.ndarray:
        """float64 [K] what all rows of a cluster lack of cosine 1, or their squared distances."""
        error_K = self.values_K / self.grid
        return (self.counts_K - error_K if self.metric == "cosine" else error_K).cpu().numpy()

    def means(self) -> Tensor:
        """float64 [K, D] mean row of every cluster, 0 of an empty one; takes the place of the sums."""
        return self.sums_KD.div_(self.counts_K.clamp_min(1)[:, None] * self.grid)

    def objective(self, n: int) -> float:
        """Mean over n rows. Twelve digits are above the noise of the order of additions: every layout decides the same."""
        return float(f"{float(self.flat[-2]) / n:.12g}")


def one_pass(
    rows: Rows,
    state: KMeansState,
    settings: KMeansSettings,
    previous: np.ndarray,
    scale: float,
    block: int,
    device: torch.device,
    group: Group,
    progress: Progress,
) -> tuple[Accumulator, np.ndarray]:
    """Assign this rank's rows and add them up; `previous` (int32, this rank's rows, -1 unknown) is brought up to date."""
    tile, piece = pass_rows(settings, rows.dim, device), tile_rows(device)
    room_TD = torch.zeros(tile, rows.dim, device=device)
    assigner = Assigner(state.centroids, settings.metric, device, settings.backend)
    total = Accumulator(settings, rows.dim, device, scale)
    tiles = math.ceil(rows.num_rows / tile)
    first, last = shard_range(tiles, collectives.rank(group), collectives.world_size(group))
    start, stop = first * tile, min(last * tile, rows.num_rows)
    moved = 0
    with stop_together(group):
        for low in range(start, stop, block):
            x_BD = rows.read(low, min(low + block, stop))
            for at in range(0, len(x_BD), tile):
                count = min(tile, len(x_BD) - at)
                pieces = [slice(begin, min(begin + piece, count)) for begin in range(0, count, piece)]
                for part in pieces:
                    # Piece by piece, from where they were read into the processor's cache.
                    room_TD[part] = prepare(x_BD[at + part.start : at + part.stop], settings.metric, device)
                room_TD[count:] = 0
                value_TL, label_TL = assigner.tile(room_TD)
                for part in pieces:
                    total.add(room_TD[part], label_TL[part, 0], value_TL[part, 0])
                labels = label_TL[:count, 0].cpu().numpy().astype(np.int32)
                where = slice(low + at - start, low + at - start + len(labels))
                moved += int((previous[where] != labels).sum())
                previous[where] = labels
                progress(len(labels))
    total.flat[-1] = moved
    collectives.all_reduce_sum(total.flat, group)
    return total, previous
