"""Builds what a run trains with from its run file: student, classifier with its optimizer, objective.

A mistake that only one rank sees, such as a file that is missing on its node, is the same error on every rank: local
work stands in `fail_together` blocks, collectives stand outside of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from megacid.checkpoint import store
from megacid.classifier import Margin, PartialFC, RowAdamW, RowSGD
from megacid.config.conditions import compares_with_teacher, terms_with_teacher
from megacid.config.schema import RunFile
from megacid.config.sections import LossConfig
from megacid.distributed.consensus import fail_together
from megacid.distributed.optimizers import check_groups, check_host
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.losses import ClusterDistillation, Objective
from megacid.models.compiled import check_compiler
from megacid.models.feature_tower import FeatureTower
from megacid.storage.metadata import read_meta, size_field
from megacid.training.classifier_plan import plan_classifier
from megacid.training.evaluation import Evaluation, open_benchmarks
from megacid.training.memory import student_bytes
from megacid.training.open_data import Data, open_data
from megacid.training.run_settings import check_same_settings
from megacid.training.schedule import groups_of_run, peak_rates

if TYPE_CHECKING:
    from megacid.models.clip import StudentSpec
    from megacid.models.student import Student


@dataclass(frozen=True)
class Components:
    """What a run trains with, before the student is inside an engine. run: with the student's width filled in."""

    run: RunFile
    data: Data
    student: Student | FeatureTower
    head: PartialFC | None
    row_optimizer: RowAdamW | RowSGD | None
    objective: Objective
    evaluation: Evaluation


def build_components(run: RunFile, parallel: Parallel) -> Components:
    """Open the data and build student, classifier and objective; check that the run directory has the same settings.

    A collective. Every rank raises the same UserError or RanksDisagree.
    """
    with fail_together(parallel.group):
        # Before the data, which may take hours to index.
        if run.megacid.student.compile:
            check_compiler(parallel.device)
        check_host(run.deepspeed["optimizer"], parallel.device.type)
        check_student(run)
    benchmarks = open_benchmarks(run, parallel)
    data = open_data(run, parallel)
    with fail_together(parallel.group):
        student = make_student(run, data)
        refuse_batch_norm(student, run)
        run = run.with_embed_dim(student.embed_dim)
        # Each rank looks for checkpoints itself: ranks that see different files must not skip a collective over it.
        if store.list_steps(run.directory):
            check_same_settings(run, run.directory)
        failpoint("start:building", step=0)
        reserved = student_bytes(run, student, parallel.world, parallel.device.type)
        head, row_optimizer = make_classifier(run, data, student.embed_dim, parallel, reserved)
        objective = make_objective(run, head, parallel, data.teacher_dims)
    evaluation = Evaluation(run, benchmarks, student, parallel)
    return Components(run, data, student, head, row_optimizer, objective, evaluation)


def check_student(run: RunFile) -> None:
    """Raise UserError unless the student can be built with the teacher's width, and has what the optimizer is for.

    Reads no data and builds no weights.
    """
    config = run.megacid.student
    if run.megacid.data.features is not None:
        return
    teachers = run.megacid.data.teachers if terms_with_teacher(run.megacid.loss) else ()
    again = "run tools/embed.py again into another directory"
    teacher_dims = tuple(size_field(read_meta(path, "embed"), Path(path), "dim", again) for path in teachers)
    # Where a student needs it, because importing open_clip takes seconds.
    from megacid.models.towers import check_towers

    clip = check_towers(
        _student_spec(run, teacher_dims),
        grad_checkpointing=config.grad_checkpointing,
        freeze=config.freeze,
        trained=trained_outputs(run.megacid.loss),
    )
    check_groups(run.deepspeed["optimizer"], groups_of_run(run, clip))


def trained_outputs(loss: LossConfig) -> set[str]:
    """The outputs of the student that the objective differentiates."""
    similarities = loss.contrastive or loss.instance or loss.affinity
    return {
        *(("image",) if loss.cluster and (loss.alpha or loss.gamma) else ()),
        *(("image", "text") if similarities or loss.mse else ()),
        *(("logit_scale",) if similarities and loss.temperature is None else ()),
        *(("logit_bias",) if loss.form == "sigmoid" else ()),
    }


def _student_spec(run: RunFile, teacher_dims: tuple[int, ...]) -> StudentSpec:
    from megacid.models.clip import StudentSpec

    config, total = run.megacid.student, sum(teacher_dims)
    width = config.embed_dim or total or None
    compared = compares_with_teacher(run.megacid.loss) or config.projection_init == "teacher"
    if teacher_dims and width != total and compared:
        teachers = run.megacid.data.teachers
        whose = f"width of the teacher in {teachers[0]}"
        if teachers[1:]:
            widths = (f"{path} ({dim})" for path, dim in zip(teachers, teacher_dims))
            whose = f"sum of the widths of the teachers in {', '.join(widths)}"
        raise UserError(f'"megacid.student.embed_dim" is {width}, expected {total}, the {whose}: write null or {total}')
    return StudentSpec(
        config.model,
        width,
        config.image_size,
        config.context_length,
        config.pretrained,
        projection=config.projection,
        patch_dropout=config.patch_dropout,
        sigmoid=run.megacid.loss.form == "sigmoid",
    )


def make_student(run: RunFile, data: Data) -> Student | FeatureTower:
    """The student, of the teacher's width, or a feature tower. Raises UserError when the widths differ."""
    config, seed = run.megacid.student, run.megacid.run.seed
    if data.feature_dim is not None:
        assert config.embed_dim is not None
        width, hidden = config.embed_dim, config.hidden
        return FeatureTower(data.feature_dim, width, hidden=hidden, layers=config.layers, seed=seed)
    from megacid.models.freezing import frozen_parameters
    from megacid.models.student import build_student

    spec = _student_spec(run, data.teacher_dims)
    student = build_student(**vars(spec), seed=seed, grad_checkpointing=config.grad_checkpointing)
    if config.freeze:
        student.freeze(frozen_parameters(student.clip, config.freeze, trained_outputs(run.megacid.loss)))
    return student


def refuse_batch_norm(student: nn.Module, run: RunFile) -> None:
    """Raise UserError for a student whose embedding of a sample depends on how a step is divided into micro-batches."""
    # A frozen layer is in eval mode.
    norms = (name for name, layer in student.named_modules() if isinstance(layer, _BatchNorm) and layer.training)
    layer = next(norms, None)
    if layer is not None and run.accumulation > 1:
        raise UserError(
            f'"gradient_accumulation_steps" is {run.accumulation}, expected 1 for student {run.megacid.student.model}, '
            f"which has batch normalisation ({layer}): its statistics would be those of a micro-batch; raise "
            "train_micro_batch_size_per_gpu, use more ranks, or choose a student without it, such as ViT-B-32"
        )


def make_classifier(
    run: RunFile, data: Data, width: int, parallel: Parallel, reserved: int = 0
) -> tuple[PartialFC | None, RowAdamW | RowSGD | None]:
    """The class-sharded classifier and its row-sparse optimizer; (None, None) for a run without the cluster term.

    reserved: bytes of the GPU that the classifier's default budget leaves to the student.
    """
    if data.num_classes is None:
        return None, None
    config = run.megacid.classifier
    planned = plan_classifier(run, data.num_classes, width, parallel.world, parallel.device.type, reserved)
    with _initial_rows(config.init, data) as init:
        head = PartialFC(
            data.num_classes,
            width,
            sample_rate=config.sample_rate,
            margin=Margin(config.m1, config.m2, config.m3),
            scale=config.scale,
            group=parallel.group,
            seed=run.megacid.run.seed,
            init=init,
            margin_grad=config.margin_grad,
            grad_reduction=run.grad_reduction,
            feature_rate=config.feature_rate,
            filter_threshold=config.filter_threshold,
            log_q=config.log_q,
            impl=config.impl,
            weight_grad=config.weight_grad,
            precision=config.precision,
            memory_budget_bytes=planned.spec.memory_budget_bytes,
            reserved_bytes=reserved,
            labels_loss=config.labels_loss,
            static_shapes=config.static_shapes,
            cuda_graph=config.cuda_graph,
            device=parallel.device,
        )
    common: dict[str, Any] = {
        "lr": peak_rates(run)[1], "weight_decay": config.weight_decay, "moments": config.moments, "lazy": config.lazy,
    }  # fmt: skip
    if config.optimizer == "adamw":
        return head, RowAdamW(head, betas=config.betas, eps=config.eps, **common)
    return head, RowSGD(head, momentum=config.momentum, **common)


def _initial_rows(init: str, data: Data) -> AbstractContextManager[Path | None]:
    """The file with the initial class rows, which can be read during the block; None for random ones."""
    if init == "centroids" and data.centroids is not None:
        return data.centroids()
    return nullcontext(None if init in ("centroids", "random") else Path(init))


def make_objective(
    run: RunFile, head: PartialFC | None, parallel: Parallel, teacher_dims: tuple[int, ...] = ()
) -> Objective:
    """The weighted sum of the loss terms; a term of weight 0 is not computed. teacher_dims: width of each teacher."""
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
        affinity=loss.affinity,
        cluster_loss=cluster,
        group=parallel.group,
        overlap=run.zero_stage < 3,
        grad_reduction=run.grad_reduction,
        equal_batches=True,
        form=loss.form,
        temperature=loss.temperature,
        affinity_temperature=loss.affinity_temperature,
        teacher_widths=teacher_dims,
    )
