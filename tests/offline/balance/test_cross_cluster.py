"""The second pass across neighbouring clusters, and clusters read in panels, against brute force on all pairs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from balance_data import brute_components, brute_greedy, decided, labelled, unit_rows
from harness import run_ranks

from megacid.distributed.array_exchange import ALONE
from megacid.errors import UserError
from megacid.offline.balance import cross_cluster, linking
from megacid.offline.balance.clusters import Clusters, group_by_cluster
from megacid.offline.balance.context import BalanceContext, BalanceSettings
from megacid.offline.balance.cross_cluster import find_candidates, match_candidates
from megacid.offline.balance.deduplicate import Decision
from megacid.offline.balance.group_merge import merge_groups
from megacid.offline.balance.linking import LinkOptions, UnitRows, panel_rows, representatives
from megacid.offline.cluster.results import read_centroids
from megacid.offline.nearest import Assigner
from megacid.offline.rows import ArrayRows
from megacid.storage.stage_directory import PartialResults

CPU = torch.device("cpu")


@pytest.mark.parametrize("panel", [7, 14, 63, 98])
@pytest.mark.parametrize(("link", "brute"), [("components", brute_components), ("greedy", brute_greedy)])
def test_panels_change_nothing(panel: int, link: str, brute: Callable[..., np.ndarray]) -> None:
    x = unit_rows(90)
    rows = UnitRows(ArrayRows(x.numpy()), np.arange(90), CPU)
    np.testing.assert_array_equal(representatives(rows, LinkOptions(0.2, link, 7, panel)), brute(rows[:], 0.2))


def test_large_cluster_is_read_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of 300,000 rows in 2 GiB, and that no more rows than that are asked for at once."""
    for dim in (64, 768, 1280):
        panel = panel_rows(dim, 1024)
        assert panel % 1024 == 0 and 20 * dim * panel <= linking.PANEL_BYTES < (2 << 30) - (1 << 30)
    assert panel_rows(1 << 30, 1024) == 1024
    monkeypatch.setattr(linking, "PANEL_BYTES", 20 * 3 * 100)
    asked = []

    class Counted(ArrayRows):
        def take(self, rows: np.ndarray) -> np.ndarray:
            asked.append(len(rows))
            return super().take(rows)

    image = Counted(unit_rows(450).numpy())
    clusters = group_by_cluster(np.zeros(450, np.int32), np.zeros(450), 1)
    few = decided(image, clusters, BalanceSettings(threshold=0.2, block=10))
    assert max(asked) == 100 and len(asked) > 10
    monkeypatch.undo()
    np.testing.assert_array_equal(
        few.representative, decided(image, clusters, BalanceSettings(threshold=0.2, block=10)).representative
    )


def toy(n: int = 700, k: int = 12, metric: str = "cosine") -> tuple[ArrayRows, Clusters, np.ndarray]:
    x = unit_rows(n, 4, 5).numpy().astype(np.float16)
    label, centroids = labelled(x, k, metric)
    priority = np.random.default_rng(1).integers(0, 50, n).astype(np.float32)
    return ArrayRows(x), group_by_cluster(label, priority, k), centroids


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("threshold", [0.05, 0.12, 0.5])
def test_components_over_all_neighbours_are_those_of_all_pairs(threshold: float, metric: str) -> None:
    rows, clusters, centroids = toy(metric=metric)
    settings = BalanceSettings(threshold=threshold, neighbor_clusters=11, block=16)
    decision = decided(rows, clusters, settings, centroids=centroids, metric=metric)
    order = np.argsort(clusters.priority, kind="stable")
    x = torch.nn.functional.normalize(torch.from_numpy(rows.array[order].astype(np.float32)), dim=1)
    expected = np.empty(len(order), np.int64)
    expected[order] = order[brute_components(x, threshold)]
    np.testing.assert_array_equal(decision.representative, expected)
    inside = decided(rows, clusters, BalanceSettings(threshold=threshold))
    assert decision.removed_across_clusters == inside.keep.sum() - decision.keep.sum() >= 0
    assert threshold == 0.05 or decision.removed_across_clusters > 0


@pytest.mark.parametrize("link", ["components", "greedy"])
def test_large_borders_are_read_in_panels(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, clusters, centroids = toy(k=3)
    settings = BalanceSettings(threshold=0.2, link=link, neighbor_clusters=2, block=8)
    whole = decided(rows, clusters, settings, centroids=centroids)
    monkeypatch.setattr(linking, "PANEL_BYTES", 4 * 20 * 4 * 16)
    assert panel_rows(4, 8, linking.PANEL_BYTES // 4) == 16 and whole.removed_across_clusters > 10
    large = []
    link_large = cross_cluster._link_large
    monkeypatch.setattr(cross_cluster, "_link_large", lambda x, *rest: large.append(type(x)) or link_large(x, *rest))
    few = decided(rows, clusters, settings, centroids=centroids)
    np.testing.assert_array_equal(few.representative, whole.representative)
    assert UnitRows in large and few.removed_across_clusters == whole.removed_across_clusters


def test_greedy_leaves_no_two_near_ones_and_removes_only_near_kept_ones() -> None:
    rows, clusters, centroids = toy()
    decision = decided(
        rows,
        clusters,
        BalanceSettings(threshold=0.15, link="greedy", neighbor_clusters=11, block=16),
        centroids=centroids,
    )
    x = torch.nn.functional.normalize(torch.from_numpy(rows.array.astype(np.float32)), dim=1)
    distance = torch.cdist(x.double(), x.double()).numpy()
    kept = np.flatnonzero(decision.keep)
    near = distance[np.ix_(kept, kept)] < 0.15
    assert near.sum() == len(kept)  # each one to itself
    assert decision.keep[decision.representative].all()
    # Near the kept one, or near one that was kept until the second pass and is near the kept one itself.
    assert (distance[np.arange(len(x)), decision.representative] < 0.3).all()
    # The same over the survivors of the first pass as one greedy pass over them in order of preference.
    first = np.flatnonzero(decided(rows, clusters, BalanceSettings(threshold=0.15, link="greedy")).keep)
    first = first[np.argsort(clusters.priority[first], kind="stable")]
    np.testing.assert_array_equal(decision.representative[first], first[brute_greedy(x[first], 0.15)])


def test_greedy_follows_a_chain_in_order() -> None:
    chain = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
    assert merge_groups(np.arange(6), chain, np.zeros(6), "greedy", ALONE).tolist() == [0, 0, 2, 2, 4, 5]
    assert merge_groups(np.arange(6), chain, np.zeros(6), "components", ALONE).tolist() == [0, 0, 0, 0, 0, 5]
    assert merge_groups(np.arange(6), chain, np.array([9, 1, 2, 0, 9, 9]), "greedy", ALONE).tolist() == [
        1,
        1,
        3,
        3,
        3,
        5,
    ]
    # What the first pass removed for row 1 follows it.
    assert merge_groups(np.array([0, 1, 1]), np.array([[0, 1]]), np.zeros(3), "greedy", ALONE).tolist() == [0, 0, 0]


def test_cap_counts_what_both_passes_keep() -> None:
    rows, clusters, centroids = toy()
    decision = decided(rows, clusters, BalanceSettings(threshold=0.12, neighbor_clusters=3, cap=4), centroids=centroids)
    for cluster in range(12):
        members = clusters.order[clusters.starts[cluster] : clusters.starts[cluster + 1]]
        own = members[decision.representative[members] == members]
        assert members[decision.keep[members]].tolist() == own[:4].tolist()


def test_candidates_are_the_clusters_behind_a_border_in_reach() -> None:
    centroids = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    # The border between the first two lies at 45 degrees; of a unit vector, 0.1 is 5.7 degrees.
    angle = torch.deg2rad(torch.tensor([0.0, 38.0, 41.0, 49.0, 90.0, 180.0]))
    x = torch.stack([angle.cos(), angle.sin()], dim=1).numpy()
    rows, label = np.arange(6), np.array([0, 0, 0, 1, 1, 2], np.int32)
    assigner = Assigner(centroids, "cosine", CPU)
    settings = BalanceSettings(threshold=0.1, neighbor_clusters=2)
    context = BalanceContext(ArrayRows(x), group_by_cluster(label, np.zeros(6), 3), settings, CPU, assigner)
    entries = find_candidates(context, rows, 0.1)
    assert sorted(entries.tolist()) == [[2, 1], [3, 0]]
    # No sample of cluster 2 has cluster 1 as a candidate.
    pairs = match_candidates(np.concatenate([entries, [[4, 2], [1, 1]]]), label, 3)
    assert (pairs.rows.tolist(), pairs.starts.tolist(), pairs.middles.tolist()) == ([1, 2, 3], [0, 3], [2])
    assert len(match_candidates(np.empty((0, 2), np.int64), label, 3)) == 0


def _decide(rows: ArrayRows, clusters: Clusters, settings: BalanceSettings, centroids: np.ndarray) -> Decision:
    cross_cluster.CHUNK_ROWS = 100
    return decided(rows, clusters, settings, centroids=centroids, part_pairs=500)


@pytest.mark.parametrize("link", ["components", "greedy"])
def test_restarts_and_ranks_decide_alike(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, clusters, centroids = toy()
    settings = BalanceSettings(threshold=0.15, link=link, neighbor_clusters=5)
    whole = decided(rows, clusters, settings, centroids=centroids)
    monkeypatch.setattr(cross_cluster, "CHUNK_ROWS", 100)
    monkeypatch.setattr(cross_cluster, "tile_rows", lambda device: 50)
    work = PartialResults(tmp_path, {})
    work.begin()
    calls = 0

    class Cut(Exception):  # noqa: N818
        pass

    def cut(done: int) -> None:
        nonlocal calls
        calls += 1
        if calls > patience:
            raise Cut

    # Each run goes a little farther than the one before, until one ends.
    for attempt in range(1000):
        calls, patience = 0, 20 + 10 * attempt
        try:
            decision = decided(
                rows, clusters, settings, centroids=centroids, partial=work, progress=cut, part_pairs=500
            )
            break
        except Cut:
            assert attempt == 0 or (work.folder / "settings.json").exists()
    assert attempt > 2 and len(list(work.folder.glob("cross-cluster-*.npy"))) > 2
    assert len(list(work.folder.glob("candidates-*.npy"))) > 3
    for other in (decision, *run_ranks(_decide, 2, rows, clusters, settings, centroids)):
        np.testing.assert_array_equal(other.representative, whole.representative)
        np.testing.assert_array_equal(other.keep, whole.keep)


def test_planted_copies_are_found_across_borders() -> None:
    """Of 50,000 vectors without structure, where borders are everywhere, 2,000 are rotated copies of others."""
    rng = np.random.default_rng(0)
    n, copies, dim, k = 48_000, 2_000, 32, 200
    x = rng.standard_normal((n, dim)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    of = rng.choice(n, copies, replace=False)
    noise = rng.standard_normal((copies, dim)).astype(np.float32)
    turned = x[of] + 0.1 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    x = np.concatenate([x, turned / np.linalg.norm(turned, axis=1, keepdims=True)]).astype(np.float16)
    label, centroids = labelled(x, k)
    clusters = group_by_cluster(label, np.zeros(len(x)), k)
    crossing = label[of] != label[n:]
    assert 0.1 < crossing.mean() < 0.6

    def score(decision: Decision) -> tuple[float, float]:
        removed = np.flatnonzero(~decision.keep)
        right = (removed >= n) & (decision.representative[removed] == of[np.maximum(removed - n, 0)])
        return float(right.sum() / len(removed)), float(right.sum() / copies)

    inside = score(decided(ArrayRows(x), clusters, BalanceSettings(threshold=0.15)))
    assert inside[0] >= 0.99 and inside[1] == pytest.approx(1 - crossing.mean(), abs=0.001)
    for link in ("components", "greedy"):
        settings = BalanceSettings(threshold=0.15, neighbor_clusters=4, link=link)
        precision, recall = score(decided(ArrayRows(x), clusters, settings, centroids=centroids))
        assert precision >= 0.99 and recall >= 0.99, (link, precision, recall)


def test_bad_input_is_named(tmp_path: Path) -> None:
    rows, clusters, centroids = toy()
    with pytest.raises(UserError, match="--neighbor-clusters is -1, expected 0"):
        BalanceSettings(threshold=0.1, neighbor_clusters=-1)
    with pytest.raises(ValueError, match="there is no assigner of the centroids"):
        decided(rows, clusters, BalanceSettings(threshold=0.1, neighbor_clusters=1))
    (tmp_path / "meta.json").write_text('{"made_by": "cluster", "k": 12, "metric": "cosine"}')
    np.save(tmp_path / "centroids.npy", centroids[:3])
    with pytest.raises(UserError, match=r"shape \(3, 4\), expected floating point \(12, 4\)"):
        read_centroids(tmp_path, 4)
    centroids[3, 1] = np.nan
    np.save(tmp_path / "centroids.npy", centroids)
    with pytest.raises(UserError, match="NaN or infinity"):
        read_centroids(tmp_path, 4)
