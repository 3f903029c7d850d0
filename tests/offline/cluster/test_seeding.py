"""k-means++ and merging against their definitions in float64."""

import itertools

import numpy as np
import pytest
import torch

from megacid.distributed.stopping import no_progress
from megacid.errors import UserError
from megacid.offline.cluster.memory import check_seeding_memory
from megacid.offline.cluster.merging import merge_cost, merge_nearest
from megacid.offline.cluster.seeding import initial_centroids, plus_plus
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import Metric
from megacid.offline.rows import ArrayRows

CPU = torch.device("cpu")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def error_of(x: np.ndarray, metric: Metric) -> float:
    """Least summed error of rows that share one centroid."""
    if metric == "euclidean":
        return float(((x - x.mean(0)) ** 2).sum())
    return float(len(x) - np.linalg.norm(x.sum(0)))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_plus_plus_returns_the_distance_left_after_each_step(metric: Metric) -> None:
    x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    chosen, left = plus_plus(ArrayRows(x), 20, 500, 3, metric, CPU, no_progress)
    exact = unit(x.astype(np.float64)) if metric == "cosine" else x.astype(np.float64)
    assert len(np.unique(chosen)) == 20
    for count in range(1, 21):
        distance = ((exact[:, None] - exact[chosen[:count]][None]) ** 2).sum(2).min(1)
        assert left[count - 1] == pytest.approx(distance.sum(), rel=1e-5)
    # More clusters than different rows: nothing is left, and any row will do.
    same = np.repeat(x[:3], 50, axis=0)
    chosen, left = plus_plus(ArrayRows(same), 6, 150, 0, metric, CPU, no_progress)
    assert len(np.unique(same[chosen[:3]], axis=0)) == 3 and left[2:] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_merge_cost_is_the_added_error_and_the_cheapest_pair_is_merged(metric: Metric) -> None:
    rng = np.random.default_rng(1)
    middles = rng.normal(size=(8, 6))
    middles[5] = middles[2] + 0.05  # two centroids on one cluster, large ones; two small ones that are farther apart
    parts = [m + 0.1 * rng.normal(size=(n, 6)) for m, n in zip(middles, (40, 60, 50, 70, 30, 50, 20, 90))]
    parts = [unit(part) if metric == "cosine" else part for part in parts]
    sums = np.stack([part.sum(0) for part in parts])
    weight = np.linalg.norm(sums, axis=1) if metric == "cosine" else np.array([len(part) for part in parts], float)
    centroids = torch.from_numpy(sums / weight[:, None])
    pairs = list(itertools.combinations(range(8), 2))
    a, b = (torch.tensor(side) for side in zip(*pairs))
    w = torch.from_numpy(weight)
    added = [
        error_of(np.concatenate([parts[i], parts[j]]), metric) - error_of(parts[i], metric) - error_of(parts[j], metric)
        for i, j in pairs
    ]
    np.testing.assert_allclose(merge_cost(centroids[a], centroids[b], w[a], w[b], metric), added, rtol=1e-6, atol=1e-9)
    best = pairs[int(np.argmin(added))]
    merged = merge_nearest(centroids.float(), w, 7, metric, lambda c: torch.arange(len(c)).repeat(len(c), 1))
    rest = [c for c in range(8) if c not in best]
    both = sums[list(best)].sum(0) / (
        np.linalg.norm(sums[list(best)].sum(0)) if metric == "cosine" else weight[list(best)].sum()
    )
    expected = np.concatenate([both[None], centroids[rest].numpy()])
    np.testing.assert_allclose(np.sort(merged.numpy(), axis=0), np.sort(expected, axis=0), rtol=1e-5, atol=1e-6)
    assert merge_nearest(centroids.float(), w, 3, metric, lambda c: torch.arange(len(c)).repeat(len(c), 1)).shape == (
        3,
        6,
    )


def test_every_planted_cluster_gets_a_centroid_despite_outliers() -> None:
    rng = np.random.default_rng(0)
    middles = unit(rng.normal(size=(25, 32)))
    x = middles[rng.choice(25, 6000, p=rng.dirichlet(np.full(25, 2.0)))] + 0.05 * rng.normal(size=(6000, 32))
    x[::100] = rng.normal(size=(60, 32))  # k-means++ by itself spends centroids on them
    settings = KMeansSettings(k=25, init="k-means++")
    for seed in range(4):
        start = initial_centroids(
            ArrayRows(unit(x).astype(np.float16)), KMeansSettings(**{**vars(settings), "seed": seed}), CPU
        )
        assert (start.numpy() @ middles.T).max(0).min() > 0.8


def test_memory_of_the_sample_is_checked() -> None:
    large = KMeansSettings(k=100_000, init="k-means++", memory_gb=2)
    with pytest.raises(UserError, match=r"k-means\+\+ for 100000 clusters of width 768 needs .* --init random"):
        check_seeding_memory(10**9, 768, large)
    check_seeding_memory(10**9, 768, KMeansSettings(k=100_000, init="random", memory_gb=2))
    check_seeding_memory(10**9, 768, KMeansSettings(k=100_000, init="k-means++", memory_gb=2, method="hierarchical"))
