"""Reference implementation for the tests: the formulas written out for autograd, in one process, without chunks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megacid_kernels.loss_spec import TargetMargin, Weights


def discrimination_reference(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    *,
    margin: TargetMargin | None = None,
    scale: float = 64.0,
    teacher: Tensor | None = None,
    weights: Weights | None = None,
    filter_threshold: float | None = None,
    bias: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    labels_loss: Literal["mlcd", "mean"] = "mlcd",
) -> tuple[Tensor, Tensor]:
    """Loss and raw terms of `linear_margin_discrimination`, differentiable through autograd.

    The margin's own derivative is not used: autograd differentiates psi through cos and sin. Tensors are those of
    `linear_margin_discrimination`, but w [C, D] and bias [C] hold all classes; the options are those of `LossSpec`.

    Returns:
        The 0-d loss and the detached [3] raw terms.
    """
    weights, reduce = weights or Weights(), torch.mean if reduction == "mean" else torch.sum
    target = target if target.ndim == 2 else target[:, None]
    keep = (target >= 0).any(1)
    x, target = x[keep], target[keep]
    unit_w = w / w.norm(dim=1, keepdim=True)
    raw = [x.new_zeros(()), x.new_zeros(()), x.new_zeros(())]
    if len(x) == 0:
        return x.sum() * 0 + w.sum() * 0, torch.stack(raw).detach()
    sample, place = (target >= 0).nonzero(as_tuple=True)
    is_label = torch.zeros(len(x), len(w), dtype=torch.bool)
    is_label[sample, target[sample, place]] = True
    unit_x = x / x.norm(dim=1, keepdim=True)
    cos = unit_x @ unit_w.T
    psi = cos if margin is None else _with_margin(cos, unit_x, unit_w, is_label, margin)
    removed = torch.zeros_like(is_label)
    if filter_threshold is not None:
        removed = (cos.detach() > filter_threshold) & ~is_label
    offset = torch.zeros_like(cos) if bias is None else bias.expand_as(cos).masked_fill(is_label, 0.0)

    def logits(cosine: Tensor, temperature: float = 1.0) -> Tensor:
        return (scale / temperature * cosine + offset).masked_fill(removed, -torch.inf)

    kind = "one" if target.shape[1] == 1 else labels_loss
    if weights.alpha > 0:
        raw[0] = reduce(_each_loss(kind, logits(psi), logits(cos), is_label))
    if teacher is not None and weights.needs_teacher:
        unit_t = teacher[keep].detach()
        cos_t = unit_t / unit_t.norm(dim=1, keepdim=True) @ unit_w.T
        if weights.beta > 0:
            raw[1] = reduce(_each_loss(kind, logits(cos_t), logits(cos_t), is_label))
        if weights.gamma > 0:
            log_t = logits(cos_t.detach(), weights.temperature).log_softmax(1)
            log_s = logits(psi, weights.temperature).log_softmax(1)
            gap = torch.where(removed, torch.zeros_like(log_t), log_t - log_s)
            raw[2] = reduce((log_t.exp() * gap).sum(1))
    loss = weights.alpha * raw[0] + weights.beta * raw[1] + weights.gamma * raw[2]
    return loss, torch.stack(raw).detach()


def _with_margin(cos: Tensor, unit_x: Tensor, unit_w: Tensor, is_label: Tensor, margin: TargetMargin) -> Tensor:
    at_x, at_w = is_label.nonzero(as_tuple=True)
    x, w = unit_x[at_x], unit_w[at_w]
    sin = (x - w).norm(dim=1) * (x + w).norm(dim=1) / 2
    return cos.index_put((at_x, at_w), margin.target((x * w).sum(1), sin)[0])


def _each_loss(kind: str, z: Tensor, plain: Tensor, is_label: Tensor) -> Tensor:
    """[b]; plain: the logits without margin, as which the other labels are negatives in "mean"."""
    if kind == "one":
        return -z.log_softmax(1)[is_label]
    if kind == "mean":
        means = []
        for row, plain_row, labels in zip(z, plain, is_label):
            each = [plain_row.index_put((y,), row[y]).log_softmax(0)[y] for y in labels.nonzero()[:, 0]]
            means.append(-torch.stack(each).mean())
        return torch.stack(means)
    one = z.new_zeros(len(z), 1)  # exp(0), the 1 in both logarithms
    positive = torch.cat([one, (-z).masked_fill(~is_label, -torch.inf)], 1).logsumexp(1)
    return positive + torch.cat([one, z.masked_fill(is_label, -torch.inf)], 1).logsumexp(1)
