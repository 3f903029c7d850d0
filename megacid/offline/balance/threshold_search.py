"""Searches the threshold that keeps a given share of the samples, on a sample of whole clusters.

What the sample says is corrected on all samples: `next_threshold` follows the exact shares of whole passes.

The share kept falls as the threshold grows, so the threshold is bracketed and the bracket is narrowed until the share
is within half a sample of the target. Without the second pass, clusters are sampled one by one. With it, whole
neighbourhoods of clusters are sampled, because a sample has to be compared with the clusters next to its own; some of
those still lie outside of the sample, so what is removed across borders is scaled up to all of them.

Legend: n samples searched on, k clusters, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.balance import cross_cluster
from megacid.offline.balance.context import FARTHEST, BalanceContext
from megacid.offline.balance.within_cluster import link_cluster
from megacid.offline.nearest import Assigner
from megacid.offline.random_streams import RandomStream
from megacid.offline.row_numbers import all_rows
from megacid.offline.rows import SubsetRows

# Clusters sampled together: few enough that the default 200,000 samples, at 400 per cluster in LAION, are many places.
NEIGHBOURHOOD = 32
SHARE_TOLERANCE = 1e-3  # of the share kept of all samples
MAX_PASSES = 16  # over all samples, until their share is within the tolerance
_BY_SLOPE = 3  # first passes that follow the slope of the search; then the threshold is doubled or halved
_RESOLUTION = 1e-5  # width of the bracket at which the search stops
Curve = list[tuple[float, float]]  # (threshold, share kept), by threshold


def search_threshold(context: BalanceContext) -> tuple[float, Curve, int]:
    """Finds the threshold whose share kept is nearest to `settings.target_keep`. On one rank, without communication.

    Returns:
        The threshold, the visited curve, and the number of samples searched on: the share is exact when it is all.
    """
    settings = context.settings
    assert settings.target_keep is not None
    chosen = sample_clusters(context.clusters.sizes, settings.search_rows, settings.seed, context.assigner)
    numbers, clusters = context.clusters.of(chosen)
    count, rows = len(numbers), SubsetRows(context.rows, numbers)
    subset = replace(context, rows=rows, clusters=clusters, alone=True, partial=None)
    candidates, inside = np.empty((0, 2), np.int64), 1.0
    if context.assigner is not None:
        # At the largest threshold no candidate is ruled out, so these serve every threshold.
        candidates = cross_cluster.find_candidates(subset, np.arange(count), FARTHEST)
        inside = float(np.isin(candidates[:, 1], chosen).mean()) if len(candidates) else 1.0
    stored = context.partial.json("search") if context.partial else None  # JSON keeps every bit of a float
    visited: dict[float, float] = {float(at): float(kept) for at, kept in stored or []}

    def share(threshold: float) -> float:
        if threshold not in visited:
            representative = all_rows(count)
            options = subset.link_options(threshold)
            for cluster in chosen:
                subset.progress(0)
                members = clusters.members(cluster)
                representative[members] = members[link_cluster(subset, cluster, options)]
            kept = float(clusters.keep_mask(representative, settings.cap).sum())
            if context.assigner is not None and threshold > 0:
                merged = cross_cluster.link_neighbors(subset, representative, threshold, candidates)
                across = kept - float(clusters.keep_mask(merged, settings.cap).sum())
                # Scaled from the candidates inside of the sample to all of them.
                kept = max(kept - across / max(inside, 1 / count), 0.0)
            visited[threshold] = kept
            if context.partial:
                context.partial.save_json("search", list(visited.items()))
            failpoint("balance:search", step=len(visited))
        return visited[threshold] / count

    threshold, curve = bisect_threshold(settings.target_keep, count, share)
    return threshold, curve, count


def sample_clusters(sizes: np.ndarray, rows: int, seed: int, assigner: Assigner | None = None) -> list[int]:
    """Samples clusters until they hold at least `rows` samples together, or are all clusters that hold any.

    Args:
        sizes: int64 [k], samples of each cluster.
        assigner: of the k centroids; None: clusters are sampled without their neighbours.

    Returns:
        Cluster numbers in the order sampled.

    Raises:
        UserError: all clusters are empty.
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
    """The cluster, then those whose centroids are nearest to its own; the cluster itself may occur twice."""
    c_KD = assigner.centroids_KD
    near: list[int] = assigner.tile(c_KD[cluster : cluster + 1], min(NEIGHBOURHOOD, len(c_KD)))[1][0].tolist()
    return [cluster, *near]


def bisect_threshold(target: float, count: int, share: Callable[[float], float]) -> tuple[float, Curve]:
    """Finds the threshold whose share is nearest to `target`, by alternating regula falsi and bisection.

    Interpolation is fast where the share is smooth; bisection always converges.

    Args:
        count: samples; the search stops within half a sample of the target.
        share: share kept at a threshold, falling from 1 at distance 0.

    Returns:
        The best threshold and all visited points.
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


def next_threshold(target: float, passes: Curve, curve: Curve) -> float | None:
    """The threshold of the next pass over all samples; None when no other one can be nearer to the target.

    Args:
        passes: (threshold, exact share kept) of the passes so far, in their order; at least one.
        curve: of the search on a sample, which tells the slope.
    """
    low = max((point for point in passes if point[1] > target), default=None)
    high = min((point for point in passes if point[1] <= target), default=None)
    if low and high:
        if high[0] - low[0] <= _RESOLUTION:
            return None
        # Interpolation alone creeps where one end of the bracket is far away.
        part = min(max((low[1] - target) / (low[1] - high[1]), 0.05), 0.95) if len(passes) % 2 == 0 else 0.5
        return low[0] + part * (high[0] - low[0])
    at, kept = passes[-1]
    if at == (FARTHEST if kept > target else 0.0):
        return None
    if len(passes) <= _BY_SLOPE:
        thresholds, shares = np.array(sorted(curve)).T
        shifted = target - kept + np.interp(at, thresholds, shares)
        out = float(np.clip(np.interp(shifted, shares[::-1], thresholds[::-1]), at / 2, min(2 * at, FARTHEST)))
        if (out > at) == (kept > target) and out != at:
            return out
    if kept > target:
        return min(max(2 * at, 0.01), FARTHEST)
    return at / 2 if len(passes) < MAX_PASSES // 2 else 0.0


def explain_share(target: float, points: Curve) -> str:
    """One line that says why no point has the target share."""
    share = min(points, key=lambda point: abs(point[1] - target))[1]
    low = max((point for point in points if point[1] > target), default=None)
    high = min((point for point in points if point[1] <= target), default=None)
    if low and high:
        cause = (
            f"threshold {low[0]:.5f} keeps {low[1]:.2%} and {high[0]:.5f} keeps {high[1]:.2%}, because many pairs have "
            "nearly the same distance"
        )
    elif high:
        cause = "fewer links keep no more, because of --cap"
    else:
        cause = "more links remove no more, because samples are linked inside clusters: use fewer clusters or --cap"
    return f"{share:.2%} of the samples are kept, --target-keep is {target:.2%}: {cause}"
