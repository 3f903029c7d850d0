"""Merging of near centroids: the same bits in blocks of any size, within its memory, on the first rank alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from benchmarks.anonymous_memory import PeakAnonymous, anonymous_bytes
from megacid.offline.cluster import hierarchical, merging
from megacid.offline.cluster.merging import merge_cost, merge_nearest, merging_bytes
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import Metric
from megacid.offline.rows import ArrayRows


def centroids(count: int, dim: int, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    """(centroids, weights, every seventh 0)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, dim, generator=generator)
    weight = torch.rand(count, dtype=torch.float64, generator=generator) * 50
    weight[::7] = 0
    return (torch.nn.functional.normalize(x, dim=1) if metric == "cosine" else x), weight


def nearest(x_KD: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x_KD, x_KD).topk(min(5, len(x_KD)), largest=False).indices


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dim", [1, 3, 17, 64])
def test_blocks_of_any_size_give_the_same_bits(dim: int, metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = centroids(300, dim, metric)
    whole = merge_nearest(x.clone(), weight, 150, metric, nearest)
    assert whole.shape == (150, dim)
    for pairs in (0, 6, 63):
        monkeypatch.setattr(merging, "BLOCK_BYTES", pairs * merging._PAIR_BYTES * dim)
        assert torch.equal(merge_nearest(x.clone(), weight, 150, metric, nearest), whole)
    least = merging_bytes(300, dim)
    assert torch.equal(merge_nearest(x.clone(), weight, 150, metric, nearest, least), whole)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_round_of_merges_is_that_of_the_definition(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = centroids(40, 6, metric)
    monkeypatch.setattr(merging, "BLOCK_BYTES", 3 * merging._PAIR_BYTES * 6)
    a, b = np.triu_indices(40, 1)
    cost = merge_cost(x[a].double(), x[b].double(), weight[a], weight[b], metric)
    stay, gone = (int(side[int(cost.argmin())]) for side in (a, b))
    share = weight[stay] / (weight[stay] + weight[gone]).clamp_min(1e-300) if weight[stay] + weight[gone] else 1.0
    middle = share * x[stay].double() + (1 - share) * x[gone].double()
    expected = x.clone()
    expected[stay] = (middle / middle.norm() if metric == "cosine" else middle).float()
    expected = expected[torch.arange(40) != gone]
    merged = merge_nearest(x, weight, 39, metric, lambda c: torch.arange(len(c)).repeat(len(c), 1))
    torch.testing.assert_close(merged, expected)


def test_the_peak_stays_within_the_bound() -> None:
    count, dim = 30_000, 256
    x, weight = centroids(count, dim, "cosine")
    near = torch.randint(count, (count, 5), generator=torch.Generator().manual_seed(1))
    merge_nearest(x[:1000].clone(), weight[:1000], 900, "cosine", lambda c: near[: len(c)] % len(c))  # the libraries'
    bound = merging_bytes(count, dim) + (1 << 20)
    before = anonymous_bytes()
    with PeakAnonymous() as peak:
        assert len(merge_nearest(x, weight, 28_000, "cosine", lambda c: near[: len(c)] % len(c), bound)) == 28_000
    # The centroids and their copy for the search are the caller's here. All pairs at once would need 1.4 GB.
    assert peak.bytes - before < bound - 8 * count * dim


def _merges_of_rank(x: np.ndarray, settings: KMeansSettings, work: Path) -> tuple[int, torch.Tensor]:
    calls = 0

    def counted(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return merge_nearest(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hierarchical, "merge_nearest", counted)
        centroids = hierarchical.two_level(ArrayRows(x), settings, work).centroids
    assert dist.get_world_size() == 3
    return calls, centroids


def test_the_first_rank_merges_for_all(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float16)
    settings = KMeansSettings(30, method="hierarchical", init="k-means++", iterations=2, refine=1, metric="euclidean")
    alone = hierarchical.two_level(ArrayRows(x), settings, tmp_path / "alone").centroids
    ranks = run_ranks(_merges_of_rank, 3, x, settings, tmp_path / "ranks")
    assert [calls for calls, _ in ranks] == [1, 0, 0]
    assert all(torch.equal(centroids, alone) for _, centroids in ranks)
