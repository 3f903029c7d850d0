"""The copy of embeddings in the order of their clusters, and reading rows in few pieces."""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from balance_data import decided, labelled
from harness import run_ranks
from offline_data import write_embeddings

from benchmarks import cluster_order as benchmark
from benchmarks.suite import add_shared_arguments
from megacid import failpoints
from megacid.distributed.stopping import no_progress
from megacid.errors import UserError
from megacid.offline import cluster_order, row_files
from megacid.offline.balance.clusters import Clusters, group_by_cluster
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.cluster import cells as cells_module
from megacid.offline.cluster import hierarchical
from megacid.offline.cluster.hierarchical import two_level
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.cluster_order import OrderedRows, in_cluster_order
from megacid.offline.row_files import RowFiles
from megacid.offline.rows import ArrayRows, EmbeddingRows, Rows, SubsetRows
from megacid.storage.atomic import file_sha256
from megacid.storage.stage_directory import PartialResults

DIM, K = 8, 30
MEMORY_GB = 2e-5  # 178 rows of 16 bytes in one file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[EmbeddingRows, Clusters, np.ndarray]:
    """600 unit rows, a third of them near copies, in 7 tars; their clusters; the centroids."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, DIM)).astype(np.float32)
    x[400:] = x[rng.integers(0, 400, 200)] + 0.05 * rng.standard_normal((200, DIM)).astype(np.float32)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)[rng.permutation(600)]
    label, centroids = labelled(x, K)
    label[::50] = -1
    rows = EmbeddingRows(write_embeddings(tmp_path_factory.mktemp("order") / "emb", x, 7))
    return rows, group_by_cluster(label, rng.random(600), K), centroids


@pytest.fixture(autouse=True)
def tiny_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set is larger than the memory, and rows are read only where they are needed."""
    monkeypatch.setattr(cluster_order, "machine_memory", lambda: 0)
    monkeypatch.setattr(cluster_order, "_GAP_BYTES", 0)


def partial_results(folder: Path) -> PartialResults:
    partial = PartialResults(folder, {})
    partial.begin()
    return partial


def ordered(rows: Rows, clusters: Clusters, folder: Path, memory_gb: float = MEMORY_GB) -> Rows:
    return in_cluster_order(rows, clusters.places, partial_results(folder), None, memory_gb, no_progress)


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.glob("cluster-order*"))}


# ---- reading rows of files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0, 40, 1 << 15])
def test_any_rows_of_several_files_are_those_of_the_array(
    gap: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "_READ_BYTES", 100)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((90, 3)).astype(np.float32)
    cuts, dtypes = [0, 20, 20, 51, 52, 90], [np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float32)] * 2
    for number, dtype in enumerate(dtypes[:5]):
        x[cuts[number] : cuts[number + 1]] = part = x[cuts[number] : cuts[number + 1]].astype(dtype)
        (tmp_path / str(number)).write_bytes(b"12345" + part.tobytes())
    paths = [str(tmp_path / str(number)) for number in range(5)]
    rows = RowFiles(paths, np.diff(cuts).tolist(), [5] * 5, dtypes[:5], 3, "make it again", gap)
    assert rows.dtype == np.float32 and rows.num_rows == 90
    for _ in range(50):
        start, stop = np.sort(rng.integers(0, 91, 2)).tolist()
        np.testing.assert_array_equal(rows.read(start, stop), x[start:stop])
        chosen = rng.integers(0, 90, rng.integers(0, 60))
        np.testing.assert_array_equal(rows.take(chosen), x[chosen])
        np.testing.assert_array_equal(rows.take(np.sort(chosen)), x[np.sort(chosen)])
        np.testing.assert_array_equal(rows.take(np.arange(start, stop)), x[start:stop])


def test_a_file_that_was_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    rows = EmbeddingRows(write_embeddings(tmp_path / "emb", np.ones((20, 4), np.float16), 2))
    path = tmp_path / "emb" / "img_emb" / "img_emb_00001.npy"
    rows.read(0, 20)
    os.truncate(path, path.stat().st_size - 8)
    for read in (lambda: rows.read(0, 20), lambda: rows.take(np.array([3, 19]))):
        with pytest.raises(
            UserError, match=r"img_emb_00001.npy cannot be read \(it ends before row 10\): run tools/embed"
        ):
            read()
    rows.take(np.array([3, 18]))


# ---- the copy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_copy_has_the_bits_of_the_originals(dtype: Any, data: Any, tmp_path: Path) -> None:
    rows, clusters, _ = data
    x = rows.read(0, 600).astype(dtype)
    original = SubsetRows(ArrayRows(np.concatenate([x, x])), np.arange(300, 900))
    copy = ordered(original, clusters, tmp_path)
    assert isinstance(copy, OrderedRows) and len(copy.copy.starts) - 1 == (4 if dtype == np.float16 else 5)
    np.testing.assert_array_equal(copy.copy.read(0, 600), original.take(clusters.order))
    for chosen in (np.arange(600), np.random.default_rng(0).integers(0, 600, 50), np.empty(0, np.int64)):
        assert copy.take(chosen).dtype == dtype
        np.testing.assert_array_equal(copy.take(chosen), original.take(chosen))
    np.testing.assert_array_equal(copy.read(5, 70), original.read(5, 70))
    assert copy.name(7) == original.name(7)


def test_a_cluster_is_one_read(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, clusters, _ = data
    copy, reads, preadv = ordered(rows, clusters, tmp_path, 1.0), [], os.preadv

    def counted(descriptor: int, views: list[memoryview], at: int) -> int:
        reads.append(at)
        return preadv(descriptor, views, at)

    monkeypatch.setattr(os, "preadv", counted)
    for cluster in range(K):
        copy.take(clusters.members(cluster))
    assert len(reads) == (clusters.sizes > 0).sum()
    assert sorted(reads) == sorted(set(reads))


def test_a_folder_that_the_page_cache_holds_is_not_copied(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, clusters, _ = data
    monkeypatch.setattr(cluster_order, "machine_memory", lambda: 2 * 600 * DIM * 2)
    assert ordered(rows, clusters, tmp_path) is rows and not files_of(tmp_path / ".work")
    monkeypatch.setattr(cluster_order, "machine_memory", lambda: 2 * 600 * DIM * 2 - 1)
    assert ordered(rows, clusters, tmp_path) is not rows


def test_memory_of_a_container_is_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for text, expected in (("max\n", None), ("4096\n", 4096), (f"{1 << 60}\n", None)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(cluster_order, "_CGROUP_LIMIT", tmp_path / "limit")
        assert cluster_order.machine_memory() == (expected or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _copy_on_ranks(rows: EmbeddingRows, clusters: Clusters, folder: Path) -> np.ndarray:
    partial = PartialResults(folder, {})
    return in_cluster_order(rows, clusters.places, partial, None, MEMORY_GB, no_progress).take(np.arange(600))


class CutError(Exception):
    pass


def _cut(**facts: Any) -> None:
    raise CutError


def test_ranks_and_kills_make_the_same_files(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, clusters, _ = data
    ordered(rows, clusters, tmp_path / "alone")
    expected = files_of(tmp_path / "alone" / ".work")
    assert len(expected) == 1 + 1 + 4 + 4  # settings, places, blocks, files
    for world in (2, 4):
        partial_results(tmp_path / str(world))
        for x in run_ranks(_copy_on_ranks, world, rows, clusters, tmp_path / str(world)):
            np.testing.assert_array_equal(x, rows.read(0, 600))
        assert files_of(tmp_path / str(world) / ".work") == expected
    # One copy is cut at every block and file, and in the middle of every write.
    cuts = {at: _copies_cut_at(at, rows, clusters, tmp_path, expected, monkeypatch) for at in CUTS}
    assert cuts == {"offline:file": 10, "cluster_order:block": 4, "cluster_order:file": 4}


CUTS = ("offline:file", "cluster_order:block", "cluster_order:file")


def _copies_cut_at(
    at: str,
    rows: EmbeddingRows,
    clusters: Clusters,
    folder: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    """Cuts a copy at every visit of a failpoint in turn and asserts that it is completed; returns their number."""
    for number in range(100):
        left = number

        def cut(**facts: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise CutError

        monkeypatch.setitem(failpoints.hooks, at, cut)
        try:
            ordered(rows, clusters, folder / f"{at}-{number}")
        except CutError:
            monkeypatch.delitem(failpoints.hooks, at)
            ordered(rows, clusters, folder / f"{at}-{number}")
            assert files_of(folder / f"{at}-{number}" / ".work") == expected
        else:
            monkeypatch.delitem(failpoints.hooks, at)
            return number
    raise AssertionError(f"{at} is visited without end")


def test_finished_blocks_and_files_are_not_made_again(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, clusters, _ = data
    for at, again in (("cluster_order:block", 3), ("cluster_order:file", 0)):
        with monkeypatch.context() as patched:
            patched.setitem(failpoints.hooks, at, _cut)
            with pytest.raises(CutError):
                ordered(rows, clusters, tmp_path / at)
        blocks: list[int] = []
        monkeypatch.setitem(failpoints.hooks, "cluster_order:block", lambda step: blocks.append(step))  # noqa: B023
        ordered(rows, clusters, tmp_path / at)
        assert len(blocks) == again
        monkeypatch.setitem(failpoints.hooks, "offline:file", lambda path: pytest.fail(f"{path} was made again"))
        ordered(rows, clusters, tmp_path / at)
        ordered(rows, clusters, tmp_path / at, MEMORY_GB / 2)  # a complete copy serves any bound
        monkeypatch.delitem(failpoints.hooks, "offline:file")


def test_a_copy_of_another_order_or_bound_starts_again(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, clusters, _ = data
    with monkeypatch.context() as patched, pytest.raises(CutError):
        patched.setitem(failpoints.hooks, "cluster_order:block", _cut)
        ordered(rows, clusters, tmp_path)
    copy = ordered(rows, clusters, tmp_path, MEMORY_GB / 2)  # whose files must be smaller
    assert isinstance(copy, OrderedRows) and len(copy.copy.starts) - 1 == 7
    np.testing.assert_array_equal(copy.take(np.arange(600)), rows.read(0, 600))
    other = replace(clusters, order=clusters.order[::-1].copy())
    copy = ordered(rows, other, tmp_path)
    assert isinstance(copy, OrderedRows)
    np.testing.assert_array_equal(copy.copy.read(0, 600), rows.take(other.order))
    path = tmp_path / ".work" / "cluster-order-00001.npy"
    os.truncate(path, path.stat().st_size - 1)
    np.testing.assert_array_equal(ordered(rows, other, tmp_path).take(np.arange(600)), rows.read(0, 600))


def test_rows_that_a_crash_of_the_machine_lost_are_noticed(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, clusters, _ = data
    with monkeypatch.context() as patched, pytest.raises(CutError):
        patched.setitem(failpoints.hooks, "cluster_order:file", _cut)
        ordered(rows, clusters, tmp_path)
    path = tmp_path / ".work" / "cluster-order-00002.part"
    size = path.stat().st_size
    for left in (size - 8, 20):  # places, and within a row
        os.truncate(path, left)
        os.truncate(path, size if left > 20 else left)
        with pytest.raises(
            UserError, match=r"cluster-order-00002.part is damaged: delete .*cluster-order.json and run"
        ):
            ordered(rows, clusters, tmp_path)
    (tmp_path / ".work" / "cluster-order.json").unlink()
    np.testing.assert_array_equal(ordered(rows, clusters, tmp_path).take(np.arange(600)), rows.read(0, 600))


def test_a_full_disk_is_said_before_the_copy(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, clusters, _ = data
    # 600 rows of 16 bytes, two places of 4 bytes each, and a second file of 178 rows while it is sorted.
    need = 600 * (16 + 8) + 178 * 16
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
    with pytest.raises(UserError, match=r"needs 0.00 GB for a copy of the embeddings .* take another --out"):
        ordered(rows, clusters, tmp_path)
    assert not files_of(tmp_path / ".work")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need))
    ordered(rows, clusters, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    ordered(rows, clusters, tmp_path)  # the copy is complete


# ---- the stages that read it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 0.2},
        {"threshold": 0.2, "link": "greedy"},
        {"target_keep": 0.8},
        {"threshold": 0.3, "keep": "medoid"},
    ],
    ids=str,
)
def test_balance_decides_the_same_on_the_copy(change: dict[str, Any], data: Any, tmp_path: Path) -> None:
    rows, clusters, centroids = data
    for neighbors in (0, 3):
        settings = BalanceSettings(**change, neighbor_clusters=neighbors, search_rows=200)
        known = centroids if neighbors else None
        expected = decided(rows, clusters, settings, centroids=known)
        found = decided(ordered(rows, clusters, tmp_path), clusters, settings, centroids=known)  # type: ignore[arg-type]
        assert 0.1 < expected.keep.mean() < 0.95 and found.threshold == expected.threshold
        np.testing.assert_array_equal(found.representative, expected.representative)
        np.testing.assert_array_equal(found.keep, expected.keep)


def _levels(rows: Rows, settings: KMeansSettings, work: Path) -> tuple[torch.Tensor, list[float], bool]:
    state = two_level(rows, settings, work)
    return state.centroids, state.objective, (work / ".work" / "cluster-order.json").exists()


@pytest.mark.parametrize("world", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_two_levels_give_the_same_bits_on_the_copy(
    world: int, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "MIN_PART_TILES", 1)
    monkeypatch.setattr(hierarchical, "tile_rows", lambda device: 64)  # of a part
    rows, settings = data[0], KMeansSettings(30, iterations=3, method="hierarchical", init="k-means++", refine=2)
    with monkeypatch.context() as patched:
        patched.setattr(cluster_order, "machine_memory", lambda: 1 << 40)
        expected = _levels(rows, settings, tmp_path / "small")
    assert not expected[2] and len(list((tmp_path / "small" / ".work").glob("rows_*.npy"))) == 10
    with pytest.raises(CutError), monkeypatch.context() as patched:
        patched.setitem(failpoints.hooks, "cluster_order:file", _cut)
        _levels(rows, settings, tmp_path / "cut")
    ranks = run_ranks(_levels, world, rows, settings, tmp_path / str(world))
    for found in (_levels(rows, settings, tmp_path / "alone"), _levels(rows, settings, tmp_path / "cut"), *ranks):
        assert torch.equal(found[0], expected[0]) and found[1] == expected[1] and found[2]


def test_the_benchmark_measures_every_way_of_reading(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_shared_arguments(parser)
    parser.set_defaults(suite="cluster-order")
    benchmark.add_arguments(parser)
    small = {"tars": 12, "copied-tars": 3, "rows": 40, "dim": 4, "cluster-rows": 5, "clusters": 6, "folder": tmp_path}
    words = [f"--{name}={value}" for name, value in small.items()]
    report = benchmark.run(parser.parse_args([*words, "--device=cpu", "--clock=cpu"]))
    assert [row["rows"] for row in report["results"]] == [480, 480, 120, 120, 120]
    assert len(benchmark.check(report)) == 4 and not list(tmp_path.iterdir())
