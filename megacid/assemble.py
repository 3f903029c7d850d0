"""The parts of a run, each built from the run file: data, student, classifier with its optimizer, objective.

`train.py` puts them together. A mistake that only one rank can see (a missing file on its node, say) becomes the same
error on every rank, so that nobody waits in a collective for a rank that has left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megacid.classifier import Margin, PartialFC, RowAdamW, RowSGD
from megacid.config import RunFile, UserError
from megacid.data.index import load_index
from megacid.data.loader import PairStream
from megacid.data.sidecar import KeepTable, LabelTable, TeacherTable
from megacid.distributed.collectives import agree, gather_json
from megacid.distributed.parallel import Parallel
from megacid.losses import ClusterDistillation, Objective
from megacid.student import Student, build_student, tokenizer_for, train_transform

log = logging.getLogger("megacid")
T = TypeVar("T")


@dataclass
class Data:
    """The shards and what is joined to them."""

    stream: Callable[[int], PairStream]  # from a start step
    teacher: TeacherTable | None
    labels: LabelTable | None


def open_data(run: RunFile, parallel: Parallel) -> Data:
    config, loss = run.megacid.data, run.megacid.loss
    together(
        lambda: load_index(config.shards) if parallel.is_first else None, parallel
    )  # rank 0 builds a missing index alone
    index = together(lambda: load_index(config.shards), parallel)
    agree(index.digest, f"the content of {config.shards}", parallel.group)
    needs_teacher = loss.instance or loss.mse or (loss.cluster and (loss.beta or loss.gamma))
    teacher = together(
        lambda: TeacherTable(config.teacher, index) if config.teacher and needs_teacher else None, parallel
    )
    labels = together(lambda: LabelTable(config.labels, index) if config.labels and loss.cluster else None, parallel)
    keep = together(lambda: KeepTable(config.keep, index) if config.keep else None, parallel)

    def stream(start_step: int) -> PairStream:
        return PairStream(
            index,
            transform=train_transform(run.megacid.student, config.augment),
            tokenize=tokenizer_for(run.megacid.student),
            global_batch=run.global_batch,
            micro_batch=run.micro_batch,
            accumulation=run.accumulation,
            rank=parallel.rank,
            world=parallel.world,
            seed=run.megacid.run.seed,
            start_step=start_step,
            total_steps=run.megacid.run.total_steps,
            seeded=config.augment != "none",
            workers=config.workers,
            teacher=teacher,
            labels=labels,
            keep=keep,
            error_budget=config.error_budget,
            max_image_pixels=config.max_image_pixels,
            block_shards=config.block_shards,
            pin_memory=parallel.device.type == "cuda",
        )

    facts = together(lambda: stream(0).facts(), parallel)
    log.info("data: %s", "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()))
    return Data(stream, teacher, labels)


def make_student(run: RunFile, data: Data) -> Student:
    config = run.megacid.student
    width = config.embed_dim or (data.teacher.dim if data.teacher else None)
    if data.teacher and width != data.teacher.dim:
        raise UserError(
            f'"megacid.student.embed_dim" is {width}, the teacher in {run.megacid.data.teacher} has {data.teacher.dim}: write null or {data.teacher.dim}'
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
    if data.labels is None or run.megacid.data.labels is None:
        return None, None
    config = run.megacid.classifier
    head = PartialFC(
        data.labels.num_classes,
        width,
        sample_rate=config.sample_rate,
        margin=Margin(config.m1, config.m2, config.m3),
        scale=config.scale,
        group=parallel.group,
        seed=run.megacid.run.seed,
        init=Path(run.megacid.data.labels) / "centroids.npy" if config.init == "centroids" else None,
        margin_grad=config.margin_grad,
        grad_reduction=run.grad_reduction,
        feature_rate=config.feature_rate,
        filter_threshold=config.filter_threshold,
        device=parallel.device,
    )
    peak = peak_rates(run)[1]
    if config.optimizer == "adamw":
        return head, RowAdamW(head, lr=peak, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    return head, RowSGD(head, lr=peak, momentum=config.momentum, weight_decay=config.weight_decay)


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
    """build() on every rank; a UserError on one becomes the same UserError on all, so that nobody waits for it."""
    value, error = None, None
    try:
        value = build()
    except UserError as problem:
        error = str(problem)
    first = next((said for said in gather_json(error, parallel.group) if said), None)
    if first is not None:
        raise UserError(first)
    return value  # type: ignore[return-value]
