"""The search of a threshold that counts with the second pass across clusters, against decisions at given thresholds."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from balance_data import decided, labelled, unit_rows
from harness import run_ranks

from megacid.errors import UserError
from megacid.offline.balance.clusters import Clusters, group_by_cluster
from megacid.offline.balance.context import BalanceContext, BalanceSettings
from megacid.offline.balance.threshold_search import (
    MAX_PASSES,
    NEIGHBOURHOOD,
    SHARE_TOLERANCE,
    bisect_threshold,
    next_threshold,
    sample_clusters,
    search_threshold,
)
from megacid.offline.nearest import Assigner, prepare
from megacid.offline.rows import ArrayRows
from megacid.storage.stage_directory import PartialResults

CPU = torch.device("cpu")


def data(n: int, k: int, dim: int = 4) -> tuple[ArrayRows, Clusters, np.ndarray]:
    x = unit_rows(n, dim, 5).numpy().astype(np.float16)
    label, centroids = labelled(x, k)
    priority = np.random.default_rng(1).permutation(n).astype(np.float32)
    return ArrayRows(x), group_by_cluster(label, priority, k), centroids


@pytest.mark.parametrize(("link", "cap"), [("components", None), ("components", 40), ("greedy", None)])
def test_share_with_the_second_pass_is_what_was_asked_for(link: str, cap: int | None) -> None:
    rows, clusters, centroids = data(700, 12)
    settings = BalanceSettings(target_keep=0.5, link=link, neighbor_clusters=4, cap=cap)
    decision = decided(rows, clusters, settings, centroids=centroids)
    assert decision.keep.mean() == pytest.approx(0.5, abs=3 / 700)
    assert decision.removed_across_clusters > 10  # what a search without the second pass would be wrong by
    # All clusters were searched: every point of the curve is what a run at that threshold keeps.
    assert decision.searched_rows == 700
    for threshold, share in decision.curve[1:-1:4]:
        given = BalanceSettings(threshold=threshold, link=link, neighbor_clusters=4, cap=cap)
        assert decided(rows, clusters, given, centroids=centroids).keep.mean() == pytest.approx(share, abs=1e-9)


def test_ranks_and_an_interrupted_search_give_the_same_bits(tmp_path: Path) -> None:
    rows, clusters, centroids = data(700, 12)
    settings = BalanceSettings(target_keep=0.5, neighbor_clusters=4)
    whole = decided(rows, clusters, settings, centroids=centroids)
    work = PartialResults(tmp_path, {})
    work.begin()

    class Cut(Exception):  # noqa: N818
        pass

    def cut(done: int) -> None:
        if len(work.json("search") or []) == 5:
            raise Cut

    with pytest.raises(Cut):
        decided(rows, clusters, settings, partial=work, progress=cut, centroids=centroids)
    again = decided(rows, clusters, settings, partial=work, centroids=centroids)
    two = run_ranks(decided, 2, rows, clusters, settings, centroids)
    for other in (again, *two):
        assert other.threshold == whole.threshold and other.curve == whole.curve
        np.testing.assert_array_equal(other.representative, whole.representative)
        np.testing.assert_array_equal(other.keep, whole.keep)


def test_sample_of_neighbourhoods_speaks_for_all_clusters() -> None:
    rows, clusters, centroids = data(12_000, 400, 6)
    settings = BalanceSettings(target_keep=0.6, neighbor_clusters=4, search_rows=3000)
    assigner = Assigner(prepare(centroids, "cosine", CPU), "cosine", CPU)
    threshold, _, searched = search_threshold(BalanceContext(rows, clusters, settings, CPU, assigner))
    assert 3000 <= searched < 3400
    given = BalanceSettings(threshold=threshold, neighbor_clusters=4)
    decision = decided(rows, clusters, given, centroids=centroids)
    share = decision.removed_across_clusters / len(decision.keep)
    assert share > 0.05
    # Without the scale from the borders inside of the sample to all of them it would be off by half of that share.
    assert decision.keep.mean() == pytest.approx(0.6, abs=share / 4)


def test_clusters_are_drawn_with_their_neighbours() -> None:
    _, clusters, centroids = data(2000, 100)
    assigner = Assigner(prepare(centroids, "cosine", CPU), "cosine", CPU)
    few = sample_clusters(clusters.sizes, 200, 0, assigner)
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    near = np.argsort(-(unit @ unit[few[0]]), kind="stable")[:NEIGHBOURHOOD]
    assert set(few) <= set(near.tolist()) and clusters.sizes[few].sum() >= 200 > clusters.sizes[few[:-1]].sum()
    everything = sample_clusters(clusters.sizes, 10**9, 0, assigner)
    assert sorted(everything) == np.flatnonzero(clusters.sizes).tolist()
    assert sorted(sample_clusters(clusters.sizes, 10**9, 0)) == sorted(everything)
    with pytest.raises(UserError, match="no sample has a cluster"):
        sample_clusters(np.zeros(3, np.int64), 10, 0)


def test_chosen_clusters_alone_keep_their_order() -> None:
    label = np.array([0, 2, 2, 0, 2, -1])
    clusters = Clusters(np.array([5, 0, 3, 1, 4, 2]), np.array([1, 3, 3, 6]), np.arange(6) * 1.0, label)
    rows, part = clusters.of([2, 0])
    assert rows.tolist() == [0, 1, 2, 3, 4] and part.starts.tolist() == [0, 2, 2, 5]
    assert rows[part.order].tolist() == [0, 3, 1, 4, 2] and part.priority.tolist() == [0, 1, 2, 3, 4]
    assert part.label.tolist() == [0, 2, 2, 0, 2]
    rows, part = clusters.of([2])
    assert rows[part.order].tolist() == [1, 4, 2] and part.starts.tolist() == [0, 0, 0, 3]
    assert part.label.tolist() == [2, 2, 2]


def test_search_takes_few_steps_on_a_smooth_curve_and_finds_a_step() -> None:
    visited = []
    threshold, curve = bisect_threshold(
        0.563, 10**6, lambda at: visited.append(at) or 1 / (1 + np.exp((at - 0.37) / 0.03))
    )
    assert 1 / (1 + np.exp((threshold - 0.37) / 0.03)) == pytest.approx(0.563, abs=1e-6)
    assert len(visited) == len(curve) <= 16  # halves alone would take 19
    threshold, curve = bisect_threshold(0.5, 1000, lambda at: 1.0 if at < 0.3 else 0.1)
    assert threshold == pytest.approx(0.3, abs=2e-5) and threshold >= 0.3  # 0.1 is nearer to 0.5 than 1.0 is
    assert curve == sorted(curve) and curve[0] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("target", "link", "neighbors"), [(0.9, "components", 4), (0.563, "greedy", 0), (0.3, "components", 0)]
)
def test_share_of_all_samples_is_within_a_tenth_of_a_point(target: float, link: str, neighbors: int) -> None:
    rows, clusters, centroids = data(12_000, 400, 6)
    settings = BalanceSettings(target_keep=target, link=link, neighbor_clusters=neighbors, search_rows=600)
    decision = decided(rows, clusters, settings, centroids=centroids)
    assert decision.searched_rows < 1000
    assert decision.keep.mean() == pytest.approx(target, abs=SHARE_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.563, 0.8])
def test_share_of_a_large_corpus_in_neighbouring_clusters(target: float, caplog: pytest.LogCaptureFixture) -> None:
    n, k, dim = 50_000, 250, 24
    rng = np.random.default_rng(3)
    middle = rng.standard_normal((k // 5, dim))  # several clusters share one clump, so copies fall on both sides
    x = middle[rng.integers(len(middle), size=n)] + 0.9 * rng.standard_normal((n, dim))
    copy = np.flatnonzero(rng.random(n) < 0.4)
    spread = rng.exponential(0.15, (len(copy), 1))
    x[copy] = x[rng.integers(n, size=len(copy))] + spread * rng.standard_normal((len(copy), dim))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    label, centroids = labelled(x, k)
    settings = BalanceSettings(target_keep=target, neighbor_clusters=4, search_rows=5000)
    with caplog.at_level(logging.INFO, logger="megacid.offline.balance.deduplicate"):
        decision = decided(ArrayRows(x), group_by_cluster(label, rng.random(n), k), settings, centroids=centroids)
    assert abs(decision.keep.mean() - target) <= 1e-3
    assert decision.searched_rows < 6000 and decision.removed_across_clusters > 100
    # A pass over all samples is what costs, so few of them may be needed.
    assert sum("searching on" in message for message in caplog.messages) <= 4


def test_passes_over_all_samples_give_the_same_bits_on_ranks_and_after_an_interruption(tmp_path: Path) -> None:
    rows, clusters, centroids = data(12_000, 400, 6)
    settings = BalanceSettings(target_keep=0.563, neighbor_clusters=4, search_rows=600)
    whole = decided(rows, clusters, settings, centroids=centroids)
    work = PartialResults(tmp_path, {})
    work.begin()
    first = decided(rows, clusters, settings, centroids=centroids, partial=work, part_pairs=200_000)
    names = {path.name.partition("links")[0] for path in work.folder.glob("*links-*.npy")}
    assert {"", "pass-1-"} <= names  # more than one pass was needed
    for path in sorted(work.folder.glob("pass-1-*.npy"))[::2]:
        path.unlink()
    again = decided(rows, clusters, settings, centroids=centroids, partial=work, part_pairs=200_000)
    two = run_ranks(decided, 2, rows, clusters, settings, centroids)
    for other in (first, again, *two):
        assert other.threshold == whole.threshold
        np.testing.assert_array_equal(other.representative, whole.representative)
        np.testing.assert_array_equal(other.keep, whole.keep)


def test_a_share_that_no_threshold_keeps_is_explained_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    copies = np.repeat(unit_rows(100, 4, 1).numpy().astype(np.float16), 4, axis=0)
    label = np.repeat(np.arange(100), 4).astype(np.int32)
    clusters = group_by_cluster(label, np.zeros(400), 100)
    for settings, cause in (
        ({"target_keep": 0.1}, "25.00% of the samples are kept, --target-keep is 10.00%: more links remove no more"),
        ({"target_keep": 0.6}, r"because many pairs have nearly the same distance"),
        ({"target_keep": 0.9, "cap": 2}, "50.00% of the samples are kept, .*: fewer links keep no more, because of"),
    ):
        for search_rows in (100, 10**6):
            caplog.clear()
            decided(ArrayRows(copies), clusters, BalanceSettings(**settings, search_rows=search_rows))
            assert len(caplog.records) == 1 and "\n" not in caplog.text.strip()
            caplog_text = caplog.records[0].getMessage()
            with pytest.raises(UserError, match=cause):
                raise UserError(caplog_text)


@pytest.mark.parametrize("bend", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("place", [0.2, 0.31, 0.37, 0.6])
@pytest.mark.parametrize("target", [0.05, 0.563, 0.95])
def test_a_few_passes_correct_a_sample_that_misleads(target: float, place: float, bend: float) -> None:
    def kept(at: float, place: float, bend: float) -> float:
        return float(1 / (1 + (at / place) ** (place / bend)))

    curve = [(float(at), kept(float(at), 0.3, 0.03)) for at in np.linspace(0, 2, 60)]
    passes = [(0.3, kept(0.3, place, bend))]
    while abs(passes[-1][1] - target) > SHARE_TOLERANCE:
        following = next_threshold(target, passes, curve)
        assert following is not None and len(passes) < MAX_PASSES
        passes.append((following, kept(following, place, bend)))
