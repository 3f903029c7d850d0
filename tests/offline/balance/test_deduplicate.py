"""Linking and choosing against brute force on all pairs; the search; the numbers of the report."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from balance_data import brute_components, brute_greedy, decided, labelled, unit_rows
from harness import run_ranks

from megacid.errors import UserError
from megacid.offline.balance import within_cluster
from megacid.offline.balance.clusters import group_by_cluster
from megacid.offline.balance.context import BalanceSettings, Keep, part_bounds
from megacid.offline.balance.linking import LinkOptions, near_pairs, representatives
from megacid.offline.balance.preference import preference
from megacid.offline.balance.report import planted_report, power_histogram
from megacid.offline.balance.subset import subset_array, uid_pairs
from megacid.offline.rows import ArrayRows
from megacid.storage.stage_directory import PartialResults


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.2, 0.5, 2.0])
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize(("link", "brute"), [("components", brute_components), ("greedy", brute_greedy)])
def test_owners_equal_brute_force(threshold: float, block: int, link: str, brute) -> None:
    x = unit_rows(90)
    if threshold == 0:
        expected = np.arange(90)
    else:
        expected = brute(x, threshold)
    np.testing.assert_array_equal(representatives(x, LinkOptions(threshold, link, block)), expected)


def test_chains_differ_between_the_modes() -> None:
    angle = torch.arange(6) * 0.1
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert representatives(x, LinkOptions(0.11, "components")).tolist() == [0] * 6
    assert representatives(x, LinkOptions(0.11, "greedy")).tolist() == [0, 0, 2, 2, 4, 4]


def test_a_cluster_of_copies_needs_one_row_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    products = 0
    plain = torch.Tensor.__matmul__

    def counted(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        nonlocal products
        assert self.shape[0] <= 10 and other.shape[1] <= 10
        products += 1
        return plain(self, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    assert (representatives(unit_rows(1).repeat(200, 1), LinkOptions(0.1, "components", 10)) == 0).all()
    assert products == 20


@pytest.mark.parametrize(("keep", "first"), [("nearest", [2, 1, 0]), ("farthest", [0, 1, 2])])
def test_scores_that_are_equal_in_fp16_decide_which_sample_is_kept(keep: Keep, first: list[int]) -> None:
    score = np.array([0.9003, 0.9004, 0.9005], np.float32)
    assert len(np.unique(score.astype(np.float16))) == 1
    rows = ArrayRows(unit_rows(1).repeat(3, 1).numpy())
    clusters = group_by_cluster(np.zeros(3, np.int32), preference(keep, score, 0, rows, None), 1)
    assert clusters.members(0).tolist() == first
    decision = decided(rows, clusters, BalanceSettings(threshold=0.1, keep=keep))
    assert decision.representative.tolist() == [first[0]] * 3


def test_cap_keeps_the_most_preferred() -> None:
    representative = np.array([0, 0, 2, 3, 2, 5, 6])
    clusters = group_by_cluster(np.array([0] * 6 + [1]), np.arange(7), 2)
    assert clusters.keep_mask(representative, None).tolist() == [True, False, True, True, False, True, True]
    assert clusters.keep_mask(representative, 2).tolist() == [True, False, True, False, False, False, True]


def clustered(n: int = 1200, k: int = 15, seed: int = 1) -> tuple[ArrayRows, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = unit_rows(n, 6, seed).numpy().astype(np.float16)
    return ArrayRows(x), rng.integers(0, k, n).astype(np.int32), rng.random(n).astype(np.float32)


@pytest.mark.parametrize("link", ["components", "greedy"])
def test_decide_works_inside_clusters_only(link: str) -> None:
    rows, label, priority = clustered()
    label[5] = -1
    decision = decided(rows, group_by_cluster(label, priority, 15), BalanceSettings(threshold=0.4, link=link, block=33))
    brute = brute_components if link == "components" else brute_greedy
    for cluster in range(15):
        members = np.flatnonzero(label == cluster)
        members = members[np.argsort(priority[members], kind="stable")]
        x = torch.nn.functional.normalize(torch.from_numpy(rows.array[members].astype(np.float32)), dim=1)
        np.testing.assert_array_equal(decision.representative[members], members[brute(x, 0.4)])
    np.testing.assert_array_equal(decision.keep, decision.representative == np.arange(1200))
    assert decision.keep[5] and 0 < decision.keep.sum() < 1200


@pytest.mark.parametrize("link", ["components", "greedy"])
@pytest.mark.parametrize("target", [0.9, 0.563, 0.2])
def test_target_share_is_reached(link: str, target: float) -> None:
    rows, label, priority = clustered()
    decision = decided(rows, group_by_cluster(label, priority, 15), BalanceSettings(target_keep=target, link=link))
    assert decision.keep.mean() == pytest.approx(target, abs=2.5 / 1200)
    # All clusters were searched, so what the search saw is what came out.
    assert decision.searched_rows == 1200
    assert dict(decision.curve)[decision.threshold] == pytest.approx(decision.keep.mean())


def test_target_out_of_reach_ends_at_the_nearest_share() -> None:
    copies = ArrayRows(np.repeat(unit_rows(10).numpy(), 4, axis=0).astype(np.float16))
    label = np.repeat(np.arange(10), 4).astype(np.int32)
    decision = decided(copies, group_by_cluster(label, np.zeros(40), 10), BalanceSettings(target_keep=0.1))
    # Nothing is linked across clusters: a quarter is the least.
    assert decision.keep.mean() == 0.25


def test_search_on_a_sample_of_the_clusters() -> None:
    rows, label, priority = clustered(4000, 40)
    clusters = group_by_cluster(label, priority, 40)
    decision = decided(rows, clusters, BalanceSettings(target_keep=0.6, search_rows=1500))
    assert 1500 <= decision.searched_rows < 1800
    assert decision.keep.mean() == pytest.approx(0.6, abs=1e-3)


def test_partial_results_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, label, priority = clustered()
    clusters = group_by_cluster(label, priority, 15)
    settings = BalanceSettings(target_keep=0.3, cap=30)
    whole = decided(rows, clusters, settings)
    assert len(part_bounds(clusters.sizes**2, 20_000)) > 4
    work = PartialResults(tmp_path, {})
    work.begin()
    first = decided(rows, clusters, settings, partial=work, part_pairs=20_000)
    parts = sorted(work.folder.glob("links-*.npy"))
    parts[1].unlink()
    parts[2].write_bytes(parts[2].read_bytes()[:-8])
    done = 0

    def count(links: int) -> None:
        nonlocal done
        done += links

    linked = 0
    link = within_cluster.representatives

    def counted(x: torch.Tensor, *rest: Any) -> np.ndarray:
        nonlocal linked
        linked += len(x)
        return link(x, *rest)

    monkeypatch.setattr(within_cluster, "representatives", counted)
    again = decided(rows, clusters, settings, partial=work, progress=count, part_pairs=20_000)
    assert done == 1200  # the progress bar reaches its end
    assert 0 < linked < 600  # two of the parts, and nothing of the search
    for decision in (first, again, *run_ranks(decided, 2, rows, clusters, settings)):
        assert decision.threshold == whole.threshold and decision.curve == whole.curve
        np.testing.assert_array_equal(decision.keep, whole.keep)
        np.testing.assert_array_equal(decision.representative, whole.representative)


def test_parts_are_whole_clusters_of_about_the_same_work() -> None:
    assert part_bounds(np.array([25, 25, 25, 25, 25, 25]), 100).tolist() == [0, 3, 6]
    assert part_bounds(np.array([2500, 1, 1]), 100).tolist() == [0, 3]
    assert part_bounds(np.array([1, 2500, 1, 2500]), 100).tolist() == [0, 1, 3, 4]
    assert part_bounds(np.zeros(4, np.int64), 100).tolist() == [0, 4]


def test_ranks_decide_alike() -> None:
    rows, label, priority = clustered()
    clusters = group_by_cluster(label, priority, 15)
    settings = BalanceSettings(target_keep=0.3, cap=30)
    alone = decided(rows, clusters, settings)
    for decision in run_ranks(decided, 2, rows, clusters, settings):
        assert decision.threshold == alone.threshold
        np.testing.assert_array_equal(decision.keep, alone.keep)
        np.testing.assert_array_equal(decision.representative, alone.representative)


def test_preferred_sample_of_a_group_is_kept() -> None:
    rows = ArrayRows(np.repeat(unit_rows(3).numpy(), 5, axis=0).astype(np.float16))
    priority = np.array([3, 1, 2, 0, 4] * 3, np.float32)
    decision = decided(rows, group_by_cluster(np.zeros(15, np.int32), priority, 1), BalanceSettings(threshold=0.01))
    assert np.flatnonzero(decision.keep).tolist() == [3, 8, 13]


def test_planted_report() -> None:
    #                 group 0 (3 members)  group 1 (2)  singles
    origin = np.array([0, 0, 0, 1, 1, 2, 3])
    label = np.array([0, 0, 1, 0, 0, 0, 0])
    representative = np.array([0, 0, 2, 3, 4, 5, 5])
    keep = representative == np.arange(7)
    facts = planted_report(origin, keep, representative, label)
    assert (facts["groups"], facts["copies"]) == (2, 3)
    assert facts["removal_recall"] == 0  # both groups still have two members
    assert facts["copies_removed"] == pytest.approx(1 / 3)
    assert facts["linking_recall"] == pytest.approx(1 / 4)
    assert facts["same_cluster"] == pytest.approx(2 / 4)
    assert facts["linking_precision"] == pytest.approx(1 / 2)
    assert facts["removal_precision"] == pytest.approx(1 / 2)
    nothing = planted_report(np.arange(3), np.ones(3, bool), np.arange(3), np.zeros(3, int))
    assert nothing["groups"] == 0 and nothing["removal_recall"] is None


def test_subset_array_is_sorted_datacomp() -> None:
    uids = ["f" * 32, "0" * 16 + "00000000000000ff", "0" * 31 + "1"]
    subset = subset_array(uid_pairs(uids))
    assert subset.dtype == np.dtype("u8,u8")
    assert subset.tolist() == sorted((int(uid[:16], 16), int(uid[16:], 16)) for uid in uids)
    with pytest.raises(ValueError, match="'abc' has 3 characters"):
        uid_pairs(["abc"])


def test_histogram_of_sizes() -> None:
    assert power_histogram(np.array([0, 1, 1, 2, 3, 4, 9])) == {"0": 1, "1": 2, "2-3": 2, "4-7": 1, "8-15": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "exactly one of --threshold"),
        ({"threshold": 3.0}, "0 to 2"),
        ({"target_keep": 0.0}, "above 0"),
        ({"threshold": 0.1, "cap": 0}, "cap is 0"),
        ({"threshold": 0.1, "link": "x"}, "--link is 'x', expected one of components, greedy"),
    ],
)
def test_settings_are_checked(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BalanceSettings(**change)


def exact_near(x: np.ndarray, threshold: float) -> np.ndarray:
    x = x.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return np.linalg.norm(x[:, None] - x[None], axis=2) < threshold


@pytest.mark.parametrize("link", ["components", "greedy"])
@pytest.mark.parametrize("threshold", [1e-6, 1e-4, 3e-4, 1e-3, 4e-3])
@pytest.mark.parametrize(("dim", "block"), [(768, 64), (512, 1000), (17, 7)])
def test_bit_identical_copies_are_found_at_a_threshold_near_zero(
    link: str, threshold: float, dim: int, block: int
) -> None:
    x = unit_rows(40, dim, 3).numpy().astype(np.float16)
    copies = np.concatenate([np.repeat(x[:1], 200, axis=0), np.repeat(x[1:20], 3, axis=0), x[20:]])
    copies = copies[np.random.default_rng(0).permutation(len(copies))]
    rows = ArrayRows(copies)
    label = np.zeros(len(copies), np.int32)
    decision = decided(
        rows, group_by_cluster(label, np.arange(len(copies)), 1), BalanceSettings(threshold=threshold, link=link)
    )
    _, first, group = np.unique(copies, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(decision.representative, first[group.reshape(-1)])


@pytest.mark.parametrize("threshold", [2e-4, 1e-3, 3e-3, 0.01, 0.3, 2.0])
def test_near_pairs_equal_float64_distances_of_the_rows(threshold: float) -> None:
    rng = np.random.default_rng(2)
    base = unit_rows(30, 64, 4).numpy()
    noise = rng.standard_normal((10, 30, 64)) * threshold * rng.uniform(0, 0.2, (10, 30, 1))
    x = torch.nn.functional.normalize(torch.from_numpy((base + noise).reshape(-1, 64)).float(), dim=1)
    near = np.zeros((300, 300), bool)
    near[near_pairs(x, x, threshold)] = True
    expected = exact_near(x.numpy(), threshold)
    np.testing.assert_array_equal(near, expected)
    assert expected.sum() > 300


def test_copies_in_neighbouring_clusters_are_found_at_a_threshold_near_zero() -> None:
    x = unit_rows(200, 256, 7).numpy().astype(np.float16)
    copies = np.concatenate([x, x])
    label, centroids = labelled(x.astype(np.float16), 6)
    label = np.concatenate([label, label])
    # Copies on both sides of a border: the second centroid is the nearest one, moved by less than a row's rounding.
    centroids = np.concatenate([centroids, centroids + 1e-6])
    label[200:] += 6
    clusters = group_by_cluster(label, np.arange(400), 12)
    for link in ("components", "greedy"):
        settings = BalanceSettings(threshold=1e-4, neighbor_clusters=1, link=link)
        decision = decided(ArrayRows(copies), clusters, settings, centroids=centroids)
        np.testing.assert_array_equal(decision.representative, np.tile(np.arange(200), 2))
