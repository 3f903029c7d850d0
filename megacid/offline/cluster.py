"""The clustering stage: k-means over an embedding folder, then one label file per tar.

Legend: K clusters, D width, T rows of one tile, L labels per sample.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from megacid.checkpoint.store import atomic_path, read_meta, write_json_atomic, write_meta
from megacid.distributed.collectives import all_reduce_sum, barrier, fail_together
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.offline.assign import Assigner, pad_rows, prepare, tile_rows
from megacid.offline.kmeans import KMeansSettings, KMeansState, imbalance_factor, kmeans
from megacid.offline.rows import EmbeddingRows, PartitionedRows

log = logging.getLogger(__name__)


def label_partition(
    rows: PartitionedRows, partition: int, assigner: Assigner, top: int, tick: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, float]:
    """(labels int32 [n, L] best first, cosine to the first float32 [n], sum of the similarities) of one partition."""
    start, stop = int(rows.starts[partition]), int(rows.starts[partition + 1])
    tile = tile_rows(assigner.device)
    labels = np.empty((stop - start, top), np.int32)
    score = np.empty(stop - start, np.float32)
    total = 0.0
    for low in range(start, stop, tile):
        x_TD = prepare(rows.read(low, min(low + tile, stop)), assigner.metric, assigner.device)
        value_TL, label_TL = assigner.tile(pad_rows(x_TD, tile), top)
        value_TL, label_TL = value_TL[: len(x_TD)], label_TL[: len(x_TD)]
        where = slice(low - start, low - start + len(x_TD))
        labels[where] = label_TL.cpu().numpy()
        score[where] = assigner.cosine(x_TD, label_TL[:, 0]).cpu().numpy()
        total += float(value_TL[:, 0].double().sum())
        tick(len(x_TD))
    return labels, score, total


def _write_labels(path: Path, keys: list[str], labels: np.ndarray, score: np.ndarray) -> None:
    columns = {"key": pa.array(keys, pa.string()), "label": pa.array(labels[:, 0], pa.int32())}
    columns["score"] = pa.array(score.astype(np.float16), pa.float16())
    columns |= {f"label_{i}": pa.array(labels[:, i], pa.int32()) for i in range(1, labels.shape[1])}
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def cluster(
    embeddings: Path,
    out: Path,
    settings: KMeansSettings,
    parallel: Parallel,
    *,
    top_labels: int = 1,
    progress: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> dict[str, Any]:
    """Cluster the image embeddings and write centroids, sizes, labels and meta.json; returns it.

    An interrupted run goes on after its last iteration. A complete folder made with the same settings is left as it is.
    """
    group = parallel.group
    with fail_together(group):
        rows = EmbeddingRows(embeddings)
        if not 1 <= top_labels <= settings.k:
            raise UserError(f"top labels is {top_labels}, wanted 1 to k = {settings.k}")
        identity = {
            "shards_digest": rows.meta["shards_digest"],
            "model": rows.meta["model"],
            "weights": rows.meta.get("weights"),
        }
        wanted = _wanted(settings, top_labels) | identity
        done = _complete(out, wanted)
    if done is not None:
        log.info("%s is complete", out)
        return done
    with fail_together(group):
        if parallel.is_first:
            _claim(out, wanted)
    barrier(group)
    state = kmeans(
        rows,
        settings,
        device=parallel.device,
        group=group,
        checkpoint=out / "state.npz",
        identity=identity,
        tick=progress(rows.num_rows * settings.iterations),
    )
    assigner = Assigner(state.centroids, settings.metric, parallel.device, settings.backend)
    tick = progress(rows.num_rows)
    totals = torch.zeros(settings.k + 1, dtype=torch.float64, device=parallel.device)
    with fail_together(group):
        for partition in range(parallel.rank, len(rows.stems), parallel.world):
            labels, score, value = label_partition(rows, partition, assigner, top_labels, tick)
            _write_labels(out / "labels" / f"{rows.stems[partition]}.parquet", rows.keys(partition), labels, score)
            totals[:-1] += torch.from_numpy(np.bincount(labels[:, 0], minlength=settings.k)).to(totals)
            totals[-1] += value
    all_reduce_sum(totals, group)
    with fail_together(group):
        if parallel.is_first:
            _finish(out, rows, state, wanted, totals.cpu().numpy())
    barrier(group)
    return read_meta(out, expect="cluster")


def _wanted(settings: KMeansSettings, top_labels: int) -> dict[str, Any]:
    names = ("k", "metric", "seed", "init", "train_sample", "iterations", "tolerance")
    return {"method": "flat", "labels_per_sample": top_labels} | {name: getattr(settings, name) for name in names}


def _complete(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    if not (out / "meta.json").exists():
        return None
    meta = read_meta(out, expect="cluster")
    for name, value in wanted.items():
        before = meta.get("iterations_asked" if name == "iterations" else name)
        if before != value:
            raise UserError(
                f"{out} was made with {name}={before!r}, this run has {name}={value!r}: take another --out or delete it"
            )
    return meta


def _claim(out: Path, wanted: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / "settings.json").exists():
        raise UserError(f"{out} is not empty and was not made by tools/cluster.py: take another --out")
    write_json_atomic(out / "settings.json", wanted)


def _finish(out: Path, rows: EmbeddingRows, state: KMeansState, wanted: dict[str, Any], totals: np.ndarray) -> None:
    sizes = totals[:-1].astype(np.int64)
    for name, array in (("centroids", state.centroids.numpy()), ("sizes", sizes)):
        with atomic_path(out / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
    facts = wanted | {"iterations": state.iteration, "iterations_asked": wanted["iterations"]}
    write_meta(
        out,
        "cluster",
        source={"embeddings": str(rows.directory.resolve()), "shards": rows.meta["source"].get("shards")},
        dim=rows.dim,
        num_samples=rows.num_rows,
        objective=state.objective,
        final_objective=float(totals[-1]) / rows.num_rows,
        imbalance=imbalance_factor(sizes),
        empty=int((sizes == 0).sum()),
        pretrained=rows.meta.get("pretrained"),
        **facts,
    )
    (out / "state.npz").unlink(missing_ok=True)
