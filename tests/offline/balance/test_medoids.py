"""--keep medoid: the sample nearest to the mean of its group, against its definition on all pairs in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from balance_data import brute_components, brute_medoids, decided, labelled, unit_rows
from harness import run_ranks

from megacid.errors import UserError
from megacid.offline.balance import deduplicate, medoids
from megacid.offline.balance.clusters import Clusters, group_by_cluster
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.deduplicate import Decision
from megacid.offline.rows import ArrayRows
from megacid.storage.stage_directory import PartialResults


def toy(copies: int = 60) -> tuple[ArrayRows, Clusters, np.ndarray]:
    """Rows with some bit-equal copies of others; (rows, clusters, centroids)."""
    x = unit_rows(700, 4, 5).numpy().astype(np.float16)
    x[-copies:] = x[np.random.default_rng(2).integers(0, 640, copies)]
    label, centroids = labelled(x, 12)
    priority = np.random.default_rng(1).integers(0, 50, 700).astype(np.float32)
    return ArrayRows(x), group_by_cluster(label, priority, 12), centroids


def brute_groups(rows: ArrayRows, clusters: Clusters, threshold: float, neighbors: bool) -> np.ndarray:
    """A number per connected component, int64 [n]: inside clusters, or over all pairs."""
    x = torch.nn.functional.normalize(torch.from_numpy(rows.array.astype(np.float32)), dim=1)
    if neighbors:
        return brute_components(x, threshold)
    out = np.empty(len(x), np.int64)
    for cluster in range(len(clusters.sizes)):
        members = np.sort(clusters.members(cluster))
        out[members] = members[brute_components(x[members], threshold)]
    return out


@pytest.mark.parametrize("neighbors", [0, 11])
@pytest.mark.parametrize("threshold", [0.12, 0.2, 0.25])
def test_each_group_keeps_the_sample_with_the_least_sum_of_squared_distances(threshold: float, neighbors: int) -> None:
    rows, clusters, centroids = toy()
    settings = BalanceSettings(threshold=threshold, keep="medoid", neighbor_clusters=neighbors, block=16)
    decision = decided(rows, clusters, settings, centroids=centroids)
    group = brute_groups(rows, clusters, threshold, bool(neighbors))
    expected = brute_medoids(rows.array, group)
    np.testing.assert_array_equal(decision.representative, expected)
    np.testing.assert_array_equal(decision.keep, expected == np.arange(700))
    # The groups are those of the default; which of their samples is kept differs.
    nearest = decided(rows, clusters, BalanceSettings(threshold, neighbor_clusters=neighbors), centroids=centroids)
    assert nearest.keep.sum() == decision.keep.sum() and (nearest.keep != decision.keep).any()
    assert decision.removed_across_clusters == nearest.removed_across_clusters
    if neighbors:
        label = clusters.label
        crossing = [value for value in np.unique(group) if len(np.unique(label[group == value])) > 1]
        assert len(crossing) > 3, "groups that span clusters were compared"


def test_of_equally_near_samples_the_first_is_kept_whatever_their_place_in_the_cluster() -> None:
    pair, copies = unit_rows(2, 8, 1), unit_rows(1, 8, 3)
    pair[1] = torch.nn.functional.normalize(pair[0] + 0.01 * pair[1], dim=0)
    near = torch.cat([pair, copies.repeat(5, 1)]).numpy()
    for x, threshold, expected in ((near, 0.05, [0, 0, 2, 2, 2, 2, 2]), (np.eye(3, dtype=np.float32), 1.5, [0, 0, 0])):
        for seed in range(4):
            priority = np.random.default_rng(seed).random(len(x))
            clusters = group_by_cluster(np.zeros(len(x), np.int32), priority, 1)
            decision = decided(ArrayRows(x), clusters, BalanceSettings(threshold, keep="medoid"))
            assert decision.representative.tolist() == expected


def _decide(rows: ArrayRows, clusters: Clusters, settings: BalanceSettings, centroids: np.ndarray) -> Decision:
    return decided(rows, clusters, settings, centroids=centroids, part_pairs=100)


def test_ranks_blocks_and_a_continued_run_choose_the_same_medoids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, clusters, centroids = toy()
    settings = BalanceSettings(threshold=0.2, keep="medoid", neighbor_clusters=5)
    whole = decided(rows, clusters, settings, centroids=centroids)
    assert np.bincount(whole.representative).max() > 8
    # One group is larger than a part and is read in blocks; the others are in several parts.
    monkeypatch.setattr(medoids, "_PART_ROWS", 4)
    monkeypatch.setattr(medoids, "_BLOCK_ROWS", 3)
    work = PartialResults(tmp_path, {})
    work.begin()
    decided(rows, clusters, settings, centroids=centroids, partial=work, part_pairs=100)
    parts = sorted(work.folder.glob("medoids-*.npy"))
    assert len(parts) > 4
    parts[2].unlink()
    parts[3].write_bytes(b"cut")
    read = parts[1].stat().st_mtime_ns
    again = decided(rows, clusters, settings, centroids=centroids, partial=work, part_pairs=100)
    assert parts[2].exists() and parts[1].stat().st_mtime_ns == read, "what was finished is not computed again"
    ranks = [
        decision for world in (2, 4) for decision in run_ranks(_decide, world, rows, clusters, settings, centroids)
    ]
    for decision in (again, *ranks):
        np.testing.assert_array_equal(decision.representative, whole.representative)
        np.testing.assert_array_equal(decision.keep, whole.keep)


def test_a_pair_is_not_read_and_a_group_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.repeat(unit_rows(40, 8).numpy(), 3, axis=0)[: 3 * 40 - 20 * 3]
    x = np.concatenate([x, np.repeat(unit_rows(20, 8, 9).numpy(), 2, axis=0)])
    taken: list[int] = []

    class Counted(ArrayRows):
        def take(self, rows: np.ndarray) -> np.ndarray:
            taken.extend(rows.tolist())
            return super().take(rows)

    clusters = group_by_cluster(np.arange(len(x)) % 1, np.arange(len(x)), 1)
    decided(Counted(x), clusters, BalanceSettings(threshold=0.01, keep="medoid"))
    medoid_reads = np.bincount(taken, minlength=len(x)) - 1  # the links read every row once
    assert medoid_reads.tolist() == [1] * 60 + [0] * 40


@pytest.mark.parametrize("cap", [None, 20])
def test_the_share_is_reached_and_the_cap_keeps_the_medoids_nearest_to_the_centroid(cap: int | None) -> None:
    rows, clusters, centroids = toy()
    settings = BalanceSettings(target_keep=0.3, keep="medoid", neighbor_clusters=5, cap=cap)
    decision = decided(rows, clusters, settings, centroids=centroids)
    assert decision.keep.mean() == pytest.approx(0.3, abs=2.5 / 700)
    for cluster in range(12):
        members = clusters.members(cluster)
        own = members[decision.representative[members] == members]
        assert own[:cap].tolist() == members[decision.keep[members]].tolist()


@pytest.mark.parametrize("cap", [None, 20])
def test_medoids_are_computed_once_unless_the_share_depends_on_them(
    monkeypatch: pytest.MonkeyPatch, cap: int | None
) -> None:
    rows, clusters, centroids = toy()
    passes: dict[str, list[object]] = {"_link": [], "represent_by_medoids": []}
    for name, calls in passes.items():
        whole = getattr(deduplicate, name)
        monkeypatch.setattr(deduplicate, name, lambda *a, calls=calls, whole=whole: calls.append(a) or whole(*a))
    how = {"keep": "medoid", "neighbor_clusters": 5, "cap": cap}
    found = decided(rows, clusters, BalanceSettings(target_keep=0.3, search_rows=60, **how), centroids=centroids)
    links, medoid_passes = map(len, passes.values())
    assert links > 2 and medoid_passes == (1 if cap is None else links)
    given = decided(rows, clusters, BalanceSettings(found.threshold, **how), centroids=centroids)
    np.testing.assert_array_equal(found.representative, given.representative)
    np.testing.assert_array_equal(found.keep, given.keep)
    assert found.removed_across_clusters == given.removed_across_clusters > 0


@pytest.mark.parametrize("link", ["greedy", "semdedup"])
def test_rules_that_need_an_order_before_groups_are_refused(link: str) -> None:
    with pytest.raises(UserError, match=f"--link is '{link}', expected components with --keep medoid.*another --keep"):
        BalanceSettings(threshold=0.1, link=link, keep="medoid")  # type: ignore[arg-type]


def test_an_embedding_without_a_length_is_named() -> None:
    x = np.repeat(unit_rows(1).numpy(), 3, axis=0)
    x[1] = np.nan
    context = medoids.BalanceContext(
        ArrayRows(x),
        group_by_cluster(np.zeros(3, np.int32), np.zeros(3), 1),
        BalanceSettings(threshold=0.1, keep="medoid"),
        torch.device("cpu"),
    )
    with pytest.raises(UserError, match="row 1 of the array is zero or holds NaN or infinity"):
        medoids.represent_by_medoids(context, np.zeros(3, np.int64))
