"""Cluster discrimination distillation (CLIP-CID, arXiv 2408.09441): student and teacher over the same sampled clusters.

    zS = s * psi_y(cos(vS, W))      zT = s * cos(vT, W)
    L = alpha * CE(zS, y) + beta * CE(zT, y) + gamma * KL(softmax(zT / tau) || softmax(zS / tau))

The paper's figure shows the three terms; their form is assumed. It is also assumed that the teacher's distribution is
constant in the KL: the class rows follow the teacher only through beta. The teacher's embeddings get no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megacid.classifier.partial_fc import PartialFC
from megacid.distributed.collectives import Gathered
from megacid.errors import UserError
from megacid_kernels import Weights


class ClusterDistillation(nn.Module):
    """The three terms on a `PartialFC`, with one sample of classes and one all-reduce.

    Args:
        head: the classifier.
        alpha: weight of the student's cross entropy; a term of weight 0 is not computed.
        beta: weight of the teacher's cross entropy.
        gamma: weight of the KL divergence.
        temperature: of both distributions in the KL.

    Raises:
        UserError: a value out of range, or all weights 0.
    """

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
                "cluster loss: alpha, beta and gamma are all 0, expected one > 0: set one, or leave the term out"
            )

    def forward(
        self, student_BD: Tensor | Gathered, target_B: Tensor, teacher_BD: Tensor | Gathered | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Means over the labelled samples of the global batch. A collective.

        Args:
            student_BD: [B, D] student embeddings, or Gathered, those of all ranks; like teacher_BD.
            target_B: int64 [B] or [B, l], as in `PartialFC.forward`; all three terms leave unlabelled samples out.
            teacher_BD: [B, D] stored teacher embeddings, needed if beta or gamma is > 0.

        Returns:
            The weighted sum, 0-d, and the computed terms among "student_ce", "teacher_ce", "kl": 0-d, detached,
            without their weights. The same on every rank.
        """
        out = self.head.discriminate(student_BD, target_B, teacher_BD=teacher_BD, weights=self.weights)
        w = self.weights
        names = (("student_ce", w.alpha), ("teacher_ce", w.beta), ("kl", w.gamma))
        terms: tuple[Tensor, ...] = torch.unbind(out.raw.detach())
        return out.loss, {name: value for (name, weight), value in zip(names, terms) if weight > 0}
