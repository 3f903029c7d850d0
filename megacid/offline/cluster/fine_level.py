"""The second level: how many centroids each cell gets, and k-means inside it. Cells are dealt out over the ranks.

Legend: n rows, K centroids, C cells, D width.

k-means++ inside a cell says how much summed error each further centroid takes away there. Budgets follow from these
curves: a cell of one large, tight cluster needs fewer than one of as many rows in ten clusters.
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
from megacid.offline.cluster.cells import Cells, budgets, deal
from megacid.offline.cluster.kmeans import block_rows, imbalance_factor, spare_bytes, update
from megacid.offline.cluster.level_context import LevelRun
from megacid.offline.cluster.seeding import initial_centroids, plus_plus, sample_rows
from megacid.offline.cluster.state import KMeansSettings, KMeansState, settled
from megacid.offline.nearest import prepare
from megacid.offline.random_streams import RandomStream
from megacid.offline.rows import Rows, SubsetRows
from megacid.storage.stage_directory import PartialResults

log = logging.getLogger(__name__)
_MORE_STEPS = 8  # of k-means++ in every cell, above half more than its share


def fine_level(run: LevelRun, cells: Cells, partial: PartialResults, count: int) -> tuple[Tensor, Tensor]:
    """(centroids fp32 [K, D] in order of the cells, weight float64 [K] of each, see `merging`); K is `count`."""
    starts = _starts(run, cells, partial, count)
    budget = budgets([start[1] for start in starts], count)
    filled = np.flatnonzero(budget)
    log.info(
        "%d filled cells of %d to %d rows (imbalance %.3f), %d to %d centroids each",
        len(filled),
        cells.sizes[filled].min(),
        cells.sizes.max(),
        imbalance_factor(cells.sizes),
        budget[filled].min(),
        budget.max(),
    )

    def fine(cell: int) -> np.ndarray:
        one = replace(run.settings, k=int(budget[cell]), seed=_cell_seed(run.settings.seed, cell), method="flat")
        members = SubsetRows(run.rows, cells.members(cell))
        if one.init == "random":
            first = initial_centroids(members, one, run.device, run.progress)
        else:
            chosen = starts[cell][0, : one.k].astype(np.int64)
            first = prepare(members.take(chosen), one.metric, torch.device("cpu"))
        centroids_KD, weight_K = _inside(run, members, one, first)
        # float64: weights are up to the number of rows.
        return np.concatenate([centroids_KD.numpy(), weight_K[:, None]], axis=1, dtype=np.float64)

    shapes = {cell: (int(budget[cell]), run.rows.dim + 1) for cell in filled.tolist()}
    work = cells.sizes.astype(np.float64) * budget
    parts = np.concatenate(_each_cell(run, partial, "fine", shapes, work, cells.sizes * run.settings.iterations, fine))
    return torch.from_numpy(parts[:, :-1].astype(np.float32)), torch.from_numpy(parts[:, -1].copy())


def _starts(run: LevelRun, cells: Cells, partial: PartialResults, count: int) -> list[np.ndarray]:
    """For every cell float64 [2, steps] of k-means++: members chosen (by number), summed error that they leave.

    Steps: half more than its share by size, and some; where all share the data evenly, no cell needs more.
    """
    n = run.rows.num_rows
    # Python's integers: rows times k is above 2^63 for data that is not out of reach.
    steps = [min(size, -(-3 * count * size // (2 * n)) + _MORE_STEPS) for size in cells.sizes.tolist()]

    def start(cell: int) -> np.ndarray:
        members = SubsetRows(run.rows, cells.members(cell))
        sample = sample_rows(members.num_rows, steps[cell], members.dim)
        seed = _cell_seed(run.settings.seed, cell)
        return np.stack(plus_plus(members, steps[cell], sample, seed, run.settings.metric, run.device, run.progress))

    shapes = {cell: (2, steps[cell]) for cell in np.flatnonzero(cells.sizes).tolist()}
    work = np.square(np.array(steps, np.float64))
    found = dict(zip(shapes, _each_cell(run, partial, "start", shapes, work, np.zeros_like(cells.sizes), start)))
    return [found.get(cell, np.empty((2, 0))) for cell in range(cells.count)]


def _each_cell(
    run: LevelRun,
    partial: PartialResults,
    name: str,
    shapes: dict[int, tuple[int, int]],
    work: np.ndarray,
    rows: np.ndarray,
    make: Callable[[int], np.ndarray],
) -> list[np.ndarray]:
    """float64 arrays of these cells, of these shapes, the same on every rank; those that are missing are made and kept.

    work: [C] what each costs; rows: [C] how many count as done for one that is there.
    """
    cells = np.array(list(shapes), np.int64)
    mine = cells[deal(work[cells], run.world) == run.rank].tolist()
    began, done = time.monotonic(), 0
    with stop_together(run.group):
        for number, cell in enumerate(mine, 1):
            if partial.array(f"{name}_{cell:05d}", shapes[cell], "f") is not None:
                run.progress(int(rows[cell]))
                continue
            partial.save_array(f"{name}_{cell:05d}", make(cell))
            failpoint(f"cluster:{name}", step=cell)
            run.progress(0)
            done += 1
            if number == len(mine) or number * 10 // len(mine) > (number - 1) * 10 // len(mine):
                seconds = time.monotonic() - began
                left = seconds / done * (len(mine) - number)
                log.info("%s, cells %d/%d of this rank: %.1f s, %.0f s to go", name, number, len(mine), seconds, left)
    with stop_together(run.group):
        parts = {cell: partial.array(f"{name}_{cell:05d}", shape, "f") for cell, shape in shapes.items()}
        missing = [cell for cell, part in parts.items() if part is None]
        if missing:
            raise RuntimeError(f"{name} of the cells {missing} is missing in {partial.folder}")
        return [part for part in parts.values() if part is not None]


def _cell_seed(seed: int, cell: int) -> int:
    return int(np.random.SeedSequence([seed, RandomStream.CELL, cell]).generate_state(1, np.uint64)[0])


def _inside(run: LevelRun, members: Rows, settings: KMeansSettings, first: Tensor) -> tuple[Tensor, np.ndarray]:
    """(centroids fp32 [k, D], weight float64 [k]) of the rows of one cell, on this rank alone, from the centroids `first`.

    Rows are held when `memory_gb` allows it, else read again in every iteration: the same result.
    """
    n = members.num_rows
    block = block_rows(n, members.dim, settings, run.device)
    held = None
    # As read and in fp32.
    if n * members.dim * 12 <= spare_bytes(n, members.dim, settings, run.device):
        held = torch.cat([x_TD for _, x_TD in run.tiles(members.read(0, n))])

    def tiles() -> Iterator[Tensor]:
        if held is not None:
            yield from (x_TD for _, x_TD in run.pieces(held))
            return
        for low in range(0, n, block):
            yield from (x_TD for _, x_TD in run.tiles(members.read(low, min(low + block, n))))

    state = KMeansState(first)
    # The mean of everything does not move.
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
