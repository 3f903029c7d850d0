"""k-means in two levels: coarse clusters ("cells"), k-means inside each cell, then iterations over all k centroids.

A flat iteration compares n rows with K centroids. Here every row is compared with C (about sqrt(K)) coarse centroids,
then with the about K / C centroids of its own cell (`fine_level.py`), and in the refining iterations with the centroids
nearest to its cell, as many as `refine_cells` cells have. The rows of one cell share these candidates, so this is a
plain matrix product too. The restriction affects rows near a border whose nearest centroid is not a candidate; labels
are assigned among all k.

The result does not depend on the number of ranks: sums are exact (`accumulate.py`), the seed of a cell follows from its
number, and tiles start at the first row of a cell. The coarse state, the cell of every row, and the centroids of every
cell are stored in OUT/.work, and the state after every refining iteration in OUT/state.npz; a restart continues from
them with the same result, also on another number of ranks.

Legend: n rows, K clusters, C cells, D width, B rows of a block, T rows of a tile, M neighbours.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacid.distributed.stopping import Group, Progress, no_progress, stop_together
from megacid.failpoints import failpoint
from megacid.offline.cluster.accumulate import Accumulator
from megacid.offline.cluster.cells import Cells, balance_load, group_by_label
from megacid.offline.cluster.fine_level import fine_level, joined
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.lloyd import iterate
from megacid.offline.cluster.memory import candidate_bytes
from megacid.offline.cluster.merging import NEIGHBOURS, merge_nearest
from megacid.offline.cluster.run import KMeansRun, begin_stage, start_run
from megacid.offline.cluster.seeding import SEEDING_ITERATIONS, seed_count
from megacid.offline.cluster.state import (
    KMeansSettings,
    KMeansState,
    cell_count,
    coarse_rows,
    fingerprint,
    load_state,
    num_candidates,
    save_state,
)
from megacid.offline.cluster_order import in_cluster_order
from megacid.offline.nearest import tile_rows
from megacid.offline.rows import Rows
from megacid.storage.stage_directory import PartialResults

log = logging.getLogger(__name__)


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
    """Run or continue both levels and the refining iterations; returns the same state on every rank.

    Other arguments and errors are those of `kmeans`. `.objective` of the state holds the refining iterations.

    Args:
        work: Directory on a file system shared by all ranks, for the state and partial results; continued if it exists.
    """
    device = torch.device(device)
    # Unlike in a flat run, the fine centroids depend on the number of iterations, so it cannot be raised later.
    identity = (identity or {}) | {"level_iterations": settings.iterations, "level_tolerance": settings.tolerance}
    final = replace(settings, iterations=max(settings.refine, 1))
    checkpoint = work / "state.npz"
    with stop_together(group):
        # A state of other settings is refused before `begin` drops any partial result.
        state = load_state(checkpoint, final, identity) if checkpoint.exists() else None
    run = start_run(rows, settings, device, group, progress, unit_rows=unit_rows)
    partial = PartialResults(work, _fingerprint(run, identity))
    with stop_together(group):
        if run.rank == 0:
            partial.begin()
    begin_stage("coarse clusters")
    coarse_CD = _coarse_level(run, partial, identity)
    begin_stage("cells")
    cells = Cells(partial, run.rows.num_rows, len(coarse_CD), tile_rows(device))
    _assign_cells(run, coarse_CD, cells)
    begin_stage("order")
    ordered = in_cluster_order(run.rows, cells.places, partial, group, settings.memory_gb, progress)
    run = replace(run, rows=ordered)
    if state is None:
        fine = fine_level(run, cells, partial, min(run.rows.num_rows, seed_count(settings.k)))
        failpoint("cluster:merge")
        state = KMeansState(_merged(run, fine, coarse_CD))
    else:
        log.info("continuing after iteration %d of %d over all clusters", state.iteration, settings.refine)
    if settings.refine:
        begin_stage("refining")
        refining = _RefiningPass(run, cells, coarse_CD)
        iterate(run, state, settings.refine, refining, lambda: save_state(checkpoint, state, final, identity), "refine")
    return state


def _merged(run: KMeansRun, fine: list[np.ndarray], coarse_CD: Tensor) -> Tensor:
    """The k centroids left of those of `fine_level`, fp32 [K, D]. A collective."""
    begin_stage("merging")
    settings = run.settings
    memory_bytes = settings.memory_gb * 1e9 - candidate_bytes(settings, run.device)

    def merged() -> Tensor:
        centroids_KD, weight_K = joined(fine)
        return merge_nearest(
            centroids_KD,
            weight_K,
            settings.k,
            settings.metric,
            lambda c_KD: _neighbours(run, c_KD, coarse_CD),
            memory_bytes,
        )

    return run.on_first_rank(merged, (settings.k, run.rows.dim))


def _fingerprint(run: KMeansRun, identity: dict[str, Any]) -> dict[str, Any]:
    rows = {"rows": run.rows.num_rows, "dim": run.rows.dim, "tile": tile_rows(run.device)}
    # Partial results of both levels do not depend on the refining iterations.
    settings = {name: value for name, value in fingerprint(run.settings, identity).items() if name != "refine_cells"}
    return settings | rows | {"seeding_iterations": SEEDING_ITERATIONS}


def _coarse_level(run: KMeansRun, partial: PartialResults, identity: dict[str, Any]) -> Tensor:
    """The coarse centroids fp32 [C, D], by flat k-means on a sample."""
    count, n = cell_count(run.settings.k), run.rows.num_rows
    log.info("coarse clusters: %d, about the square root of k", count)
    sample = coarse_rows(run.settings.k)
    coarse_CD = kmeans(
        run.rows,
        replace(run.settings, k=count, train_sample=sample if sample < n else None, method="flat"),
        device=run.device,
        group=run.group,
        checkpoint=partial.folder / "coarse.npz",
        identity=identity,
        progress=lambda rows: run.progress(0),
    ).centroids
    with stop_together(run.group):
        failpoint("cluster:coarse")
    return coarse_CD


def _assign_cells(run: KMeansRun, coarse_CD: Tensor, cells: Cells) -> None:
    """Store the cell of every row, parts divided among the ranks, and open `cells`."""
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


def _centroids_by_cell(run: KMeansRun, centroids_KD: Tensor, coarse_CD: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(centroids sorted by the cell they lie in int64 [K], first place of each cell int64 [C + 1])."""
    assigner, cell_K = run.assigner(coarse_CD), []
    # Every rank does all of this with the same shapes, so the last tile needs no padding.
    for _, x_TD in run.split(centroids_KD):
        cell_K.append(assigner.tile(x_TD.to(run.device))[1][:, 0].cpu().numpy())
    return group_by_label(np.concatenate(cell_K), len(coarse_CD))


def _candidates(run: KMeansRun, centroids_KD: Tensor, coarse_CD: Tensor) -> list[Tensor]:
    """The centroids that the rows of each cell are compared with, int64, ascending: those in the cell and those nearest
    to its coarse centroid."""
    count, cells = num_candidates(run.settings), len(coarse_CD)
    if count == 0:
        return [torch.arange(len(centroids_KD))] * cells
    assigner, nearest = run.assigner(centroids_KD), []
    for _, x_TD in run.split(coarse_CD):
        nearest.append(assigner.tile(x_TD.to(run.device), count)[1].cpu().numpy())
    order, begins = _centroids_by_cell(run, centroids_KD, coarse_CD)
    return [
        torch.from_numpy(np.union1d(near, order[begins[cell] : begins[cell + 1]]))
        for cell, near in enumerate(np.concatenate(nearest))
    ]


def _neighbours(run: KMeansRun, centroids_KD: Tensor, coarse_CD: Tensor) -> Tensor:
    """The nearest candidates of each centroid, int64 [K, M]; padded with its own number."""
    order, begins = _centroids_by_cell(run, centroids_KD, coarse_CD)
    near_KM = torch.arange(len(centroids_KD))[:, None].repeat(1, NEIGHBOURS + 1)
    for cell, ids in enumerate(_candidates(run, centroids_KD, coarse_CD)):
        own = torch.from_numpy(order[begins[cell] : begins[cell + 1]])
        assigner = run.assigner(centroids_KD[ids])
        for at, x_TD in run.split(centroids_KD[own]):
            places = assigner.tile(x_TD.to(run.device), min(NEIGHBOURS + 1, len(ids)))[1].cpu()
            near_KM[own[at : at + len(x_TD)], : places.shape[1]] = ids[places]
        run.progress(0)
    return near_KM


class _RefiningPass:
    """One pass over all rows, each compared with the candidates of its cell; cells are divided among the ranks."""

    def __init__(self, run: KMeansRun, cells: Cells, coarse_CD: Tensor) -> None:
        self.run, self.cells, self.coarse_CD = run, cells, coarse_CD
        rank_of = balance_load(cells.sizes, run.world)
        self.mine = np.flatnonzero((rank_of == run.rank) & (cells.sizes > 0)).tolist()
        self.previous = {cell: np.full(int(cells.sizes[cell]), -1, np.int32) for cell in self.mine}

    def __call__(self, state: KMeansState) -> Accumulator:
        """The sums over all ranks. Candidates are found in every pass, because centroids move."""
        run, moved = self.run, 0
        total = Accumulator(run.settings, run.rows.dim, run.device, run.scale)
        candidates = _candidates(run, state.centroids, self.coarse_CD)
        compared = sum(len(ids) * int(size) for ids, size in zip(candidates, self.cells.sizes)) / run.rows.num_rows
        log.info(
            "iteration %d: a row is compared with %.0f of %d centroids", state.iteration + 1, compared, run.settings.k
        )
        with stop_together(run.group):
            for cell in self.mine:
                members, ids = self.cells.members(cell), candidates[cell].to(run.device)
                assigner = run.assigner(state.centroids[candidates[cell]])
                for low in range(0, len(members), run.block):
                    block = run.rows.take(members[low : low + run.block])
                    for at, x_TD in run.tiles(block):
                        value_T, place_T = run.nearest(assigner, x_TD)
                        label_T = ids[place_T]
                        total.add(x_TD, label_T, value_T)
                        label = label_T.cpu().numpy().astype(np.int32)
                        previous = self.previous[cell][low + at : low + at + len(label)]
                        moved += int((previous != label).sum())
                        previous[:] = label
                        run.progress(len(label))
        total.all_reduce(moved, run.group)
        return total
