"""The clustering stage: k-means over an embedding folder, then one label file per tar; or labels from finished centroids.

Legend: K clusters, D width.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacid.distributed.collectives import barrier
from megacid.distributed.consensus import any_rank
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import StartProgress, no_progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.cluster.hierarchical import two_level
from megacid.offline.cluster.kmeans import KMeansSettings, KMeansState, imbalance_factor, kmeans
from megacid.offline.cluster.labels import centroids_digest, label_all
from megacid.offline.nearest import Backend, check_backend
from megacid.offline.rows import EmbeddingRows
from megacid.storage.metadata import read_meta
from megacid.storage.npy import read_array, write_array
from megacid.storage.parquet import parquet_shape
from megacid.storage.stage_directory import WORK, StageDirectory

log = logging.getLogger(__name__)


def cluster(
    embeddings: Path,
    out: Path,
    settings: KMeansSettings,
    parallel: Parallel,
    *,
    top_labels: int = 1,
    start_progress: StartProgress = lambda total: no_progress,
) -> dict[str, Any]:
    """Cluster the image embeddings and write centroids, sizes, labels and meta.json; returns it.

    An interrupted run goes on after its last iteration or label file, with the same result. A complete folder made with
    the same settings is left as it is; what is missing or cut off in it is made again. All ranks stop together when the
    function of `start_progress` raises Stopped. UserError also when all samples fall into one of several clusters.
    """
    group = parallel.group
    with stop_together(group):
        rows = EmbeddingRows(embeddings)
        if not 1 <= top_labels <= settings.k:
            raise UserError(f"top labels is {top_labels}, expected 1 to k = {settings.k}")
        identity = _identity(rows)
        expected = _expected(settings, top_labels) | identity
        stage = StageDirectory(out, "cluster", expected)
        done = stage.finished()
    state: KMeansState | None = None
    if done is not None:
        # Every rank has read the same meta.json; what is behind it is looked at in parts.
        with stop_together(group):
            mine = range(parallel.rank, len(rows.stems), parallel.world)
            damage = _damaged(out, settings.k, rows, list(mine), top_labels)
            centroids = read_array(out / "centroids.npy", (settings.k, rows.dim), "f")
        if not any_rank(damage is not None, group):
            with stop_together(group):
                if parallel.is_first:
                    _remove_partial_results(stage)
            log.info("%s is complete", out)
            return done
        log.warning("%s is damaged or missing: making again what is needed", damage or "a file that another rank reads")
        if centroids is not None:
            # The labels follow from the centroids alone.
            state = KMeansState(torch.from_numpy(np.array(centroids)), int(done["iterations"]), done["objective"])
    with stop_together(group):
        if parallel.is_first:
            stage.begin()
    if state is None:
        state = _train(rows, out, settings, parallel, identity, start_progress)
    sizes, similarity = label_all(
        out,
        rows,
        state.centroids,
        settings.metric,
        settings.backend,
        parallel,
        top_labels,
        start_progress(rows.num_rows),
    )
    with stop_together(group):
        _check_spread(sizes, rows, warn=parallel.is_first)
        if parallel.is_first:
            facts = expected | {"iterations": state.iteration, "iterations_asked": settings.iterations}
            facts["objective"] = state.objective
            _finish(stage, rows, state.centroids, facts, sizes, similarity)
    barrier(group)
    return read_meta(out, expect="cluster")


def _train(
    rows: EmbeddingRows,
    out: Path,
    settings: KMeansSettings,
    parallel: Parallel,
    identity: dict[str, Any],
    start_progress: StartProgress,
) -> KMeansState:
    if settings.method == "flat":
        return kmeans(
            rows,
            settings,
            device=parallel.device,
            group=parallel.group,
            checkpoint=out / "state.npz",
            identity=identity,
            unit_rows=True,
            progress=start_progress(rows.num_rows * settings.iterations),
        )
    return two_level(
        rows,
        settings,
        out,
        device=parallel.device,
        group=parallel.group,
        identity=identity,
        unit_rows=True,
        progress=start_progress(rows.num_rows * (1 + settings.iterations + settings.refine)),
    )


def assign_only(
    embeddings: Path,
    clusters: Path,
    out: Path,
    parallel: Parallel,
    *,
    top_labels: int = 1,
    backend: Backend = "auto",
    start_progress: StartProgress = lambda total: no_progress,
) -> dict[str, Any]:
    """Label embeddings with the finished centroids of `clusters`, in the layout of `cluster`; returns meta.json.

    meta.json has the method "assign-only", names the directory in `source` and holds the sha256 of its centroids. Sizes
    are those of the new data. UserError when the width, the model or its weights are not those the centroids were made
    with. Interruptions and complete folders are dealt with as in `cluster`.
    """
    group = parallel.group
    with stop_together(group):
        check_backend(backend)
        rows, origin = EmbeddingRows(embeddings), read_meta(clusters, expect="cluster")
        _check_origin(rows, clusters, origin)
        k = int(origin["k"])
        if not 1 <= top_labels <= k:
            raise UserError(f"top labels is {top_labels}, expected 1 to k = {k}: correct --top-labels")
        stored = read_array(clusters / "centroids.npy", (k, rows.dim), "f")
        if stored is None:
            raise UserError(
                f"{clusters / 'centroids.npy'} is missing or not {(k, rows.dim)} numbers, expected what its meta.json says: "
                "run tools/cluster.py there again"
            )
        if out.resolve() == clusters.resolve():
            raise UserError(f"--out is {out}, the directory the centroids come from: take another --out")
        if (out / "state.npz").exists() or (out / WORK).exists():
            raise UserError(f"{out} holds a clustering that has not ended: end it first, or take another --out")
        centroids_KD = torch.from_numpy(np.array(stored, np.float32))
        expected: dict[str, Any] = {"method": "assign-only", "labels_per_sample": top_labels, "k": k}
        expected |= {"metric": origin["metric"], "centroids_sha256": centroids_digest(centroids_KD)} | _identity(rows)
        stage = StageDirectory(out, "cluster", expected)
        done = stage.finished()
    if done is not None:
        with stop_together(group):
            damage = _damaged(out, k, rows, list(range(parallel.rank, len(rows.stems), parallel.world)), top_labels)
        if not any_rank(damage is not None, group):
            log.info("%s is complete", out)
            return done
        log.warning("%s is damaged or missing: making again what is needed", damage or "a file that another rank reads")
    with stop_together(group):
        if parallel.is_first:
            stage.begin()
    sizes, similarity = label_all(
        out, rows, centroids_KD, origin["metric"], backend, parallel, top_labels, start_progress(rows.num_rows)
    )
    with stop_together(group):
        if parallel.is_first:
            _finish(stage, rows, centroids_KD, expected, sizes, similarity, clusters=str(clusters.resolve()))
    barrier(group)
    return read_meta(out, expect="cluster")


def _check_origin(rows: EmbeddingRows, clusters: Path, origin: dict[str, Any]) -> None:
    for name, label in (("dim", "width"), ("model", "model"), ("weights", "weights")):
        have, made = rows.meta.get(name), origin.get(name)
        if have != made:
            raise UserError(
                f"{rows.directory} has {label} {have!r}, the centroids of {clusters} were made with {label} {made!r}: "
                "take embeddings of that teacher, or other clusters"
            )


def _check_spread(sizes: np.ndarray, rows: EmbeddingRows, *, warn: bool) -> None:
    """UserError when several clusters were asked for and one holds everything; a warning when most hold nothing."""
    used = int((sizes > 0).sum())
    if used == 1 and len(sizes) > 1 and rows.num_rows > 1:
        raise UserError(
            f"all {rows.num_rows} samples of {rows.directory} fall into one of {len(sizes)} clusters: their embeddings are "
            "(nearly) the same, so labels would say nothing; check the images and the teacher's weights"
        )
    if warn and used * 2 < len(sizes):
        log.warning(
            "only %d of %d clusters hold a sample: many embeddings are (nearly) the same, or k is too large",
            used,
            len(sizes),
        )


def _identity(rows: EmbeddingRows) -> dict[str, Any]:
    """What the rows are."""
    return {"shards_digest": rows.meta["shards_digest"], "model": rows.meta["model"]} | {
        name: rows.meta.get(name) for name in ("weights", "precision")
    }


def _expected(settings: KMeansSettings, top_labels: int) -> dict[str, Any]:
    names = ["method", "k", "metric", "seed", "init", "train_sample", "iterations", "tolerance"]
    if settings.method == "hierarchical":
        names += ["refine", "refine_cells"]
    return {name: getattr(settings, name) for name in names} | {"labels_per_sample": top_labels}


def _damaged(out: Path, k: int, rows: EmbeddingRows, partitions: list[int], top: int) -> Path | None:
    """The first file of a finished folder that is missing or not whole; of the label files only those of `partitions`."""
    if read_array(out / "centroids.npy", (k, rows.dim), "f") is None:
        return out / "centroids.npy"
    if read_array(out / "sizes.npy", (k,), "i") is None:
        return out / "sizes.npy"
    for partition in partitions:
        path = out / "labels" / f"{rows.stems[partition]}.parquet"
        try:
            shape = parquet_shape(path, "")
        except UserError:
            return path
        if shape != (rows.rows_of[partition], 2 + top):
            return path
    return None


def _remove_partial_results(stage: StageDirectory) -> None:
    (stage.path / "state.npz").unlink(missing_ok=True)
    stage.remove_partial_results()


def _finish(
    stage: StageDirectory,
    rows: EmbeddingRows,
    centroids_KD: torch.Tensor,
    facts: dict[str, Any],
    sizes: np.ndarray,
    similarity: float,
    **source: str,
) -> None:
    """Write what stands beside the labels. source: more of where it comes from, for meta.json."""
    failpoint("cluster:labelled")
    write_array(stage.path / "centroids.npy", centroids_KD.numpy())
    write_array(stage.path / "sizes.npy", sizes)
    stage.commit(
        {"embeddings": str(rows.directory.resolve()), "shards": rows.meta["source"].get("shards")} | source,
        dim=rows.dim,
        num_samples=rows.num_rows,
        final_objective=similarity / rows.num_rows,
        imbalance=imbalance_factor(sizes),
        empty=int((sizes == 0).sum()),
        pretrained=rows.meta.get("pretrained"),
        **facts,
    )
    _remove_partial_results(stage)
