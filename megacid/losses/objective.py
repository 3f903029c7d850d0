"""The training objective: a weighted sum of terms. A term of weight 0 is not computed and needs no inputs."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.distributed.collectives import GradReduction
from megacid.errors import UserError
from megacid.losses.cluster import ClusterDistillation
from megacid.losses.instance import affinity_loss, contrastive_loss, feature_mse, instance_loss


class StudentOutput(Protocol):
    """Output of a student: image, text [B, D] L2-normalised, logit_scale 0-d."""

    @property
    def image(self) -> Tensor: ...
    @property
    def text(self) -> Tensor: ...
    @property
    def logit_scale(self) -> Tensor: ...


class TargetBatch(Protocol):
    """Targets of a batch: label int64 [B], teacher_image and teacher_text [B, D]; each may be None."""

    @property
    def label(self) -> Tensor | None: ...
    @property
    def teacher_image(self) -> Tensor | None: ...
    @property
    def teacher_text(self) -> Tensor | None: ...


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
        temperature: fixed temperature of the student's similarities; None uses its learned logit_scale.
        affinity_temperature: of the teacher's similarities in `affinity_loss`. Stored embeddings come without the
            teacher's own; OpenCLIP's models end at 0.01, their bound.

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
        temperature: float | None = None,
        affinity_temperature: float = 0.01,
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
        if not (math.isfinite(affinity_temperature) and affinity_temperature > 0):
            raise UserError(f"affinity_temperature is {affinity_temperature}, expected > 0: 0.01 is usual")
        self.cluster_loss, self.temperature = cluster_loss, temperature
        self.affinity_scale = 1 / affinity_temperature
        self.group, self.grad_reduction = group, grad_reduction

    def __call__(self, out: StudentOutput, batch: TargetBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch. A collective.

        Returns:
            The loss, 0-d, and the computed terms among instance, cluster, cluster/student_ce, cluster/teacher_ce,
            cluster/kl, contrastive, mse, affinity: 0-d, detached, without their weights. The same on every rank.

        Raises:
            UserError: the batch lacks a field that a term needs.
        """
        w, scale = self.weights, self._logit_scale(out)
        values: dict[str, Tensor] = {}
        details: dict[str, Tensor] = {}
        common = (self.group, self.grad_reduction)
        if w["instance"] > 0:
            teacher_image = _require(batch, "instance", "teacher_image")
            teacher_text = _require(batch, "instance", "teacher_text")
            values["instance"] = instance_loss(out.image, out.text, teacher_image, teacher_text, scale, *common)
        if w["cluster"] > 0 and self.cluster_loss is not None:
            label = _require(batch, "cluster", "label")
            needs_teacher = self.cluster_loss.weights.needs_teacher
            anchor = _require(batch, "cluster", "teacher_image") if needs_teacher else None
            values["cluster"], parts = self.cluster_loss(out.image, label, anchor)
            details = {f"cluster/{name}": value for name, value in parts.items()}
        if w["contrastive"] > 0:
            values["contrastive"] = contrastive_loss(out.image, out.text, scale, *common)
        if w["mse"] > 0:
            image, text = _require(batch, "mse", "teacher_image"), _require(batch, "mse", "teacher_text")
            values["mse"] = feature_mse(out.image, image, *common) + feature_mse(out.text, text, *common)
        if w["affinity"] > 0:
            image, text = _require(batch, "affinity", "teacher_image"), _require(batch, "affinity", "teacher_text")
            values["affinity"] = affinity_loss(out.image, out.text, image, text, scale, self.affinity_scale, *common)
        loss = torch.stack([w[name] * value for name, value in values.items()]).sum()
        return loss, {name: value.detach() for name, value in values.items()} | details

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


def _require(batch: TargetBatch, term: str, field: str) -> Tensor:
    value: Tensor | None = getattr(batch, field)
    if value is None:
        raise UserError(
            f"the {term} term needs batch.{field}, which is missing: add it to the run's data, or set the weight to 0"
        )
    return value
