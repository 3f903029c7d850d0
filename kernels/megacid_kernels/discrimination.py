"""The public operators: validation, dispatch, autograd.

Legend: G gathered batch, D width, S rows of w on this rank.
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
    target_cosine: Tensor  # [G] the student's cosine to its class; 0 where unlabelled
    hit: Tensor  # [G] bool: without the margin, P(target) > 1/2 among the rows of all ranks


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
        problem: Problem,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        dtype = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
        need_x, need_w = (grad_enabled and ctx.needs_input_grad[i] for i in (0, 1))
        with torch.autocast(x.device.type, enabled=False):
            x_, w_ = x.detach().to(dtype), w.detach().to(dtype)
            teacher_ = None if teacher is None else teacher.detach().to(dtype)
            out = row_mode(x_, w_, target, rows, teacher_, problem, need_x, need_w)
        ctx.save_for_backward(
            None if out.grad_x is None else out.grad_x.to(x.dtype),
            None if out.grad_w is None else out.grad_w.to(w.dtype),
        )
        ctx.mark_non_differentiable(out.raw, out.target_cosine, out.hit)
        return out.terms.sum(), out.raw, out.target_cosine, out.hit

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return grads[0], grads[1], None, None, None, None, None


def linear_margin_discrimination(
    x: Tensor, w: Tensor, target: Tensor, problem: Problem, *, rows: Tensor | None = None, teacher: Tensor | None = None
) -> Discrimination:
    """Weighted sum of the student's margin cross entropy, the teacher's cross entropy and their KL, classes sharded.

    x [G, D]         embeddings of the gathered batch, identical on every rank of `problem.group`; any length > 0
    w [S, D]         this rank's class rows (all of its shard, or those sampled); any length > 0
    target [G] int64 global class ids; -1 = unlabelled: left out of every term
    rows [S] int64   sorted: w[j] is class `problem.class_start + rows[j]`; None: rows 0 .. S-1
    teacher [G, D]   stored embeddings, needed when beta or gamma > 0; gets no gradient

    bf16 and fp16 inputs are computed in float32; float64 stays float64. Every labelled class must be in the w of some
    rank, otherwise the loss is NaN. Memory: the [chunk, S] matrices within `problem.memory_budget_bytes`, and the
    gradients [G, D] and [S, D]. The gradient of w is exact. The gradient of x is THIS SHARD'S PARTIAL SUM: the sum over
    ranks is the gradient (the backward of `megacid.distributed.collectives.gather_rows` does it). With no labelled
    sample loss and gradients are 0. Raises ValueError for shapes and dtypes that do not fit.
    """
    _check(x, w, target, problem, rows, teacher)
    loss, raw, cosine, hit = _RowMode.apply(x, w, target, rows, teacher, problem, torch.is_grad_enabled())
    return Discrimination(loss, raw, cosine, hit)


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
    return linear_margin_discrimination(x, w, target, problem, rows=rows).loss


def _check(x: Tensor, w: Tensor, target: Tensor, problem: Problem, rows: Tensor | None, teacher: Tensor | None) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or w.shape[0] == 0:
        raise ValueError(
            f"x is {tuple(x.shape)} and w is {tuple(w.shape)}, wanted [G, D] and [S, D] with S > 0 and one D"
        )
    if target.shape != x.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target is {tuple(target.shape)} {target.dtype}, wanted [{x.shape[0]}] torch.int64")
    if rows is not None and (rows.shape != w.shape[:1] or rows.dtype != torch.int64):
        raise ValueError(f"rows is {tuple(rows.shape)} {rows.dtype}, wanted [{w.shape[0]}] torch.int64, sorted")
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
