"""The training objective: a weighted sum of terms. A term of weight 0 is not computed and needs no inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.distributed.collectives import Gathered, GradReduction, sum_over_ranks
from megacid.errors import UserError
from megacid.losses.cluster import ClusterDistillation
from megacid.losses.global_batch import TEACHER, GlobalBatch, check_rows, check_shapes
from megacid.losses.instance import (
    affinity_part,
    contrastive_part,
    gathered_student,
    gathered_teacher,
    instance_part,
    mse_part,
)
from megacid.losses.teachers import Teachers

_FIELDS = dict(zip(TEACHER, ("teacher_image", "teacher_text")))  # of TargetBatch


class StudentOutput(Protocol):
    """Output of a student: image, text [B, D] L2-normalised, logit_scale and logit_bias 0-d."""

    @property
    def image(self) -> Tensor: ...
    @property
    def text(self) -> Tensor: ...
    @property
    def logit_scale(self) -> Tensor: ...
    @property
    def logit_bias(self) -> Tensor: ...


class TargetBatch(Protocol):
    """Targets of a batch: label int64 [B], teacher_image and teacher_text [B, D]; each may be None.

    The embeddings of K teachers are [t_1, ..., t_K] / sqrt(K), whose width D is the sum of theirs.
    """

    @property
    def label(self) -> Tensor | None: ...
    @property
    def teacher_image(self) -> Tensor | None: ...
    @property
    def teacher_text(self) -> Tensor | None: ...


@dataclass(frozen=True)
class StartedBatch:
    """Targets of a batch whose teacher embeddings are being gathered; see `Objective.start`."""

    targets: TargetBatch
    gathered: GlobalBatch | None  # None: no term needs all ranks' embeddings of the teacher


class Objective:
    """instance * L_instance + cluster * L_cluster + contrastive * L_CLIP + affinity * L_affinity
    + mse * (|vS - vT|^2 + |tS - tT|^2).

    Args:
        instance: weight of `instance_loss`, like contrastive (`contrastive_loss`), affinity (`affinity_loss`) and mse
            (`feature_mse`).
        cluster: weight of `cluster_loss`, the method's lambda.
        cluster_loss: holds the classifier; needed if cluster > 0.
        group: ranks of the global batch; None is the default group.
        grad_reduction: how the engine combines gradients over ranks.
        equal_batches: whether every rank has equally many samples, which saves an exchange of their numbers.
        overlap: whether the student's forward may run while the teacher's embeddings are gathered; not under ZeRO 3,
            whose forward gathers parameters in another group.
        form: of the contrastive and the instance term; "sigmoid" adds the student's learned logit_bias to the logits.
        temperature: fixed temperature of the student's similarities; None uses its learned logit_scale.
        affinity_temperature: of the teacher's similarities in `affinity_loss`, or one of each teacher. Stored
            embeddings come without the teacher's own; OpenCLIP's models end at 0.01, their bound.
        teacher_widths: of each of several teachers, over which `affinity_loss` is averaged; () for one teacher.

    Raises:
        UserError: a value out of range, all weights 0, or a cluster weight without `cluster_loss`.
    """

    def __init__(
        self,
        *,
        instance: float = 1.0,
        cluster: float = 1.0,
        contrastive: float = 0.0,
        mse: float = 0.0,
        affinity: float = 0.0,
        cluster_loss: ClusterDistillation | None = None,
        group: dist.ProcessGroup | None = None,
        grad_reduction: GradReduction = "mean",
        equal_batches: bool = False,
        overlap: bool = True,
        form: Literal["softmax", "sigmoid"] = "softmax",
        temperature: float | None = None,
        affinity_temperature: float | Sequence[float] = 0.01,
        teacher_widths: Sequence[int] = (),
    ):
        self.weights = {
            "instance": instance, "cluster": cluster, "contrastive": contrastive, "mse": mse, "affinity": affinity,
        }  # fmt: skip
        for name, value in self.weights.items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(
                    f"weight of the {name} term is {value}, expected a finite number >= 0: 0 leaves the term out"
                )
        if not any(self.weights.values()):
            raise UserError(
                "all loss weights are 0, expected one > 0: set instance, cluster, contrastive, mse or affinity"
            )
        if cluster > 0 and cluster_loss is None:
            raise UserError(
                f"weight of the cluster term is {cluster}, expected 0 without a classifier: "
                "pass cluster_loss, or set the weight to 0"
            )
        if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
            raise UserError(f"temperature is {temperature}, expected > 0, or null for the learned temperature")
        if form not in ("softmax", "sigmoid"):
            raise UserError(f'form is {form!r}, expected "softmax" or "sigmoid"')
        self.cluster_loss, self.form, self.temperature = cluster_loss, form, temperature
        self.teachers = Teachers.of(teacher_widths, affinity_temperature)
        self.group, self.grad_reduction, self.equal_batches = group, grad_reduction, equal_batches
        self.overlap = overlap
        both = tuple(_FIELDS.values())
        anchor = cluster > 0 and cluster_loss is not None and cluster_loss.weights.needs_teacher
        reads = {"instance": both, "cluster": ("label", *(both[:1] if anchor else ())), "mse": both, "affinity": both}
        self._reads = {term: fields for term, fields in reads.items() if self.weights[term] > 0}
        # Names of the matrices that are gathered, and of those among them with the student's width: affinity takes any.
        self._teacher = gathered_teacher(instance, affinity, anchor)
        self._width_checked = gathered_teacher(instance + mse, 0.0, anchor)
        self._student = gathered_student(instance, contrastive, affinity, form)
        self._needs_pairs = any(self.weights[term] > 0 for term in ("instance", "contrastive", "affinity"))

    def start(self, batch: TargetBatch) -> StartedBatch:
        """Start to gather the teacher's embeddings, which overlaps with the student's forward. A collective.

        Raises:
            UserError: the batch lacks a field that a term needs.
        """
        for term, fields in self._reads.items():
            for field in fields:
                if getattr(batch, field) is None:
                    raise UserError(
                        f"the {term} term needs batch.{field}, which is missing: add it to the run's data, or set the "
                        "weight to 0"
                    )
        local = {name: getattr(batch, _FIELDS[name]) for name in self._teacher}
        gathered = self._global_batch(len(next(iter(local.values())))) if local else None
        if gathered is not None:
            gathered.start(**local)
            if not self.overlap:
                gathered.finish()
        return StartedBatch(batch, gathered)

    def __call__(self, out: StudentOutput, batch: TargetBatch | StartedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch. A collective.

        Args:
            batch: the targets, or what `start` returned for them before the student's forward.

        Returns:
            The loss, 0-d, and the computed terms among instance, cluster, cluster/student_ce, cluster/teacher_ce,
            cluster/kl, contrastive, mse, affinity: 0-d, detached, without their weights. The same on every rank.

        Raises:
            UserError: the batch lacks a field that a term needs, or the teacher has other numbers of rows or
                another width than the student.
        """
        started = batch if isinstance(batch, StartedBatch) else self.start(batch)
        targets, gathered = started.targets, started.gathered or self._global_batch(len(out.image))
        teacher = {name: getattr(targets, _FIELDS[name]) for name in self._teacher}
        check_rows(out.image, **teacher)
        check_shapes(out.image, **{name: x for name, x in teacher.items() if name in self._width_checked})
        if self._needs_pairs:
            check_shapes(out.image, text_S=out.text)
            student = {"image_S": out.image, "text_S": out.text}
            gathered.start(**{name: x for name, x in student.items() if name in self._student})
            gathered.keep(**{name: x for name, x in student.items() if name not in self._student})
        w, scale = self.weights, self._logit_scale(out)
        bias = out.logit_bias if self.form == "sigmoid" else None
        parts: dict[str, Tensor] = {}  # this rank's parts of the means over the global batch
        details: dict[str, Tensor] = {}
        if w["instance"] > 0:
            parts["instance"] = instance_part(gathered, scale, bias)
        if w["cluster"] > 0:
            cluster, details = self._cluster(out.image, targets, gathered)
        if w["contrastive"] > 0:
            parts["contrastive"] = contrastive_part(gathered, scale, bias)
        if w["mse"] > 0:
            assert targets.teacher_image is not None and targets.teacher_text is not None
            image, text = (out.image, targets.teacher_image), (out.text, targets.teacher_text)
            parts["mse"] = mse_part(gathered, *image) + mse_part(gathered, *text)
        if w["affinity"] > 0:
            parts["affinity"] = affinity_part(gathered, scale, self.teachers)
        if parts:  # one all-reduce for all terms
            parts = dict(zip(parts, sum_over_ranks(torch.stack([*parts.values()]), self.group).unbind()))
        if w["cluster"] > 0:
            parts["cluster"] = cluster
        values = {name: parts[name] for name in w if name in parts}
        loss = torch.stack([w[name] * value for name, value in values.items()]).sum()
        return loss, {name: value.detach() for name, value in values.items()} | details

    def _cluster(self, image: Tensor, targets: TargetBatch, gathered: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The cluster term and its own terms."""
        assert self.cluster_loss is not None and targets.label is not None
        # Alone, the classifier gathers the student's images itself: its reduce-scatter then overlaps with the gradient
        # of the class rows.
        student = Gathered(gathered["image_S"]) if "image_S" in self._student else image
        anchor = Gathered(gathered["image_T"]) if self.cluster_loss.weights.needs_teacher else None
        value, terms = self.cluster_loss(student, targets.label, anchor)
        return value, {f"cluster/{name}": term for name, term in terms.items()}

    def _global_batch(self, size: int) -> GlobalBatch:
        return GlobalBatch(size, self.group, self.grad_reduction, equal_batches=self.equal_batches)

    @property
    def is_mean_over_samples(self) -> bool:
        """Whether the objective of a batch is the mean of the objectives of its equal parts.

        True for mse alone. Contrastive terms compare samples; the cluster term is a mean over the labelled samples,
        whose number varies, and draws classes for the labels of the batch.
        """
        return not any(weight > 0 for name, weight in self.weights.items() if name != "mse")

    def _logit_scale(self, out: StudentOutput) -> Tensor:
        if self.temperature is None:
            return out.logit_scale
        return torch.full_like(out.logit_scale.detach(), 1 / self.temperature)
