"""Class-labelled feature vectors, written by tools/synthesize.py features or, with clusters for labels, by tools/sweep.py.

    meta.json                          classes (how many labels there are), dim
    features/features_00000.npy ...    float16 [n, d]
    labels/labels_00000.npy ...        int32 [n], 0 .. classes - 1
    true_labels/...                    only where `labels` are clusters: int32 [n], 0 .. true_classes - 1
    test/features/ ..., test/labels/   rows held out, with true classes

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
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy

Split = Literal["train", "test"]
MAKERS = ("synthesize", "sweep")
_AGAIN = "run tools/synthesize.py features again, or tools/sweep.py where that made it"


class FeatureSet(MappedRows):
    """One split of a features directory, memory-mapped: `read` and `take` of features, `take_labels` of labels.

    `.classes`: number of labels of this split; `.true_classes`; `.clustered`: the training labels are clusters;
    `.digest`: of what decides the content (the arguments it was made with) and of the files' sizes.
    true_labels: the true classes instead of clusters (the same where labels are classes; the test split always has them).
    UserError for a directory of another tool, files that do not fit each other, another dtype or width.
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
        facts = {**self.meta, "date": None, "versions": None, "files": [len(array) for array in self.maps]}
        self.digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _read_meta(self) -> dict[str, Any]:
        if not self.directory.is_dir():
            raise UserError(
                f"there is no directory {self.directory}, expected feature vectors: "
                "make them with tools/synthesize.py features, or correct the path"
            )
        meta = read_meta(self.directory)
        if meta.get("made_by") not in MAKERS or not {"classes", "dim"} <= meta.keys():
            raise UserError(
                f"{self.directory} was made by {meta.get('made_by')!r} and holds no class-labelled features: "
                "name the output of tools/synthesize.py features"
            )
        for name in {"classes", "dim", "true_classes"} & meta.keys():
            value = meta[name]
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise UserError(
                    f"{self.directory}/meta.json has {name} {str(value)[:40]!r}, expected a whole number above 0: {_AGAIN}"
                )
        return meta

    def take_labels(self, rows: np.ndarray) -> np.ndarray:
        """int32 [m]: labels of the rows of these numbers. UserError for a label outside 0 .. classes - 1."""
        labels = take_rows(self.label_maps, self.starts, rows)
        outside = np.flatnonzero((labels < 0) | (labels >= self.classes))
        if outside.size:
            partition, inside = self.partition_of(int(rows[outside[0]]))
            raise UserError(
                f"{self.label_paths[partition]} row {inside} has label {labels[outside[0]]}, "
                f"expected 0 .. {self.classes - 1} as meta.json says: the data is damaged, {_AGAIN}"
            )
        return labels

    def name(self, row: int) -> str:
        """Where a row lies, for error messages."""
        partition, inside = self.partition_of(row)
        return f"row {inside} of {self.paths[partition]}"


def _map(path: Path, dtype: type[np.generic], shape: tuple[int | None, ...]) -> np.ndarray:
    """A memory map of that dtype and shape (None: any); UserError otherwise."""
    array = load_npy(path, _AGAIN)
    fits = len(array.shape) == len(shape) and all(w is None or g == w for g, w in zip(array.shape, shape))
    if array.dtype != dtype or not fits:
        wanted = "(" + ", ".join("n" if w is None else str(w) for w in shape) + ")"
        raise UserError(
            f"{path} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {wanted} to fit meta.json and the other "
            f"file of the pair: {_AGAIN}"
        )
    return array


class FeatureStream:
    """Iterate over the micro-batches of this rank, as `PairStream` does: image float32 [b, d], text int64 [b, 0].

    Reads in this process: a batch is a few hundred kilobytes of a memory map. seed decides the order; block_shards:
    files that are shuffled with each other, see `SampleOrder`; pin_memory: batches in page-locked memory.

    There are always `len` micro-batches. A label out of range, or a file that was cut since it was opened, is no exception,
    which would leave the other ranks waiting: the batch gets a `failure`, and so does every later one. That of a label
    has its features, and no labels; the others are dummies: zeros, labels and ids -1.

    Raises UserError for fewer rows than one global batch, never while iterating.
    """

    def __init__(
        self, features: FeatureSet, plan: Positions, *, seed: int, block_shards: int = 16, pin_memory: bool = False
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
        nothing = torch.full((size,), -1)
        image, text = torch.zeros(size, self.features.dim), torch.empty(size, 0, dtype=torch.int64)
        return Batch(image, text, nothing, None, None, nothing.clone(), failure=failure)

    def statistics(self) -> dict[str, Any]:
        """Counts for the log."""
        features = self.features
        return {
            "rows": features.num_rows, "classes": features.classes, "width": features.dim, "files": len(features.paths)
        }  # fmt: skip
