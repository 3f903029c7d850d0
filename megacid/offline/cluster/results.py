"""Reads labels and centroids of a finished cluster folder. Legend: m samples, k clusters, D width."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megacid.errors import UserError
from megacid.offline.nearest import Metric
from megacid.offline.rows import EmbeddingRows
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy
from megacid.storage.parquet import join_by_key, key_column, label_column, read_parquet


def read_labels(
    clusters: Path, rows: EmbeddingRows, partitions: range | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels of the rows of some partitions (None: all) of an embedding folder, joined by key.

    Returns:
        (label int32 [m], cosine to the nearest centroid [m], k). The cosine is float32, or float16 in folders that an
        earlier version has written.

    Raises:
        UserError: The two folders were made from different shards or teachers, or a label file is damaged.
    """
    meta = read_meta(clusters, expect="cluster")
    if meta["shards_digest"] != rows.meta["shards_digest"]:
        raise UserError(
            f"{clusters} was made from other shards than {rows.directory}: run tools/cluster.py on {rows.directory}"
        )
    for name in ("model", "weights", "precision"):
        if meta.get(name) != rows.meta.get(name):
            raise UserError(
                f"{clusters} was made from embeddings of another teacher ({name} {meta.get(name)!r}) than "
                f"{rows.directory} ({rows.meta.get(name)!r}): run tools/cluster.py on {rows.directory}"
            )
    k = int(meta["k"])
    remedy = f"run tools/cluster.py on {rows.directory} again"
    labels, scores = [np.empty(0, np.int32)], [np.empty(0, np.float16)]
    for partition in range(len(rows.stems)) if partitions is None else partitions:
        path = clusters / "labels" / f"{rows.stems[partition]}.parquet"
        table = read_parquet(path, remedy, ["key", "label", "score"])
        keys = key_column(table, "key", path, remedy)
        at = join_by_key(rows.keys(partition), keys, path, remedy, require_all=True)
        labels.append(label_column(table, "label", keys, k, path, remedy)[at].astype(np.int32))
        score = table["score"].to_numpy()
        if score.dtype.kind != "f" or not np.isfinite(score).all():
            raise UserError(f"{path} has {score.dtype} scores, expected finite floating point numbers: {remedy}")
        scores.append(score[at])
    return np.concatenate(labels), np.concatenate(scores), k


def read_centroids(clusters: Path, dim: int) -> tuple[np.ndarray, Metric]:
    """(centroids float32 [k, D], their metric). UserError when the file does not match meta.json."""
    meta = read_meta(clusters, expect="cluster")
    path = clusters / "centroids.npy"
    centroids = load_npy(path, "run tools/cluster.py again")
    shape = (int(meta["k"]), dim)
    if centroids.shape != shape or centroids.dtype.kind != "f":
        raise UserError(
            f"{path} is {centroids.dtype} of shape {centroids.shape}, expected floating point {shape}: run "
            "tools/cluster.py again"
        )
    values = np.array(centroids, np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinity: run tools/cluster.py again")
    return values, "euclidean" if meta.get("metric") == "euclidean" else "cosine"
