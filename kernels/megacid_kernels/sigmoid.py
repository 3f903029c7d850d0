"""Sigmoid cross entropy over all pairs (Zhai et al. 2023, SigLIP, arXiv 2303.15343), in chunks of anchors.

Legend: b anchors of this rank, G candidates, c anchors of one chunk, D width.

    z_ij = scale a_i . o_j + bias     loss = sum_i sum_j softplus(u_ij), u_ij = -z_ij for the own pair, z_ij for others

The loss is the last operator, so forward computes its gradients. With R = dloss / dz, which is -sigmoid(u) for the own
pair and sigmoid(u) for others:

    da = scale R O      dO = R^T (scale A)      dscale = sum_i a_i . da_i / scale      dbias = sum_ij R_ij
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megacid_kernels.contrastive import DEFAULT_BUDGET_BYTES, PairLoss, check_pairs
from megacid_kernels.loss_spec import check_budget, equal_chunk_size

_MATRICES = 2  # live [c, G] matrices
_LINEAR = 40.0  # softplus(u) is u beyond it, also in float64; exp(u) is finite below it, also in float32


class _Sigmoid(PairLoss):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, other: Tensor, scale: Tensor, bias: Tensor, start: int, step: int, train: bool
    ) -> Tensor:
        ctx.dtypes = [x.dtype for x in (anchor, other, scale, bias)]
        dtype = torch.float64 if torch.float64 in ctx.dtypes[:2] else torch.float32
        anchor, other, scale, bias = (x.to(dtype) for x in (anchor, other, scale, bias))
        needs = [train and needed for needed in ctx.needs_input_grad[:4]]
        loss = anchor.new_zeros(())
        grad_anchor = torch.empty_like(anchor) if needs[0] or needs[2] else None
        grad_other = torch.zeros_like(other) if needs[1] else None
        grad_bias = torch.zeros_like(bias) if needs[3] else None
        for low in range(0, len(anchor), step):
            part = slice(low, low + step)
            scaled_cD = anchor[part] * scale
            u_cG = (scaled_cD @ other.T).add_(bias)
            own_c = u_cG.diagonal(start + low)  # a view of the own pairs
            own_c.neg_()
            loss += F.softplus(u_cG, threshold=_LINEAR).sum()
            residual_cG = u_cG.sigmoid_()
            own_c.neg_()
            if grad_anchor is not None:
                grad_anchor[part] = (residual_cG @ other).mul_(scale)
            if grad_other is not None:
                grad_other.addmm_(residual_cG.T, scaled_cD)
            if grad_bias is not None:
                grad_bias += residual_cG.sum()
        PairLoss.keep(ctx, needs, anchor, scale, grad_anchor, grad_other, grad_bias)
        return loss


def sigmoid_cross_entropy(
    anchor_bD: Tensor,
    other_GD: Tensor,
    scale: Tensor,
    bias: Tensor,
    start: int = 0,
    *,
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Binary cross entropy of sigmoid(scale * anchor . other + bias) over all pairs; 1 for the own pair, 0 for others.

    The sum over the anchors of all ranks, divided by their number, is the loss of SigLIP. It is symmetric: one call
    covers both directions. Plain PyTorch on any device: 6 b G D FLOP with gradients.

    Args:
        anchor_bD: [b, D] floating point, this rank's anchors.
        other_GD: [G, D] floating point, the candidates of all ranks; the pair of anchor i is row start + i.
        scale: 0-d, > 0; like bias on the device of the other tensors and never read on the host.
        bias: 0-d.
        start: row of the first anchor's pair.
        memory_budget_bytes: bound on the live [chunk, G] matrices (at least one anchor per chunk); None: 256 MiB.

    Returns:
        The 0-d loss, differentiable once. The gradients of other_GD, scale and bias are this rank's parts: sum them
        over the ranks.

    Raises:
        ValueError: wrong shapes.
    """
    check_pairs(anchor_bD, other_GD, start, scale=scale, bias=bias)
    check_budget(memory_budget_bytes)
    itemsize = 8 if torch.float64 in (anchor_bD.dtype, other_GD.dtype) else 4
    budget = memory_budget_bytes or DEFAULT_BUDGET_BYTES
    step = equal_chunk_size(len(anchor_bD), max(1, budget // (_MATRICES * max(1, len(other_GD)) * itemsize)))
    with torch.autocast(anchor_bD.device.type, enabled=False):
        loss: Tensor = _Sigmoid.apply(anchor_bD, other_GD, scale, bias, start, step, torch.is_grad_enabled())
    return loss
