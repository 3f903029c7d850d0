"""Losses and gradient coefficients from the reduced row statistics: the work between the all-reduce and the gradient
products, on [b] and [b, l] tensors only.

Legend: b samples of one chunk, l labels per sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megacid_kernels.loss_spec import Distribution, LossSpec
from megacid_kernels.row_statistics import RowStatistics
from megacid_kernels.targets import BatchLabels, Target


class Coefficients(NamedTuple):
    """Losses of a chunk and the coefficients of its gradients."""

    raw: Tensor  # [3, b] the terms without their weights; 0 without a label, NaN where no rank holds a label's class
    student_target: Tensor | None  # [b, l] d loss / d target cosine of the student; 0 where another rank owns the class
    teacher_target: Tensor | None  # [b, l] the same of the teacher
    student: dict[Distribution, Tensor]  # [b] d loss / d student cosine, divided by the exponential
    teacher: dict[Distribution, Tensor]  # [b] d loss / d teacher cosine, divided by the exponential


class SoftmaxLoss(NamedTuple):
    """One softmax loss per sample."""

    loss: Tensor  # [b]
    residual: Tensor  # [b, l] -d loss / d logit of each label: 1 - P_y for a single label
    log_z: (
        Tensor  # [b] -ln(d loss / d logit of a negative, divided by its exponential): ln Z - kappa for a single label
    )
    as_negative: Tensor | None = None  # [b, l] d loss / d logit of each label as a negative of the other labels


def divide_by_z(factor: Tensor, log_z: Tensor) -> Tensor:
    """factor / Z for factor >= 0, always finite."""
    # The bound acts only where every exponential underflowed to 0: 0 * finite is 0, where 0 * inf would be NaN.
    return torch.exp((factor.log() - log_z).clamp_max(88.0 if log_z.dtype == torch.float32 else 700.0))


def one_label(negatives: Tensor, logit: Tensor, shift: float | Tensor) -> SoftmaxLoss:
    """Cross entropy. negatives: [b] sum of exp(z - shift) over them; logit: [b, 1] the label's; shift: 0-d or [b]."""
    target, log_n = logit[:, 0] - shift, negatives.log()
    d = log_n - target
    loss = torch.logaddexp(d, torch.zeros_like(d))
    log_z = torch.logaddexp(log_n, target)  # not target + loss, which may cancel
    return SoftmaxLoss(loss, torch.sigmoid(d)[:, None], log_z)


def _several_labels(negatives: Tensor, logit: Tensor, present: Tensor, shift: float) -> SoftmaxLoss:
    """MLCD: ln(1 + sum_i exp(-z_i)) + ln(1 + sum_j exp(z_j)); present [b, l] marks the labels that exist."""
    negated = torch.where(present, -logit, -torch.inf)
    zero = torch.zeros_like(negatives)
    positive = torch.logaddexp(torch.logsumexp(negated, 1), zero)
    log_z = torch.logaddexp(negatives.log(), zero - shift)  # ln(1 + sum_j exp(z_j)) - shift
    loss = positive + log_z + shift
    return SoftmaxLoss(loss, torch.exp(negated - positive[:, None]), log_z)


def _mean_over_labels(negatives: Tensor, logit: Tensor, plain: Tensor, present: Tensor, shift: float) -> SoftmaxLoss:
    """Mean over the labels of their cross entropies, each with the other labels as negatives. plain: [b, l] logits
    without margin, which labels have as negatives."""
    absent, count = ~present, present.sum(1, keepdim=True).clamp_min(1).to(logit.dtype)
    target, other = logit - shift, (plain - shift).masked_fill(absent, -torch.inf)
    itself = torch.eye(present.shape[1], dtype=torch.bool, device=present.device)
    of_others = other[:, None, :].masked_fill(itself, -torch.inf)  # [b, label, negative]
    log_n = torch.logaddexp(of_others.logsumexp(2), negatives.log()[:, None])
    d, log_z = log_n - target, torch.logaddexp(log_n, target)
    loss = torch.logaddexp(d, torch.zeros_like(d)).masked_fill(absent, 0.0)
    residual = torch.sigmoid(d).masked_fill(absent, 0.0)
    as_negative = torch.exp(of_others - log_z[:, :, None]).masked_fill(absent[:, :, None], 0.0).sum(1)
    inverse = (-log_z).masked_fill(absent, -torch.inf).logsumexp(1) - count[:, 0].log()
    return SoftmaxLoss(loss.sum(1) / count[:, 0], residual / count, -inverse, as_negative / count)


def epilogue(
    spec: LossSpec, stats: RowStatistics, labels: BatchLabels, student_here: Target | None, teacher_here: Target | None
) -> Coefficients:
    """Losses and coefficients from `stats` of all ranks and the targets of this one."""
    w, s, present, share = spec.weights, spec.scale, labels.present, labels.share
    raw, teacher_target = [torch.zeros_like(share) for _ in range(3)], None
    student_target, student_negative = torch.zeros_like(present, dtype=share.dtype), None
    student: dict[Distribution, Tensor] = {}
    teacher: dict[Distribution, Tensor] = {}

    def softmax(distribution: Distribution) -> SoftmaxLoss:
        cosine = stats.psi if distribution.source == "student" else stats.teacher_cos
        assert cosine is not None
        logit = cosine * (s / distribution.temperature)
        shift, negatives = spec.shift(distribution.temperature), stats.sums[distribution]
        if present.shape[1] == 1:
            return one_label(negatives, logit, shift)
        if spec.labels_loss == "mlcd":
            return _several_labels(negatives, logit, present, shift)
        plain = stats.cos if distribution.source == "student" else cosine
        assert plain is not None
        return _mean_over_labels(negatives, logit, plain * (s / distribution.temperature), present, shift)

    if w.alpha > 0:
        plain = Distribution("student", 1.0)
        ce, factor = softmax(plain), share * (w.alpha * s)
        raw[0], student[plain] = ce.loss, divide_by_z(factor, ce.log_z)
        student_target = student_target - factor[:, None] * ce.residual
        student_negative = None if ce.as_negative is None else factor[:, None] * ce.as_negative
    if w.beta > 0:
        plain = Distribution("teacher", 1.0)
        ce, factor = softmax(plain), share * (w.beta * s)
        raw[1], teacher[plain] = ce.loss, divide_by_z(factor, ce.log_z)
        residual = ce.residual if ce.as_negative is None else ce.residual - ce.as_negative
        teacher_target = -factor[:, None] * residual
    if w.gamma > 0:
        assert stats.gap is not None and stats.psi is not None and stats.teacher_cos is not None
        soft_scale = s / w.temperature
        of_student, of_teacher = spec.softened("student"), spec.softened("teacher")
        factor, p_student, p_teacher = share * (w.gamma * soft_scale), softmax(of_student), softmax(of_teacher)
        target_gap = (1 - p_teacher.residual[:, 0]) * (stats.teacher_cos[:, 0] - stats.psi[:, 0])
        gap = stats.gap * divide_by_z(torch.ones_like(factor), p_teacher.log_z) + target_gap
        raw[2] = soft_scale * gap + p_student.log_z - p_teacher.log_z
        # At temperature 1 one matrix serves two terms: add their coefficients, not their products.
        student[of_student] = student.get(of_student, 0) + divide_by_z(factor, p_student.log_z)
        student[of_teacher] = -divide_by_z(factor, p_teacher.log_z)
        student_target = student_target + factor[:, None] * (p_teacher.residual - p_student.residual)
    own = labels.located.own
    if student_here is not None:
        student_target = student_target * student_here.dpsi  # 0 where another rank owns the class
        if student_negative is not None:
            student_target += student_negative * own
    if teacher_here is not None and teacher_target is not None:
        teacher_target = teacher_target * own
    lost = stats.owned < labels.num_labels - 0.5
    losses = torch.stack(raw).masked_fill(~present.any(1), 0.0).masked_fill(lost, torch.nan)
    return Coefficients(losses, student_target, teacher_target, student, teacher)
