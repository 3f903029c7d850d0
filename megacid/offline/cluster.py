"""The clustering stage: k-means over an embedding folder, then one label file per tar.

Legend: K clusters, D width, T rows of one tile, L labels per sample.

A label file says in its own metadata which centroids it was made with, so a run that was killed keeps those that fit.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from megacid.checkpoint.store import read_meta, write_json_atomic, write_meta
from megacid.distributed.collectives import all_reduce_sum, any_rank, barrier
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.offline.assign import Assigner, pad_rows, prepare, tile_rows
from megacid.offline.files import disk_errors, finished_meta, read_array, sweep, write_array, writing
from megacid.offline.kmeans import KMeansSettings, KMeansState, imbalance_factor, kmeans
from megacid.offline.rows import EmbeddingRows, PartitionedRows, odd_row
from megacid.offline.stopping import together
from megacid.probes import probe

log = logging.getLogger(__name__)
_CENTROIDS, _SIMILARITY = b"centroids", b"similarity"  # in the metadata of a label file: sha256, and a sum as hex


def label_partition(
    rows: PartitionedRows,
    partition: int,
    assigner: Assigner,
    top: int,
    tick: Callable[[int], None],
    *,
    unit_rows: bool = False,
) -> tuple[np.ndarray, np.ndarray, float]:
    """(labels int32 [n, L] best first, cosine to the first float32 [n], sum of the similarities) of one partition.

    UserError naming a row with NaN, infinity, (cosine) no length, or with unit_rows another length than 1.
    """
    start, stop = int(rows.starts[partition]), int(rows.starts[partition + 1])
    tile = tile_rows(assigner.device)
    labels = np.empty((stop - start, top), np.int32)
    score = np.empty(stop - start, np.float32)
    total = 0.0
    for low in range(start, stop, tile):
        block = rows.read(low, min(low + tile, stop))
        # Training on a sample has not seen all rows.
        found = odd_row(
            np.asarray(block, np.float32), zero_is_odd=assigner.metric == "cosine" or unit_rows, unit=unit_rows
        )
        if found is not None:
            raise UserError(f"{rows.name(low + found[0])} {found[1]}: embed that shard again")
        x_TD = prepare(block, assigner.metric, assigner.device)
        value_TL, label_TL = assigner.tile(pad_rows(x_TD, tile), top)
        value_TL, label_TL = value_TL[: len(x_TD)], label_TL[: len(x_TD)]
        where = slice(low - start, low - start + len(x_TD))
        labels[where] = label_TL.cpu().numpy()
        score[where] = assigner.cosine(x_TD, label_TL[:, 0]).cpu().numpy()
        total += float(value_TL[:, 0].double().sum())
        tick(len(x_TD))
    return labels, score, total


def _write_labels(
    path: Path, keys: list[str], labels: np.ndarray, score: np.ndarray, centroids: str, value: float
) -> None:
    columns = {"key": pa.array(keys, pa.string()), "label": pa.array(labels[:, 0], pa.int32())}
    columns["score"] = pa.array(score.astype(np.float16), pa.float16())
    columns |= {f"label_{i}": pa.array(labels[:, i], pa.int32()) for i in range(1, labels.shape[1])}
    table = pa.table(columns).replace_schema_metadata({_CENTROIDS: centroids, _SIMILARITY: value.hex()})
    with writing(path) as temporary:
        pq.write_table(table, temporary)


def _read_labels(path: Path, keys: list[str], top: int, centroids: str) -> tuple[np.ndarray, float] | None:
    """(first label int32 [n], sum of the similarities) of a label file that is whole, of these keys and made with the
    centroids of this sha256; else None."""
    try:
        table = pq.read_table(path)
        facts = table.schema.metadata or {}
        fits = table.num_columns == 2 + top and table["key"].to_pylist() == keys
        if not fits or facts.get(_CENTROIDS) != centroids.encode():
            return None
        return table["label"].to_numpy(), float.fromhex(facts[_SIMILARITY].decode())
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None


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

    An interrupted run goes on after its last iteration or label file, with the same result. A complete folder made with
    the same settings is left as it is; what is missing or cut off in it is made again. All ranks stop together when the
    function of `progress` raises Stopped. UserError also when all samples fall into one of several clusters.
    """
    group = parallel.group
    with together(group):
        rows = EmbeddingRows(embeddings)
        if not 1 <= top_labels <= settings.k:
            raise UserError(f"top labels is {top_labels}, wanted 1 to k = {settings.k}")
        identity = {
            "shards_digest": rows.meta["shards_digest"],
            "model": rows.meta["model"],
            "weights": rows.meta.get("weights"),
            "precision": rows.meta.get("precision"),
        }
        wanted = _wanted(settings, top_labels) | identity
        done = _finished(out, wanted)
    state: KMeansState | None = None
    if done is not None:
        # Every rank has read the same meta.json; what is behind it is looked at in parts.
        with together(group):
            mine = range(parallel.rank, len(rows.stems), parallel.world)
            damage = _damaged(out, settings.k, rows, list(mine), top_labels)
            centroids = read_array(out / "centroids.npy", (settings.k, rows.dim), "f")
        if not any_rank(damage is not None, group):
            with together(group):
                if parallel.is_first:
                    _tidy(out)
            log.info("%s is complete", out)
            return done
        log.warning("%s is damaged or missing: making again what is needed", damage or "a file that another rank reads")
        if centroids is not None:
            # The labels follow from the centroids alone.
            state = KMeansState(torch.from_numpy(np.array(centroids)), int(done["iterations"]), done["objective"])
    with together(group):
        if parallel.is_first:
            _claim(out, wanted)
    if state is None:
        state = kmeans(
            rows,
            settings,
            device=parallel.device,
            group=group,
            checkpoint=out / "state.npz",
            identity=identity,
            unit_rows=True,
            tick=progress(rows.num_rows * settings.iterations),
        )
    sizes, similarity = _label_all(out, rows, state, settings, parallel, top_labels, progress(rows.num_rows))
    with together(group):
        _check_spread(sizes, rows, warn=parallel.is_first)
        if parallel.is_first:
            _finish(out, rows, state, wanted, sizes, similarity)
    barrier(group)
    return read_meta(out, expect="cluster")


def _label_all(
    out: Path,
    rows: EmbeddingRows,
    state: KMeansState,
    settings: KMeansSettings,
    parallel: Parallel,
    top: int,
    tick: Callable[[int], None],
) -> tuple[np.ndarray, float]:
    """Write the label files that are missing; (sizes int64 [K], sum of the similarities) of all, the same on every rank."""
    assigner = Assigner(state.centroids, settings.metric, parallel.device, settings.backend)
    digest = hashlib.sha256(np.ascontiguousarray(state.centroids.numpy()).tobytes()).hexdigest()
    count_K = torch.zeros(settings.k, dtype=torch.float64, device=parallel.device)
    value_of = torch.zeros(len(rows.stems), dtype=torch.float64, device=parallel.device)
    with together(parallel.group):
        for partition in range(parallel.rank, len(rows.stems), parallel.world):
            path, keys = out / "labels" / f"{rows.stems[partition]}.parquet", rows.keys(partition)
            before = _read_labels(path, keys, top, digest)
            if before is not None:
                label, value = before
                tick(len(label))
            else:
                labels, score, value = label_partition(rows, partition, assigner, top, tick, unit_rows=True)
                label = labels[:, 0]
                _write_labels(path, keys, labels, score, digest, value)
                probe("cluster:labels", step=partition)
                tick(0)
            count_K += torch.from_numpy(np.bincount(label, minlength=settings.k)).to(count_K)
            value_of[partition] = value
    all_reduce_sum(count_K, parallel.group)
    all_reduce_sum(value_of, parallel.group)
    # One order of additions for every number of ranks.
    return count_K.cpu().numpy().astype(np.int64), math.fsum(value_of.tolist())


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


def _wanted(settings: KMeansSettings, top_labels: int) -> dict[str, Any]:
    names = ("k", "metric", "seed", "init", "train_sample", "iterations", "tolerance")
    return {"method": "flat", "labels_per_sample": top_labels} | {name: getattr(settings, name) for name in names}


def _finished(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """meta.json of a folder that was finished with the same settings; UserError when with others, None when not finished."""
    meta = finished_meta(out, "cluster")
    for name, value in wanted.items() if meta else ():
        before = (meta or {}).get("iterations_asked" if name == "iterations" else name)
        if before != value:
            raise UserError(
                f"{out} was made with {name}={before!r}, this run has {name}={value!r}: take another --out or delete it"
            )
    return meta


def _damaged(out: Path, k: int, rows: EmbeddingRows, partitions: list[int], top: int) -> Path | None:
    """The first file of a finished folder that is missing or not whole; of the label files only those of `partitions`."""
    if read_array(out / "centroids.npy", (k, rows.dim), "f") is None:
        return out / "centroids.npy"
    if read_array(out / "sizes.npy", (k,), "i") is None:
        return out / "sizes.npy"
    for partition in partitions:
        path = out / "labels" / f"{rows.stems[partition]}.parquet"
        try:
            footer = pq.read_metadata(path)  # at the end of the file: gone when it was cut off
        except (OSError, ValueError, pa.ArrowException):
            return path
        if (footer.num_rows, footer.num_columns) != (len(rows.maps[partition]), 2 + top):
            return path
    return None


def _claim(out: Path, wanted: dict[str, Any]) -> None:
    with disk_errors(out / "settings.json"):
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        if any(out.iterdir()) and not (out / "settings.json").exists():
            raise UserError(f"{out} is not empty and was not made by tools/cluster.py: take another --out")
        (out / "meta.json").unlink(missing_ok=True)
        write_json_atomic(out / "settings.json", wanted)


def _tidy(out: Path) -> None:
    """Remove what only an unfinished run needs."""
    (out / "state.npz").unlink(missing_ok=True)
    sweep(out)


def _finish(
    out: Path, rows: EmbeddingRows, state: KMeansState, wanted: dict[str, Any], sizes: np.ndarray, similarity: float
) -> None:
    probe("cluster:labelled")
    write_array(out / "centroids.npy", state.centroids.numpy())
    write_array(out / "sizes.npy", sizes)
    facts = wanted | {"iterations": state.iteration, "iterations_asked": wanted["iterations"]}
    probe("cluster:before_meta")
    with disk_errors(out / "meta.json"):
        write_meta(
            out,
            "cluster",
            source={"embeddings": str(rows.directory.resolve()), "shards": rows.meta["source"].get("shards")},
            dim=rows.dim,
            num_samples=rows.num_rows,
            objective=state.objective,
            final_objective=similarity / rows.num_rows,
            imbalance=imbalance_factor(sizes),
            empty=int((sizes == 0).sum()),
            pretrained=rows.meta.get("pretrained"),
            **facts,
        )
    probe("cluster:after_meta")
    _tidy(out)
