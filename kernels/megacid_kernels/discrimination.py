"""The public operators: validation, dispatch, autograd.

Legend: G gathered batch, D width, S rows of w on this rank, l labels per sample.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacid_kernels.problem import Problem, TargetMargin
from megacid_kernels.row_chunks import row_mode


class Discrimination(NamedTuple):
    """Result of `linear_margin_discrimination`. Only `loss` carries a gradient."""

    loss: Tensor  # 0-d, the same on every rank
    raw: Tensor  # [3] CE(student), CE(teacher), KL, without their weights; 0 where not computed
    target_cosine: Tensor  # like target: the student's cosine to the label; 0 where there is none
    largest_negative: Tensor  # [G] largest cosine (logit / scale, bias included) among THIS RANK's negatives
    removed: Tensor  # [G] int64, negatives of this rank that `filter_threshold` took out


class Gradients(NamedTuple):
    """Result of `discrimination_with_gradients`: the gradients of `result.loss`."""

    result: Discrimination  # detached
    x: Tensor | None  # [G, D] this shard's partial sum
    w: Tensor | None  # [S, D]


class _RowMode(torch.autograd.Function):
    """The loss is the last operator, so its gradients are made in forward and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        target: Tensor,
        rows: Tensor | None,
        teacher: Tensor | None,
        bias: Tensor | None,
        problem: Problem,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        need_x, need_w = (grad_enabled and ctx.needs_input_grad[i] for i in (0, 1))
        found = discrimination_with_gradients(
            x, w, target, problem, rows=rows, teacher=teacher, bias=bias, need_x=need_x, need_w=need_w
        )
        ctx.save_for_backward(found.x, found.w)
        ctx.mark_non_differentiable(*found.result[1:])
        return tuple(found.result)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return grads[0], grads[1], None, None, None, None, None, None


def linear_margin_discrimination(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    problem: Problem,
    *,
    rows: Tensor | None = None,
    teacher: Tensor | None = None,
    bias: Tensor | None = None,
) -> Discrimination:
    """Weighted sum of the student's margin cross entropy, the teacher's cross entropy and their KL, classes sharded.

    x [G, D]         embeddings of the gathered batch, identical on every rank of `problem.group`; any length
    w [S, D]         this rank's class rows (all of its shard, or those sampled); any length, also 0
    target [G]       int64 global class ids; -1 = unlabelled: left out of every term. Or [G, l], l labels per sample,
                     -1 = none: then alpha and beta weigh MLCD's ln(1 + sum_labels exp(-z)) + ln(1 + sum_negatives
                     exp(z)) (An et al., ECCV 2024) instead of the cross entropy, and gamma must be 0
    rows [S] int64   sorted: w[j] is class `problem.class_start + rows[j]`; None: rows 0 .. S-1
    teacher [G, D]   stored embeddings, needed when beta or gamma > 0; gets no gradient
    bias [S]         added to a class's logit where it is a negative: -ln(its probability of being sampled) makes the sum
                     over the sample an unbiased estimate of the sum over all classes (log-Q correction). The fixed shift
                     assumes sum_j exp(bias_j) <= num_classes

    bf16 and fp16 inputs are computed in float32; float64 stays float64. Every labelled class must be in the w of some
    rank, otherwise the loss is NaN. Memory: the [chunk, S] matrices within `problem.memory_budget_bytes`, and the
    gradients [G, D] and [S, D]. The gradient of w is exact. The gradient of x is THIS SHARD'S PARTIAL SUM: the sum over
    ranks is the gradient (the backward of `megacid.distributed.collectives.gather_rows` does it). With no labelled
    sample loss and gradients are 0. Raises ValueError for shapes and dtypes that do not fit.
    """
    return Discrimination(*_RowMode.apply(x, w, target, rows, teacher, bias, problem, torch.is_grad_enabled()))


def discrimination_with_gradients(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    problem: Problem,
    *,
    rows: Tensor | None = None,
    teacher: Tensor | None = None,
    bias: Tensor | None = None,
    need_x: bool = True,
    need_w: bool = True,
    overwrite_w: bool = False,
) -> Gradients:
    """`linear_margin_discrimination` without autograd: the result and the gradients of its loss at once.

    For callers with an autograd of their own: no second copy of the gradient [S, D] is made for scaling it. overwrite_w:
    w is scratch; its rows are normalised in place, which saves two passes over [chunk, S].
    """
    _check(x, w, target, problem, rows, teacher, bias)
    dtype = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        out = row_mode(
            x.to(dtype), w.to(dtype), target[:, None] if target.ndim == 1 else target, rows,
            None if teacher is None else teacher.to(dtype), None if bias is None else bias.to(dtype),
            problem, need_x, need_w, overwrite_w=overwrite_w or w.dtype != dtype,
        )  # fmt: skip
        cosine = out.target_cosine[:, 0] if target.ndim == 1 else out.target_cosine
        return Gradients(
            Discrimination(out.terms.sum(), out.raw, cosine, out.largest_negative, out.removed),
            None if out.grad_x is None else out.grad_x.to(x.dtype),
            None if out.grad_w is None else out.grad_w.to(w.dtype),
        )


def linear_margin_cross_entropy(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    *,
    margin: TargetMargin | None = None,
    scale: float = 64.0,
    rows: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    impl: str = "auto",
    mode: str = "auto",
    memory_budget_bytes: int | None = None,
    class_start: int = 0,
    num_classes: int | None = None,
    max_rows: int | None = None,
    margin_grad: Literal["exact", "straight_through"] = "exact",
    filter_threshold: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Mean (or sum) over the labelled samples of CE(scale * psi_y(cos(x, w)), y), classes sharded over `group`.

    Tensors and gradients as in `linear_margin_discrimination`; x's gradient is this shard's partial sum. On several
    ranks `num_classes` (all ranks together) and `max_rows` (most rows of w on any rank) must be given and equal on
    every rank: the fixed shift and the chunks follow from them. impl: "auto" or "torch"; mode: "auto" or "row".
    """
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if num_classes is None and world > 1:
        raise ValueError(f"num_classes is None on {world} ranks: pass the number of classes of all ranks together")
    problem = Problem(
        num_classes=w.shape[0] if num_classes is None else num_classes, scale=scale, margin=margin, margin_grad=margin_grad, filter_threshold=filter_threshold,
        class_start=class_start, max_rows=max_rows, reduction=reduction, group=group, impl=impl, mode=mode,
        memory_budget_bytes=memory_budget_bytes,
    )  # fmt: skip
    return linear_margin_discrimination(x, w, target, problem, rows=rows, bias=bias).loss


def _check(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    problem: Problem,
    rows: Tensor | None,
    teacher: Tensor | None,
    bias: Tensor | None,
) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)} and w is {tuple(w.shape)}, wanted [G, D] and [S, D] with one D")
    if target.ndim not in (1, 2) or target.shape[:1] != x.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target is {tuple(target.shape)} {target.dtype}, wanted torch.int64 [{x.shape[0]}] or [{x.shape[0]}, l]"
        )
    if target.ndim == 2 and (target.shape[1] == 0 or (target.shape[1] > 1 and problem.weights.gamma > 0)):
        raise ValueError(
            f"target is {tuple(target.shape)} with gamma {problem.weights.gamma}, wanted at least one label per sample, "
            "and one alone for the KL: set gamma to 0, or pass the nearest label only"
        )
    if rows is not None and (rows.shape != w.shape[:1] or rows.dtype != torch.int64):
        raise ValueError(f"rows is {tuple(rows.shape)} {rows.dtype}, wanted [{w.shape[0]}] torch.int64, sorted")
    if bias is not None and (bias.shape != w.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias is {tuple(bias.shape)} {bias.dtype}, wanted floating point [{w.shape[0]}]")
    if problem.weights.needs_teacher:
        if teacher is None:
            raise ValueError("teacher is None, but beta or gamma is > 0: pass the stored embeddings [G, D]")
        if teacher.shape != x.shape:
            raise ValueError(f"teacher is {tuple(teacher.shape)}, wanted {tuple(x.shape)} like x")
    if problem.world > 1 and problem.max_rows is None:
        raise ValueError(f"max_rows is None on {problem.world} ranks: pass the most rows of w that any rank holds")
    if problem.num_classes < w.shape[0]:
        raise ValueError(
            f"num_classes is {problem.num_classes}, but w has {w.shape[0]} rows: pass the classes of all ranks"
        )
