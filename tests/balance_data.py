"""Embeddings for the tests of the balance stage, and links and choices by brute force over all pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megacid.offline.balance.clusters import Clusters
from megacid.offline.balance.context import BalanceContext, BalanceSettings
from megacid.offline.balance.deduplicate import Decision, decide
from megacid.offline.nearest import Assigner, Metric, prepare
from megacid.offline.rows import ArrayRows


def unit_rows(m: int, dim: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(m, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def brute_near(x: torch.Tensor, threshold: float) -> np.ndarray:
    distance = torch.cdist(x.double(), x.double())
    # fp32 cosines of a few terms are within 3e-7: no pair may be so near the bound that a BLAS decides it.
    assert (distance.square() - threshold**2).div(2).abs().min() > 5e-7
    return (distance < threshold).numpy()


def brute_components(x: torch.Tensor, threshold: float) -> np.ndarray:
    near, representative = brute_near(x, threshold), np.full(len(x), -1)
    for first in range(len(x)):
        if representative[first] >= 0:
            continue
        todo = [first]
        while todo:
            row = todo.pop()
            if representative[row] < 0:
                representative[row] = first
                todo += np.flatnonzero(near[row]).tolist()
    return representative


def brute_greedy(x: torch.Tensor, threshold: float) -> np.ndarray:
    near, representative, kept = brute_near(x, threshold), np.arange(len(x)), []
    for row in range(len(x)):
        earlier = [k for k in kept if near[row, k]]
        if earlier:
            representative[row] = earlier[0]
        else:
            kept.append(row)
    return representative


def brute_medoids(x: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The first row of each group whose squared distances to the others have the least sum, int64 [n], by row.

    x: float16 [n, D]; group: int [n].
    """
    unit = torch.nn.functional.normalize(torch.from_numpy(x.astype(np.float32)), dim=1).double().numpy()
    out = np.empty(len(x), np.int64)
    for value in np.unique(group):
        members = np.flatnonzero(group == value)
        total = ((unit[members, None] - unit[None, members]) ** 2).sum(axis=(1, 2)) / len(members)
        out[members] = members[np.flatnonzero(total < total.min() + 1e-11)[0]]
    return out


def labelled(x: np.ndarray, k: int, metric: str = "cosine", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(labels int32 [n] of the nearest centroid, centroids float32 [k, D], random rows), as after a step of k-means."""
    rng = np.random.default_rng(seed)
    centroids = x[rng.choice(len(x), k, replace=False)].astype(np.float32)
    if metric == "euclidean":
        centroids = centroids * rng.uniform(0.5, 1, (k, 1)).astype(np.float32)
    merit = x.astype(np.float32) @ centroids.T
    if metric == "euclidean":
        merit -= (centroids**2).sum(1) / 2
    return merit.argmax(1).astype(np.int32), centroids


def decided(
    rows: ArrayRows,
    clusters: Clusters,
    settings: BalanceSettings,
    centroids: np.ndarray | None = None,
    metric: Metric = "cosine",
    **more: Any,
) -> Decision:
    cpu = torch.device("cpu")
    assigner = None if centroids is None else Assigner(prepare(centroids, metric, cpu), metric, cpu)
    return decide(BalanceContext(rows, clusters, settings, cpu, assigner, **more))
