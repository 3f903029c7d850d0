"""The parts of a run, each built from the run file: data, student, classifier with its optimizer, objective.

`train.py` puts them together. A mistake that only one rank can see (a missing file on its node, say) becomes the same
error on every rank, so that nobody waits in a collective for a rank that has left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megacid.classifier import Margin, PartialFC, RowAdamW, RowSGD
from megacid.config.schema import RunFile
from megacid.data.batch import Batch, Positions
from megacid.data.features import FeatureSet, FeatureStream
from megacid.data.index import load_index
from megacid.data.loader import PairStream
from megacid.data.pairs import PairOptions
from megacid.data.side_tables import KeepTable, LabelTable, TeacherTable
from megacid.distributed.consensus import agree, fail_together
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.losses import ClusterDistillation, Objective
from megacid.models.clip import tokenizer_for, train_transform
from megacid.models.feature_tower import FeatureTower
from megacid.models.student import Student, build_student

log = logging.getLogger("megacid")
T = TypeVar("T")


class Stream(Protocol):
    """The micro-batches of one rank; the position is the start step alone."""

    def __iter__(self) -> Iterator[Batch]: ...
    def statistics(self) -> dict[str, Any]: ...


@dataclass
class Data:
    """What a run trains on, and what the rest of it needs to know about that."""

    stream: Callable[[int], Stream]  # from a start step
    teacher_dim: int | None = None
    num_classes: int | None = None  # None: no labels
    centroids: Path | None = None  # of the labels; None: they have none
    feature_dim: int | None = None  # None: pairs of images and texts


def open_data(run: RunFile, parallel: Parallel) -> Data:
    if run.megacid.data.features is not None:
        data = _open_features(run, run.megacid.data.features, parallel)
    else:
        assert run.megacid.data.shards is not None
        data = _open_pairs(run, run.megacid.data.shards, parallel)
    statistics = together(lambda: data.stream(0).statistics(), parallel)
    log.info(
        "data: %s", "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in statistics.items())
    )
    return data


def _positions(run: RunFile, parallel: Parallel, start_step: int) -> Positions:
    return Positions(
        run.global_batch,
        run.micro_batch,
        run.accumulation,
        parallel.rank,
        parallel.world,
        start_step,
        run.megacid.run.total_steps,
    )


def _open_features(run: RunFile, directory: str, parallel: Parallel) -> Data:
    features = together(lambda: FeatureSet(directory), parallel)
    agree(features.digest, f"the content of {directory}", parallel.group)

    def stream(start_step: int) -> FeatureStream:
        return FeatureStream(
            features,
            _positions(run, parallel, start_step),
            seed=run.megacid.run.seed,
            block_shards=run.megacid.data.block_shards,
            pin_memory=parallel.device.type == "cuda",
        )

    return Data(stream, num_classes=features.classes, feature_dim=features.dim)


def _open_pairs(run: RunFile, shards: str, parallel: Parallel) -> Data:
    config, loss = run.megacid.data, run.megacid.loss
    together(lambda: load_index(shards) if parallel.is_first else None, parallel)  # rank 0 builds a missing index alone
    index = together(lambda: load_index(shards), parallel)
    agree(index.digest, f"the content of {shards}", parallel.group)
    needs_teacher = loss.instance or loss.mse or (loss.cluster and (loss.beta or loss.gamma))
    teacher = together(
        lambda: TeacherTable(config.teacher, index) if config.teacher and needs_teacher else None, parallel
    )
    labels = together(
        lambda: LabelTable(config.labels, index, config.labels_per_sample) if config.labels and loss.cluster else None,
        parallel,
    )
    keep = together(lambda: KeepTable(config.keep, index) if config.keep else None, parallel)

    options = together(
        lambda: PairOptions(
            transform=train_transform(run.megacid.student, config.augment),
            tokenize=tokenizer_for(run.megacid.student),
            seed=run.megacid.run.seed,
            seeded_transform=config.augment != "none",
            workers=config.workers,
            worker_timeout_s=config.worker_timeout_s,
            teacher=teacher,
            labels=labels,
            keep=keep,
            error_budget=config.error_budget,
            max_image_pixels=config.max_image_pixels,
            block_shards=config.block_shards,
            pin_memory=parallel.device.type == "cuda",
        ),
        parallel,
    )
    return Data(
        lambda start_step: PairStream(index, _positions(run, parallel, start_step), options),
        teacher_dim=teacher.dim if teacher else None,
        num_classes=labels.num_classes if labels else None,
        centroids=labels.directory / "centroids.npy" if labels else None,
    )


def make_student(run: RunFile, data: Data) -> Student | FeatureTower:
    config = run.megacid.student
    width = config.embed_dim or data.teacher_dim
    if data.teacher_dim is not None and width != data.teacher_dim:
        raise UserError(
            f'"megacid.student.embed_dim" is {width}, the teacher in {run.megacid.data.teacher} has {data.teacher_dim}: write null or {data.teacher_dim}'
        )
    if data.feature_dim is not None:
        assert width is not None
        return FeatureTower(
            data.feature_dim, width, hidden=config.hidden, layers=config.layers, seed=run.megacid.run.seed
        )
    return build_student(
        config.model,
        embed_dim=width,
        image_size=config.image_size,
        context_length=config.context_length,
        pretrained=config.pretrained,
        seed=run.megacid.run.seed,
        grad_checkpointing=config.grad_checkpointing,
    )


def make_classifier(
    run: RunFile, data: Data, width: int, parallel: Parallel
) -> tuple[PartialFC | None, RowAdamW | RowSGD | None]:
    """The class-sharded head and its row-sparse optimizer; (None, None) when the run has no cluster term."""
    if data.num_classes is None:
        return None, None
    config = run.megacid.classifier
    head = PartialFC(
        data.num_classes,
        width,
        sample_rate=config.sample_rate,
        margin=Margin(config.m1, config.m2, config.m3),
        scale=config.scale,
        group=parallel.group,
        seed=run.megacid.run.seed,
        init={"centroids": data.centroids, "random": None}.get(config.init, Path(config.init)),
        margin_grad=config.margin_grad,
        grad_reduction=run.grad_reduction,
        feature_rate=config.feature_rate,
        filter_threshold=config.filter_threshold,
        log_q=config.log_q,
        weight_grad=config.weight_grad,
        device=parallel.device,
    )
    peak = peak_rates(run)[1]
    stored: dict[str, Any] = {"moments": config.moments, "lazy": config.lazy}
    if config.optimizer == "adamw":
        return head, RowAdamW(
            head, lr=peak, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, **stored
        )
    return head, RowSGD(head, lr=peak, momentum=config.momentum, weight_decay=config.weight_decay, **stored)


def peak_rates(run: RunFile) -> tuple[float, float]:
    """Peak learning rate of the student and of the class rows."""
    student = float(run.deepspeed["optimizer"]["params"]["lr"])
    rows = run.megacid.classifier.lr
    return student, student if rows is None else rows


def make_objective(run: RunFile, head: PartialFC | None, parallel: Parallel) -> Objective:
    loss = run.megacid.loss
    cluster = None
    if head is not None:
        cluster = ClusterDistillation(
            head, alpha=loss.alpha, beta=loss.beta, gamma=loss.gamma, temperature=loss.cluster_temperature
        )
    return Objective(
        instance=loss.instance,
        cluster=loss.cluster,
        contrastive=loss.contrastive,
        mse=loss.mse,
        cluster_loss=cluster,
        group=parallel.group,
        grad_reduction=run.grad_reduction,
        temperature=loss.temperature,
    )


def together(build: Callable[[], T], parallel: Parallel) -> T:
    """build() on every rank, without collectives inside; what goes wrong on one is an error on all, so that nobody waits."""
    with fail_together(parallel.group):
        value = build()
    return value
