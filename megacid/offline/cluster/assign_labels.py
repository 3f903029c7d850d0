"""Assigns every sample its nearest centroids and writes one label file per tar.

A label file records the digest of its centroids in its metadata, so an interrupted run keeps the files that match.

Legend: n samples, K clusters, D width, T rows of one tile, L labels per sample.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megacid.distributed.collectives import all_reduce_sum
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.nearest import Assigner, pad_rows, prepare, tile_rows
from megacid.offline.rows import EmbeddingRows, PartitionedRows, find_invalid_row
from megacid.storage.atomic import writing
from megacid.storage.parquet import read_parquet

_CENTROIDS, _SIMILARITY = b"centroids", b"similarity"  # in the metadata of a label file: sha256, and a sum as hex


def centroids_digest(centroids_KD: Tensor) -> str:
    """sha256 of centroids fp32 [K, D]."""
    return hashlib.sha256(np.ascontiguousarray(centroids_KD.cpu().numpy()).tobytes()).hexdigest()


def label_partition(
    rows: PartitionedRows, partition: int, assigner: Assigner, top: int, progress: Progress, *, unit_rows: bool = False
) -> tuple[np.ndarray, np.ndarray, float]:
    """Label one partition.

    Args:
        top: Number L of labels per sample.
        unit_rows: Require rows of length 1, whatever the metric.

    Returns:
        (labels int32 [n, L], nearest first; cosine to the nearest centroid float32 [n]; sum of the similarities).

    Raises:
        UserError: A row is invalid; the message names it.
    """
    start, stop = int(rows.starts[partition]), int(rows.starts[partition + 1])
    tile = tile_rows(assigner.device)
    labels = np.empty((stop - start, top), np.int32)
    score = np.empty(stop - start, np.float32)
    total = 0.0
    for low in range(start, stop, tile):
        block = rows.read(low, min(low + tile, stop))
        # Training on a sample has not checked all rows.
        invalid = find_invalid_row(
            np.asarray(block, np.float32), allow_zero=assigner.metric != "cosine" and not unit_rows, unit=unit_rows
        )
        if invalid is not None:
            row, problem = invalid
            raise UserError(f"{rows.name(low + row)} {problem}: delete that file and run tools/embed.py again")
        x_TD = prepare(block, assigner.metric, assigner.device)
        value_TL, label_TL = assigner.tile(pad_rows(x_TD, tile), top)
        value_TL, label_TL = value_TL[: len(x_TD)], label_TL[: len(x_TD)]
        where = slice(low - start, low - start + len(x_TD))
        labels[where] = label_TL.cpu().numpy()
        score[where] = assigner.cosine(x_TD, label_TL[:, 0]).cpu().numpy()
        total += float(value_TL[:, 0].double().sum())
        progress(len(x_TD))
    return labels, score, total


def _write_labels(
    path: Path, keys: list[str], labels: np.ndarray, score: np.ndarray, centroids: str, value: float
) -> None:
    columns = {"key": pa.array(keys, pa.string()), "label": pa.array(labels[:, 0], pa.int32())}
    columns["score"] = pa.array(score, pa.float32())
    columns |= {f"label_{i}": pa.array(labels[:, i], pa.int32()) for i in range(1, labels.shape[1])}
    table = pa.table(columns).replace_schema_metadata({_CENTROIDS: centroids, _SIMILARITY: value.hex()})
    with writing(path) as temporary:
        pq.write_table(table, temporary)


def _read_labels(path: Path, keys: list[str], top: int, centroids: str) -> tuple[np.ndarray, float] | None:
    """(first label int32 [n], sum of the similarities) of a complete label file of these keys and the centroids of this
    digest; else None."""
    try:
        table = read_parquet(path, "")
        metadata = table.schema.metadata or {}
        # Earlier versions wrote float16 scores, in which the order of preference has ties.
        fits = table.num_columns == 2 + top and table["score"].type == pa.float32()
        fits = fits and table["key"].to_pylist() == keys
        if not fits or metadata.get(_CENTROIDS) != centroids.encode():
            return None
        return table["label"].to_numpy(), float.fromhex(metadata[_SIMILARITY].decode())
    except (UserError, ValueError, KeyError):
        return None


def assign_labels(
    out: Path, rows: EmbeddingRows, assigner: Assigner, parallel: Parallel, top: int, progress: Progress
) -> tuple[np.ndarray, float]:
    """Write the missing label files, partitions divided among the ranks.

    Returns:
        (sizes int64 [K], sum of the similarities of all samples), the same on every rank.
    """
    k, digest = len(assigner.centroids_KD), centroids_digest(assigner.centroids_KD)
    count_K = torch.zeros(k, dtype=torch.float64, device=parallel.device)
    value_of = torch.zeros(len(rows.stems), dtype=torch.float64, device=parallel.device)
    with stop_together(parallel.group):
        for partition in range(parallel.rank, len(rows.stems), parallel.world):
            path, keys = out / "labels" / f"{rows.stems[partition]}.parquet", rows.keys(partition)
            before = _read_labels(path, keys, top, digest)
            if before is not None:
                label, value = before
                progress(len(label))
            else:
                labels, score, value = label_partition(rows, partition, assigner, top, progress, unit_rows=True)
                label = labels[:, 0]
                _write_labels(path, keys, labels, score, digest, value)
                failpoint("cluster:labels", step=partition)
                progress(0)
            count_K += torch.from_numpy(np.bincount(label, minlength=k)).to(count_K)
            value_of[partition] = value
    all_reduce_sum(count_K, parallel.group)
    all_reduce_sum(value_of, parallel.group)
    # fsum: the same order of additions for every number of ranks.
    return count_K.cpu().numpy().astype(np.int64), math.fsum(value_of.tolist())
