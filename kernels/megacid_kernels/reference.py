"""The written-out formulas for autograd in float64, one process, no chunks: what the operators are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from megacid_kernels.problem import TargetMargin, Weights


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
) -> tuple[Tensor, Tensor]:
    """(loss, [3] raw terms) of `linear_margin_discrimination`, differentiable. x [G, D], w [C, D], all float64.

    The margin's own derivative is not used: autograd differentiates psi through cos and sin.
    """
    weights = weights or Weights()
    keep = target >= 0
    x, y = x[keep], target[keep]
    unit_w = w / w.norm(dim=1, keepdim=True)
    raw = [x.new_zeros(()), x.new_zeros(()), x.new_zeros(())]
    if len(y) == 0:
        return x.sum() * 0 + w.sum() * 0, torch.stack(raw).detach()
    onehot = torch.nn.functional.one_hot(y, len(w)).bool()
    unit_x = x / x.norm(dim=1, keepdim=True)
    cos = unit_x @ unit_w.T
    w_y = unit_w[y]
    cos_y = (unit_x * w_y).sum(1)
    psi = cos_y
    if margin is not None:
        psi = margin.target(cos_y, (unit_x - w_y).norm(dim=1) * (unit_x + w_y).norm(dim=1) / 2)[0]
    removed = torch.zeros_like(onehot) if filter_threshold is None else (cos.detach() > filter_threshold) & ~onehot
    z_S = scale * torch.where(onehot, psi[:, None], cos)
    if weights.alpha > 0:
        raw[0] = torch.nn.functional.cross_entropy(z_S.masked_fill(removed, -torch.inf), y)
    if teacher is not None and weights.needs_teacher:
        unit_t = teacher[keep].detach()
        unit_t = unit_t / unit_t.norm(dim=1, keepdim=True)
        z_T = scale * unit_t @ unit_w.T
        if weights.beta > 0:
            raw[1] = torch.nn.functional.cross_entropy(z_T.masked_fill(removed, -torch.inf), y)
        if weights.gamma > 0:
            log_t = (z_T.detach() / weights.temperature).masked_fill(removed, -torch.inf).log_softmax(1)
            log_s = (z_S / weights.temperature).masked_fill(removed, -torch.inf).log_softmax(1)
            gap = torch.where(removed, torch.zeros_like(log_t), log_t - log_s)
            raw[2] = (log_t.exp() * gap).sum(1).mean()
    loss = weights.alpha * raw[0] + weights.beta * raw[1] + weights.gamma * raw[2]
    return loss, torch.stack(raw).detach()
