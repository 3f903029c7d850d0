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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacid.distributed import collectives
from megacid.offline.assign import Assigner, pad_rows, prepare, tile_rows
from megacid.offline.cells import Cells, budgets, by_label, deal
from megacid.offline.files import PartialResults
from megacid.offline.kmeans import (
    Accumulator,
    Group,
    Tick,
    block_rows,
    check_amount,
    check_rows,
    grid_scale,
    imbalance_factor,
    initial_centroids,
    kmeans,
    report,
    training_sample,
    update,
)
from megacid.offline.kmeans_state import KMeansSettings, KMeansState, fingerprint, load_state, save_state, settled
from megacid.offline.rows import Rows, SubsetRows
from megacid.offline.stopping import together
from megacid.probes import probe

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
    tick: Tick = lambda rows: None,
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
    final = replace(settings, iterations=max(settings.refine, 1))
    checkpoint, partial = work / "state.npz", PartialResults(work, _fingerprint(rows, settings, device, identity))
    with together(group):
        # First of all: a folder of other settings is refused before anything in it is dropped.
        state = load_state(checkpoint, final, identity) if checkpoint.exists() else None
    with together(group):
        if collectives.rank(group) == 0:
            partial.begin()
    largest = check_rows(rows, settings.metric, block, group, unit_rows=unit_rows, tick=tick)
    run = _Run(rows, settings, grid_scale(settings.metric, largest), block, device, group, tick)

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
        tick=lambda done: tick(0),
    ).centroids
    with together(group):
        probe("cluster:coarse")
    cells = Cells(partial, n, count, tile_rows(device))
    _assign_cells(run, coarse_CD, cells)
    if state is None:
        state = KMeansState(_fine(run, cells, partial))
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


@dataclass(frozen=True)
class _Run:
    """What all stages need."""

    rows: Rows
    settings: KMeansSettings
    scale: float
    block: int
    device: torch.device
    group: Group
    tick: Tick

    @property
    def rank(self) -> int:
        return collectives.rank(self.group)

    @property
    def world(self) -> int:
        return collectives.world_size(self.group)

    def tiles(self, x_BD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(place, rows fp32 [at most T, D]) one tile after the other."""
        tile = tile_rows(self.device)
        for at in range(0, len(x_BD), tile):
            yield at, x_BD[at : at + tile]

    def nearest(self, assigner: Assigner, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(similarity [T], label int64 [T]) of at most one tile of rows."""
        value_TL, label_TL = assigner.tile(pad_rows(x_TD, tile_rows(self.device)))
        return value_TL[: len(x_TD), 0], label_TL[: len(x_TD), 0]

    def assigner(self, centroids_KD: Tensor) -> Assigner:
        return Assigner(centroids_KD, self.settings.metric, self.device, self.settings.backend)


def _fingerprint(
    rows: Rows, settings: KMeansSettings, device: torch.device, identity: dict[str, Any]
) -> dict[str, Any]:
    every = fingerprint(settings, identity) | {"rows": rows.num_rows, "dim": rows.dim, "tile": tile_rows(device)}
    # Both levels are the same whatever comes after them.
    return {name: value for name, value in every.items() if name != "refine_cells"}


def _assign_cells(run: _Run, coarse_CD: Tensor, cells: Cells) -> None:
    """Find the cell of every row, part by part, parts dealt out over the ranks; opens `cells`."""
    assigner = run.assigner(coarse_CD)
    with together(run.group):
        for part in range(run.rank, cells.parts, run.world):
            start, stop = cells.bounds(part)
            if cells.load(part) is not None:
                run.tick(stop - start)
                continue
            label = np.empty(stop - start, np.int32)
            for low in range(start, stop, run.block):
                block = run.rows.read(low, min(low + run.block, stop))
                for at, x_TD in run.tiles(prepare(block, run.settings.metric, run.device)):
                    where = slice(low + at - start, low + at - start + len(x_TD))
                    label[where] = run.nearest(assigner, x_TD)[1].cpu().numpy()
                    run.tick(len(x_TD))
            cells.save(part, label)
            probe("cluster:cells", step=part)
    with together(run.group):
        cells.open()


def _fine(run: _Run, cells: Cells, partial: PartialResults) -> Tensor:
    """k-means inside every cell, cells dealt out over the ranks; all centroids fp32 [K, D], in order of the cells."""
    settings = run.settings
    budget = budgets(cells.sizes, settings.k)
    filled = np.flatnonzero(budget)
    # A cell costs its rows times its centroids; floats, as the product may be above 2^63.
    rank_of = deal(cells.sizes.astype(np.float64) * budget, run.world)
    mine = filled[rank_of[filled] == run.rank].tolist()
    log.info(
        "%d filled cells of %d to %d rows (imbalance %.3f), %d to %d centroids each",
        len(filled),
        cells.sizes[filled].min(),
        cells.sizes.max(),
        imbalance_factor(cells.sizes),
        budget[filled].min(),
        budget.max(),
    )
    began, done = time.monotonic(), 0
    shapes = {cell: (int(budget[cell]), run.rows.dim) for cell in filled.tolist()}
    with together(run.group):
        for number, cell in enumerate(mine, 1):
            if partial.array(f"fine_{cell:05d}", shapes[cell], "f") is not None:
                run.tick(int(cells.sizes[cell]) * settings.iterations)
                continue
            one = replace(settings, k=int(budget[cell]), seed=_cell_seed(settings.seed, cell), method="flat")
            centroids_KD = _inside(run, SubsetRows(run.rows, cells.members(cell)), one)
            partial.save_array(f"fine_{cell:05d}", centroids_KD.numpy())
            probe("cluster:fine", step=cell)
            run.tick(0)
            done += 1
            if number == len(mine) or number * 10 // len(mine) > (number - 1) * 10 // len(mine):
                seconds = time.monotonic() - began
                left = seconds / done * (len(mine) - number)
                log.info("cells %d/%d of this rank: %.1f s, %.0f s to go", number, len(mine), seconds, left)
    with together(run.group):
        parts = [(cell, partial.array(f"fine_{cell:05d}", shape, "f")) for cell, shape in shapes.items()]
        missing = [cell for cell, part in parts if part is None]
        if missing:
            raise RuntimeError(f"the centroids of the cells {missing} are missing in {partial.folder}")
        return torch.from_numpy(np.concatenate([part for _, part in parts if part is not None]))


def _cell_seed(seed: int, cell: int) -> int:
    return int(np.random.SeedSequence([seed, 3, cell]).generate_state(1, np.uint64)[0])


def _inside(run: _Run, members: Rows, settings: KMeansSettings) -> Tensor:
    """Centroids fp32 [k, D] of the rows of one cell, on this rank alone. Rows are held when `memory_gb` allows it, else
    read again in every iteration: the same result."""
    n = members.num_rows
    block = block_rows(n, members.dim, settings, run.device)
    state = KMeansState(initial_centroids(members, settings, run.device, run.tick))
    held = prepare(members.read(0, n), settings.metric, run.device) if block >= n else None
    # The mean of everything does not move.
    for _ in range(settings.iterations if settings.k > 1 else 1):
        assigner = run.assigner(state.centroids)
        total = Accumulator(settings, members.dim, run.device, run.scale)
        for low in range(0, n, block):
            x_BD = held if held is not None else prepare(members.read(low, low + block), settings.metric, run.device)
            for _at, x_TD in run.tiles(x_BD):
                value_T, label_T = run.nearest(assigner, x_TD)
                total.add(x_TD, label_T, value_T)
                run.tick(len(x_TD))
        state.objective.append(total.objective(n))
        state.iteration += 1
        update(state, total, settings)
        if settled(state.objective, settings):
            break
    return state.centroids


def _candidates(run: _Run, centroids_KD: Tensor, coarse_CD: Tensor) -> list[Tensor]:
    """For every cell the centroids its rows are compared with, int64, ascending: those that lie in it, and those nearest
    to its middle, as many as `refine_cells` cells have on average. Found anew in every iteration, as centroids move.
    """
    wanted, count = _near_middle(run.settings), len(coarse_CD)
    if wanted == 0:
        return [torch.arange(len(centroids_KD))] * count
    to_cells, to_fine, cell_K, nearest = run.assigner(coarse_CD), run.assigner(centroids_KD), [], []
    # Every rank does all of this with the same shapes: no need to fill up the last tile.
    for _, x_TD in run.tiles(centroids_KD):
        cell_K.append(to_cells.tile(x_TD.to(run.device))[1][:, 0].cpu().numpy())
    for _, x_TD in run.tiles(coarse_CD):
        nearest.append(to_fine.tile(x_TD.to(run.device), wanted)[1].cpu().numpy())
    order, begins = by_label(np.concatenate(cell_K), count)
    found = []
    for cell, near in enumerate(np.concatenate(nearest)):
        found.append(torch.from_numpy(np.union1d(near, order[begins[cell] : begins[cell + 1]])))
    return found


def _refine(run: _Run, cells: Cells, coarse_CD: Tensor, state: KMeansState, save: Callable[[], None]) -> None:
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
        with together(run.group):
            for cell in mine:
                members, ids = cells.members(cell), candidates[cell].to(run.device)
                assigner = run.assigner(state.centroids[candidates[cell]])
                for low in range(0, len(members), run.block):
                    block = run.rows.take(members[low : low + run.block])
                    for at, x_TD in run.tiles(prepare(block, settings.metric, run.device)):
                        value_T, place_T = run.nearest(assigner, x_TD)
                        label_T = ids[place_T]
                        total.add(x_TD, label_T, value_T)
                        label = label_T.cpu().numpy().astype(np.int32)
                        before = previous[cell][low + at : low + at + len(label)]
                        moved += int((before != label).sum())
                        before[:] = label
                        run.tick(len(label))
        total.flat[-1] = moved
        collectives.all_reduce_sum(total.flat, run.group)
        state.objective.append(total.objective(n))
        state.iteration += 1
        sizes, empty = update(state, total, settings)
        state.imbalance = imbalance_factor(sizes)
        state.stopped = settled(state.objective, settings)
        with together(run.group):
            probe("cluster:refine", step=state.iteration)
            if run.rank == 0:
                save()
            probe("cluster:refine_saved", step=state.iteration)
            run.tick(0)
        share = float(total.flat[-1]) / n if known else None
        report(state, settings.refine, empty, share, time.monotonic() - began)
        known = True
