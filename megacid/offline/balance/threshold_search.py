"""The threshold that keeps a given share of the samples: which clusters it is searched on, and the steps.

Without the second pass, clusters are drawn one by one. With it, whole neighbourhoods are drawn, because a sample has to be
compared with clusters that come next to its own; some of those are still outside of what was drawn, and what is removed
across borders is scaled to all of them.

Legend: n samples drawn, k clusters, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megacid.errors import UserError
from megacid.offline.nearest import Assigner
from megacid.offline.random_streams import RandomStream

FARTHEST = 2.0  # no two unit vectors are farther apart
NEIGHBOURHOOD = (
    32  # clusters drawn together; few enough that 200,000 samples of LAION's 400 per cluster are many places
)
_RESOLUTION = 1e-5  # the search stops when its interval is this narrow


def sample_clusters(sizes: np.ndarray, rows: int, seed: int, assigner: Assigner | None = None) -> list[int]:
    """Clusters that hold at least `rows` samples together, or all that hold any; the order is part of the draw.

    sizes: int64 [k]; assigner: of the k centroids, None: clusters are drawn without their neighbours. UserError when all are empty.
    """
    chosen: dict[int, None] = {}
    count = 0
    for first in np.random.default_rng([seed, RandomStream.SAMPLED_CLUSTERS]).permutation(len(sizes)).tolist():
        if count >= rows:
            break
        if first in chosen or not sizes[first]:
            continue
        for cluster in [first] if assigner is None else _neighbourhood(assigner, first):
            if sizes[cluster] and cluster not in chosen and count < rows:
                chosen[cluster] = None
                count += int(sizes[cluster])
    if not count:
        raise UserError("no sample has a cluster: run tools/cluster.py again")
    return list(chosen)


def _neighbourhood(assigner: Assigner, cluster: int) -> list[int]:
    """The cluster and those whose centroids are nearest to its own, nearest first."""
    c_KD = assigner.centroids_KD
    near: list[int] = assigner.tile(c_KD[cluster : cluster + 1], min(NEIGHBOURHOOD, len(c_KD)))[1][0].tolist()
    return [cluster, *near]  # the cluster itself is in both, and taken once


def bisect_threshold(
    target: float, count: int, share: Callable[[float], float]
) -> tuple[float, list[tuple[float, float]]]:
    """(threshold whose share kept is nearest to the target, the visited (threshold, share) by threshold).

    share: falls from 1 at distance 0; of `count` samples, so that a difference of half a sample is none. Steps go to the
    line between the two ends and to the middle in turns: the line is fast where the share is smooth, the middle is sure.
    """
    low, high = (0.0, share(0.0)), (FARTHEST, share(FARTHEST))
    curve = [low, high]
    # More is kept at `low`, less at `high`; ties (equal distances) can make the target unreachable.
    while high[0] - low[0] > _RESOLUTION and min(abs(kept - target) for _, kept in curve) * count >= 0.5:
        part = 0.5
        if len(curve) % 2 and low[1] > target > high[1]:
            part = min(max((low[1] - target) / (low[1] - high[1]), 0.02), 0.98)
        at = low[0] + part * (high[0] - low[0])
        point = (at, share(at))
        curve.append(point)
        low, high = (point, high) if point[1] > target else (low, point)
    best = min(curve, key=lambda point: (abs(point[1] - target), point[0]))
    return best[0], sorted(curve)
