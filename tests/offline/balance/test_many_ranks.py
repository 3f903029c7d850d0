"""The balance stage on several ranks: same bits, slow ranks, shares of the work, and a sample for the gallery."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from balance_data import decided, labelled, unit_rows
from faultplan import Fault, FaultPlan, kill
from harness import rank_fates, run_ranks
from offline_data import balance_args, cluster_args, embed_args, results, run, save_model, write_shards
from offline_tool import KILLED, Tool, tool_rank

from megacid.distributed import array_exchange
from megacid.errors import EXIT_AGAIN
from megacid.offline import row_numbers
from megacid.offline.balance import cross_cluster, groups
from megacid.offline.balance import stage as balance_stage
from megacid.offline.balance.clusters import Clusters, group_by_cluster
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.groups import Groups, representative_distance, sample_groups
from megacid.offline.balance.outputs import write_outputs
from megacid.offline.balance.preference import preference
from megacid.offline.row_numbers import is_own, members_of, row_dtype
from megacid.offline.rows import ArrayRows


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_shards(folder / "shards")
    save_model(folder / "model", seed=1)
    run("embed", *embed_args(folder))
    run("cluster", *cluster_args(folder, k=6))
    return folder


def tool(stage: Path, out: str, log: Path, *options: object) -> Tool:
    made = Tool("balance", stage, out, log)
    made.args = balance_args(stage, out, *options)
    return made


# ---- the same files on any number of ranks, also after a kill ------------------------------------------------------

ACROSS = ("--neighbor-clusters", 3)
CAPTION = ("--target-keep", 0.5, "--keep", "caption", "--cap", 5, *ACROSS)
MEDOID = ("--threshold", 0.4, "--keep", "medoid", *ACROSS)
KILLS: dict[str, tuple[tuple[object, ...], list[tuple[str, int]]]] = {
    "caption": (
        CAPTION,
        [("balance:preference", 0), ("balance:exchange", 1), ("balance:keep", 1), ("balance:subset", 1)],
    ),
    "medoid": (MEDOID, [("balance:merge", 1), ("balance:medoids", 0)]),
}


@pytest.mark.parametrize("case", KILLS)
def test_a_rank_killed_in_any_phase_leaves_what_other_ranks_finish_with_the_same_bits(
    case: str, stage: Path, tmp_path: Path
) -> None:
    options, kills = KILLS[case]
    run("balance", *balance_args(stage, f"whole-{case}", *options))
    cut = tool(stage, f"cut-{case}", tmp_path / "log", *options)
    for at, rank in kills:
        ends = cut.fates(2, kill(at, rank=rank))
        assert ends[rank] == KILLED and ends[1 - rank] == EXIT_AGAIN, (at, ends, cut.output)
    assert cut.fates(4) == [0] * 4, cut.output
    cut.equals(stage / f"whole-{case}")


def test_ranks_read_labels_of_both_versions_and_name_a_damaged_file_alike(stage: Path, tmp_path: Path) -> None:
    clusters = Path(shutil.copytree(stage / "clusters", tmp_path / "clusters"))
    first, last = (clusters / "labels" / f"{number:05d}.parquet" for number in (0, 2))
    table = pq.read_table(first)
    old = table["score"].to_numpy().astype(np.float16)
    pq.write_table(table.set_column(table.schema.get_field_index("score"), "score", [old]), first)
    made = tool(stage, "by-two", tmp_path / "log", "--threshold", 0.3)
    made.args[made.args.index("--clusters") + 1] = clusters
    assert made.fates(2) == [0, 0], made.output
    alone = [stage / "by-one" if arg == stage / "by-two" else arg for arg in made.args]
    run("balance", *alone)
    made.equals(stage / "by-one")
    last.write_bytes(b"cut")
    made.args[made.args.index("--out") + 1] = stage / "by-none"
    assert made.fates(2) == [2, 2]
    for output in made.output:
        assert f"{last} cannot be read" in output and "Traceback" not in output


KEEP = ["nearest", "farthest", "random", "caption", "medoid"]


def same_on_ranks(worlds: tuple[int, ...], stage: Path, log: Path, name: str, *options: object) -> None:
    run("balance", *balance_args(stage, name, *options))
    for world in worlds:
        ranks = tool(stage, f"{name}-{world}", log, *options)
        assert ranks.fates(world) == [0] * world, ranks.output
        ranks.equals(stage / name)


def test_greedy_keep_at_random_gives_the_same_bits_on_ranks(stage: Path, tmp_path: Path) -> None:
    same_on_ranks(
        (4,), stage, tmp_path / "log", "random", "--threshold", 0.3, "--keep", "random", "--link", "greedy", *ACROSS
    )


@pytest.mark.slow
@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("link", ["components", "greedy"])
@pytest.mark.parametrize("keep", KEEP)
def test_every_rule_gives_the_same_bits_on_ranks(
    keep: str, link: str, cells: bool, stage: Path, tmp_path: Path
) -> None:
    if keep == "medoid" and link == "greedy":
        pytest.skip("refused: medoids need components")
    name, options = f"rule-{keep}-{link}-{cells}", ["--target-keep", 0.5, "--keep", keep, "--link", link, *ACROSS]
    if not cells:
        return same_on_ranks((2, 4), stage, tmp_path / "log", name, *options)
    where = ["--embeddings", stage / "emb", "--cells", 5]
    run("balance", *where, "--out", stage / name, *options)
    for world in (2, 4):
        ranks = Tool("balance", stage, f"{name}-{world}", tmp_path / "log")
        ranks.args = [*where, "--out", stage / f"{name}-{world}", *options]
        assert ranks.fates(world) == [0] * world, ranks.output
        ranks.equals(stage / name)


# ---- a rank that works longer than the time limit of collectives ---------------------------------------------------

LIMIT_S = 3.0
SLOW = [("balance:part", 1), ("balance:keep", 1), ("balance:gallery", 0)]
SLOW_TOO = [
    *[("balance:search", 0), ("balance:candidate_clusters", 1), ("balance:exchange", 0), ("balance:cross_cluster", 1)],
    *[("balance:merge", 0), ("balance:preference", 0), ("balance:subset", 1), ("balance:report", 0)],
]


def slow_ranks(stage: Path, out: str, log: Path, phases: list[tuple[str, int]], *options: object) -> None:
    plan = FaultPlan(*(Fault(at, "sleep", rank=rank, value=LIMIT_S + 0.7) for at, rank in phases))
    args = balance_args(stage, out, *options)
    ends = rank_fates(tool_rank, 2, "balance", args, plan, {}, log, timeout_s=120, group_timeout_s=LIMIT_S)
    output = Path(f"{log}.0").read_text() + Path(f"{log}.1").read_text()
    assert ends == [0, 0], output
    run("balance", *balance_args(stage, f"{out}-fast", *options))
    assert results(stage / out) == results(stage / f"{out}-fast")


def test_a_rank_slower_than_the_limit_of_collectives_does_not_end_the_run(stage: Path, tmp_path: Path) -> None:
    slow_ranks(stage, "slow", tmp_path / "log", SLOW, "--threshold", 0.3)


@pytest.mark.slow
def test_a_rank_may_be_slow_in_every_phase(stage: Path, tmp_path: Path) -> None:
    slow_ranks(stage, "slow-caption", tmp_path / "log", SLOW_TOO, *CAPTION)
    slow_ranks(stage, "slow-medoid", tmp_path / "log", [("balance:medoids", 0), ("reshard:tar", 1)], *MEDOID,
               "--reshard", stage / "kept")  # fmt: skip


# ---- what a rank holds ---------------------------------------------------------------------------------------------


def toy() -> tuple[ArrayRows, Clusters, np.ndarray]:
    x = unit_rows(2000, 5, 5).numpy().astype(np.float16)
    label, centroids = labelled(x, 30)
    label[7] = -1
    priority = np.random.default_rng(1).integers(0, 50, len(x)).astype(np.float32)
    return ArrayRows(x), group_by_cluster(label, priority, 30), centroids


def matched_entries(how: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list[int], int]:
    """Representatives, keep flags, entries of each bin that this rank sorted, and links that it kept."""
    cross_cluster.BIN_ENTRIES, array_exchange.PIECE_BYTES, row_numbers.BLOCK_ROWS = 100, 512, 97
    cross_cluster.CHUNK_ROWS = 100
    sizes: list[int] = []
    links = 0
    match, merge = cross_cluster.match_candidates, cross_cluster.merge_groups

    def counted_match(entries: np.ndarray, *rest: Any) -> Any:
        assert entries.dtype == np.int32
        sizes.append(len(entries))
        return match(entries, *rest)

    def counted_merge(representative: np.ndarray, own: np.ndarray, *rest: Any) -> np.ndarray:
        nonlocal links
        links += len(own)
        assert representative.dtype == own.dtype == np.int32
        return merge(representative, own, *rest)

    cross_cluster.match_candidates, cross_cluster.merge_groups = counted_match, counted_merge
    try:
        rows, clusters, centroids = toy()
        decision = decided(rows, clusters, BalanceSettings(**how), centroids=centroids, part_pairs=500)
    finally:
        cross_cluster.match_candidates, cross_cluster.merge_groups = match, merge
    return decision.representative, decision.keep, sizes, links


@pytest.mark.parametrize("link", ["components", "greedy"])
def test_ranks_share_the_entries_and_links_across_clusters(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"threshold": 0.15, "link": link, "neighbor_clusters": 6, "block": 64}
    rows, clusters, centroids = toy()
    whole = decided(rows, clusters, BalanceSettings(**how), centroids=centroids)
    assert whole.removed_across_clusters > 20
    for world in (2, 4):
        ranks = run_ranks(matched_entries, world, how)
        total = sum(sum(sizes) for _, _, sizes, _ in ranks)
        for representative, keep, sizes, links in ranks:
            np.testing.assert_array_equal(representative, whole.representative)
            np.testing.assert_array_equal(keep, whole.keep)
            assert 0.5 * total < world * sum(sizes) < 1.6 * total and len(sizes) > 8
            assert max(sizes) < 0.1 * total
            assert links > 0


@pytest.mark.parametrize("given", [True, False], ids=["clusters", "cells"])
def test_preference_and_scores_are_freed_before_the_outputs(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    arrays: list[weakref.ref[np.ndarray]] = []
    freed: list[bool] = []

    def noted(keep: Any, score: np.ndarray, *rest: Any) -> np.ndarray:
        priority = preference(keep, score, *rest)
        arrays.extend([weakref.ref(score), weakref.ref(priority)])
        return priority

    def outputs(*args: Any) -> None:
        freed.extend(array() is None for array in arrays)
        write_outputs(*args)

    monkeypatch.setattr(balance_stage, "preference", noted)
    monkeypatch.setattr(balance_stage, "write_outputs", outputs)
    clusters = ["--clusters", stage / "clusters"] if given else ["--cells", 6]
    run("balance", "--embeddings", stage / "emb", *clusters, "--out", tmp_path / "out", "--target-keep", 0.5)
    assert freed == [True, True]


def test_row_numbers_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_numbers, "BLOCK_ROWS", 3)
    representative = np.array([0, 0, 2, 1, 2, 5, 5, 0], np.int32)
    assert is_own(representative).tolist() == [True, False, True, False, False, True, False, False]
    assert members_of(representative, 0, 8).tolist() == [1, 3, 4, 6, 7]
    assert members_of(representative, 1, 3).tolist() == [3, 4]
    assert members_of(representative, 6, 6).tolist() == [] and members_of(representative, 0, 8).dtype == np.int32
    assert row_dtype(1 << 31) == np.int32 and row_dtype((1 << 31) + 1) == np.int64


# ---- the sample of the gallery -------------------------------------------------------------------------------------


def grouped(n: int = 6000) -> tuple[ArrayRows, np.ndarray]:
    """Rows in groups of 1 to 5; every third group has one sample."""
    first = np.sort(np.random.default_rng(0).choice(n, n // 3, replace=False))
    representative = first[np.maximum(np.searchsorted(first, np.arange(n), side="right") - 1, 0)]
    representative[: first[0]] = np.arange(first[0])
    return ArrayRows(unit_rows(n, 6, 2).numpy()), representative


def test_gallery_of_a_large_set_shows_whole_groups_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    image, representative = grouped()
    every = sample_groups(image, representative)
    direct = Groups(representative, representative_distance(image, representative))
    assert every.note == "" and len(every) == len(direct)
    np.testing.assert_array_equal(every.spread, direct.spread)
    for place in range(0, len(every), 50):
        np.testing.assert_array_equal(every.at(place, 9).rows, direct.at(place, 9).rows)
        np.testing.assert_array_equal(every.at(place, 9).distances, direct.at(place, 9).distances)
    removed = int((~is_own(representative)).sum())
    monkeypatch.setattr(groups, "SAMPLED_ROWS", removed // 10)
    taken: list[int] = []

    class Counted(ArrayRows):
        def take(self, rows: np.ndarray) -> np.ndarray:
            taken.extend(rows.tolist())
            return super().take(rows)

    few = sample_groups(Counted(image.array), representative)
    assert few.note == " (of a sample of about 0.1 of all groups)"
    assert 0.07 * len(every) < len(few) < 0.13 * len(every)
    assert len(set(taken)) < 0.2 * len(representative)
    whole = {int(direct.at(place, 99).rows[0]): direct.at(place, 99) for place in range(len(direct))}
    for place in range(len(few)):
        group = few.at(place, 99)
        expected = whole[int(group.rows[0])]
        assert group.rows.tolist() == expected.rows.tolist() and group.size == expected.size
        np.testing.assert_array_equal(group.distances, expected.distances)


def test_gallery_says_that_its_groups_are_a_sample(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--threshold", 0.5)
    run("balance", *balance_args(stage, "all-shown", *options))
    monkeypatch.setattr(groups, "SAMPLED_ROWS", 8)
    run("balance", *balance_args(stage, "few-shown", *options))
    pages = [(stage / name / "gallery.html").read_text() for name in ("all-shown", "few-shown")]
    reports = [json.loads((stage / name / "report.json").read_text()) for name in ("all-shown", "few-shown")]
    assert reports[0] == reports[1]
    assert "of a sample of" not in pages[0] and pages[1].count("groups (of a sample of about ") == 2
    assert 0 < pages[1].count("<figure>") < pages[0].count("<figure>")
