"""What all stages of k-means in two levels need: the rows, how they are read, and who does what.

Legend: K centroids, B rows of a block, T rows of a tile, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megacid.distributed import collectives
from megacid.distributed.stopping import Progress
from megacid.offline.cluster.accumulate import Group
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import Assigner, pad_rows, prepare, tile_rows
from megacid.offline.rows import Rows


@dataclass(frozen=True)
class LevelRun:
    """scale: of the grid of the sums; block: rows read at once."""

    rows: Rows
    settings: KMeansSettings
    scale: float
    block: int
    device: torch.device
    group: Group
    progress: Progress

    @property
    def rank(self) -> int:
        return collectives.rank(self.group)

    @property
    def world(self) -> int:
        return collectives.world_size(self.group)

    def pieces(self, x_BD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(place, rows [at most T, D]) one tile after the other."""
        tile = tile_rows(self.device)
        for at in range(0, len(x_BD), tile):
            yield at, x_BD[at : at + tile]

    def tiles(self, block: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """(place, rows fp32 [at most T, D]) of rows as they were read, one tile after the other."""
        tile = tile_rows(self.device)
        for at in range(0, len(block), tile):
            yield at, prepare(block[at : at + tile], self.settings.metric, self.device)

    def nearest(self, assigner: Assigner, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(similarity [T], label int64 [T]) of at most one tile of rows."""
        value_TL, label_TL = assigner.tile(pad_rows(x_TD, tile_rows(self.device)))
        return value_TL[: len(x_TD), 0], label_TL[: len(x_TD), 0]

    def assigner(self, centroids_KD: Tensor) -> Assigner:
        return Assigner(centroids_KD, self.settings.metric, self.device, self.settings.backend)
