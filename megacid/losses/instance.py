"""Contrastive losses between student and teacher or between towers, and feature mimicry.

Legend: b local batch, G gathered batch, D width. Every loss is the mean over the global batch and has the same value on
every rank. Each rank computes its own rows [b, G] of a similarity matrix, never [G, G], one chunk at a time: its part
of the mean (`*_part`). The losses are the sums of the parts over the ranks.

The gradient at the student's outputs follows `grad_reduction` (see megacid.distributed.collectives): after the engine's
mean or sum over ranks, the student's gradient equals that of a single process with the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacid.distributed.collectives import (
    GradReduction,
    Group,
    gradient_factor,
    scale_gradient,
    sum_over_ranks,
)
from megacid.losses.global_batch import STUDENT, TEACHER, GlobalBatch, at_least_fp32, check_rows, check_shapes
from megacid.losses.teachers import Teachers
from megacid_kernels import affinity_cross_entropy, contrastive_cross_entropy, sigmoid_cross_entropy


def _gather(group: Group, grad_reduction: GradReduction, image_S: Tensor, **others: Tensor) -> GlobalBatch:
    """The global batch of a term that is used alone."""
    check_shapes(image_S, **others)
    batch = GlobalBatch(len(image_S), group, grad_reduction)
    batch.start(image_S=image_S, **others)
    return batch


def _replicated(logit_scale: Tensor, batch: GlobalBatch) -> Tensor:
    """The scale is a replicated parameter, as is the bias: the engine sums or averages its gradient over the ranks."""
    return scale_gradient(at_least_fp32(logit_scale), gradient_factor(batch.group, batch.grad_reduction))


def _sum_of_pairs(
    batch: GlobalBatch, pairs: tuple[tuple[str, str], ...], logit_scale: Tensor, logit_bias: Tensor | None
) -> Tensor:
    """This rank's part of the sum over pairs (a, b) of matrices: 1/2 [NCE(a -> b) + NCE(b -> a)], or SCE(a, b)."""
    own, scale = batch.own, _replicated(logit_scale, batch)
    if logit_bias is not None:
        bias = _replicated(logit_bias, batch)
        parts = [sigmoid_cross_entropy(batch.rows(a), batch[b], scale, bias, own.start) for a, b in pairs]
        return torch.stack(parts).sum() / batch.count
    x = {name: batch[name] for pair in pairs for name in pair}
    directions = [(x[one], x[other]) for a, b in pairs for one, other in ((a, b), (b, a))]
    parts = [contrastive_cross_entropy(a[own], b, scale, own.start) for a, b in directions]
    return torch.stack(parts).sum() / (2 * batch.count)


def gathered_student(instance: float, contrastive: float, affinity: float, form: str) -> tuple[str, ...]:
    """Names of the student's matrices that terms of these weights need from all ranks.

    The sigmoid form is symmetric: each rank takes its rows of one matrix of a pair and all rows of the other one.
    """
    if affinity > 0 or (form == "softmax" and (instance > 0 or contrastive > 0)):
        return STUDENT
    return ("text_S",) if contrastive > 0 else ()


def gathered_teacher(instance: float, affinity: float, cluster: bool) -> tuple[str, ...]:
    """Names of the teacher's matrices that terms of these weights need from all ranks.

    cluster: whether the cluster term compares the teacher's images with the classes.
    """
    if instance > 0 or affinity > 0:
        return TEACHER
    return TEACHER[:1] if cluster else ()


def instance_part(batch: GlobalBatch, logit_scale: Tensor, logit_bias: Tensor | None = None) -> Tensor:
    """This rank's part of `instance_loss`."""
    return _sum_of_pairs(batch, (("image_S", "text_T"), ("text_S", "image_T")), logit_scale, logit_bias)


def contrastive_part(batch: GlobalBatch, logit_scale: Tensor, logit_bias: Tensor | None = None) -> Tensor:
    """This rank's part of `contrastive_loss`."""
    return _sum_of_pairs(batch, (STUDENT,), logit_scale, logit_bias)


def affinity_part(batch: GlobalBatch, logit_scale: Tensor, teachers: Teachers) -> Tensor:
    """This rank's part of the mean of `affinity_loss` over the teachers."""
    v_S, t_S = batch["image_S"], batch["text_S"]
    own, scale = batch.own, _replicated(logit_scale, batch)
    parts = [
        affinity_cross_entropy(a_S[own], b_S, scale, a_T[own], b_T, teacher_scale)
        for v_T, t_T, teacher_scale in teachers.separate(batch["image_T"], batch["text_T"])
        for a_S, b_S, a_T, b_T in ((v_S, t_S, v_T, t_T), (t_S, v_S, t_T, v_T))
    ]
    return torch.stack(parts).sum() / (len(parts) * batch.count)


def mse_part(batch: GlobalBatch, feature_S: Tensor, feature_T: Tensor) -> Tensor:
    """This rank's part of `feature_mse`; nothing is gathered."""
    check_shapes(feature_S, feature_T=feature_T)
    f_S = scale_gradient(at_least_fp32(feature_S), gradient_factor(batch.group, batch.grad_reduction))
    return (f_S - at_least_fp32(feature_T).detach()).square().sum() / batch.count


def instance_loss(
    image_S: Tensor,
    text_S: Tensor,
    image_T: Tensor,
    text_T: Tensor,
    logit_scale: Tensor,
    group: Group = None,
    grad_reduction: GradReduction = "mean",
    *,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """Instance discrimination distillation (CLIP-CID, arXiv 2408.09441). A collective; batch sizes may differ or be 0.

        1/2 [NCE(vS -> tT) + NCE(tT -> vS)] + 1/2 [NCE(tS -> vT) + NCE(vT -> tS)]

    In the sigmoid form, that of SigLIP (arXiv 2303.15343), it is SCE(vS, tT) + SCE(tS, vT):

        SCE(a, b) = -1/G sum_i sum_j ln sigmoid(y_ij (logit_scale a_i . b_j + logit_bias)), y_ii = 1, else y_ij = -1

    Args:
        image_S: [b, D] student embeddings, L2-normalised, like text_S.
        image_T: [b, D] stored teacher embeddings, L2-normalised, like text_T; no gradient.
        logit_scale: 0-d, 1 / temperature.
        group: ranks of the global batch; None is the default group.
        grad_reduction: how the engine combines gradients over ranks.
        logit_bias: 0-d, selects the sigmoid form.

    Returns:
        The loss, 0-d, the same on every rank.
    """
    batch = _gather(group, grad_reduction, image_S, text_S=text_S, image_T=image_T, text_T=text_T)
    return sum_over_ranks(instance_part(batch, logit_scale, logit_bias), group)


def contrastive_loss(
    image_S: Tensor,
    text_S: Tensor,
    logit_scale: Tensor,
    group: Group = None,
    grad_reduction: GradReduction = "mean",
    *,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """The loss of CLIP, 0-d: 1/2 [NCE(vS -> tS) + NCE(tS -> vS)], or with a logit_bias that of SigLIP, SCE(vS, tS).

    Arguments as in `instance_loss`.
    """
    batch = _gather(group, grad_reduction, image_S, text_S=text_S)
    return sum_over_ranks(contrastive_part(batch, logit_scale, logit_bias), group)


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

    Its gradient is that of the KL divergence. The other arguments are those of `instance_loss`; the teacher may have
    another width than the student.

    Args:
        teacher_scale: 1 / temperature of the teacher's similarities, constant.
    """
    check_rows(image_S, image_T=image_T, text_T=text_T)
    batch = _gather(group, grad_reduction, image_S, text_S=text_S)
    batch.start(image_T=image_T, text_T=text_T)
    return sum_over_ranks(affinity_part(batch, logit_scale, Teachers((), (teacher_scale,))), group)


def feature_mse(
    feature_S: Tensor, feature_T: Tensor, group: Group = None, grad_reduction: GradReduction = "mean"
) -> Tensor:
    """Feature mimicry, 0-d: mean over the global batch of |fS - fT|^2. feature_T [b, D] gets no gradient."""
    batch = GlobalBatch(len(feature_S), group, grad_reduction)
    return sum_over_ranks(mse_part(batch, feature_S, feature_T), group)
