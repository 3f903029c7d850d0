"""Inputs of the balance stage: embeddings, their clusters, and the tars they were made from.

Legend: n samples with an embedding, k clusters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacid.data.index import ShardIndex, ShardReader, read_sample_json
from megacid.distributed.stopping import Progress, no_progress
from megacid.offline.cluster.results import read_labels
from megacid.offline.cluster.stage import first_damaged
from megacid.offline.rows import EmbeddingRows
from megacid.offline.tars import load_tars, rows_in_tar
from megacid.storage.stage_directory import finished_meta

CELLS = "cells"  # folder in the output of the stage for the clusters that it makes itself


@dataclass(frozen=True)
class BalanceInputs:
    """Inputs that belong together, by embedding row."""

    rows: EmbeddingRows
    index: ShardIndex
    clusters: Path  # the folder of the labels
    label: np.ndarray  # int32 [n], the cluster of each sample, -1 for none
    score: np.ndarray  # float32 (older folders: float16) [n], similarity to its centroid
    k: int

    @property
    def source(self) -> dict[str, str]:
        """The inputs, with absolute paths."""
        folders = {"embeddings": self.rows.directory, "clusters": self.clusters}
        return {name: str(folder.resolve()) for name, folder in folders.items()} | {"shards": self.index.paths.source}

    def labels_digest(self) -> str:
        """sha256 of the labels and scores of all samples."""
        digest = hashlib.sha256(np.ascontiguousarray(self.label).tobytes())
        digest.update(np.ascontiguousarray(self.score).tobytes())
        return digest.hexdigest()

    def locate(self) -> SampleLocations:
        """Joins samples and tars by key."""
        shard, row = np.empty(self.rows.num_rows, np.int32), np.empty(self.rows.num_rows, np.int64)
        for partition in range(len(self.rows.stems)):
            where = slice(int(self.rows.starts[partition]), int(self.rows.starts[partition + 1]))
            shard[where], row[where] = rows_in_tar(self.rows, self.index, partition)
        return SampleLocations(self.index, shard, row)


@dataclass(frozen=True)
class SampleLocations:
    """Where each embedded sample is in the tars. shard: int32 [n]; row: int64 [n], its row in that tar."""

    index: ShardIndex
    shard: np.ndarray
    row: np.ndarray

    @property
    def number(self) -> np.ndarray:
        """int64 [n]: the samples of all tars, numbered in order."""
        return self.index.starts[self.shard] + self.row

    def has_field(self, field: str) -> bool:
        """Whether the first sample's json holds `field`; one tool writes a whole folder, so the others do, too."""
        with closing(ShardReader(self.index)) as reader:
            return field in read_sample_json(reader, int(np.flatnonzero(self.index.sizes)[0]), 0)

    def read_json(self, rows: np.ndarray, progress: Progress = no_progress) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields key and json of some samples. rows: int64 embedding rows; progress: called with 0 for every sample."""
        with closing(ShardReader(self.index)) as reader:
            for shard, row in zip(self.shard[rows].tolist(), self.row[rows].tolist()):
                progress(0)
                yield self.index.table(shard).keys[row], read_sample_json(reader, shard, row)


def damaged_cells(out: Path, cells: int, rows: EmbeddingRows) -> Path | None:
    """The first file of the clusters in the stage's output that is missing or damaged."""
    folder = out / CELLS
    if finished_meta(folder, "cluster") is None:
        return folder / "meta.json"
    return first_damaged(folder, cells, rows, range(len(rows.stems)), 1)


def read_inputs(embeddings: Path, clusters: Path, shards: str | Path | None = None) -> BalanceInputs:
    """Reads and checks the inputs.

    Args:
        embeddings, clusters: folders written by tools/embed.py and tools/cluster.py.
        shards: the tars; None: the one recorded by tools/embed.py.

    Raises:
        UserError: an input is damaged, or they do not belong together.
    """
    rows = EmbeddingRows(embeddings)
    return add_labels(rows, load_tars(rows, shards), clusters)


def add_labels(rows: EmbeddingRows, index: ShardIndex, clusters: Path) -> BalanceInputs:
    """Reads and checks the labels of the embeddings. Raises as `read_inputs`."""
    return BalanceInputs(rows, index, Path(clusters), *read_labels(clusters, rows))
