"""Merge the cheapest pairs of centroids until k are left.

A cluster that lies across the border of two cells gets centroids on both sides. The levels therefore start with more
than k centroids, and the pairs whose merge adds least to the summed error (Ward's criterion) are merged: two centroids
in one cluster are the cheapest. Each round makes half of the remaining merges, of pairs that share no centroid, taken
from each centroid's nearest neighbours. All ranks do this with the same float64 inputs and stable sorts, so they get
the same bits; nothing is saved, and a restart before the first iteration repeats it.

Legend: K centroids, D width, M neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megacid.offline.nearest import Metric

NEIGHBOURS = 4  # of each centroid that it may be merged with
_PAIRS_PER_MERGE = 8


def merge_cost(x_ED: Tensor, y_ED: Tensor, x_weight_E: Tensor, y_weight_E: Tensor, metric: Metric) -> Tensor:
    """What merging each pair of clusters adds to the summed error, float64 [E].

    Args:
        x_ED, y_ED: Centroids of the pairs, float64; unit rows for the cosine.
        x_weight_E, y_weight_E: float64; Euclidean: number of rows (Ward's criterion); cosine: length of their sum.
    """
    if metric == "euclidean":
        weight_E = x_weight_E * y_weight_E / (x_weight_E + y_weight_E).clamp_min(1)
        return weight_E * (x_ED - y_ED).pow(2).sum(1)
    sum_ED = x_weight_E[:, None] * x_ED + y_weight_E[:, None] * y_ED
    return x_weight_E + y_weight_E - sum_ED.norm(dim=1)


def merge_nearest(
    centroids_KD: Tensor, weight_K: Tensor, k: int, metric: Metric, neighbours: Callable[[Tensor], Tensor]
) -> Tensor:
    """The centroids after K - k merges, fp32 [k, D].

    Args:
        centroids_KD: fp32, on the CPU.
        weight_K: float64, on the CPU, see `merge_cost`.
        neighbours: Maps centroids to int64 [K, M], the numbers of some near ones of each; its own number is ignored. It
            is called once, and again only when the pairs run out: a merged cluster has the neighbours of both.
    """
    pairs = torch.empty(2, 0, dtype=torch.int64)
    while len(centroids_KD) > k:
        left = len(centroids_KD) - k
        if pairs.shape[1] == 0:
            near_KM = neighbours(centroids_KD)
            own_KM = torch.arange(len(near_KM))[:, None].expand_as(near_KM)
            pairs = _each_once(torch.stack([own_KM.flatten(), near_KM.flatten()]), len(centroids_KD))
        low_ED, high_ED = centroids_KD[pairs].double()
        cost_E = merge_cost(low_ED, high_ED, weight_K[pairs[0]], weight_K[pairs[1]], metric)
        if pairs.shape[1] > _PAIRS_PER_MERGE * left:  # the others are too expensive to be merged
            cheap = cost_E.argsort(stable=True)[: _PAIRS_PER_MERGE * left].sort().values
            pairs, cost_E = pairs[:, cheap], cost_E[cheap]
        stay, gone = pairs[:, _disjoint(pairs, cost_E.numpy(), -(-left // 2))]
        weight_E = weight_K[stay] + weight_K[gone]
        # Of two clusters without rows either centroid will do.
        share = torch.where(weight_E > 0, weight_K[stay] / weight_E.clamp_min(1e-300), 1.0)[:, None]
        middle = share * centroids_KD[stay].double() + (1 - share) * centroids_KD[gone].double()
        if metric == "cosine":
            # The weight becomes the length of the new sum; where the two cancel, the direction stays.
            length = middle.norm(dim=1, keepdim=True)
            weight_E = weight_E * length[:, 0]
            middle = torch.where(length > 1e-12, middle / length.clamp_min(1e-12), centroids_KD[stay].double())
        centroids_KD, weight_K = centroids_KD.clone(), weight_K.clone()
        centroids_KD[stay], weight_K[stay] = middle.float(), weight_E
        kept = torch.ones(len(centroids_KD), dtype=torch.bool)
        kept[gone] = False
        centroids_KD, weight_K = centroids_KD[kept], weight_K[kept]
        number = kept.cumsum(0) - 1
        number[gone] = number[stay]
        pairs = _each_once(number[pairs], len(centroids_KD))
    return centroids_KD


def _each_once(pairs: Tensor, count: int) -> Tensor:
    """Distinct pairs of different numbers below `count`, smaller number first, sorted, int64 [2, E]."""
    low, high = pairs.min(0).values, pairs.max(0).values
    code = torch.unique((low * count + high)[low != high])
    return torch.stack([code // count, code % count])


def _disjoint(pairs: Tensor, cost: np.ndarray, count: int) -> Tensor:
    """Numbers of at most `count` pairs that share no centroid, int64: the cheapest first, ties in order."""
    low, high = (side.numpy() for side in pairs)
    taken: set[int] = set()
    chosen: list[int] = []
    for pair in np.argsort(cost, kind="stable"):
        a, b = int(low[pair]), int(high[pair])
        if a not in taken and b not in taken:
            taken |= {a, b}
            chosen.append(int(pair))
            if len(chosen) == count:
                break
    return torch.tensor(chosen, dtype=torch.int64)
