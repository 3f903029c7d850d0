"""Cluster discrimination distillation: student and teacher over the same sampled cluster centres.

    zS = s * psi_y(cos(vS, W))      zT = s * cos(vT, W)
    L = alpha * CE(zS, y) + beta * CE(zT, y) + gamma * KL(softmax(zT / tau) || softmax(zS / tau))

The ingredients are the paper's figure, the form is assumed [assumed]. So is that the teacher's distribution is a
constant in the KL: the centres follow the teacher through beta only. No gradient reaches the teacher: it is data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megacid.classifier.partial_fc import PartialFC
from megacid.errors import UserError
from megacid_kernels import Weights


class ClusterDistillation(nn.Module):
    """The three terms on a `PartialFC`, over one sample of classes and with one all-reduce."""

    def __init__(
        self, head: PartialFC, alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
    ):
        super().__init__()
        self.head = head
        try:
            self.weights = Weights(alpha=alpha, beta=beta, gamma=gamma, temperature=temperature)
        except ValueError as error:
            raise UserError(f"cluster loss: {error}") from error
        if not (self.weights.needs_student or self.weights.needs_teacher):
            raise UserError(
                "cluster loss: alpha, beta and gamma are all 0: set one of them, or leave the cluster term out"
            )

    def forward(
        self, student_BD: Tensor, target_B: Tensor, teacher_BD: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(total 0-d, {"student_ce", "teacher_ce", "kl"}: 0-d, detached, without weights, those of weight > 0).

        student_BD, teacher_BD [B, D] (the teacher only where beta or gamma is > 0), target_B int64 [B]; -1 = unlabelled:
        left out of all three. Means over the labelled samples of the global batch, same on every rank. A collective.
        """
        out = self.head.discriminate(student_BD, target_B, teacher_BD=teacher_BD, weights=self.weights)
        w = self.weights
        names = (("student_ce", w.alpha), ("teacher_ce", w.beta), ("kl", w.gamma))
        raw: tuple[Tensor, ...] = torch.unbind(out.raw.detach())
        return out.loss, {name: value for (name, weight), value in zip(names, raw) if weight > 0}
