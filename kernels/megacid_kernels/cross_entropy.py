"""The margin cross entropy as an operator of torch: one node for torch.compile and torch.export.

Legend: G gathered batch, D width, S rows of w on this rank, l labels per sample.

An operator's arguments are tensors and plain values: the margin travels as its numbers, the group by its name. The loss is
the last operator, so its gradients are made in forward, where they are results of the operator, and scaled in backward.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_group, _resolve_process_group

from megacid_kernels.checks import check_label_values
from megacid_kernels.discrimination import discrimination_with_gradients, linear_margin_discrimination
from megacid_kernels.loss_spec import LossSpec, TargetMargin
from megacid_kernels.margin import Margin

_NAME = "megacid_kernels::linear_margin_cross_entropy"
_SCHEMA = """(
    Tensor x, Tensor w, Tensor target, Tensor? rows, Tensor? bias, float m1, float m2, float m3, bool easy_margin,
    str margin_grad, float scale, float? filter_threshold, SymInt num_classes, SymInt class_start, SymInt? max_rows,
    str reduction, str group, str impl, str weight_grad, str precision, int? memory_budget_bytes, bool need_x, bool need_w
) -> (Tensor loss, Tensor grad_x, Tensor grad_w)""".replace("\n", " ")
_NUM_ARGUMENTS = 23


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
    weight_grad: str = "auto",
    memory_budget_bytes: int | None = None,
    class_start: int = 0,
    num_classes: int | None = None,
    max_rows: int | None = None,
    margin_grad: Literal["exact", "straight_through"] = "exact",
    filter_threshold: float | None = None,
    bias: Tensor | None = None,
    precision: str = "auto",
) -> Tensor:
    """Mean (or sum) over the labelled samples of CE(scale * psi_y(cos(x, w)), y), classes sharded over `group`.

    Tensors and gradients as in `linear_margin_discrimination`; x's gradient is this shard's partial sum. On several
    ranks `num_classes` (all ranks together) and `max_rows` (most rows of w on any rank) must be given and equal on
    every rank: the fixed shift and the chunks follow from them. impl, weight_grad, precision, memory_budget_bytes: see
    `LossSpec`. Under torch.compile and torch.export one node, `torch.ops.megacid_kernels.linear_margin_cross_entropy`;
    a margin that is no `megacid_kernels.Margin` has no such form and is computed outside of graphs.
    """
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if num_classes is None and world > 1:
        raise ValueError(f"num_classes is None on {world} ranks: pass the number of classes of all ranks together")
    count = w.shape[0] if num_classes is None else num_classes
    if margin is not None and not isinstance(margin, Margin):
        spec = LossSpec(
            num_classes=count, scale=scale, margin=margin, margin_grad=margin_grad, filter_threshold=filter_threshold,
            class_start=class_start, max_rows=max_rows, reduction=reduction, group=group, impl=impl,
            weight_grad=weight_grad,
            precision=precision, memory_budget_bytes=memory_budget_bytes,
        )  # fmt: skip
        return linear_margin_discrimination(x, w, target, spec, rows=rows, bias=bias).loss
    numbers = margin or Margin()
    train = torch.is_grad_enabled()
    loss: Tensor = _operator(
        x, w, target, rows, bias, numbers.m1, numbers.m2, numbers.m3, numbers.easy_margin, margin_grad, scale,
        filter_threshold, count, class_start, max_rows, reduction, _name_of(group), impl, weight_grad, precision,
        memory_budget_bytes, train and x.requires_grad, train and w.requires_grad,
    )[0]  # fmt: skip
    return loss


def _name_of(group: dist.ProcessGroup | None) -> str:
    """ "" for a process without torch.distributed."""
    if not dist.is_initialized():
        return ""
    return str((_get_default_group() if group is None else group).group_name)


def _group_of(name: str) -> dist.ProcessGroup | None:
    found: Any = _resolve_process_group
    return found(name) if name else None


@torch.library.custom_op(_NAME, mutates_args=(), schema=_SCHEMA)
def _operator(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    m1: float,
    m2: float,
    m3: float,
    easy_margin: bool,
    margin_grad: Literal["exact", "straight_through"],
    scale: float,
    filter_threshold: float | None,
    num_classes: int,
    class_start: int,
    max_rows: int | None,
    reduction: Literal["mean", "sum"],
    group: str,
    impl: str,
    weight_grad: str,
    precision: str,
    memory_budget_bytes: int | None,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = LossSpec(
        num_classes=num_classes, scale=scale, margin=Margin(m1, m2, m3, easy_margin), margin_grad=margin_grad,
        filter_threshold=filter_threshold, class_start=class_start, max_rows=max_rows, reduction=reduction,
        group=_group_of(group), impl=impl, weight_grad=weight_grad, precision=precision,
        memory_budget_bytes=memory_budget_bytes,
    )  # fmt: skip
    check_label_values(target, spec)
    found = discrimination_with_gradients(
        x, w, target, spec, rows=rows, bias=bias, need_x=need_x, need_w=need_w
    )  # fmt: skip
    grads = [x.new_empty(0) if grad is None else grad for grad in (found.x, found.w)]
    return found.result.loss, grads[0], grads[1]


@_operator.register_fake
def _(x: Tensor, w: Tensor, target: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_w = values[-2:]
    dtype = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
    grads = [like.new_empty(like.shape if needed else 0) for like, needed in ((x, need_x), (w, need_w))]
    return x.new_empty((), dtype=dtype), grads[0], grads[1]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.needed = inputs[-2:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _scale(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = [grad * grad_loss.to(grad.dtype) if needed else None for grad, needed in zip(ctx.saved_tensors, ctx.needed)]
    return *grads, *(None for _ in range(_NUM_ARGUMENTS - 2))


_operator.register_autograd(_scale, setup_context=_keep)
