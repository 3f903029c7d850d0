"""The balance stage: from embeddings and clusters to keep masks and representatives per tar, a report and a gallery.

Legend: n samples with an embedding, k clusters, D width.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megacid.distributed.collectives import barrier
from megacid.distributed.consensus import any_rank
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import StartProgress, no_progress, stop_together
from megacid.errors import UserError
from megacid.offline.balance.clusters import group_by_cluster
from megacid.offline.balance.context import BalanceContext, BalanceSettings
from megacid.offline.balance.deduplicate import decide, preference
from megacid.offline.balance.inputs import BalanceInputs, read_inputs
from megacid.offline.balance.outputs import finished_outputs, write_outputs
from megacid.offline.cluster.results import read_centroids
from megacid.offline.nearest import Assigner, prepare
from megacid.offline.rows import EmbeddingRows
from megacid.storage.metadata import read_meta
from megacid.storage.stage_directory import StageDirectory

log = logging.getLogger(__name__)


def balance(
    embeddings: Path,
    clusters: Path,
    out: Path,
    settings: BalanceSettings,
    parallel: Parallel,
    *,
    shards: str | Path | None = None,
    gallery_groups: int = 40,
    start_progress: StartProgress = lambda total: no_progress,
) -> dict[str, Any]:
    """Runs or continues the stage, or keeps a finished one; returns meta.json. A collective.

    Samples without an embedding are not kept: they could not be decoded.

    Args:
        embeddings, clusters: folders written by tools/embed.py and tools/cluster.py.
        out: the folder to write.
        shards: the tars; None: the one recorded by tools/embed.py.
        gallery_groups: groups shown in gallery.html.
        start_progress: when the function it returns raises Stopped, all ranks stop.

    Raises:
        UserError: an input is damaged, inputs do not belong together, or `out` was made with other arguments.
    """
    group, device = parallel.group, parallel.device
    progress = start_progress(0)
    with stop_together(group):
        inputs = read_inputs(embeddings, clusters, shards)
        text = _caption_rows(inputs.rows) if settings.keep == "caption" else None
        centroids = read_centroids(clusters, inputs.rows.dim) if settings.neighbor_clusters else None
        arguments = _arguments(settings, inputs, centroids and centroids[0])
        stage = StageDirectory(out, "balance", arguments | {"gallery_groups": gallery_groups})
        finished = finished_outputs(stage, inputs.index)
    # Ranks may read files at different times, so they have to agree.
    if not any_rank(not finished, group):
        with stop_together(group):
            if parallel.is_first:
                stage.remove_partial_results()
        log.info("%s is complete", out)
        return read_meta(out, expect="balance")
    with stop_together(group):
        if parallel.is_first:
            stage.begin()
            stage.work.begin()
        priority = preference(settings.keep, inputs.score, settings.seed, inputs.rows, text, progress)
        sorted_rows = group_by_cluster(inputs.label, priority, inputs.k)
    barrier(group)
    progress = start_progress(inputs.rows.num_rows)
    assigner = Assigner(prepare(*centroids, device), centroids[1], device) if centroids else None
    decision = decide(
        BalanceContext(
            inputs.rows, sorted_rows, settings, device, assigner, group, partial=stage.work, progress=progress
        )
    )
    with stop_together(group):
        if parallel.is_first:
            write_outputs(stage, inputs, decision, settings, progress)
    barrier(group)
    return read_meta(out, expect="balance")


def _caption_rows(image: EmbeddingRows) -> EmbeddingRows:
    text = EmbeddingRows(image.directory, "text")
    if not np.array_equal(text.starts, image.starts):
        at = int(np.flatnonzero(text.starts != image.starts)[0]) - 1
        raise UserError(
            f"{text.name(int(text.starts[at]))} is in a partition with another number of rows than its images: "
            "run tools/embed.py again"
        )
    return text


def _arguments(settings: BalanceSettings, inputs: BalanceInputs, centroids: np.ndarray | None) -> dict[str, Any]:
    """Everything that decides the result, as JSON: settings, identity of the embeddings, digests of the clusters."""
    names = ("shards_digest", "model", "weights", "precision", "num_samples", "dim")
    arguments = asdict(settings) | {name: inputs.rows.meta.get(name) for name in names}
    arguments |= {"k": inputs.k, "labels": inputs.labels_digest()}
    if centroids is not None:
        arguments["centroids"] = hashlib.sha256(centroids.tobytes()).hexdigest()
    return arguments
