"""The second level of hierarchical k-means: the number of centroids of each cell, and k-means inside the cell.

k-means++ inside a cell measures how much each further centroid reduces the summed error there, and the budgets follow
from these curves: a cell of one large, tight cluster needs fewer centroids than one of as many rows in ten clusters.
Cells are divided among the ranks, and each is computed by one rank alone from a seed that follows from its number.
Results are stored per cell, so a restart computes only the missing ones, on any number of ranks.

Legend: n rows, K centroids, C cells, D width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megacid.distributed.stopping import stop_together
from megacid.failpoints import failpoint
from megacid.offline.cluster.accumulate import Accumulator
from megacid.offline.cluster.cells import Cells, balance_load, centroid_budgets
from megacid.offline.cluster.lloyd import imbalance_factor, update
from megacid.offline.cluster.memory import block_rows, spare_bytes
from megacid.offline.cluster.run import KMeansRun, begin_stage
from megacid.offline.cluster.seeding import SEEDING_ITERATIONS, initial_centroids, plus_plus, sample_rows
from megacid.offline.cluster.state import KMeansSettings, KMeansState, settled
from megacid.offline.nearest import prepare
from megacid.offline.random_streams import RandomStream
from megacid.offline.rows import Rows, SubsetRows
from megacid.storage.stage_directory import PartialResults

log = logging.getLogger(__name__)
EXTRA_STEPS = 8  # of k-means++ in every cell


def fine_level(run: KMeansRun, cells: Cells, partial: PartialResults, count: int) -> list[np.ndarray]:
    """For each filled cell float64 [centroids, D + 1], mapped from disk: its centroids, and in the last column their
    weights for `merge_nearest`; `count` centroids in all. `joined` joins them."""
    begin_stage("cell seeding")
    starts = _starts(run, cells, partial, count)
    budget = centroid_budgets([start[1] for start in starts], count)
    filled = np.flatnonzero(budget)
    log.info(
        f"{len(filled)} filled cells of {cells.sizes[filled].min()} to {cells.sizes.max()} rows (imbalance "
        f"{imbalance_factor(cells.sizes):.3f}), {budget[filled].min()} to {budget.max()} centroids each"
    )

    def fine(cell: int) -> np.ndarray:
        one = replace(run.settings, k=int(budget[cell]), seed=_cell_seed(run.settings.seed, cell), method="flat")
        members = SubsetRows(run.rows, cells.members(cell))
        if one.init == "random":
            first = initial_centroids(members, one, run.device, run.progress)
        else:
            chosen = starts[cell][0, : one.k].astype(np.int64)
            first = prepare(members.take(chosen), one.metric, torch.device("cpu"))
        centroids_KD, weight_K = _cell_kmeans(run, members, one, first)
        # float64, because a weight may be as large as the number of rows.
        return np.concatenate([centroids_KD.numpy(), weight_K[:, None]], axis=1, dtype=np.float64)

    begin_stage("fine level")
    shapes = {cell: (int(budget[cell]), run.rows.dim + 1) for cell in filled.tolist()}
    costs = cells.sizes.astype(np.float64) * budget
    rows_done = cells.sizes * run.settings.iterations
    return _each_cell(run, partial, "fine", shapes, costs, rows_done, fine)


def joined(cells: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(centroids fp32 [K, D], weights float64 [K]) of all cells."""
    count, columns = sum(len(array) for array in cells), cells[0].shape[1]
    centroids_KD, weight_K = np.empty((count, columns - 1), np.float32), np.empty(count)
    at = 0
    for array in cells:
        centroids_KD[at : at + len(array)], weight_K[at : at + len(array)] = array[:, :-1], array[:, -1]
        at += len(array)
    return torch.from_numpy(centroids_KD), torch.from_numpy(weight_K)


def _starts(run: KMeansRun, cells: Cells, partial: PartialResults, count: int) -> list[np.ndarray]:
    """The steps of k-means++ in each cell, float64 [2, steps]: chosen members (by number), summed error they leave.

    A cell gets 1.5 times its share of the steps by size, and a few more: an upper bound on its budget.
    """
    n = run.rows.num_rows
    # Python integers: rows times k may exceed 2^63.
    steps = [min(size, -(-3 * count * size // (2 * n)) + EXTRA_STEPS) for size in cells.sizes.tolist()]

    def start(cell: int) -> np.ndarray:
        members = SubsetRows(run.rows, cells.members(cell))
        sample = sample_rows(members.num_rows, steps[cell], members.dim)
        seed = _cell_seed(run.settings.seed, cell)
        comparisons = SEEDING_ITERATIONS * members.num_rows * (count * members.num_rows // n)
        chosen, left = plus_plus(
            *(members, steps[cell], sample, comparisons, seed, run.settings.metric, run.device, run.progress)
        )
        return np.stack([chosen, left])

    shapes = {cell: (2, steps[cell]) for cell in np.flatnonzero(cells.sizes).tolist()}
    costs = np.square(np.array(steps, np.float64))
    starts = dict(zip(shapes, _each_cell(run, partial, "start", shapes, costs, np.zeros_like(cells.sizes), start)))
    return [starts.get(cell, np.empty((2, 0))) for cell in range(cells.count)]


def _each_cell(
    run: KMeansRun,
    partial: PartialResults,
    name: str,
    shapes: dict[int, tuple[int, int]],
    costs: np.ndarray,
    rows_done: np.ndarray,
    compute: Callable[[int], np.ndarray],
) -> list[np.ndarray]:
    """Compute and store the missing arrays, cells divided among the ranks; returns all, the same on every rank.

    Args:
        name: Of the files and the failpoint.
        shapes: Cell -> shape of its float64 array.
        costs: [C] cost of each cell, to balance the ranks.
        rows_done: [C] progress to report for a cell that is stored already.
    """
    cells = np.array(list(shapes), np.int64)
    mine = cells[balance_load(costs[cells], run.world) == run.rank].tolist()
    began, done = time.monotonic(), 0
    with stop_together(run.group):
        for number, cell in enumerate(mine, 1):
            if partial.array(f"{name}_{cell:05d}", shapes[cell], "f") is not None:
                run.progress(int(rows_done[cell]))
                continue
            partial.save_array(f"{name}_{cell:05d}", compute(cell))
            failpoint(f"cluster:{name}", step=cell)
            run.progress(0)
            done += 1
            if number == len(mine) or number * 10 // len(mine) > (number - 1) * 10 // len(mine):
                seconds = time.monotonic() - began
                left = seconds / done * (len(mine) - number)
                log.info("%s, cell %d/%d of this rank: %.1f s, %.0f s left", name, number, len(mine), seconds, left)
    with stop_together(run.group):
        arrays = {cell: partial.array(f"{name}_{cell:05d}", shape, "f") for cell, shape in shapes.items()}
        missing = [cell for cell, array in arrays.items() if array is None]
        if missing:
            raise RuntimeError(f"{name} of cells {missing} is missing in {partial.folder}")
        return [array for array in arrays.values() if array is not None]


def _cell_seed(seed: int, cell: int) -> int:
    return int(np.random.SeedSequence([seed, RandomStream.CELL, cell]).generate_state(1, np.uint64)[0])


def _cell_kmeans(run: KMeansRun, members: Rows, settings: KMeansSettings, first: Tensor) -> tuple[Tensor, np.ndarray]:
    """k-means inside one cell, on this rank alone; returns (centroids fp32 [k, D], weights float64 [k]).

    The rows stay in memory if `memory_gb` allows it, else they are read again in every iteration; the result is the
    same.
    """
    n = members.num_rows
    block = block_rows(n, members.dim, settings, run.device)
    cached = None
    # 12 bytes per value: fp32, while the rows as read are also held.
    if n * members.dim * 12 <= spare_bytes(n, members.dim, settings, run.device):
        cached = torch.cat([x_TD for _, x_TD in run.tiles(members.read(0, n))])

    def tiles() -> Iterator[Tensor]:
        if cached is not None:
            yield from (x_TD for _, x_TD in run.split(cached))
            return
        for low in range(0, n, block):
            yield from (x_TD for _, x_TD in run.tiles(members.read(low, min(low + block, n))))

    state = KMeansState(first)
    # A single centroid is final after one iteration.
    for _ in range(settings.iterations if settings.k > 1 else 1):
        assigner = run.assigner(state.centroids)
        total = Accumulator(settings, members.dim, run.device, run.scale)
        for x_TD in tiles():
            value_T, label_T = run.nearest(assigner, x_TD)
            total.add(x_TD, label_T, value_T)
            run.progress(len(x_TD))
        state.objective.append(total.objective(n))
        state.iteration += 1
        weight_K = total.counts_K.cpu().numpy()
        if settings.metric == "cosine":
            weight_K = weight_K - total.errors()
        update(state, total, settings)
        if settled(state.objective, settings):
            break
    return state.centroids, weight_K
