"""The balance stage: from embeddings and clusters to keep masks and representatives per tar, a report and a gallery.

Legend: n samples with an embedding, k clusters, D width.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megacid.distributed.array_exchange import Ranks
from megacid.distributed.consensus import any_rank
from megacid.distributed.parallel import Parallel, long_waits
from megacid.distributed.stopping import StartProgress, no_progress, stop_together
from megacid.errors import UserError
from megacid.offline.balance.clusters import group_by_cluster
from megacid.offline.balance.context import BalanceContext, BalanceSettings
from megacid.offline.balance.deduplicate import decide
from megacid.offline.balance.inputs import CELLS, BalanceInputs, add_labels
from megacid.offline.balance.outputs import finished_outputs, write_outputs
from megacid.offline.balance.preference import preference
from megacid.offline.cluster.results import read_centroids
from megacid.offline.cluster.stage import cluster
from megacid.offline.cluster.state import default_settings
from megacid.offline.cluster_order import in_cluster_order
from megacid.offline.nearest import Assigner, prepare
from megacid.offline.rows import EmbeddingRows
from megacid.offline.tars import load_tars
from megacid.storage.metadata import read_meta
from megacid.storage.stage_directory import PartialResults, StageDirectory

log = logging.getLogger(__name__)


def balance(
    embeddings: Path,
    clusters: Path | None,
    out: Path,
    settings: BalanceSettings,
    parallel: Parallel,
    *,
    shards: str | Path | None = None,
    memory_gb: float = 4.0,
    gallery_groups: int = 40,
    start_progress: StartProgress = lambda total: no_progress,
) -> dict[str, Any]:
    """Runs or continues the stage, or keeps a finished one; returns meta.json. A collective.

    Samples without an embedding are not kept: they could not be decoded.

    Args:
        embeddings, clusters: folders of tools/embed.py and tools/cluster.py. clusters: None with `settings.cells`.
        out: the folder to write; with `settings.cells`, OUT/cells gets what tools/cluster.py writes for this seed.
        shards: the tars; None: the one recorded by tools/embed.py.
        memory_gb: bound on the memory of one rank that makes the cells, or copies the embeddings in cluster order.
        gallery_groups: groups shown in gallery.html.
        start_progress: when the function it returns raises Stopped, all ranks stop.

    Raises:
        UserError: an input is damaged, inputs do not belong together, or `out` was made with other arguments.
    """
    with long_waits(parallel) as waiting:
        ranks = Ranks(waiting.group)
        with ranks.stop_together():
            rows = EmbeddingRows(embeddings)
        index = load_tars(rows, shards, parallel=waiting, poll=partial(start_progress(0), 0))
        with ranks.stop_together():
            _check_cells(clusters, settings.cells, rows)
            text = _caption_rows(rows) if settings.keep == "caption" else None
            arguments = _arguments(settings, rows) | {"gallery_groups": gallery_groups}
        if clusters is not None:
            inputs, *scores = add_labels(rows, index, clusters, ranks)
            arguments, assigner = _with_clusters(arguments, settings, inputs, waiting)
        with ranks.stop_together():
            stage = StageDirectory(out, "balance", arguments)
            finished = finished_outputs(stage, index, rows, settings.cells)
        # Ranks may read files at different times, so they have to agree.
        if not any_rank(not finished, waiting.group):
            _keep_finished(stage, ranks)
            return read_meta(out, expect="balance")
        with ranks.stop_together():
            if parallel.is_first:
                stage.begin()
        if settings.cells is not None:
            cells = default_settings(settings.cells, seed=settings.seed, memory_gb=memory_gb)
            cluster(embeddings, out / CELLS, cells, parallel, start_progress=start_progress)
            inputs, *scores = add_labels(rows, index, out / CELLS, ranks)
            # Links inside of other cells are not used: if cells are made again, they may be rounded differently.
            arguments, assigner = _with_clusters(arguments, settings, inputs, waiting)
            stage.work = PartialResults(out, arguments)
        _decide_and_write(stage, inputs, scores, text, assigner, settings, waiting, memory_gb, start_progress)
    return read_meta(out, expect="balance")


def _keep_finished(stage: StageDirectory, ranks: Ranks) -> None:
    with ranks.stop_together():
        if ranks.rank == 0:
            stage.remove_partial_results()
    log.info("%s is complete", stage.path)


def _decide_and_write(
    stage: StageDirectory,
    inputs: BalanceInputs,
    scores: list[np.ndarray],
    text: EmbeddingRows | None,
    assigner: Assigner | None,
    settings: BalanceSettings,
    parallel: Parallel,
    memory_gb: float,
    start_progress: StartProgress,
) -> None:
    """The work of a stage that has begun.

    Args:
        scores: The score of `preference`, alone in a list: it is taken out, so that no caller holds its memory.
        text: Caption embeddings, for keep="caption".
    """
    ranks, rows, progress = Ranks(parallel.group), inputs.rows, start_progress(0)
    with ranks.stop_together():
        if parallel.is_first:
            stage.work.begin()
    priority = preference(settings.keep, scores.pop(), settings.seed, rows, text, ranks, stage.work, progress)
    with ranks.stop_together():
        clusters = group_by_cluster(inputs.label, priority, inputs.k)
    ordered = in_cluster_order(rows, clusters.places, stage.work, ranks.group, memory_gb, progress)
    context = BalanceContext(
        *(ordered, clusters, settings, parallel.device, assigner, ranks.group),
        partial=stage.work,
        progress=start_progress(rows.num_rows),
    )
    decision = decide(context)
    del priority, clusters, context, ordered  # the outputs do not need them
    write_outputs(stage, inputs, decision, settings, ranks, progress)


def _caption_rows(image: EmbeddingRows) -> EmbeddingRows:
    text = EmbeddingRows(image.directory, "text")
    if not np.array_equal(text.starts, image.starts):
        at = int(np.flatnonzero(text.starts != image.starts)[0]) - 1
        raise UserError(
            f"{text.name(int(text.starts[at]))} is in a partition with another number of rows than its images: "
            "run tools/embed.py again"
        )
    return text


def _check_cells(clusters: Path | None, cells: int | None, rows: EmbeddingRows) -> None:
    if (clusters is None) == (cells is None):
        raise ValueError("expected either clusters or settings.cells")
    if cells is not None and cells > rows.num_rows:
        raise UserError(f"--cells is {cells}, expected at most the {rows.num_rows:,} embedded samples: lower it")


def _arguments(settings: BalanceSettings, rows: EmbeddingRows) -> dict[str, Any]:
    """What decides the result apart from the clusters, as JSON: settings and identity of the embeddings."""
    names = ("shards_digest", "model", "weights", "precision", "num_samples", "dim")
    arguments = asdict(settings) | {name: rows.meta.get(name) for name in names}
    if settings.cells is None:
        del arguments["cells"]
    return arguments


def _with_clusters(
    arguments: dict[str, Any], settings: BalanceSettings, inputs: BalanceInputs, parallel: Parallel
) -> tuple[dict[str, Any], Assigner | None]:
    """The arguments with digests of the labels and, if they are used, of the centroids; and the latter's assigner.

    A collective.
    """
    arguments = arguments | {"k": inputs.k, "labels": inputs.labels_digest}
    if not settings.neighbor_clusters:
        return arguments, None
    with stop_together(parallel.group):
        features = read_meta(inputs.clusters, expect="cluster").get("features", "image")
        if features != "image":
            raise UserError(
                f"{inputs.clusters} has centroids of {features} features, --neighbor-clusters expects those of images: "
                "give clusters that were made with --features image, or --neighbor-clusters 0"
            )
        centroids, metric = read_centroids(inputs.clusters, inputs.rows.dim)
        arguments["centroids"] = hashlib.sha256(centroids.data).hexdigest()
        device = parallel.device
        return arguments, Assigner(prepare(centroids, metric, device), metric, device)
