"""Contrastive losses between student and teacher or between towers, and feature mimicry.

Legend: b local batch, G gathered batch, D width. Every loss is the mean over the global batch and has the same value on
every rank. Each rank computes its own rows [b, G] of a similarity matrix, never [G, G], one chunk at a time.

The gradient at the student's outputs follows `grad_reduction` (see megacid.distributed.collectives): after the engine's
mean or sum over ranks, the student's gradient equals that of a single process with the whole batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.distributed.collectives import (
    GradReduction,
    all_reduce_sum,
    gather_plain,
    gather_rows,
    gradient_factor,
    rank,
    scale_gradient,
    sum_over_ranks,
)
from megacid.errors import UserError
from megacid_kernels import affinity_cross_entropy, contrastive_cross_entropy

Group = dist.ProcessGroup | None


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_shapes(image: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape != image.shape:
            raise UserError(
                f"{name} has shape {tuple(other.shape)}, expected the student's {tuple(image.shape)}: "
                "build the student with the teacher's width"
            )


def _gather_student(
    image: Tensor, text: Tensor, group: Group, grad_reduction: GradReduction
) -> tuple[Tensor, Tensor, list[int]]:
    """Images and texts of all ranks, with gradients, and the batch size of each rank."""
    v_S, sizes = gather_rows(_at_least_fp32(image), group, grad_reduction=grad_reduction)
    t_S, _ = gather_rows(_at_least_fp32(text), group, grad_reduction=grad_reduction)
    return v_S, t_S, sizes


def _mean_of_pairs(
    pairs: list[tuple[Tensor, Tensor]],
    logit_scale: Tensor,
    sizes: list[int],
    group: Group,
    grad_reduction: GradReduction,
) -> Tensor:
    """Half the sum of NCE(a -> b) over the pairs (a_GD, b_GD), each a mean over the gathered batch."""
    own, scale = _own_rows(sizes, group), _replicated(logit_scale, group, grad_reduction)
    parts = [contrastive_cross_entropy(a[own], b, scale, own.start) for a, b in pairs]
    return sum_over_ranks(torch.stack(parts).sum() / (2 * max(1, sum(sizes))), group)


def _own_rows(sizes: list[int], group: Group) -> slice:
    """This rank's rows of the gathered batch."""
    start = sum(sizes[: rank(group)])
    return slice(start, start + sizes[rank(group)])


def _replicated(logit_scale: Tensor, group: Group, grad_reduction: GradReduction) -> Tensor:
    """The scale is a replicated parameter: the engine sums or averages its gradient over the ranks."""
    return scale_gradient(_at_least_fp32(logit_scale), gradient_factor(group, grad_reduction))


def instance_loss(
    image_S: Tensor,
    text_S: Tensor,
    image_T: Tensor,
    text_T: Tensor,
    logit_scale: Tensor,
    group: Group = None,
    grad_reduction: GradReduction = "mean",
) -> Tensor:
    """Instance discrimination distillation (CLIP-CID, arXiv 2408.09441). A collective; batch sizes may differ or be 0.

        1/2 [NCE(vS -> tT) + NCE(tT -> vS)] + 1/2 [NCE(tS -> vT) + NCE(vT -> tS)]

    Args:
        image_S: [b, D] student embeddings, L2-normalised, like text_S.
        image_T: [b, D] stored teacher embeddings, L2-normalised, like text_T; no gradient.
        logit_scale: 0-d, 1 / temperature.
        group: ranks of the global batch; None is the default group.
        grad_reduction: how the engine combines gradients over ranks.

    Returns:
        The loss, 0-d, the same on every rank.
    """
    _check_shapes(image_S, text_S=text_S, image_T=image_T, text_T=text_T)
    v_S, t_S, sizes = _gather_student(image_S, text_S, group, grad_reduction)
    v_T, t_T = (gather_plain(_at_least_fp32(x), group) for x in (image_T, text_T))
    return _mean_of_pairs([(v_S, t_T), (t_T, v_S), (t_S, v_T), (v_T, t_S)], logit_scale, sizes, group, grad_reduction)


def contrastive_loss(
    image_S: Tensor, text_S: Tensor, logit_scale: Tensor, group: Group = None, grad_reduction: GradReduction = "mean"
) -> Tensor:
    """The loss of CLIP, 0-d: 1/2 [NCE(vS -> tS) + NCE(tS -> vS)]. Arguments as in `instance_loss`."""
    _check_shapes(image_S, text_S=text_S)
    v_S, t_S, sizes = _gather_student(image_S, text_S, group, grad_reduction)
    return _mean_of_pairs([(v_S, t_S), (t_S, v_S)], logit_scale, sizes, group, grad_reduction)


def affinity_loss(
    image_S: Tensor,
    text_S: Tensor,
    image_T: Tensor,
    text_T: Tensor,
    logit_scale: Tensor,
    teacher_scale: float,
    group: Group = None,
    grad_reduction: GradReduction = "mean",
) -> Tensor:
    """The distillation term of open_clip's DistillClipLoss, 0-d. A collective; batch sizes may differ or be 0.

        CE(a, b) = -1/G sum_i sum_j softmax_j(teacher_scale aT_i . bT_j) ln softmax_j(logit_scale aS_i . bS_j)
        1/2 [CE(v, t) + CE(t, v)]

    Its gradient is that of the KL divergence. The other arguments are those of `instance_loss`.

    Args:
        teacher_scale: 1 / temperature of the teacher's similarities, constant.
    """
    _check_shapes(image_S, text_S=text_S, image_T=image_T, text_T=text_T)
    v_S, t_S, sizes = _gather_student(image_S, text_S, group, grad_reduction)
    v_T, t_T = (gather_plain(_at_least_fp32(x), group) for x in (image_T, text_T))
    own, scale = _own_rows(sizes, group), _replicated(logit_scale, group, grad_reduction)
    parts = [
        affinity_cross_entropy(a_S[own], b_S, scale, a_T[own], b_T, teacher_scale)
        for a_S, b_S, a_T, b_T in ((v_S, t_S, v_T, t_T), (t_S, v_S, t_T, v_T))
    ]
    return sum_over_ranks(torch.stack(parts).sum() / (2 * max(1, sum(sizes))), group)


def feature_mse(
    feature_S: Tensor, feature_T: Tensor, group: Group = None, grad_reduction: GradReduction = "mean"
) -> Tensor:
    """Feature mimicry, 0-d: mean over the global batch of |fS - fT|^2. feature_T [b, D] gets no gradient."""
    _check_shapes(feature_S, feature_T=feature_T)
    f_S = scale_gradient(_at_least_fp32(feature_S), gradient_factor(group, grad_reduction))
    count = all_reduce_sum(torch.tensor(float(len(f_S)), device=f_S.device), group)
    return sum_over_ranks((f_S - _at_least_fp32(feature_T).detach()).square().sum() / count.clamp_min(1), group)
