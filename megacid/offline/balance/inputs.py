"""Inputs of the balance stage: embeddings, their clusters, and the tars they were made from.

Legend: n samples with an embedding, k clusters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megacid.data.index import ShardIndex, ShardReader, read_sample_json
from megacid.distributed.array_exchange import ALONE, Ranks
from megacid.distributed.parallel import shard_range
from megacid.distributed.stopping import Progress, no_progress
from megacid.offline.cluster.results import read_labels
from megacid.offline.cluster.stage import first_damaged
from megacid.offline.row_numbers import row_dtype
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
    k: int
    labels_digest: str  # sha256 of the labels and scores of all samples

    @property
    def source(self) -> dict[str, str]:
        """The inputs, with absolute paths."""
        folders = {"embeddings": self.rows.directory, "clusters": self.clusters}
        return {name: str(folder.resolve()) for name, folder in folders.items()} | {"shards": self.index.paths.source}

    def locate(self, partitions: range, progress: Progress = no_progress) -> np.ndarray:
        """Joins samples and tars by key: the numbers of the samples of some partitions, as in `SampleLocations`."""
        starts = self.index.starts
        parts = [np.empty(0, row_dtype(self.index.num_samples))]
        for partition in partitions:
            shard, row = rows_in_tar(self.rows, self.index, partition)
            parts.append((starts[shard] + row).astype(parts[0].dtype))
            progress(0)
        return np.concatenate(parts)


@dataclass(frozen=True)
class SampleLocations:
    """Where each embedded sample is in the tars. number: int [n], in the samples of all tars, in their order."""

    index: ShardIndex
    number: np.ndarray

    @cached_property
    def _starts(self) -> np.ndarray:
        return self.index.starts

    def place(self, row: int) -> tuple[int, int]:
        """(tar, row in it) of the sample of an embedding row."""
        number = int(self.number[row])
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    def has_field(self, field: str) -> bool:
        """Whether the first sample's json holds `field`; one tool writes a whole folder, so the others do, too."""
        with closing(ShardReader(self.index)) as reader:
            return field in read_sample_json(reader, int(np.flatnonzero(self.index.sizes)[0]), 0)

    def read_json(self, rows: Iterable[int], progress: Progress = no_progress) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields key and json of some samples. rows: embedding rows; progress: called with 0 for every sample."""
        with closing(ShardReader(self.index)) as reader:
            for shard, row in map(self.place, rows):
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
    return add_labels(rows, load_tars(rows, shards), clusters, ALONE)[0]


def add_labels(
    rows: EmbeddingRows, index: ShardIndex, clusters: Path, ranks: Ranks
) -> tuple[BalanceInputs, np.ndarray]:
    """Reads and checks the labels of the embeddings. Raises as `read_inputs`. A collective: each rank reads a share.

    Returns:
        The inputs, and float32 (older folders: float16) [n], similarity of each sample to its centroid.
    """
    with ranks.stop_together():
        partitions = range(*shard_range(len(rows.stems), ranks.rank, ranks.world))
        own_label, own_score, k = read_labels(clusters, rows, partitions)
    # A folder that an earlier version began may have both types.
    dtypes = [np.dtype(name) for name in ranks.gather_json(own_score.dtype.str)]
    label, score = (
        ranks.concatenate(own) for own in (own_label, own_score.astype(np.result_type(*dtypes), copy=False))
    )
    digest = hashlib.sha256(label.data)
    digest.update(score.data)
    return BalanceInputs(rows, index, Path(clusters), label, k, digest.hexdigest()), score
