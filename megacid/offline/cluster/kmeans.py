"""k-means over rows that do not fit into memory, on one process or many ranks.

Legend: n rows, K clusters, D width, B rows of one block.

Every iteration streams the rows once, adds them up per cluster and makes one all-reduce. Rows are put on a fixed grid
(2^-26 of the largest value) before they are added in float64: then the sums are exact for up to 2^27 rows per cluster,
and the result does not depend on the order of additions, so not on block size, number of ranks or GPU atomics.
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacid.distributed import collectives
from megacid.distributed.consensus import any_rank, gather_json
from megacid.distributed.parallel import shard_range
from megacid.distributed.stopping import Progress, no_progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.cluster.accumulate import Accumulator, Group, grid_scale, one_pass, pass_rows
from megacid.offline.cluster.seeding import check_memory, initial_centroids, sample_rows
from megacid.offline.cluster.state import KMeansSettings, KMeansState, load_state, save_state, settled
from megacid.offline.nearest import Metric, search_bytes, tile_rows
from megacid.offline.random_streams import RandomStream
from megacid.offline.rows import Rows, SubsetRows, find_invalid_row

log = logging.getLogger(__name__)
_READ_BYTES = 8  # of a value while rows are read: fp32 at most, gathered from several files
_BLOCK_TILES = 64  # read at once: more is no faster
_NO_LENGTH = 1e-12  # of the mean of unit rows
_SPLIT = 1 / 1024  # relative step between the two halves of a split cluster


def spare_bytes(n: int, dim: int, settings: KMeansSettings, device: torch.device, extra: int = 0) -> int:
    """Bytes that `memory_gb` leaves for rows. UserError when that is less than a tile of them.

    n: rows of this rank; extra: more bytes that are held all the time.
    """
    tile, k = pass_rows(settings, dim, device), settings.k
    # centroids fp32 twice (those of faiss's index are gone when new ones are made) and sums fp64 twice (own and reduced),
    # the previous labels
    fixed = k * dim * (4 + 4 + 8 + 8) + 4 * n + extra
    # what looks for the nearest; a tile of rows in fp32, and of a part of it fp16, fp32 before and after it is normalised,
    # on the grid, in fp64
    fixed += search_bytes(k, tile, device) + tile * dim * 4 + tile_rows(device) * dim * 28
    spare, least = int(settings.memory_gb * 1e9) - fixed, tile * dim * _READ_BYTES
    if spare < least:
        need = (fixed + least) / 1e9
        raise UserError(
            f"memory bound is {settings.memory_gb:g} GB, {k} clusters of width {dim} need {need:.3g} GB: raise --memory-gb or lower --k"
        )
    return spare


def block_rows(n: int, dim: int, settings: KMeansSettings, device: torch.device, extra: int = 0) -> int:
    """Rows read at once under `memory_gb`; a multiple of `pass_rows`. Arguments and errors: those of `spare_bytes`."""
    tile = pass_rows(settings, dim, device)
    tiles = spare_bytes(n, dim, settings, device, extra) // (tile * dim * _READ_BYTES)
    return min(tiles, _BLOCK_TILES, max(n // tile, 1)) * tile


def imbalance_factor(sizes: np.ndarray) -> float:
    """1 when all clusters are equal; k when one holds everything."""
    total = float(sizes.sum())
    return float(len(sizes) * (sizes.astype(np.float64) ** 2).sum() / total**2) if total else math.nan


def check_rows(
    rows: Rows,
    metric: Metric,
    block: int,
    group: Group = None,
    *,
    unit_rows: bool = False,
    progress: Progress = no_progress,
) -> float:
    """Largest absolute value of all rows. UserError on every rank naming the first row with NaN, inf, (cosine) zero norm,
    or with `unit_rows` a length that is not 1."""
    start, stop = shard_range(rows.num_rows, collectives.rank(group), collectives.world_size(group))
    largest, tile = 0.0, tile_rows(torch.device("cpu"))
    with stop_together(group):
        for low in range(start, stop, block):
            x_BD = rows.read(low, min(low + block, stop))
            for at in range(0, len(x_BD), tile):
                x = np.asarray(x_BD[at : at + tile], np.float32)
                found = find_invalid_row(x, allow_zero=metric != "cosine" and not unit_rows, unit=unit_rows)
                if found is not None:
                    row, what = found
                    raise UserError(
                        f"{rows.name(low + at + row)} {what}, expected finite rows{' of length 1' if unit_rows else ' of non-zero length' if metric == 'cosine' else ''}: delete that file and run tools/embed.py again"
                    )
                largest = max(largest, float(np.abs(x).max(initial=0)))
            progress(0)
    return max(gather_json(largest, group))


def split_empty(
    centroids_KD: Tensor, sizes: np.ndarray, errors: np.ndarray, settings: KMeansSettings, iteration: int
) -> int:
    """Give every empty cluster half of the worst one, in place; returns how many. The same on every rank.

    errors: float64 [K], summed distance of the rows of each cluster. The worst cluster is the one with the largest sum, not the
    one with the most rows: web data has clumps of hundreds of thousands of equal images, which no split can divide.
    """
    empty = np.flatnonzero(sizes == 0)
    heap = [(-float(errors[c]), int(c)) for c in np.flatnonzero(sizes > 1)]
    if not heap:
        return len(empty)
    heapq.heapify(heap)
    rng = np.random.default_rng([settings.seed, RandomStream.EMPTY_CLUSTERS, iteration])
    for cluster in empty:
        error, worst = heapq.heappop(heap)
        sign = torch.from_numpy(rng.integers(0, 2, centroids_KD.shape[1]).astype(np.float32) * 2 - 1)
        step = _SPLIT * sign * centroids_KD[worst].abs()
        centroids_KD[int(cluster)] = centroids_KD[worst] + step
        centroids_KD[worst] -= step
        if settings.metric == "cosine":
            pair = [int(cluster), worst]
            centroids_KD[pair] = torch.nn.functional.normalize(centroids_KD[pair], dim=1)
        heapq.heappush(heap, (error / 2, worst))
        heapq.heappush(heap, (error / 2, int(cluster)))
    return len(empty)


def update(state: KMeansState, total: Accumulator, settings: KMeansSettings) -> tuple[np.ndarray, int]:
    """New centroids from the sums; returns (sizes int64 [K], clusters that were empty and were split off another)."""
    sizes = total.counts_K.cpu().numpy().astype(np.int64)
    means = total.means().cpu()
    before, stays = state.centroids, torch.zeros(len(means), dtype=torch.bool)
    if settings.metric == "cosine":
        length = means.norm(dim=1, keepdim=True)
        means /= length.clamp_min(_NO_LENGTH)
        # Rows that cancel exactly have no direction; the old centroid stays.
        stays = length[:, 0] <= _NO_LENGTH
    state.centroids = means.float()
    state.centroids[stays] = before[stays]
    return sizes, split_empty(state.centroids, sizes, total.errors(), settings, state.iteration)


def check_amount(n: int, k: int, group: Group = None) -> None:
    """UserError for more clusters than rows to train on; a warning for fewer than 2 rows per cluster."""
    if k > n:
        raise UserError(f"k is {k} but there are only {n} rows to train on: lower --k or give more data")
    if n < 2 * k and collectives.rank(group) == 0:
        log.warning(
            "%d rows to train on for %d clusters are %.2f per cluster, fewer than 2: most clusters will be single rows; "
            "lower --k or give more data",
            n,
            k,
            n / k,
        )


def kmeans(
    rows: Rows,
    settings: KMeansSettings,
    *,
    device: torch.device | str = "cpu",
    group: Group = None,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
    unit_rows: bool = False,
    progress: Progress = no_progress,
) -> KMeansState:
    """Run (or go on with) Lloyd's iterations; the same centroids on every rank.

    checkpoint: file that holds the state after every iteration; an existing one is continued and gives the same result.
    identity: what the rows are (digest, model); a checkpoint of something else is refused.
    unit_rows: the rows are embeddings and have to be of length 1, whatever the metric.
    progress: called with the number of rows done (also 0), for a progress bar; when it raises Stopped, all ranks stop.
    Raises UserError for k > n, rows that are not finite or zero, a memory bound too small, a foreign checkpoint.
    """
    device = torch.device(device)
    if settings.train_sample is not None:
        rows = training_sample(rows, settings)
    n = rows.num_rows
    check_amount(n, settings.k, group)
    block = block_rows(math.ceil(n / collectives.world_size(group)), rows.dim, settings, device)
    check_memory(n, rows.dim, settings)
    largest = check_rows(rows, settings.metric, block, group, unit_rows=unit_rows, progress=progress)
    scale = grid_scale(settings.metric, largest)
    with stop_together(group):
        state = load_state(checkpoint, settings, identity or {}) if checkpoint and checkpoint.exists() else None
    if state is None:
        if settings.init == "k-means++":
            sample = sample_rows(n, settings.k, rows.dim)
            log.info("k-means++: %d centroids from a sample of %d of %d rows", settings.k, sample, n)
        with stop_together(group):
            state = KMeansState(initial_centroids(rows, settings, device, progress))
            failpoint("cluster:init")
    else:
        log.info("continuing after iteration %d of %d", state.iteration, settings.iterations)
    tile = pass_rows(settings, rows.dim, device)
    tiles = math.ceil(n / tile)
    first, last = shard_range(tiles, collectives.rank(group), collectives.world_size(group))
    labels = np.full(max(0, min(last * tile, n) - first * tile), -1, np.int32)
    while state.iteration < settings.iterations and not state.stopped:
        began = time.monotonic()
        known = bool(len(labels) == 0 or labels[0] >= 0) and state.iteration > 0 and len(state.objective) > 0
        known = not any_rank(not known, group)
        total, labels = one_pass(rows, state, settings, labels, scale, block, device, group, progress)
        state.objective.append(total.objective(n))
        state.iteration += 1
        sizes, empty = update(state, total, settings)
        state.imbalance = imbalance_factor(sizes)
        state.stopped = settled(state.objective, settings)
        with stop_together(group):
            failpoint("cluster:iteration", step=state.iteration)
            if checkpoint is not None and collectives.rank(group) == 0:
                save_state(checkpoint, state, settings, identity or {})
            failpoint("cluster:iteration_saved", step=state.iteration)
            progress(0)
        report(
            state, settings.iterations, empty, float(total.flat[-1]) / n if known else None, time.monotonic() - began
        )
    return state


def report(state: KMeansState, iterations: int, empty: int, moved: float | None, seconds: float) -> None:
    """Log one iteration. moved: share of the rows whose label has changed, None when it is not known."""
    left = 0 if state.stopped else (iterations - state.iteration) * seconds
    log.info(
        "iteration %d/%d: objective %.6f, imbalance %.3f, empty %d, moved share %s, %.1f s, %.0f s to go",
        state.iteration,
        iterations,
        state.objective[-1],
        state.imbalance,
        empty,
        "unknown" if moved is None else f"{moved:.4f}",
        seconds,
        left,
    )


def training_sample(rows: Rows, settings: KMeansSettings) -> Rows:
    """A uniform sample of rows without replacement, decided by the seed."""
    count = settings.train_sample or 0
    if not settings.k <= count:
        raise UserError(f"train sample is {count} rows, expected at least k = {settings.k}: raise --train-sample")
    if count >= rows.num_rows:
        log.info("training on all %d rows (the sample asked for, %d, is not smaller)", rows.num_rows, count)
        return rows
    log.info("training on a sample of %d of %d rows (%.1f per cluster)", count, rows.num_rows, count / settings.k)
    rng = np.random.default_rng([settings.seed, RandomStream.TRAINING_SAMPLE])
    return SubsetRows(rows, np.sort(rng.choice(rows.num_rows, count, replace=False)))
