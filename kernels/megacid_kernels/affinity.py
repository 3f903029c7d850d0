"""Cross entropy between the rows of two similarity matrices, a teacher's and a student's, in chunks of rows.

Legend: b anchors of this rank, G candidates, c anchors of one chunk, D width, T the teacher's width.

    p_i = softmax_j(s_T a'_i . o'_j)      loss = -sum_i sum_j p_ij ln softmax_j(scale a_i . o_j)

The teacher's p is constant, so the gradient is that of the KL divergence, and the loss is the KL plus p's entropy. The
loss is the last operator, so forward computes its gradients: with R = softmax(z) - p,

    da = scale R O      dO = R^T (scale A)      dscale = sum_i a_i . da_i / scale
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megacid_kernels.contrastive import DEFAULT_BUDGET_BYTES, PairLoss
from megacid_kernels.loss_spec import check_budget, equal_chunk_size

_MATRICES = 3  # live [c, G] matrices


class _Affinity(PairLoss):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        other: Tensor,
        scale: Tensor,
        teacher: tuple[Tensor, Tensor],
        teacher_scale: float,
        step: int,
        train: bool,
    ) -> Tensor:
        ctx.dtypes = [x.dtype for x in (anchor, other, scale)]
        dtype = torch.float64 if torch.float64 in ctx.dtypes[:2] else torch.float32
        anchor, other, scale = anchor.to(dtype), other.to(dtype), scale.to(dtype)
        teacher_anchor, teacher_other = (x.to(dtype) for x in teacher)
        needs = [train and needed for needed in ctx.needs_input_grad[:3]]
        loss = anchor.new_zeros(())
        grad_anchor = torch.empty_like(anchor) if needs[0] or needs[2] else None
        grad_other = torch.zeros_like(other) if needs[1] else None
        for low in range(0, len(anchor), step):
            part = slice(low, low + step)
            scaled_cD = anchor[part] * scale
            z_cG = scaled_cD @ other.T
            z_cG -= z_cG.logsumexp(1, keepdim=True)
            p_cG = (teacher_anchor[part] * teacher_scale @ teacher_other.T).softmax(1)
            loss -= torch.linalg.vecdot(p_cG, z_cG).sum()
            residual_cG = z_cG.exp_().sub_(p_cG)
            if grad_anchor is not None:
                grad_anchor[part] = (residual_cG @ other).mul_(scale)
            if grad_other is not None:
                grad_other.addmm_(residual_cG.T, scaled_cD)
        PairLoss.keep(ctx, needs, anchor, scale, grad_anchor, grad_other)
        return loss


def affinity_cross_entropy(
    anchor_bD: Tensor,
    other_GD: Tensor,
    scale: Tensor,
    teacher_anchor_bT: Tensor,
    teacher_other_GT: Tensor,
    teacher_scale: float,
    *,
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Cross entropy of the student's softmax over the candidates under the teacher's, summed over the anchors.

    This is the distillation term of open_clip's DistillClipLoss in one direction, before its mean. Plain PyTorch on any
    device: 8 b G D FLOP with gradients.

    Args:
        anchor_bD: [b, D] floating point, the student's anchors of this rank.
        other_GD: [G, D] floating point, the student's candidates of all ranks.
        scale: 0-d, 1 / temperature > 0 of the student; never read on the host.
        teacher_anchor_bT: [b, T], the teacher's embeddings of the same anchors; no gradient.
        teacher_other_GT: [G, T], the teacher's embeddings of the same candidates; no gradient.
        teacher_scale: 1 / temperature > 0 of the teacher.
        memory_budget_bytes: bound on the live [chunk, G] matrices (at least one anchor per chunk); None: 256 MiB.

    Returns:
        The 0-d loss, differentiable once. The gradient of other_GD is this rank's part: sum it over the ranks.

    Raises:
        ValueError: wrong shapes.
    """
    for name, anchor, other in (
        ("anchor", anchor_bD, other_GD),
        ("teacher_anchor", teacher_anchor_bT, teacher_other_GT),
    ):
        if anchor.ndim != 2 or other.ndim != 2 or anchor.shape[1] != other.shape[1]:
            raise ValueError(
                f"{name} is {tuple(anchor.shape)} and its candidates {tuple(other.shape)}, expected [b, D] and [G, D] "
                "with one D"
            )
    if len(teacher_anchor_bT) != len(anchor_bD) or len(teacher_other_GT) != len(other_GD):
        raise ValueError(
            f"the teacher has {len(teacher_anchor_bT)} anchors and {len(teacher_other_GT)} candidates, expected "
            f"{len(anchor_bD)} and {len(other_GD)} like the student"
        )
    if scale.ndim:
        raise ValueError(f"scale is {tuple(scale.shape)}, expected a 0-d tensor")
    check_budget(memory_budget_bytes)
    itemsize = 8 if torch.float64 in (anchor_bD.dtype, other_GD.dtype) else 4
    budget = memory_budget_bytes or DEFAULT_BUDGET_BYTES
    step = equal_chunk_size(len(anchor_bD), max(1, budget // (_MATRICES * max(1, len(other_GD)) * itemsize)))
    teacher = teacher_anchor_bT.detach(), teacher_other_GT.detach()
    with torch.autocast(anchor_bD.device.type, enabled=False):
        loss: Tensor = _Affinity.apply(
            anchor_bD, other_GD, scale, teacher, teacher_scale, step, torch.is_grad_enabled()
        )
    return loss
