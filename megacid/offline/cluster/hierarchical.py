"""k-means in two levels: coarse clusters ("cells"), k-means inside each of them, then some iterations over all k.

Legend: n rows, K clusters, C cells (about sqrt(K)), D width, B rows of a block, T rows of a tile.

A flat iteration compares n rows with K centroids. Here a row is compared with C cells, then with the about K / C
centroids of its own cell, and in the last iterations with the centroids nearest to its cell, as many as `refine_cells`
cells have: rows of one cell have the same candidates, so that this too is a plain product of matrices. What that
restriction costs is a row near a border whose nearest centroid lies further away; labels are given without it.

Everything is kept on the way, and nothing depends on the number of ranks: the sums are exact (see `kmeans.py`), the
seed of a cell follows from its number, and tiles begin at the first row of a cell.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacid.distributed import collectives
from megacid.distributed.stopping import Progress, no_progress, stop_together
from megacid.failpoints import failpoint
from megacid.offline.cluster.accumulate import Accumulator, Group, grid_scale
from megacid.offline.cluster.cells import Cells, by_label, deal
from megacid.offline.cluster.fine_level import fine_level
from megacid.offline.cluster.kmeans import (
    block_rows,
    check_amount,
    check_rows,
    imbalance_factor,
    kmeans,
    report,
    training_sample,
    update,
)
from megacid.offline.cluster.level_context import LevelRun
from megacid.offline.cluster.merging import NEIGHBOURS, merge_nearest
from megacid.offline.cluster.seeding import check_memory, more_than
from megacid.offline.cluster.state import KMeansSettings, KMeansState, fingerprint, load_state, save_state, settled
from megacid.offline.nearest import tile_rows
from megacid.offline.rows import Rows
from megacid.storage.stage_directory import PartialResults

log = logging.getLogger(__name__)
COARSE_POINTS = 256  # rows per coarse centroid in the sample that these are trained on


def cell_count(k: int) -> int:
    """About sqrt(k), which makes both levels equally dear."""
    return max(1, round(math.sqrt(k)))


def two_level(
    rows: Rows,
    settings: KMeansSettings,
    work: Path,
    *,
    device: torch.device | str = "cpu",
    group: Group = None,
    identity: dict[str, Any] | None = None,
    unit_rows: bool = False,
    progress: Progress = no_progress,
) -> KMeansState:
    """Run (or go on with) all stages; the same centroids on every rank. `.objective` holds the refining iterations.

    work: directory, seen by all ranks, for the state (`state.npz`) and what is done so far (`.work`); what lies there is
    continued and gives the same result. The other arguments and the errors are those of `kmeans`.
    """
    device = torch.device(device)
    # The fine centroids follow from a fixed number of iterations, other than those of a flat run, which may go on.
    identity = (identity or {}) | {"level_iterations": settings.iterations, "level_tolerance": settings.tolerance}
    if settings.train_sample is not None:
        rows = training_sample(rows, settings)
    n = rows.num_rows
    check_amount(n, settings.k, group)
    extra = _extra_bytes(settings, device)
    block = block_rows(math.ceil(n / collectives.world_size(group)), rows.dim, settings, device, extra)
    check_memory(n, rows.dim, settings)
    final = replace(settings, iterations=max(settings.refine, 1))
    checkpoint, partial = work / "state.npz", PartialResults(work, _fingerprint(rows, settings, device, identity))
    with stop_together(group):
        # First of all: a folder of other settings is refused before anything in it is dropped.
        state = load_state(checkpoint, final, identity) if checkpoint.exists() else None
    with stop_together(group):
        if collectives.rank(group) == 0:
            partial.begin()
    largest = check_rows(rows, settings.metric, block, group, unit_rows=unit_rows, progress=progress)
    run = LevelRun(rows, settings, grid_scale(settings.metric, largest), block, device, group, progress)

    count = cell_count(settings.k)
    log.info("coarse clusters: %d, about the square root of k", count)
    sample = max(count * COARSE_POINTS, 4096)
    coarse_CD = kmeans(
        rows,
        replace(settings, k=count, train_sample=sample if sample < n else None, method="flat"),
        device=device,
        group=group,
        checkpoint=partial.folder / "coarse.npz",
        identity=identity,
        progress=lambda done: progress(0),
    ).centroids
    with stop_together(group):
        failpoint("cluster:coarse")
    cells = Cells(partial, n, count, tile_rows(device))
    _assign_cells(run, coarse_CD, cells)
    if state is None:
        centroids_KD, weight_K = fine_level(run, cells, partial, min(n, more_than(settings.k)))
        failpoint("cluster:merge")
        state = KMeansState(
            merge_nearest(
                centroids_KD, weight_K, settings.k, settings.metric, lambda c_KD: _neighbours(run, c_KD, coarse_CD)
            )
        )
    else:
        log.info("continuing after iteration %d of %d over all clusters", state.iteration, settings.refine)
    if settings.refine:
        _refine(run, cells, coarse_CD, state, lambda: save_state(checkpoint, state, final, identity))
    return state


def _near_middle(settings: KMeansSettings) -> int:
    """How many of the centroids nearest to its cell a row is compared with when refining; 0: with all."""
    wanted = math.ceil(settings.refine_cells * settings.k / cell_count(settings.k))
    return wanted if wanted < settings.k else 0


def _extra_bytes(settings: KMeansSettings, device: torch.device) -> int:
    """What two levels hold beside the blocks and what a flat run holds: lists of candidates, and the search for them."""
    wanted, count = _near_middle(settings), cell_count(settings.k)
    if wanted == 0:
        return 8 * settings.k
    return 8 * (count * wanted + settings.k) + min(tile_rows(device), count) * 2 * wanted * 12


def _fingerprint(
    rows: Rows, settings: KMeansSettings, device: torch.device, identity: dict[str, Any]
) -> dict[str, Any]:
    every = fingerprint(settings, identity) | {"rows": rows.num_rows, "dim": rows.dim, "tile": tile_rows(device)}
    # Both levels are the same whatever comes after them.
    return {name: value for name, value in every.items() if name != "refine_cells"}


def _assign_cells(run: LevelRun, coarse_CD: Tensor, cells: Cells) -> None:
    """Find the cell of every row, part by part, parts dealt out over the ranks; opens `cells`."""
    assigner = run.assigner(coarse_CD)
    with stop_together(run.group):
        for part in range(run.rank, cells.parts, run.world):
            start, stop = cells.bounds(part)
            if cells.load(part) is not None:
                run.progress(stop - start)
                continue
            label = np.empty(stop - start, np.int32)
            for low in range(start, stop, run.block):
                block = run.rows.read(low, min(low + run.block, stop))
                for at, x_TD in run.tiles(block):
                    where = slice(low + at - start, low + at - start + len(x_TD))
                    label[where] = run.nearest(assigner, x_TD)[1].cpu().numpy()
                    run.progress(len(x_TD))
            cells.save(part, label)
            failpoint("cluster:cells", step=part)
    with stop_together(run.group):
        cells.open()


def _by_cell(run: LevelRun, centroids_KD: Tensor, coarse_CD: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(centroids in order of the cell they lie in int64 [K], first place of each cell int64 [C + 1])."""
    assigner, cell_K = run.assigner(coarse_CD), []
    # Every rank does all of this with the same shapes: no need to fill up the last tile.
    for _, x_TD in run.pieces(centroids_KD):
        cell_K.append(assigner.tile(x_TD.to(run.device))[1][:, 0].cpu().numpy())
    return by_label(np.concatenate(cell_K), len(coarse_CD))


def _candidates(run: LevelRun, centroids_KD: Tensor, coarse_CD: Tensor) -> list[Tensor]:
    """For every cell the centroids its rows are compared with, int64, ascending: those that lie in it, and those nearest
    to its middle, as many as `refine_cells` cells have on average. Found anew in every iteration, as centroids move.
    """
    wanted, count = _near_middle(run.settings), len(coarse_CD)
    if wanted == 0:
        return [torch.arange(len(centroids_KD))] * count
    assigner, nearest = run.assigner(centroids_KD), []
    for _, x_TD in run.pieces(coarse_CD):
        nearest.append(assigner.tile(x_TD.to(run.device), wanted)[1].cpu().numpy())
    order, begins = _by_cell(run, centroids_KD, coarse_CD)
    found = []
    for cell, near in enumerate(np.concatenate(nearest)):
        found.append(torch.from_numpy(np.union1d(near, order[begins[cell] : begins[cell + 1]])))
    return found


def _neighbours(run: LevelRun, centroids_KD: Tensor, coarse_CD: Tensor) -> Tensor:
    """int64 [K, M]: the nearest of each centroid's candidates; itself where there are not so many."""
    order, begins = _by_cell(run, centroids_KD, coarse_CD)
    near_KM = torch.arange(len(centroids_KD))[:, None].repeat(1, NEIGHBOURS + 1)
    for cell, ids in enumerate(_candidates(run, centroids_KD, coarse_CD)):
        own = torch.from_numpy(order[begins[cell] : begins[cell + 1]])
        assigner = run.assigner(centroids_KD[ids])
        for at, x_TD in run.pieces(centroids_KD[own]):
            found = assigner.tile(x_TD.to(run.device), min(NEIGHBOURS + 1, len(ids)))[1].cpu()
            near_KM[own[at : at + len(x_TD)], : found.shape[1]] = ids[found]
        run.progress(0)
    return near_KM


def _refine(run: LevelRun, cells: Cells, coarse_CD: Tensor, state: KMeansState, save: Callable[[], None]) -> None:
    """Lloyd's iterations over all K, cells dealt out over the ranks; changes `state` in place. save: called on rank 0."""
    settings, n = run.settings, run.rows.num_rows
    rank_of = deal(cells.sizes, run.world)
    mine = np.flatnonzero((rank_of == run.rank) & (cells.sizes > 0)).tolist()
    previous = {cell: np.full(int(cells.sizes[cell]), -1, np.int32) for cell in mine}
    known = False
    while state.iteration < settings.refine and not state.stopped:
        began, moved = time.monotonic(), 0
        total = Accumulator(settings, run.rows.dim, run.device, run.scale)
        candidates = _candidates(run, state.centroids, coarse_CD)
        compared = sum(len(ids) * int(size) for ids, size in zip(candidates, cells.sizes)) / n
        log.info("iteration %d: a row is compared with %.0f of %d centroids", state.iteration + 1, compared, settings.k)
        with stop_together(run.group):
            for cell in mine:
                members, ids = cells.members(cell), candidates[cell].to(run.device)
                assigner = run.assigner(state.centroids[candidates[cell]])
                for low in range(0, len(members), run.block):
                    block = run.rows.take(members[low : low + run.block])
                    for at, x_TD in run.tiles(block):
                        value_T, place_T = run.nearest(assigner, x_TD)
                        label_T = ids[place_T]
                        total.add(x_TD, label_T, value_T)
                        label = label_T.cpu().numpy().astype(np.int32)
                        before = previous[cell][low + at : low + at + len(label)]
                        moved += int((before != label).sum())
                        before[:] = label
                        run.progress(len(label))
        total.flat[-1] = moved
        collectives.all_reduce_sum(total.flat, run.group)
        state.objective.append(total.objective(n))
        state.iteration += 1
        sizes, empty = update(state, total, settings)
        state.imbalance = imbalance_factor(sizes)
        state.stopped = settled(state.objective, settings)
        with stop_together(run.group):
            failpoint("cluster:refine", step=state.iteration)
            if run.rank == 0:
                save()
            failpoint("cluster:refine_saved", step=state.iteration)
            run.progress(0)
        share = float(total.flat[-1]) / n if known else None
        report(state, settings.refine, empty, share, time.monotonic() - began)
        known = True
