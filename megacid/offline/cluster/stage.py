"""The clustering stage: k-means over an embedding folder and one label file per tar; or labels from given centroids.

Legend: K clusters, D width.
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial
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
from megacid.offline.cluster.assign_labels import assign_labels, centroids_digest
from megacid.offline.cluster.hierarchical import two_level
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.lloyd import imbalance_factor
from megacid.offline.cluster.modality import embedding_rows
from megacid.offline.cluster.run import check_size
from megacid.offline.cluster.state import KMeansSettings, KMeansState
from megacid.offline.nearest import Assigner, Backend, check_backend
from megacid.offline.rows import EmbeddingRows, Rows, SubsetRows
from megacid.offline.tars import kept_rows
from megacid.storage.atomic import file_sha256
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
    features: str = "image",
    keep: Path | None = None,
    top_labels: int = 1,
    start_progress: StartProgress = lambda total: no_progress,
) -> dict[str, Any]:
    """Cluster the embeddings; write centroids, sizes, labels and meta.json, whose content is returned.

    An interrupted run continues after its last iteration or label file, with the same result. A finished folder is
    kept; its missing or damaged files are written again. All ranks stop together when the progress raises Stopped.

    Args:
        features: "image" or "text" embeddings, or their normalised "mean".
        keep: Folder written by tools/balance.py; the centroids are those of the samples that it kept. None: of all.
        top_labels: Nearest clusters to write per sample.
        start_progress: Called with a number of rows to process; returns the function that counts them.

    Raises:
        UserError: Unusable embeddings or arguments, a folder of other arguments, or one cluster gets all samples.
    """
    group = parallel.group
    with stop_together(group):
        rows = embedding_rows(embeddings, features)
        _check_top_labels(top_labels, settings.k)
        identity = _identity(rows, features)
    trained, kept, source = _kept(rows, keep, parallel, start_progress)
    identity |= kept
    with stop_together(group):
        arguments = _arguments(settings, top_labels) | identity
        stage = StageDirectory(out, "cluster", arguments)
        meta = stage.finished()
        if meta is None:
            check_size(trained, settings, parallel.world, parallel.device)
    state: KMeansState | None = None
    if meta is not None:
        if _is_complete(stage, settings.k, rows, top_labels, parallel):
            return meta
        with stop_together(group):
            centroids = read_array(out / "centroids.npy", (settings.k, rows.dim), "f")
        if centroids is not None:
            # The labels depend on the centroids alone.
            state = KMeansState(torch.from_numpy(np.array(centroids)), int(meta["iterations"]), meta["objective"])
    with stop_together(group):
        if parallel.is_first:
            stage.begin()
    if state is None:
        state = _train(trained, out, settings, parallel, identity, start_progress)
    assigner = Assigner(state.centroids, settings.metric, parallel.device, settings.backend)
    sizes, similarity = assign_labels(out, rows, assigner, parallel, top_labels, start_progress(rows.num_rows))
    with stop_together(group):
        _check_sizes(sizes, rows, warn=parallel.is_first)
    result = {"iterations": state.iteration, "iterations_asked": settings.iterations, "objective": state.objective}
    return _finish(stage, rows, state.centroids, parallel, sizes, similarity, source, arguments | result)


def _kept(
    rows: EmbeddingRows, keep: Path | None, parallel: Parallel, start_progress: StartProgress
) -> tuple[Rows, dict[str, str], dict[str, str]]:
    """(training rows, what identifies their choice, where it is from)."""
    if keep is None:
        return rows, {}, {}
    kept = kept_rows(rows, keep, parallel, partial(start_progress(0), 0))
    digest = hashlib.sha256(kept.tobytes()).hexdigest()
    return SubsetRows(rows, kept), {"keep": digest}, {"keep": str(keep.resolve())}


def _train(
    rows: Rows,
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
    """Label embeddings with the centroids of a finished folder, in the layout of `cluster`; returns meta.json.

    Rows are of the features, image, text or mean, that the centroids are of.

    meta.json has the method "assign-only", names `clusters` in `source` and has the sha256 of its centroids; sizes are
    those of the new data. Interrupted and finished folders are handled as in `cluster`.

    Raises:
        UserError: As in `cluster`; or width, model or weights differ from those the centroids were made with.
    """
    group = parallel.group
    with stop_together(group):
        check_backend(backend)
        origin = read_meta(clusters, expect="cluster")
        features = origin.get("features", "image")
        rows = embedding_rows(embeddings, features)
        _check_origin(rows, clusters, origin)
        k = int(origin["k"])
        _check_top_labels(top_labels, k)
        path = clusters / "centroids.npy"
        stored = read_array(path, (k, rows.dim), "f")
        if stored is None:
            raise UserError(
                f"{path} is missing or damaged, expected floating point {(k, rows.dim)} as in meta.json: run "
                f"tools/cluster.py with --out {clusters} again"
            )
        if out.resolve() == clusters.resolve():
            raise UserError(f"--out is {out}, the directory of the centroids: take another --out")
        if (out / "state.npz").exists() or (out / WORK).exists():
            raise UserError(f"{out} has an unfinished clustering: finish it first, or take another --out")
        centroids_KD = torch.from_numpy(np.array(stored, np.float32))
        arguments: dict[str, Any] = {"method": "assign-only", "labels_per_sample": top_labels, "k": k}
        arguments |= {"metric": origin["metric"], "centroids_sha256": centroids_digest(centroids_KD)} | _identity(
            rows, features
        )
        stage = StageDirectory(out, "cluster", arguments)
        meta = stage.finished()
    if meta is not None and _is_complete(stage, k, rows, top_labels, parallel):
        return meta
    with stop_together(group):
        if parallel.is_first:
            stage.begin()
    assigner = Assigner(centroids_KD, origin["metric"], parallel.device, backend)
    sizes, similarity = assign_labels(out, rows, assigner, parallel, top_labels, start_progress(rows.num_rows))
    source = {"clusters": str(clusters.resolve())}
    return _finish(stage, rows, centroids_KD, parallel, sizes, similarity, source, arguments)


def _check_top_labels(top_labels: int, k: int) -> None:
    if not 1 <= top_labels <= k:
        raise UserError(f"top labels is {top_labels}, expected 1 to k = {k}: correct --top-labels")


def _check_origin(rows: EmbeddingRows, clusters: Path, origin: dict[str, Any]) -> None:
    for name, label in (("dim", "width"), ("model", "model"), ("weights", "weights")):
        value, expected = rows.meta.get(name), origin.get(name)
        if value != expected:
            raise UserError(
                f"{rows.directory} has {label} {value!r}, expected {expected!r} as in the centroids of {clusters}: "
                "take embeddings of that teacher, or other clusters"
            )


def _check_sizes(sizes: np.ndarray, rows: EmbeddingRows, *, warn: bool) -> None:
    """UserError when one of several clusters has all samples; a warning when most clusters have none."""
    used = int((sizes > 0).sum())
    if used == 1 and len(sizes) > 1 and rows.num_rows > 1:
        raise UserError(
            f"all {rows.num_rows} samples of {rows.directory} fall into one of {len(sizes)} clusters: their embeddings "
            "are (nearly) equal; check the images and the teacher's weights"
        )
    if warn and used * 2 < len(sizes):
        log.warning(
            f"only {used} of {len(sizes)} clusters hold a sample: many embeddings are (nearly) equal, or k is too large"
        )


def _identity(rows: EmbeddingRows, features: str) -> dict[str, Any]:
    """Where the rows come from: shards and teacher, and what is not its image embeddings."""
    identity = {"shards_digest": rows.meta["shards_digest"], "model": rows.meta["model"]}
    identity |= {name: rows.meta.get(name) for name in ("weights", "precision")}
    return identity if features == "image" else identity | {"features": features}


def _arguments(settings: KMeansSettings, top_labels: int) -> dict[str, Any]:
    names = ["method", "k", "metric", "seed", "init", "train_sample", "iterations", "tolerance"]
    if settings.method == "hierarchical":
        names += ["refine", "refine_cells"]
    return {name: getattr(settings, name) for name in names} | {"labels_per_sample": top_labels}


def _is_complete(stage: StageDirectory, k: int, rows: EmbeddingRows, top: int, parallel: Parallel) -> bool:
    """Whether all files of a finished folder are intact. A collective: ranks divide the label files."""
    with stop_together(parallel.group):
        mine = range(parallel.rank, len(rows.stems), parallel.world)
        damaged = first_damaged(stage.path, k, rows, mine, top)
    if any_rank(damaged is not None, parallel.group):
        log.warning("%s is damaged or missing: making it again", damaged or "a file that another rank checked")
        return False
    with stop_together(parallel.group):
        if parallel.is_first:
            _remove_partial_results(stage)
    log.info("%s is complete", stage.path)
    return True


def first_damaged(out: Path, k: int, rows: EmbeddingRows, partitions: range, top: int) -> Path | None:
    """The first file of a finished folder that is missing or damaged; of the label files only those of `partitions`."""
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
    parallel: Parallel,
    sizes: np.ndarray,
    similarity: float,
    source: dict[str, str],
    entries: dict[str, Any],
) -> dict[str, Any]:
    """Write centroids, sizes and meta.json on the first rank; returns meta.json. source, entries: added to it."""
    with stop_together(parallel.group):
        if parallel.is_first:
            failpoint("cluster:labelled")
            centroids = stage.path / "centroids.npy"
            write_array(centroids, centroids_KD.numpy())
            write_array(stage.path / "sizes.npy", sizes)
            embeddings = {"embeddings": str(rows.directory.resolve()), "shards": rows.meta["source"].get("shards")}
            stage.commit(
                embeddings | source,
                dim=rows.dim,
                num_samples=rows.num_rows,
                final_objective=similarity / rows.num_rows,
                imbalance=imbalance_factor(sizes),
                empty=int((sizes == 0).sum()),
                pretrained=rows.meta.get("pretrained"),
                centroids={"bytes": centroids.stat().st_size, "sha256": file_sha256(centroids)},
                **entries,
            )
            _remove_partial_results(stage)
    barrier(parallel.group)
    return read_meta(stage.path, expect="cluster")
