"""Lloyd's iterations, shared by flat and hierarchical k-means: new centroids from the sums of a pass, state, log line.

Legend: K clusters, D width.

An empty cluster takes half of the cluster with the largest summed error. Everything here follows from all-reduced sums,
the seed and the number of the iteration, so all ranks compute the same bits.
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megacid.distributed.stopping import stop_together
from megacid.failpoints import failpoint
from megacid.offline.cluster.accumulate import Accumulator
from megacid.offline.cluster.run import KMeansRun
from megacid.offline.cluster.state import KMeansSettings, KMeansState, settled
from megacid.offline.random_streams import RandomStream

log = logging.getLogger(__name__)
_MIN_LENGTH = 1e-12  # of the mean of unit rows: below, it has no direction
_SPLIT = 1 / 1024  # relative step between the two halves of a split cluster


def iterate(
    run: KMeansRun,
    state: KMeansState,
    iterations: int,
    assign_rows: Callable[[KMeansState], Accumulator],
    save: Callable[[], None],
    name: str = "iteration",
) -> None:
    """Run Lloyd's iterations on `state`, in place, until `iterations` are done or the objective has settled.

    Args:
        assign_rows: One pass over all rows; returns the sums over all ranks.
        save: Called on the first rank after every iteration.
        name: Of the failpoints.
    """
    first = True  # the labels before a first or resumed iteration are unknown
    while state.iteration < iterations and not state.stopped:
        began = time.monotonic()
        total = assign_rows(state)
        state.objective.append(total.objective(run.rows.num_rows))
        state.iteration += 1
        sizes, empty = update(state, total, run.settings)
        state.imbalance = imbalance_factor(sizes)
        state.stopped = settled(state.objective, run.settings)
        with stop_together(run.group):
            failpoint(f"cluster:{name}", step=state.iteration)
            if run.rank == 0:
                save()
            failpoint(f"cluster:{name}_saved", step=state.iteration)
            run.progress(0)
        seconds = time.monotonic() - began
        moved = "unknown" if first else f"{total.moved() / run.rows.num_rows:.4f}"
        left = 0 if state.stopped else (iterations - state.iteration) * seconds
        log.info(
            f"iteration {state.iteration}/{iterations}: objective {state.objective[-1]:.6f}, imbalance "
            f"{state.imbalance:.3f}, empty {empty}, moved fraction {moved}, {seconds:.1f} s, {left:.0f} s left"
        )
        first = False


def update(state: KMeansState, total: Accumulator, settings: KMeansSettings) -> tuple[np.ndarray, int]:
    """Replace the centroids by the means of their rows; returns (sizes int64 [K], number of empty clusters)."""
    sizes = total.counts_K.cpu().numpy().astype(np.int64)
    means = total.means().cpu()
    before, stays = state.centroids, torch.zeros(len(means), dtype=torch.bool)
    if settings.metric == "cosine":
        length = means.norm(dim=1, keepdim=True)
        means /= length.clamp_min(_MIN_LENGTH)
        # Rows that cancel exactly have no direction: their centroid stays.
        stays = length[:, 0] <= _MIN_LENGTH
    state.centroids = means.float()
    state.centroids[stays] = before[stays]
    return sizes, split_empty(state.centroids, sizes, total.errors(), settings, state.iteration)


def split_empty(
    centroids_KD: Tensor, sizes: np.ndarray, errors: np.ndarray, settings: KMeansSettings, iteration: int
) -> int:
    """Give every empty cluster half of the one with the largest summed error, in place; returns the number of empty.

    The largest error decides, not the most rows: web data has clumps of hundreds of thousands of equal images, which no
    split can divide.

    Args:
        errors: float64 [K], see `Accumulator.errors`.
    """
    empty = np.flatnonzero(sizes == 0)
    if len(empty) == 0:
        return 0  # the heap takes as long as an iteration in a cell of two levels
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


def imbalance_factor(sizes: np.ndarray) -> float:
    """k * sum(sizes^2) / sum(sizes)^2: 1 when all k clusters have the same size, k when one has all rows."""
    total = float(sizes.sum())
    return float(len(sizes) * (sizes.astype(np.float64) ** 2).sum() / total**2) if total else math.nan
