"""SemDeDup's own rule (--link semdedup, --eps) against written-down values and a plain NumPy reference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from balance_data import decided, unit_rows
from harness import run_ranks
from offline_data import balance_args, cluster_args, embed_args, run, save_model, write_shards

from megacid.errors import UserError
from megacid.offline.balance.clusters import group_by_cluster
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.linking import LinkOptions, UnitRows, representatives
from megacid.offline.rows import ArrayRows
from megacid.storage.stage_directory import PartialResults


def reference(x: np.ndarray, eps: float) -> np.ndarray:
    """bool [M]: the samples that SemDeDup keeps of one cluster, sorted by preference. x: unit rows [M, D]."""
    similarity = x @ x.T
    most = np.triu(similarity, k=1).max(axis=0)  # of each sample to any earlier one
    assert np.abs(most - (1 - eps)).min() > 1e-7  # no pair so near to the bound that rounding decides it
    kept: np.ndarray = most <= 1 - eps
    return kept


def distance(eps: float) -> float:
    return math.sqrt(2 * eps)


def on_circle(*degrees: float) -> torch.Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1).float()


# 1 - cos(10 degrees) = 0.01519, 1 - cos(20 degrees) = 0.06031.
@pytest.mark.parametrize(
    ("degrees", "eps", "semdedup", "greedy", "components"),
    [
        # The third is near the second alone, which is removed: greedy keep keeps it, SemDeDup does not.
        ((0, 10, 20, 40), 0.0153, [0, 0, 0, 3], [0, 0, 2, 3], [0, 0, 0, 3]),
        # The second is near the third alone, which comes later: one component, but SemDeDup keeps it.
        ((0, 20, 10), 0.0153, [0, 1, 0], [0, 1, 0], [0, 0, 0]),
        # 0.0151 < 1 - cos(10 degrees): nothing is linked.
        ((0, 10, 20, 40), 0.0151, [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]),
        ((0, 10, 20, 40), 0.0604, [0, 0, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]),
    ],
)
def test_values_written_down(
    degrees: tuple[float, ...], eps: float, semdedup: list[int], greedy: list[int], components: list[int]
) -> None:
    x = on_circle(*degrees)
    kept = np.array(semdedup) == np.arange(len(degrees))
    np.testing.assert_array_equal(reference(x.double().numpy(), eps), kept)
    for block in (1, 2, 1000):
        assert representatives(x, LinkOptions(distance(eps), "semdedup", block)).tolist() == semdedup
        assert representatives(x, LinkOptions(distance(eps), "greedy", block)).tolist() == greedy
        assert representatives(x, LinkOptions(distance(eps), "components", block)).tolist() == components


@pytest.mark.parametrize("eps", [0.001, 0.01, 0.05, 0.2])
@pytest.mark.parametrize(("block", "panel"), [(5, None), (7, 7), (16, 32), (1000, None)])
def test_random_clusters_equal_the_plain_rule_in_any_blocks(eps: float, block: int, panel: int | None) -> None:
    for seed in range(3):
        x = unit_rows(150, 3, seed)
        rows = UnitRows(ArrayRows(x.numpy()), np.arange(150), torch.device("cpu"))
        got = representatives(rows, LinkOptions(distance(eps), "semdedup", block, panel))
        kept = got == np.arange(150)
        np.testing.assert_array_equal(kept, reference(x.double().numpy(), eps))
        assert (got[got] == got).all() and (got <= np.arange(150)).all()  # everyone is represented by a kept one
        # Components keep the fewest, greedy keep the most.
        fewest, most = (representatives(x, LinkOptions(distance(eps), link)) for link in ("components", "greedy"))
        assert (kept | (fewest != np.arange(150))).all() and (~kept | (most == np.arange(150))).all()
        # A chain of links leads to the representative: both are in one component.
        np.testing.assert_array_equal(fewest[got], fewest)


def test_a_cluster_of_copies_keeps_one() -> None:
    copies = unit_rows(1).repeat(200, 1)
    assert (representatives(copies, LinkOptions(distance(1e-6), "semdedup", 10)) == 0).all()
    assert representatives(copies, LinkOptions(0, "semdedup", 10)).tolist() == list(range(200))


def clustered() -> tuple[ArrayRows, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = unit_rows(900, 5, 1).numpy().astype(np.float16)
    return ArrayRows(x), rng.integers(-1, 12, 900).astype(np.int32), rng.random(900).astype(np.float32)


def test_ranks_and_a_continued_run_decide_as_the_plain_rule(tmp_path: Path) -> None:
    rows, label, priority = clustered()
    clusters = group_by_cluster(label, priority, 12)
    settings = BalanceSettings(distance(0.2), link="semdedup", block=9)
    whole = decided(rows, clusters, settings)
    x = rows.array.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for cluster in range(12):
        members = clusters.members(cluster)
        np.testing.assert_array_equal(whole.keep[members], reference(x[members], 0.2))
    assert whole.keep[label == -1].all() and 100 < whole.keep.sum() < 800
    work = PartialResults(tmp_path, {})
    work.begin()
    decided(rows, clusters, settings, partial=work, part_pairs=5_000)
    parts = sorted(work.folder.glob("links-*.npy"))
    parts[1].unlink()
    again = decided(rows, clusters, settings, partial=work, part_pairs=5_000)
    for decision in (again, *run_ranks(decided, 3, rows, clusters, settings)):
        np.testing.assert_array_equal(decision.representative, whole.representative)
        np.testing.assert_array_equal(decision.keep, whole.keep)


def test_target_share_is_reached_with_semdedups_rule() -> None:
    rows, label, priority = clustered()
    settings = BalanceSettings(target_keep=0.5, link="semdedup")
    assert decided(rows, group_by_cluster(label, priority, 12), settings).keep.mean() == pytest.approx(0.5, abs=2e-3)


def test_neighbouring_clusters_are_refused_since_the_rule_has_none() -> None:
    with pytest.raises(UserError, match=r"--neighbor-clusters is 4, expected 0 with --link semdedup.*--link greedy"):
        BalanceSettings(threshold=0.1, link="semdedup", neighbor_clusters=4)
    BalanceSettings(threshold=0.1, link="greedy", neighbor_clusters=4)


# ---- the tool ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("semdedup")
    write_shards(folder / "shards")
    save_model(folder / "model", seed=1)
    run("embed", *embed_args(folder))
    run("cluster", *cluster_args(folder))
    return folder


@pytest.mark.parametrize(("keep", "hardest_first"), [("farthest", True), ("nearest", False)])
def test_tool_with_a_published_eps(stage: Path, keep: str, hardest_first: bool) -> None:
    eps = 0.002
    output = run("balance", *balance_args(stage, keep, "--eps", eps, "--link", "semdedup", "--keep", keep))
    report = json.loads((stage / keep / "report.json").read_text())
    assert report["cosine"] == pytest.approx(1 - eps, abs=1e-12) and "cosine above 0.99800" in output
    x = np.concatenate([np.load(path) for path in sorted((stage / "emb" / "img_emb").iterdir())]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    tables = [pq.read_table(path) for path in sorted((stage / "clusters" / "labels").iterdir())]
    label, score = (np.concatenate([table[name].to_numpy() for table in tables]) for name in ("label", "score"))
    expected = np.zeros(len(x), bool)
    for cluster in range(4):
        members = np.flatnonzero(label == cluster)
        # SemDeDup sorts by the distance to the centroid: descending to keep hard samples.
        members = members[np.argsort(score[members] if hardest_first else -score[members], kind="stable")]
        expected[members] = reference(x[members], eps)
    flags = np.concatenate([np.load(path) for path in sorted((stage / keep / "keep").iterdir())])
    np.testing.assert_array_equal(np.delete(flags, 16), expected)  # row 16 could not be decoded
    assert not flags[16] and report["kept"] == expected.sum() < 30


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--eps", 0.1, "--threshold", 0.1], "not allowed with"),
        (["--eps", -0.1], "--eps is -0.1, expected a finite number, 0 or more and at most 2"),
        (["--eps", "nan"], "--eps is nan, expected a finite number"),
        (["--eps", 0.1, "--link", "semdedup", "--neighbor-clusters", 1], "--neighbor-clusters is 1, expected 0"),
    ],
)
def test_argument_mistakes_are_one_line(stage: Path, options: list[object], problem: str) -> None:
    output = run("balance", *balance_args(stage, "none", *options), expect=2)
    assert problem in output and len(output.strip().splitlines()) == 1
    assert not (stage / "none").exists()


def test_eps_is_the_threshold_in_another_unit(stage: Path) -> None:
    for out, option in (("by_eps", ("--eps", 0.02)), ("by_distance", ("--threshold", distance(0.02)))):
        run("balance", *balance_args(stage, out, *option))
    one, other = (json.loads((stage / out / "report.json").read_text()) for out in ("by_eps", "by_distance"))
    assert one == other
