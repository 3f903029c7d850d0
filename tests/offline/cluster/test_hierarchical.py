"""Hierarchical k-means: budgets, objective against flat k-means, ranks, memory, restarts, indices of large sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_ranks

from megacid.distributed.parallel import shard_range
from megacid.errors import UserError
from megacid.offline.cluster import cells as cells_module
from megacid.offline.cluster import state as state_module
from megacid.offline.cluster.accumulate import Accumulator
from megacid.offline.cluster.cells import Cells, balance_load, centroid_budgets, global_rows, group_by_label
from megacid.offline.cluster.hierarchical import cell_count, two_level
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.memory import block_rows
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import TILE_CENTROIDS, Assigner, Metric, tile_rows
from megacid.offline.rows import ArrayRows
from megacid.storage.stage_directory import PartialResults

CPU = torch.device("cpu")


def mixture(n: int, dim: int, centres: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(unit rows fp16, cluster int64, -1 for the outliers, one row in a hundred); cluster sizes differ tenfold."""
    rng = np.random.default_rng(seed)
    share_of = rng.lognormal(0, 0.7, centres)
    label = rng.choice(centres, n, p=share_of / share_of.sum())
    x = rng.normal(size=(centres, dim))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True))[label] + rng.normal(size=(n, dim)) * (0.35 / dim**0.5)
    outlier = rng.random(n) < 0.01
    x[outlier] = rng.normal(size=(int(outlier.sum()), dim))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float16), np.where(outlier, -1, label)


def labels(x: np.ndarray, centroids: torch.Tensor, metric: Metric = "cosine") -> tuple[np.ndarray, float]:
    value, label = Assigner(centroids, metric, CPU).tile(torch.from_numpy(x).float())
    return label[:, 0].numpy(), float(value.double().mean())


HIERARCHICAL = KMeansSettings(k=60, iterations=5, method="hierarchical", init="k-means++", refine=2, refine_cells=8)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of the toy data."""
    monkeypatch.setattr(cells_module, "MAX_PARTS", 4)
    monkeypatch.setattr(cells_module, "MIN_PART_TILES", 1)


# ---- budgets and cells -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_budgets_reduce_the_error_most(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Non-increasing gains, as of k-means in a cell: then the greedy choice is optimal.
    gains = [np.sort(rng.lognormal(0, 2, m))[::-1] for m in rng.integers(0, 6, 5)]
    left = [gain.sum() - np.cumsum(gain) + 1 for gain in gains]
    filled, most = sum(len(curve) > 0 for curve in left), sum(map(len, left))
    choices = [range(1, len(curve) + 1) if len(curve) else [0] for curve in left]
    for k in {filled, (filled + most) // 2, most}:
        budget = centroid_budgets(left, k)
        assert budget.sum() == k

        def error(counts: tuple[int, ...]) -> float:
            return sum(curve[count - 1] for curve, count in zip(left, counts) if count)

        best = min(error(counts) for counts in itertools.product(*choices) if sum(counts) == k)
        assert error(tuple(budget)) == pytest.approx(best)
    for k in (filled - 1, most + 1):
        with pytest.raises(ValueError, match="filled cells"):
            centroid_budgets(left, k)


def test_budgets_average_a_late_gain() -> None:
    # The second centroid of cell 0 was drawn badly, the third one shows what it lacked.
    late, even = np.array([10.0, 10.0, 2.0]), np.array([10.0, 7.0, 4.0])
    assert centroid_budgets([late, even], 4).tolist() == [3, 1]
    assert centroid_budgets([np.empty(0), late, np.array([5.0])], 2).tolist() == [0, 1, 1]


def test_cells_hold_every_row_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 6, 700)
    label[label == 4] = 0
    cells = Cells(PartialResults(tmp_path, {}), 700, 6, 64)
    cells.partial.begin()
    assert cells.parts == 4 and cells.part_rows == 192
    for part in range(cells.parts - 1):
        cells.save(part, label[slice(*cells.bounds(part))])
    with pytest.raises(RuntimeError, match=r"\[3\] of 4"):
        cells.open()
    cells.save(3, label[slice(*cells.bounds(3))])
    cells.open()
    assert cells.sizes.tolist() == np.bincount(label, minlength=6).tolist()
    for cell in range(6):
        np.testing.assert_array_equal(cells.members(cell), np.flatnonzero(label == cell))
    place, order = np.concatenate(list(cells.places())), np.argsort(label, kind="stable")
    np.testing.assert_array_equal(place[order], np.arange(700))


def test_balance_load_is_even_and_complete() -> None:
    costs = np.array([9, 1, 8, 2, 5, 5])
    rank_of = balance_load(costs, 3)
    assert np.bincount(rank_of, weights=costs, minlength=3).tolist() == [10, 10, 10]
    assert balance_load(costs, 1).tolist() == [0] * 6


# ---- the whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_objective_is_close_to_flat_kmeans(metric: Metric, tmp_path: Path) -> None:
    x, _ = mixture(6000, 16, 200)
    flat = KMeansSettings(k=144, metric=metric, iterations=10)
    two = replace(flat, method="hierarchical", refine=2, refine_cells=4)
    want = labels(x, kmeans(ArrayRows(x), flat).centroids, metric)[1]
    state = two_level(ArrayRows(x), two, tmp_path)
    assert state.centroids.shape == (144, 16) and len(state.objective) == 2
    have = labels(x, state.centroids, metric)[1]
    # A squared distance shows a small difference of the cosine many times larger.
    assert have >= 0.985 * want if metric == "cosine" else have <= 1.15 * want
    # What the restriction to near cells loses, and what refining gains.
    exact = two_level(ArrayRows(x), replace(two, refine_cells=0), tmp_path / "exact")
    assert have == pytest.approx(labels(x, exact.centroids, metric)[1], rel=0.01 if metric == "cosine" else 0.03)
    none = two_level(ArrayRows(x), replace(two, refine=0), tmp_path / "none")
    assert none.objective == [] and (labels(x, none.centroids, metric)[1] < have) == (metric == "cosine")


@pytest.mark.parametrize("method", ["flat", "hierarchical"])
def test_planted_clusters_are_found(method: str, tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    x, truth = mixture(8000, 32, 40)
    settings = replace(HIERARCHICAL, k=40, iterations=15, method=method)
    rows = ArrayRows(x)
    state = kmeans(rows, settings) if method == "flat" else two_level(rows, settings, tmp_path)
    label, inside = labels(x, state.centroids)[0], truth >= 0
    assert metrics.adjusted_mutual_info_score(truth[inside], label[inside]) >= 0.95


def _on_ranks(x: np.ndarray, settings: KMeansSettings, work: Path) -> tuple[torch.Tensor, list[float]]:
    state = two_level(ArrayRows(x), settings, work)
    return state.centroids, state.objective


def test_ranks_and_memory_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = mixture(7000, 16, 80)
    monkeypatch.setattr(state_module, "COARSE_POINTS", 64)
    settings = replace(HIERARCHICAL, refine_cells=3)
    alone = two_level(ArrayRows(x), settings, tmp_path / "alone")
    tight = two_level(ArrayRows(x), replace(settings, memory_gb=0.00125), tmp_path / "tight")
    assert torch.equal(tight.centroids, alone.centroids) and tight.objective == alone.objective
    for world in (2, 4):
        for centroids, objective in run_ranks(_on_ranks, world, x, settings, tmp_path / str(world)):
            assert torch.equal(centroids, alone.centroids)
            assert objective == alone.objective


class CutError(Exception):
    pass


def test_a_run_interrupted_anywhere_continues_to_the_same_bits(tmp_path: Path) -> None:
    x, _ = mixture(5000, 16, 80)
    whole = two_level(ArrayRows(x), HIERARCHICAL, tmp_path / "whole")
    total = 0

    def count(rows: int) -> None:
        nonlocal total
        total += rows

    two_level(ArrayRows(x), HIERARCHICAL, tmp_path / "count", progress=count)
    for share_done in (0.1, 0.3, 0.6, 0.75, 0.9):
        left = int(share_done * total)

        def interrupt(rows: int) -> None:
            nonlocal left
            left -= rows
            if left < 0:
                raise CutError

        work = tmp_path / str(share_done)
        with pytest.raises(CutError):
            two_level(ArrayRows(x), HIERARCHICAL, work, progress=interrupt)
        state = two_level(ArrayRows(x), HIERARCHICAL, work)
        assert torch.equal(state.centroids, whole.centroids) and state.objective == whole.objective
    for change, message in (({"method": "flat"}, "method"), ({"iterations": 6}, "level_iterations=5")):
        with pytest.raises(UserError, match=message):
            other = replace(HIERARCHICAL, **change)
            if other.method == "flat":
                kmeans(ArrayRows(x), other, checkpoint=work / "state.npz")
            else:
                two_level(ArrayRows(x), other, work)


def test_what_was_done_with_other_settings_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x, _ = mixture(2000, 8, 20)
    settings = replace(HIERARCHICAL, k=20, refine=0)
    two_level(ArrayRows(x), replace(settings, seed=1), tmp_path)
    state = two_level(ArrayRows(x), settings, tmp_path)
    assert "partial results of other arguments or inputs (seed)" in caplog.text
    assert torch.equal(state.centroids, two_level(ArrayRows(x), settings, tmp_path / "fresh").centroids)


def test_extreme_numbers_of_clusters_and_rows(tmp_path: Path) -> None:
    x, _ = mixture(300, 8, 5)
    for k in (1, 2, 3, 299, 300):
        state = two_level(ArrayRows(x), replace(HIERARCHICAL, k=k, iterations=2), tmp_path / str(k))
        assert state.centroids.shape == (k, 8) and bool(torch.isfinite(state.centroids).all())
    # All rows the same: one filled cell.
    same = np.repeat(x[:1], 300, axis=0)
    state = two_level(ArrayRows(same), replace(HIERARCHICAL, k=9, iterations=2), tmp_path / "same")
    assert state.centroids.shape == (9, 8)
    sampled = replace(HIERARCHICAL, k=9, iterations=2, train_sample=100)
    assert two_level(ArrayRows(x), sampled, tmp_path / "sampled").centroids.shape == (9, 8)


def test_invalid_input_is_an_error(tmp_path: Path) -> None:
    x, _ = mixture(300, 8, 5)
    with pytest.raises(UserError, match="k is 301 but there are only 300 rows"):
        two_level(ArrayRows(x), replace(HIERARCHICAL, k=301), tmp_path)
    x[299, 1] = np.nan
    with pytest.raises(UserError, match=r"row 299 of the array holds NaN"):
        two_level(ArrayRows(x), HIERARCHICAL, tmp_path)
    with pytest.raises(UserError, match=r"refine_cells is -1.*--refine-cells"):
        replace(HIERARCHICAL, refine_cells=-1)
    with pytest.raises(UserError, match="method"):
        KMeansSettings(k=3, method="tree")  # type: ignore[arg-type]


# ---- index arithmetic of sizes no test can hold ------------------------------------------------------------------

LARGE_K, LARGE_N = 10_000_000, 3_000_000_000


def test_labels_above_2_to_the_18() -> None:
    k = 262_144 + 3 * TILE_CENTROIDS + 5
    centroids = torch.randn(k, 6, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 262_143, 262_144, 262_145, k - 6, k - 1])
    value, label = Assigner(centroids, "euclidean", CPU).tile(centroids[targets])
    assert label[:, 0].tolist() == targets.tolist() and label.dtype == torch.int64
    total = Accumulator(KMeansSettings(k=k), 6, CPU, 8.0)
    total.add(centroids[targets], targets, value[:, 0])
    assert total.counts_K.nonzero()[:, 0].tolist() == targets.tolist()
    torch.testing.assert_close(total.means()[targets].float(), centroids[targets], rtol=0, atol=1e-6)
    order, begins = group_by_label(targets.numpy(), k)
    assert order.tolist() == list(range(6)) and begins[-1] == 6 and begins[262_144] == 2


def test_sums_of_ten_million_clusters_have_their_places() -> None:
    total = Accumulator(KMeansSettings(k=LARGE_K), 768, torch.device("meta"), 1.0)
    assert total.flat.numel() == LARGE_K * 770 + 2 > 2**31
    assert total.sums_KD.shape == (LARGE_K, 768) and total.counts_K.shape == total.values_K.shape == (LARGE_K,)
    assert total.counts_K.storage_offset() == LARGE_K * 768


def test_products_of_rows_and_clusters_above_2_to_the_31() -> None:
    rng = np.random.default_rng(0)
    assert cell_count(LARGE_K) == 3162
    sizes = rng.multinomial(LARGE_N, np.full(3162, 1 / 3162)).astype(np.int64)
    budget = sizes * LARGE_K // LARGE_N
    assert int(sizes.max()) * int(budget.max()) < 2**63  # the cost of a cell
    rank_of = balance_load(sizes.astype(np.float64) * budget, 64)
    load = np.bincount(rank_of, weights=sizes.astype(np.float64) * budget)
    assert len(load) == 64 and load.max() / load.mean() < 1.1


def test_rows_above_2_to_the_31(tmp_path: Path) -> None:
    cells = Cells(PartialResults(tmp_path, {}), LARGE_N, 3162, tile_rows(CPU))
    assert cells.parts <= cells_module.MAX_PARTS and cells.part_rows < 2**31
    ends = [cells.bounds(part) for part in range(cells.parts)]
    assert ends[0][0] == 0 and ends[-1][1] == LARGE_N
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    start, stop = ends[-1]
    inside = np.array([0, stop - start - 1], np.int32)
    assert global_rows(cells.parts - 1, cells.part_rows, inside).tolist() == [start, LARGE_N - 1]
    parts = [shard_range(LARGE_N, rank, 64) for rank in range(64)]
    assert parts[-1][1] == LARGE_N and sum(stop - start for start, stop in parts) == LARGE_N


def test_memory_of_large_sizes_is_said_before_anything_is_done() -> None:
    settings = KMeansSettings(k=LARGE_K, memory_gb=64)
    with pytest.raises(UserError, match=r"10000000 clusters of width 768 need 1\d\d GB"):
        block_rows(LARGE_N // 64, 768, settings, CPU)
    assert block_rows(LARGE_N // 64, 768, replace(settings, memory_gb=256), CPU) % tile_rows(CPU) == 0
