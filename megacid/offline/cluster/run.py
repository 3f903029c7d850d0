"""The context of a k-means run: checked training rows, settings, ranks, block size and the grid of the sums.

Legend: K centroids, B rows of a block, T rows of a tile, D width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megacid.distributed import collectives
from megacid.distributed.consensus import gather_json
from megacid.distributed.parallel import shard_range, waiting_group
from megacid.distributed.stopping import Group, Progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.cluster.memory import block_rows, candidate_bytes, check_memory
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import Assigner, Metric, pad_rows, prepare, tile_rows
from megacid.offline.random_streams import RandomStream
from megacid.offline.rows import Rows, SubsetRows, find_invalid_row

log = logging.getLogger(__name__)


def begin_stage(name: str) -> None:
    """Mark the beginning of a stage, and the end of the one before, for what observes them."""
    failpoint("cluster:stage", stage=name)


@dataclass(frozen=True)
class KMeansRun:
    """What every pass over the rows needs.

    Attributes:
        rows: The training rows.
        block: Number of rows to read at once.
        scale: Power of two that no value of the rows exceeds; the grid of the sums covers it.
    """

    rows: Rows
    settings: KMeansSettings
    block: int
    scale: float
    device: torch.device
    group: Group
    progress: Progress

    @property
    def rank(self) -> int:
        return collectives.rank(self.group)

    @property
    def world(self) -> int:
        return collectives.world_size(self.group)

    def split(self, x_BD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(offset, rows [at most T, D]) tile by tile."""
        tile = tile_rows(self.device)
        for at in range(0, len(x_BD), tile):
            yield at, x_BD[at : at + tile]

    def tiles(self, block: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """(offset, prepared rows fp32 [at most T, D]) of a block of rows as read, tile by tile."""
        tile = tile_rows(self.device)
        for at in range(0, len(block), tile):
            yield at, prepare(block[at : at + tile], self.settings.metric, self.device)

    def nearest(self, assigner: Assigner, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(similarity [T], label int64 [T]) of at most one tile of rows."""
        value_TL, label_TL = assigner.tile(pad_rows(x_TD, tile_rows(self.device)))
        return value_TL[: len(x_TD), 0], label_TL[: len(x_TD), 0]

    def assigner(self, centroids_KD: Tensor) -> Assigner:
        return Assigner(centroids_KD, self.settings.metric, self.device, self.settings.backend)

    def on_first_rank(self, compute: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """What `compute` returns on the first rank, fp32 of this shape on the CPU, on every rank. A collective."""
        result = torch.empty(0)
        # With many centroids it takes longer than ranks wait in a collective of the launcher's group.
        with nullcontext(self.group) if self.world == 1 else waiting_group() as group, stop_together(group):
            if self.rank == 0:
                result = compute()
        return collectives.broadcast(result if self.rank == 0 else torch.empty(shape), self.group)


def start_run(
    rows: Rows,
    settings: KMeansSettings,
    device: torch.device,
    group: Group,
    progress: Progress,
    *,
    unit_rows: bool,
) -> KMeansRun:
    """Draw the training sample, check amount, memory and rows, and choose block size and grid.

    Args:
        unit_rows: Require rows of length 1, whatever the metric.

    Raises:
        UserError: k > n, the memory bound is too small, or a row is invalid.
    """
    begin_stage("check")
    world = collectives.world_size(group)
    check_size(rows, settings, world, device)
    extra_bytes = rows.chosen.nbytes if isinstance(rows, SubsetRows) else 0
    if settings.train_sample is not None:
        rows = _training_sample(rows, settings)
    n = rows.num_rows
    if n < 2 * settings.k and collectives.rank(group) == 0:
        log.warning(
            f"{n} rows to train on for {settings.k} clusters are {n / settings.k:.2f} per cluster, fewer than 2: most "
            "clusters will be single rows, make fewer of them or give more data"
        )
    if settings.method == "hierarchical":
        extra_bytes += candidate_bytes(settings, device)
    block = block_rows(math.ceil(n / world), rows.dim, settings, device, extra_bytes)
    largest = _check_rows(rows, settings.metric, block, group, progress, unit_rows)
    # Unit rows, or the next power of two.
    scale = 1.0 if settings.metric == "cosine" else 2.0 ** math.ceil(math.log2(largest or 1.0))
    return KMeansRun(rows, settings, block, scale, device, group, progress)


def _training_sample(rows: Rows, settings: KMeansSettings) -> Rows:
    """A uniform sample of rows without replacement, decided by the seed."""
    count = settings.train_sample or 0
    if count >= rows.num_rows:
        log.info("training on all %d rows: --train-sample %d is not smaller", rows.num_rows, count)
        return rows
    log.info("training on a sample of %d of %d rows (%.1f per cluster)", count, rows.num_rows, count / settings.k)
    rng = np.random.default_rng([settings.seed, RandomStream.TRAINING_SAMPLE])
    return SubsetRows(rows, np.sort(rng.choice(rows.num_rows, count, replace=False)))


def check_size(rows: Rows, settings: KMeansSettings, world: int, device: torch.device) -> None:
    """UserError for a training sample or rows fewer than the clusters, or too small a memory bound."""
    n, sample = rows.num_rows, settings.train_sample
    if sample is not None and sample < settings.k:
        raise UserError(f"train sample is {sample} rows, expected at least k = {settings.k}: raise --train-sample")
    if settings.k > n:
        raise UserError(f"k is {settings.k} but there are only {n} rows to train on: lower --k or give more data")
    extra_bytes = rows.chosen.nbytes if isinstance(rows, SubsetRows) else 0
    check_memory(min(sample or n, n), rows.dim, settings, world, device, extra_bytes)


def _check_rows(rows: Rows, metric: Metric, block: int, group: Group, progress: Progress, unit_rows: bool) -> float:
    """Largest absolute value of all rows. UserError on every rank that names the first invalid row."""
    start, stop = shard_range(rows.num_rows, collectives.rank(group), collectives.world_size(group))
    largest, tile = 0.0, tile_rows(torch.device("cpu"))
    expected = "of length 1" if unit_rows else "of non-zero length" if metric == "cosine" else "without NaN or infinity"
    with stop_together(group):
        for low in range(start, stop, block):
            x_BD = rows.read(low, min(low + block, stop))
            for at in range(0, len(x_BD), tile):
                x = np.asarray(x_BD[at : at + tile], np.float32)
                invalid = find_invalid_row(x, allow_zero=metric != "cosine" and not unit_rows, unit=unit_rows)
                if invalid is not None:
                    row, problem = invalid
                    raise UserError(
                        f"{rows.name(low + at + row)} {problem}, expected rows {expected}: delete that file and run "
                        "tools/embed.py again"
                    )
                largest = max(largest, float(np.abs(x).max(initial=0)))
            progress(0)
    return max(gather_json(largest, group))
