"""Accuracy of a classification run on the test split of a features directory.

    head                 nearest row of the classifier over ALL classes, by cosine; for runs whose labels are classes
    nearest_class_mean   nearest mean embedding of the training rows of a true class; also for runs on clusters

Neither stores a [C, D] matrix: blocks of class rows or class means are compared with all test rows one after another.
Shapes: N test rows, C classes, K classes of one block, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megacid.checkpoint.state import CheckpointReader, student_tensors
from megacid.data.features import FeatureSet
from megacid.distributed.stopping import Progress, no_progress
from megacid.errors import UserError, one_line
from megacid.evaluate.export import checkpoint_of, read_run_block
from megacid.models.feature_tower import FeatureTower

TASKS = ("head", "nearest_class_mean")
CLASSES_PER_BLOCK = 16384
ROWS_PER_TILE = 1024  # x CLASSES_PER_BLOCK products: 64 MiB
Embed = Callable[[FeatureSet, np.ndarray], Tensor]  # row numbers -> [m, D] fp32, L2-normalised


@dataclass(frozen=True)
class TrainedTower:
    """The tower of a checkpoint in fp32 on `device`, and a reader of its class rows."""

    tower: FeatureTower
    reader: CheckpointReader
    device: torch.device

    @property
    def num_classes(self) -> int:
        return int(self.reader.manifest["num_classes"])

    @property
    def step(self) -> int:
        return int(self.reader.manifest["step"])

    @torch.inference_mode()
    def embed(self, features: FeatureSet, rows: np.ndarray) -> Tensor:
        """Embeddings of the rows with these numbers: [m, D] fp32, L2-normalised."""
        empty = torch.empty(0, 0, dtype=torch.int64, device=self.device)
        parts = [torch.empty(0, self.tower.embed_dim, device=self.device)]
        for low in range(0, len(rows), ROWS_PER_TILE):
            block = features.take(rows[low : low + ROWS_PER_TILE]).astype(np.float32)
            parts.append(self.tower(torch.from_numpy(block).to(self.device), empty).image)
        return torch.cat(parts)


def trained_tower(
    run: Path,
    features: FeatureSet,
    step: int | None = None,
    device: torch.device | str = "cpu",
    *,
    ema: bool = False,
) -> TrainedTower:
    """Load the tower of a run on features, from the checkpoint of `step` (None: the newest valid one).

    ema: with the moving average of its weights.

    Raises:
        UserError: not a run directory, a run on images, run, checkpoint and features do not fit, or there is no EMA.
    """
    block = read_run_block(run)
    student, data = block["student"], block.get("data") or {}
    if data.get("features") is None:
        raise UserError(f"{run} was trained on {data.get('shards')}, expected features: use --dataset-root")
    reader = CheckpointReader(checkpoint_of(run, step))
    tower = FeatureTower(features.dim, student["embed_dim"], hidden=student["hidden"], layers=student["layers"])
    tensors = student_tensors(reader, ema=ema)
    try:
        tower.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{reader.directory} does not fit features of width {features.dim} in {features.directory} "
            f"({one_line(error)}): use features like those of the run, {data['features']}"
        ) from error
    device = torch.device(device)
    return TrainedTower(tower.eval().requires_grad_(False).to(device), reader, device)


def head_blocks(trained: TrainedTower) -> Iterator[Tensor]:
    """Blocks of unit class rows of the checkpoint, [K, D] fp32. Only these rows are read from its files."""
    for start in range(0, trained.num_classes, CLASSES_PER_BLOCK):
        stop = min(start + CLASSES_PER_BLOCK, trained.num_classes)
        yield F.normalize(trained.reader.rows("head/weight", start, stop).float().to(trained.device), dim=1)


def mean_blocks(embed: Embed, train: FeatureSet) -> Iterator[Tensor]:
    """Blocks of unit mean embeddings by label of `train`, [K, D] fp32; NaN for a class without rows."""
    empty_0D = embed(train, np.empty(0, np.int64))
    labels = train.take_labels(np.arange(train.num_rows))
    order = np.argsort(labels, kind="stable")
    labels = labels[order]
    for start in range(0, train.classes, CLASSES_PER_BLOCK):
        stop = min(start + CLASSES_PER_BLOCK, train.classes)
        low, high = np.searchsorted(labels, [start, stop])
        sum_KD = empty_0D.new_zeros(stop - start, empty_0D.shape[1])
        for at in range(low, high, CLASSES_PER_BLOCK):
            here = slice(at, min(at + CLASSES_PER_BLOCK, high))
            label = torch.from_numpy(labels[here].astype(np.int64) - start).to(sum_KD.device)
            sum_KD.index_add_(0, label, embed(train, order[here]))
        yield sum_KD / sum_KD.norm(dim=1, keepdim=True)


@torch.inference_mode()
def nearest(emb_ND: Tensor, blocks: Iterator[Tensor], progress: Progress = no_progress) -> Tensor:
    """The class with the largest product for each row, on ties the lowest: int64 [N] on the CPU.

    A class of NaN is never nearest; -1 if all are. blocks: [K, D] rows of all classes in order.
    """
    best_N = torch.full((len(emb_ND),), -torch.inf, device=emb_ND.device)
    class_N = torch.full_like(best_N, -1, dtype=torch.int64)
    start = 0
    for row_KD in blocks:
        for low in range(0, len(emb_ND), ROWS_PER_TILE):
            tile = slice(low, low + ROWS_PER_TILE)
            value, index = (emb_ND[tile] @ row_KD.T).nan_to_num(nan=-torch.inf).max(dim=1)
            better = value > best_N[tile]
            best_N[tile] = torch.where(better, value, best_N[tile])
            class_N[tile] = torch.where(better, index + start, class_N[tile])
        start += len(row_KD)
        progress(len(row_KD))
    return class_N.cpu()


def tasks_for(train: FeatureSet) -> tuple[str, ...]:
    """The tasks that apply to these features: a head over clusters does not predict classes."""
    return TASKS[1:] if train.clustered else TASKS


def accuracy(
    task: str, trained: TrainedTower, directory: Path, *, limit: int | None = None, progress: Progress = no_progress
) -> dict[str, float]:
    """Accuracy of a task on the test split of a features directory. Holds the [N, D] test embeddings in memory.

    limit: use the first `limit` test rows (the tools write them shuffled). progress: counts classes.

    Returns:
        {"acc1": fraction, "test_rows": N, "classes": C}.

    Raises:
        UserError: an unknown task, or "head" for classes that are not those of the test split.
    """
    train, test = FeatureSet(directory, true_labels=True), FeatureSet(directory, "test")
    if task not in TASKS:
        raise UserError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    if task == "head" and (train.clustered or trained.num_classes != test.classes):
        labels = "clusters" if train.clustered else f"{test.classes} classes"
        raise UserError(
            f"the head of {trained.reader.directory} has {trained.num_classes} classes, but the labels of {directory} "
            f"are {labels}: use nearest_class_mean"
        )
    blocks = head_blocks(trained) if task == "head" else mean_blocks(trained.embed, train)
    return _accuracy(trained.embed, test, blocks, limit, progress)


def untrained_accuracy(directory: Path, *, limit: int | None = None) -> dict[str, float]:
    """nearest_class_mean of the features themselves, without a tower: the baseline of training."""

    def embed(features: FeatureSet, rows: np.ndarray) -> Tensor:
        block = features.take(rows) if len(rows) else np.empty((0, features.dim))
        return F.normalize(torch.from_numpy(block.astype(np.float32)), dim=1)

    train, test = FeatureSet(directory, true_labels=True), FeatureSet(directory, "test")
    return _accuracy(embed, test, mean_blocks(embed, train), limit, no_progress)


def _accuracy(
    embed: Embed, test: FeatureSet, blocks: Iterator[Tensor], limit: int | None, progress: Progress
) -> dict[str, float]:
    rows = np.arange(test.num_rows if limit is None else min(limit, test.num_rows))
    label_N = torch.from_numpy(test.take_labels(rows).astype(np.int64))
    class_N = nearest(embed(test, rows), blocks, progress)
    return {"acc1": (class_N == label_N).double().mean().item(), "test_rows": len(rows), "classes": test.classes}
