"""Merge the cheapest pairs of centroids until k are left.

A cluster that lies across the border of two cells gets centroids on both sides. The levels therefore start with more
than k centroids, and the pairs whose merge adds least to the summed error (Ward's criterion) are merged: two centroids
in one cluster are the cheapest. Each round makes half of the remaining merges, of pairs that share no centroid, taken
from each centroid's nearest neighbours. One rank does this and sends the result to the others. Pairs are handled in
blocks, whose size does not change a bit. Nothing is saved, and a restart before the first iteration repeats it.

Legend: K centroids, D width, M neighbours, E pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from megacid.offline.nearest import Metric

NEIGHBOURS = 4  # of each centroid that it may be merged with
_PAIRS_PER_MERGE = 8
BLOCK_BYTES = 1 << 24  # of the pairs that are handled at once: larger blocks are not faster
_PAIR_BYTES = 48  # per value: two rows in fp32, and five in fp64
_CENTROID_BYTES = 512  # per centroid: its pairs, their costs and orders


def merging_bytes(count: int, dim: int) -> int:
    """Least bytes of `merge_nearest` for `count` centroids, with the centroids and a second copy for the search."""
    return count * (8 * dim + _CENTROID_BYTES) + _PAIR_BYTES * dim


def _pairs_at_once(count: int, dim: int, memory_bytes: float) -> int:
    spare = min(BLOCK_BYTES, memory_bytes - merging_bytes(count, dim))
    return max(int(spare / (_PAIR_BYTES * dim)), 0) + 1


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
    centroids_KD: Tensor,
    weight_K: Tensor,
    k: int,
    metric: Metric,
    neighbours: Callable[[Tensor], Tensor],
    memory_bytes: float = math.inf,
) -> Tensor:
    """The centroids after K - k merges, fp32 [k, D]: the first rows of `centroids_KD`, which is overwritten.

    Args:
        centroids_KD: fp32, on the CPU.
        weight_K: float64, on the CPU, see `merge_cost`.
        neighbours: Maps centroids to int64 [K, M], the numbers of some near ones of each; its own number is ignored. It
            is called once, and again only when the pairs run out: a merged cluster has the neighbours of both.
        memory_bytes: Bound on the memory, at least `merging_bytes`; does not change a bit.
    """
    pairs_at_once = _pairs_at_once(len(centroids_KD), centroids_KD.shape[1], memory_bytes)
    pairs = torch.empty(2, 0, dtype=torch.int64)
    while len(centroids_KD) > k:
        left = len(centroids_KD) - k
        if pairs.shape[1] == 0:
            near_KM = neighbours(centroids_KD)
            own_KM = torch.arange(len(near_KM))[:, None].expand_as(near_KM)
            pairs = _each_once(torch.stack([own_KM.flatten(), near_KM.flatten()]), len(centroids_KD))
        cost_E = _costs(centroids_KD, weight_K, pairs, metric, pairs_at_once)
        if pairs.shape[1] > _PAIRS_PER_MERGE * left:  # the others are too expensive to be merged
            cheap = cost_E.argsort(stable=True)[: _PAIRS_PER_MERGE * left].sort().values
            pairs, cost_E = pairs[:, cheap], cost_E[cheap]
        stay, gone = pairs[:, _disjoint(pairs, cost_E.numpy(), -(-left // 2))]
        weight_K = weight_K.clone()
        for block in _blocks(len(stay), pairs_at_once):
            _merge(centroids_KD, weight_K, stay[block], gone[block], metric)
        kept = torch.ones(len(centroids_KD), dtype=torch.bool)
        kept[gone] = False
        centroids_KD, weight_K = _compact(centroids_KD, kept, pairs_at_once), weight_K[kept]
        number = kept.cumsum(0) - 1
        number[gone] = number[stay]
        pairs = _each_once(number[pairs], len(centroids_KD))
    return centroids_KD


def _blocks(count: int, step: int) -> Iterator[slice]:
    """Slices of `count` pairs."""
    return (slice(low, low + step) for low in range(0, count, step))


def _costs(centroids_KD: Tensor, weight_K: Tensor, pairs: Tensor, metric: Metric, step: int) -> Tensor:
    """`merge_cost` of all pairs, float64 [E]."""
    cost_E = torch.empty(pairs.shape[1], dtype=torch.float64)
    for block in _blocks(len(cost_E), step):
        low, high = pairs[:, block]
        x_ED, y_ED = centroids_KD[low].double(), centroids_KD[high].double()
        cost_E[block] = merge_cost(x_ED, y_ED, weight_K[low], weight_K[high], metric)
    return cost_E


def _merge(centroids_KD: Tensor, weight_K: Tensor, stay: Tensor, gone: Tensor, metric: Metric) -> None:
    """Replace the centroids and weights of `stay` by those of the merged pairs, in place."""
    weight_E = weight_K[stay] + weight_K[gone]
    # Of two clusters without rows either centroid will do.
    share = torch.where(weight_E > 0, weight_K[stay] / weight_E.clamp_min(1e-300), 1.0)[:, None]
    middle = share * centroids_KD[stay].double() + (1 - share) * centroids_KD[gone].double()
    if metric == "cosine":
        # The weight becomes the length of the new sum; where the two cancel, the direction stays.
        length = middle.norm(dim=1, keepdim=True)
        weight_E = weight_E * length[:, 0]
        middle = torch.where(length > 1e-12, middle / length.clamp_min(1e-12), centroids_KD[stay].double())
    centroids_KD[stay], weight_K[stay] = middle.float(), weight_E


def _compact(centroids_KD: Tensor, kept: Tensor, step: int) -> Tensor:
    """Move the kept rows to the front, in place; returns them."""
    rows = kept.nonzero()[:, 0]
    for block in _blocks(len(rows), step):
        # A row never moves behind one that is read later.
        centroids_KD[block.start : block.start + len(rows[block])] = centroids_KD[rows[block]]
    return centroids_KD[: len(rows)]


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
