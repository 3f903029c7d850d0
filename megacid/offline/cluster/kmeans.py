"""Flat k-means over rows that do not fit into memory, on one process or many ranks.

Every iteration streams the rows from disk once. Each rank assigns its share of the rows to their nearest centroids and
adds them up per cluster; one all-reduce sums the ranks, and every rank computes the same new centroids. The sums are
exact (see `accumulate.py`) and the search runs on tiles of a fixed shape, so centroids and objective are bitwise the
same for any number of ranks and any memory bound. The state is saved after every iteration; a restart continues after
the last one and gives the same result as an uninterrupted run.

Legend: n rows, K clusters.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacid.distributed.stopping import Group, Progress, no_progress, stop_together
from megacid.failpoints import failpoint
from megacid.offline.cluster.accumulate import one_pass, rows_of_rank
from megacid.offline.cluster.lloyd import iterate
from megacid.offline.cluster.run import begin_stage, start_run
from megacid.offline.cluster.seeding import initial_centroids, sample_rows
from megacid.offline.cluster.state import KMeansSettings, KMeansState, load_state, save_state
from megacid.offline.rows import Rows

log = logging.getLogger(__name__)


def kmeans(
    rows: Rows,
    settings: KMeansSettings,
    *,
    device: torch.device | str = "cpu",
    group: Group = None,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
    unit_rows: bool = False,
    progress: Progress = no_progress,
) -> KMeansState:
    """Run or continue Lloyd's iterations; returns the same state on every rank.

    Args:
        checkpoint: File for the state after every iteration; an existing one is continued.
        identity: What the rows are (digest, model); a checkpoint of other rows is refused.
        unit_rows: Require rows of length 1, whatever the metric.
        progress: Called with the number of rows assigned, also with 0.

    Raises:
        UserError: k > n, an invalid row, a memory bound that is too small, or a checkpoint of another run.
    """
    device, identity = torch.device(device), identity or {}
    with stop_together(group):
        state = load_state(checkpoint, settings, identity) if checkpoint and checkpoint.exists() else None
    run = start_run(rows, settings, device, group, progress, unit_rows=unit_rows)
    n, dim = run.rows.num_rows, run.rows.dim
    if state is None:
        begin_stage("seeding")
        if settings.init == "k-means++":
            log.info(
                "k-means++: %d centroids from a sample of %d of %d rows", settings.k, sample_rows(n, settings.k, dim), n
            )
        first_KD = run.on_first_rank(lambda: initial_centroids(run.rows, settings, device, progress), (settings.k, dim))
        state = KMeansState(first_KD)
        with stop_together(group):
            failpoint("cluster:init")
    else:
        log.info("continuing after iteration %d of %d", state.iteration, settings.iterations)
    begin_stage("iterations")
    start, stop = rows_of_rank(run)
    labels = np.full(stop - start, -1, np.int32)

    def save() -> None:
        if checkpoint is not None:
            save_state(checkpoint, state, settings, identity)

    iterate(run, state, settings.iterations, lambda state: one_pass(run, state.centroids, labels), save)
    return state
