"""Class-labelled feature vectors: reading a features directory, and the stream of micro-batches from it.

tools/synthesize.py features writes such directories; tools/sweep.py writes them with clusters as labels.

    meta.json                          classes (the number of labels), dim
    features/features_00000.npy ...    float16 [n, d]
    labels/labels_00000.npy ...        int32 [n], 0 .. classes - 1
    true_labels/...                    only where `labels` are clusters: int32 [n], 0 .. true_classes - 1
    test/features/ ..., test/labels/   held-out rows with their true classes

Shapes: b micro-batch, m requested rows, d feature width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megacid.data.batch import Batch, Positions
from megacid.data.memmap import MappedRows, take_rows
from megacid.data.order import SampleOrder
from megacid.errors import UserError
from megacid.storage.metadata import read_meta, size_field
from megacid.storage.npy import load_npy

Split = Literal["train", "test"]
MAKERS = ("synthesize", "sweep")
_AGAIN = "run tools/synthesize.py features again, or tools/sweep.py where that made it"


class FeatureSet(MappedRows):
    """One split of a features directory, memory-mapped: `read` and `take` return features, `take_labels` labels.

    Args:
        true_labels: use the true classes where the labels are clusters. The test split always uses them.

    Attributes:
        classes: number of labels of this split.
        true_classes: number of true classes.
        clustered: the training labels are clusters.
        digest: sha256 of the arguments that the data was made with and of the number of rows of every file.

    Raises:
        UserError: a directory of another tool, or files whose dtype, width or number of rows does not match.
    """

    def __init__(self, directory: str | Path, split: Split = "train", *, true_labels: bool = False) -> None:
        self.directory, self.split = Path(directory), split
        self.meta = self._read_meta()
        self.clustered = "true_classes" in self.meta
        self.true_classes = int(self.meta.get("true_classes", self.meta["classes"]))
        use_true = self.clustered and (true_labels or split == "test")
        self.classes = self.true_classes if use_true else int(self.meta["classes"])
        root = self.directory if split == "train" else self.directory / "test"
        labels = "true_labels" if use_true and split == "train" else "labels"
        self.paths = sorted((root / "features").glob("features_*.npy"))
        if not self.paths:
            remedy = "--test-per-class above 0 makes one" if split == "test" else _AGAIN
            raise UserError(f"{root} has no features/features_*.npy, so there is no {split} split: {remedy}")
        self.label_paths = [root / labels / f"labels_{path.stem.removeprefix('features_')}.npy" for path in self.paths]
        dim = int(self.meta["dim"])
        super().__init__([_map(path, np.float16, (None, dim)) for path in self.paths], dim)
        self.label_maps = [_map(path, np.int32, (len(a),)) for path, a in zip(self.label_paths, self.maps)]
        content = {**self.meta, "date": None, "versions": None, "files": [len(array) for array in self.maps]}
        self.digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _read_meta(self) -> dict[str, Any]:
        if not self.directory.is_dir():
            raise UserError(
                f"there is no directory {self.directory}, expected feature vectors: "
                "make them with tools/synthesize.py features, or correct the path"
            )
        meta = read_meta(self.directory)
        if meta.get("made_by") not in MAKERS or not {"classes", "dim"} <= meta.keys():
            raise UserError(
                f"{self.directory} was made by {meta.get('made_by')!r}, expected class-labelled features: "
                "give the output of tools/synthesize.py features"
            )
        for name in {"classes", "dim", "true_classes"} & meta.keys():
            size_field(meta, self.directory, name, _AGAIN)
        return meta

    def take_labels(self, rows: np.ndarray) -> np.ndarray:
        """int32 [m]: labels of rows (int64 [m], any order). UserError for a label outside 0 .. classes - 1."""
        labels = take_rows(self.label_maps, self.starts, rows)
        outside = np.flatnonzero((labels < 0) | (labels >= self.classes))
        if outside.size:
            partition, inside = self.partition_of(int(rows[outside[0]]))
            raise UserError(
                f"{self.label_paths[partition]} row {inside} has label {labels[outside[0]]}, "
                f"expected 0 .. {self.classes - 1} according to meta.json: the data is damaged, {_AGAIN}"
            )
        return labels

    def name(self, row: int) -> str:
        """The location of a row, for error messages."""
        partition, inside = self.partition_of(row)
        return f"row {inside} of {self.paths[partition]}"


def _map(path: Path, dtype: type[np.generic], shape: tuple[int | None, ...]) -> np.ndarray:
    """A memory map of that dtype and shape (None: any); UserError otherwise."""
    array = load_npy(path, _AGAIN)
    matches = len(array.shape) == len(shape) and all(size in (None, n) for n, size in zip(array.shape, shape))
    if array.dtype != dtype or not matches:
        expected = "(" + ", ".join("n" if size is None else str(size) for size in shape) + ")"
        raise UserError(
            f"{path} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {expected} to match meta.json and the "
            f"other file of the pair: {_AGAIN}"
        )
    return array


class FeatureStream:
    """Iterates over the micro-batches of one rank, as `PairStream` does: image float32 [b, d], text int64 [b, 0].

    Reads in this process, because a batch is only a few hundred kilobytes of a memory map. There are always
    `len(stream)` micro-batches. A label out of range, or a file that was cut after it was opened, sets the `failure` of
    its batch and of all later ones instead of raising (see `PairStream`). A batch with a bad label keeps its features
    and has labels -1; the other failing batches are zeros with labels and ids -1.

    Args:
        plan: which positions of the stream this rank reads.
        seed: decides the order.
        block_shards: number of files that are shuffled with each other, see `SampleOrder`.
        pin_memory: return batches in page-locked memory.

    Raises:
        UserError: fewer rows than one global batch. Never raised while iterating.
    """

    def __init__(
        self, features: FeatureSet, plan: Positions, *, seed: int, block_shards: int = 64, pin_memory: bool = False
    ) -> None:
        self.features, self.plan, self.pin_memory = features, plan, pin_memory
        if features.num_rows < plan.global_batch:
            raise UserError(
                f"{features.directory} has {features.num_rows} rows, expected at least one global batch of "
                f"{plan.global_batch}: use a smaller batch or more data"
            )
        self.order = SampleOrder(np.diff(features.starts), seed=seed, block_shards=block_shards)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        failure: str | None = None
        for positions in self.plan:
            batch = (
                self._read(np.array(positions, np.int64)) if failure is None else self._dummy(len(positions), failure)
            )
            failure = batch.failure
            yield batch.pin_memory() if self.pin_memory else batch

    def _read(self, positions: np.ndarray) -> Batch:
        _, file, row = self.order.locate_many(positions)
        rows = self.features.starts[file] + row
        try:
            image = self.features.take(rows)
        except OSError as error:
            return self._dummy(len(rows), f"{error}: {_AGAIN}")
        try:
            label, failure = self.features.take_labels(rows), None
        except (OSError, UserError) as error:
            label, failure = np.full(len(rows), -1), str(error)
        return Batch(
            image=torch.from_numpy(image.astype(np.float32)),
            text=torch.empty(len(rows), 0, dtype=torch.int64),
            label=torch.from_numpy(label.astype(np.int64)),
            teacher_image=None,
            teacher_text=None,
            sample_id=torch.from_numpy(rows),
            failure=failure,
        )

    def _dummy(self, size: int, failure: str) -> Batch:
        none = torch.full((size,), -1)
        image, text = torch.zeros(size, self.features.dim), torch.empty(size, 0, dtype=torch.int64)
        return Batch(image, text, none, None, None, none.clone(), failure=failure)

    def statistics(self) -> dict[str, Any]:
        """Counts for the log."""
        features = self.features
        return {
            "rows": features.num_rows,
            "classes": features.classes,
            "width": features.dim,
            "files": len(features.paths),
        }
