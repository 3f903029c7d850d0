"""k-means++ and merging against their definitions in float64."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megacid.distributed.stopping import no_progress
from megacid.errors import UserError
from megacid.offline.cluster import seeding
from megacid.offline.cluster.hierarchical import two_level
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.memory import check_memory
from megacid.offline.cluster.merging import merge_cost, merge_nearest
from megacid.offline.cluster.seeding import initial_centroids, num_draws, plus_plus, sample_rows, seed_count
from megacid.offline.cluster.state import KMeansSettings, Method
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
    chosen, left = plus_plus(ArrayRows(x), 20, 500, 0, 3, metric, CPU, no_progress)
    exact = unit(x.astype(np.float64)) if metric == "cosine" else x.astype(np.float64)
    assert len(np.unique(chosen)) == 20
    for count in range(1, 21):
        distance = ((exact[:, None] - exact[chosen[:count]][None]) ** 2).sum(2).min(1)
        assert left[count - 1] == pytest.approx(distance.sum(), rel=1e-5)
    # More clusters than different rows: nothing is left, and any row will do.
    same = np.repeat(x[:3], 50, axis=0)
    chosen, left = plus_plus(ArrayRows(same), 6, 150, 0, 0, metric, CPU, no_progress)
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


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_batches_return_the_distance_left_after_each_step(metric: Metric) -> None:
    x = np.random.default_rng(0).normal(size=(900, 6)).astype(np.float32)
    exact = unit(x.astype(np.float64)) if metric == "cosine" else x.astype(np.float64)
    chosen, left = plus_plus(ArrayRows(x), 300, 900, 10**9, 3, metric, CPU, no_progress)
    assert len(np.unique(chosen)) == len(left) == 300
    distance = ((exact[:, None] - exact[chosen][None]) ** 2).sum(2)
    np.testing.assert_allclose(left, np.minimum.accumulate(distance, 1).sum(0), rtol=1e-4, atol=1e-3)
    # Fewer different rows than centroids.
    same = np.repeat(x[:100], 9, axis=0)
    chosen, left = plus_plus(ArrayRows(same), 300, 900, 10**9, 0, metric, CPU, no_progress)
    assert len(chosen) == 300 and len(np.unique(same[chosen], axis=0)) > 90 and left[-1] < 1e-2


def test_rows_drawn_in_batches_are_distributed_as_if_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "num_draws", lambda count: 1)  # without the greedy choice
    x = np.diag([1.0, 2.0, 3.0, 4.0, 5.0]).astype(np.float32)
    square = ((x[:, None] - x[None]) ** 2).sum(2)
    expected = np.zeros((5, 5))
    for rows in itertools.permutations(range(5), 4):
        share = 0.2
        for step in range(1, 4):
            nearest = square[:, list(rows[:step])].min(1)
            share *= nearest[rows[step]] / nearest.sum()
        expected[rows[2:]] += share
    runs, counts, batches = 800, np.zeros((5, 5)), []
    draw = seeding._draw

    def counted(cumulative: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        batches.append(count)
        return draw(cumulative, count, rng)

    monkeypatch.setattr(seeding, "_draw", counted)
    for seed in range(runs):
        chosen, _ = seeding._in_batches(torch.from_numpy(x), 4, 10**6, np.random.default_rng(seed), no_progress)
        counts[tuple(chosen[2:])] += 1
    assert max(batches) > 1  # the fourth row was drawn by the distances before the third
    error = (counts - runs * expected)[expected > 0] ** 2 / (runs * expected[expected > 0])
    assert error.sum() < 50  # chi-square with 19 degrees of freedom: 1 in 7,000


@pytest.mark.parametrize(
    ("n", "k", "comparisons"), [(3000, 300, 8 * 3000 * 300), (1000, 300, 400 * 1000), (900, 300, 1)]
)
def test_batches_compare_at_most_as_often_as_stated(
    n: int, k: int, comparisons: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(k, 8))[rng.integers(k, size=n)] + 0.1 * rng.normal(size=(n, 8))).astype(np.float32)
    compared, steps, mm, distances = 0, 0, torch.mm, seeding._distances

    def counted(a: torch.Tensor, b: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
        nonlocal compared
        compared += a.shape[0] * b.shape[1]
        return mm(a, b, **rest)

    def first(x_BD: torch.Tensor, square_B: torch.Tensor, place_L: torch.Tensor) -> torch.Tensor:
        nonlocal compared
        compared += len(x_BD) * len(place_L)
        return distances(x_BD, square_B, place_L)

    def step(rows: int) -> None:
        nonlocal steps
        steps += 1

    monkeypatch.setattr(seeding, "_distances", first)
    monkeypatch.setattr(seeding.torch, "mm", counted)
    chosen, _ = plus_plus(ArrayRows(x), k, n, comparisons, 0, "euclidean", CPU, step)
    assert len(chosen) == k and steps == k - 1
    assert compared <= max(comparisons, k * n)
    if comparisons > 1000 * n:  # enough for the greedy form, which uses much of it
        assert compared > 0.5 * num_draws(k) * k * n


@pytest.mark.parametrize("k", [300, 1000, 4096])
def test_the_bound_leaves_the_greedy_form_its_candidates(k: int) -> None:
    for rows_per_centroid in (4, 30, 100, 1000):
        n = rows_per_centroid * k
        comparisons = seed_count(k) * num_draws(seed_count(k)) * sample_rows(n, k, 64)
        assert comparisons < 0.75 * seeding.SEEDING_ITERATIONS * n * k  # three of four candidates are accepted


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
        check_memory(10**9, 768, large, 10**6, CPU)
    with pytest.raises(UserError, match=r"the iterations over 100000 clusters of width 768 need .* fewer clusters"):
        check_memory(10**9, 768, KMeansSettings(k=100_000, init="random", memory_gb=1), 10**6, CPU)
    check_memory(10**9, 768, KMeansSettings(k=100_000, init="random", memory_gb=2), 10**6, CPU)
    check_memory(
        *(10**9, 768, KMeansSettings(k=100_000, init="k-means++", memory_gb=2, method="hierarchical"), 10**6, CPU)
    )


@pytest.mark.parametrize("method", ["flat", "hierarchical"])
@pytest.mark.parametrize("k", [3, 40, 900])
def test_the_least_memory_that_the_error_names_works(method: Method, k: int, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4000, 8)).astype(np.float32)
    settings = KMeansSettings(
        k, metric="euclidean", method=method, init="k-means++", iterations=1, refine=1, memory_gb=1e-6
    )

    def fit(memory_gb: float) -> torch.Tensor:
        one = replace(settings, memory_gb=memory_gb)
        if method == "flat":
            return kmeans(ArrayRows(x), one).centroids
        return two_level(ArrayRows(x), one, tmp_path / str(memory_gb)).centroids

    with pytest.raises(UserError, match=f"memory bound is 1e-06 GB, .* {k} clusters of width 8 need") as refused:
        fit(1e-6)
    least = float(re.search(r"raise --memory-gb to (\S+) or more", str(refused.value))[1])  # type: ignore[index]
    with pytest.raises(UserError, match="raise --memory-gb to"):
        fit(0.98 * least)
    assert torch.equal(fit(least), fit(4.0))
