"""Reads labels and centroids of a finished cluster folder. Legend: n samples, k clusters, D width."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megacid.errors import UserError
from megacid.offline.nearest import Metric
from megacid.offline.rows import EmbeddingRows
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy
from megacid.storage.parquet import join_by_key, key_column, label_column, read_parquet


def read_labels(clusters: Path, rows: EmbeddingRows) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels of the rows of an embedding folder, joined by key.

    Returns:
        (label int32 [n], cosine to the nearest centroid [n], k). The cosine is float32, or float16 in folders that an
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
    label, scores = np.full(rows.num_rows, -1, np.int32), []
    for partition, stem in enumerate(rows.stems):
        path = clusters / "labels" / f"{stem}.parquet"
        table = read_parquet(path, remedy, ["key", "label", "score"])
        keys = key_column(table, "key", path, remedy)
        where = slice(int(rows.starts[partition]), int(rows.starts[partition + 1]))
        at = join_by_key(rows.keys(partition), keys, path, remedy, require_all=True)
        label[where] = label_column(table, "label", keys, k, path, remedy)[at]
        score = table["score"].to_numpy()
        if score.dtype.kind != "f" or not np.isfinite(score).all():
            raise UserError(f"{path} has {score.dtype} scores, expected finite floating point numbers: {remedy}")
        scores.append(score[at])
    return label, np.concatenate(scores), k


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
