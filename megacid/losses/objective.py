"""The training objective: a weighted sum of terms. A term of weight 0 is not computed and its inputs are not needed."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.distributed.collectives import GradReduction
from megacid.errors import UserError
from megacid.losses.cluster import ClusterDistillation
from megacid.losses.instance import contrastive_loss, feature_mse, instance_loss


class StudentOutput(Protocol):
    """What a student gives: image, text [B, D] L2-normalised, logit_scale 0-d."""

    @property
    def image(self) -> Tensor: ...
    @property
    def text(self) -> Tensor: ...
    @property
    def logit_scale(self) -> Tensor: ...


class TargetBatch(Protocol):
    """What the data gives: label int64 [B], teacher_image and teacher_text [B, D], each may be None."""

    @property
    def label(self) -> Tensor | None: ...
    @property
    def teacher_image(self) -> Tensor | None: ...
    @property
    def teacher_text(self) -> Tensor | None: ...


class Objective:
    """instance * L_instance + cluster * L_cluster + contrastive * L_CLIP + mse * (|vS - vT|^2 + |tS - tT|^2)."""

    def __init__(
        self,
        *,
        instance: float = 1.0,
        cluster: float = 1.0,
        contrastive: float = 0.0,
        mse: float = 0.0,
        cluster_loss: ClusterDistillation | None = None,
        group: dist.ProcessGroup | None = None,
        grad_reduction: GradReduction = "mean",
        temperature: float | None = None,
    ):
        """cluster: the method's lambda, on the sum that `cluster_loss` gives (holds the head; needed if cluster > 0).
        temperature: fixed temperature of the contrastive terms; None: the student's learned logit_scale."""
        self.weights = {"instance": instance, "cluster": cluster, "contrastive": contrastive, "mse": mse}
        for name, value in self.weights.items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(
                    f"weight of the {name} term is {value}, expected a finite number >= 0: 0 leaves the term out"
                )
        if not any(self.weights.values()):
            raise UserError(
                "all terms of the objective have weight 0: give one of instance, cluster, contrastive, mse a weight"
            )
        if cluster > 0 and cluster_loss is None:
            raise UserError(
                f"the cluster term has weight {cluster} but there is no classifier: "
                "pass cluster_loss, or set the weight to 0"
            )
        if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
            raise UserError(f"temperature is {temperature}, expected > 0, or null for the learned one")
        self.cluster_loss, self.temperature = cluster_loss, temperature
        self.group, self.grad_reduction = group, grad_reduction

    def __call__(self, out: StudentOutput, batch: TargetBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss 0-d with gradient, terms: each 0-d, detached, without its weight), same on every rank. A collective.

        terms has a key per computed term: instance, cluster, cluster/student_ce, cluster/teacher_ce, cluster/kl,
        contrastive, mse. UserError names a term and the field of the batch it misses.
        """
        w, scale = self.weights, self._logit_scale(out)
        values: dict[str, Tensor] = {}
        details: dict[str, Tensor] = {}
        common = (self.group, self.grad_reduction)
        if w["instance"] > 0:
            teacher_image = _needed(batch, "instance", "teacher_image")
            teacher_text = _needed(batch, "instance", "teacher_text")
            values["instance"] = instance_loss(out.image, out.text, teacher_image, teacher_text, scale, *common)
        if w["cluster"] > 0 and self.cluster_loss is not None:
            label = _needed(batch, "cluster", "label")
            needs_teacher = self.cluster_loss.weights.needs_teacher
            anchor = _needed(batch, "cluster", "teacher_image") if needs_teacher else None
            values["cluster"], parts = self.cluster_loss(out.image, label, anchor)
            details = {f"cluster/{name}": value for name, value in parts.items()}
        if w["contrastive"] > 0:
            values["contrastive"] = contrastive_loss(out.image, out.text, scale, *common)
        if w["mse"] > 0:
            image, text = _needed(batch, "mse", "teacher_image"), _needed(batch, "mse", "teacher_text")
            values["mse"] = feature_mse(out.image, image, *common) + feature_mse(out.text, text, *common)
        loss = torch.stack([w[name] * value for name, value in values.items()]).sum()
        return loss, {name: value.detach() for name, value in values.items()} | details

    def _logit_scale(self, out: StudentOutput) -> Tensor:
        return (
            out.logit_scale
            if self.temperature is None
            else torch.full_like(out.logit_scale.detach(), 1 / self.temperature)
        )


def _needed(batch: TargetBatch, term: str, field: str) -> Tensor:
    value: Tensor | None = getattr(batch, field)
    if value is None:
        raise UserError(
            f"the {term} term needs batch.{field}, which is missing: "
            "give the run those data, or set the term's weight to 0"
        )
    return value
