"""The margin cross entropy as a torch operator: one node for torch.compile and torch.export.

Legend: G gathered batch, D width, S rows of w on this rank, l labels per sample.

An operator takes tensors and plain values, so the margin is passed as its numbers and the group by its name. The loss
is the last operator: forward computes its gradients as further results, in the dtype of the loss, and backward scales
them and rounds them to the dtypes of the inputs. Outside of a graph `linear_margin_discrimination` gives the same
numbers: there PyTorch's handling of an operator with 24 arguments would take as long as several launches.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_group, _resolve_process_group

from megacid_kernels.checks import check_constants, check_label_values
from megacid_kernels.discrimination import discrimination_with_gradients, linear_margin_discrimination
from megacid_kernels.loss_spec import LossSpec, TargetMargin
from megacid_kernels.margin import Margin
from megacid_kernels.rows import scaled

_PROXY = "torch.fx.experimental.proxy_tensor"
_NAME = "megacid_kernels::linear_margin_cross_entropy"
_ARGUMENTS = """Tensor x, Tensor w, Tensor target, Tensor? rows, Tensor? bias, float m1, float m2, float m3,
    bool easy_margin, str margin_grad, float scale, float? filter_threshold, SymInt num_classes, SymInt class_start,
    SymInt? max_rows, str reduction, str group, str impl, str weight_grad, str precision, int? memory_budget_bytes,
    str labels_loss, bool need_x, bool need_w""".replace("\n", " ")
_NAMES = [argument.split()[-1] for argument in _ARGUMENTS.split(",")]


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
    labels_loss: Literal["mlcd", "mean"] = "mlcd",
) -> Tensor:
    """Margin cross entropy of cosine logits, CE(scale * psi_y(cos(x, w)), y), with classes sharded over `group`.

    psi_y applies the margin to the cosine of the target class. Under torch.compile and torch.export this is one node,
    `torch.ops.megacid_kernels.linear_margin_cross_entropy`. A margin of another class than `megacid_kernels.Margin` has
    no such form and is computed outside of graphs. Arguments that are not listed are those of `LossSpec`.

    Args:
        x: [G, D] floating point, embeddings of the gathered batch, identical on every rank of `group`; any norm.
        w: [S, D] floating point, this rank's class rows; any norm, S may be 0.
        target: [G] int64 global class ids, -1 for unlabelled samples; or [G, l], see `linear_margin_discrimination`.
        rows: [S] int64, sorted: w[j] is class class_start + rows[j]; None: rows 0 .. S-1.
        bias: [S] floating point, added to a class's logit where it is a negative.
        num_classes, max_rows: classes of all ranks, and the most rows of w on one; required on several, and equal.

    Returns:
        The 0-d loss, the same on every rank. The gradient of w is exact; that of x is this shard's partial sum.

    Raises:
        ValueError: an argument is out of range or does not fit the others.
    """
    check_constants(scale, bias)
    if num_classes is None and (world := dist.get_world_size(group) if dist.is_initialized() else 1) > 1:
        raise ValueError(f"num_classes is None on {world} ranks: pass the number of classes of all ranks together")
    options: dict[str, Any] = {
        "num_classes": w.shape[0] if num_classes is None else num_classes, "class_start": class_start,
        "max_rows": max_rows, "scale": scale, "margin_grad": margin_grad, "filter_threshold": filter_threshold,
        "reduction": reduction, "impl": impl, "weight_grad": weight_grad, "precision": precision,
        "memory_budget_bytes": memory_budget_bytes, "labels_loss": labels_loss,
    }  # fmt: skip
    if not _is_traced(x) or (margin is not None and type(margin) is not Margin):
        compute = _compute_untraced if torch.compiler.is_compiling() else _compute
        return compute(x, w, target, rows, bias, {**options, "margin": margin, "group": group})
    numbers, train = margin or Margin(), torch.is_grad_enabled()
    loss: Tensor = _operator(
        x, w, target, rows, bias, m1=numbers.m1, m2=numbers.m2, m3=numbers.m3, easy_margin=numbers.easy_margin,
        group=_name_of(group), need_x=train and x.requires_grad, need_w=train and w.requires_grad, **options,
    )[0]  # fmt: skip
    return loss


def _compute(
    x: Tensor, w: Tensor, target: Tensor, rows: Tensor | None, bias: Tensor | None, options: dict[str, Any]
) -> Tensor:
    return linear_margin_discrimination(x, w, target, LossSpec(**options), rows=rows, bias=bias).loss


# Like torch.compiler.disable, but imports torch._dynamo, which takes seconds, at the first call.
_compute_untraced = torch._disable_dynamo(_compute)


def _is_traced(x: Tensor) -> bool:
    """Whether there are no values: under torch.compile, make_fx and FakeTensorMode, and on the meta device."""
    fake, proxy = (sys.modules.get(name) for name in ("torch._subclasses.fake_tensor", _PROXY))
    return (
        torch.compiler.is_compiling()
        or x.is_meta
        or (fake is not None and isinstance(x, fake.FakeTensor))
        or (proxy is not None and proxy.get_proxy_mode() is not None)
    )


def _name_of(group: dist.ProcessGroup | None) -> str:
    """The group's name, or "" without torch.distributed."""
    if not dist.is_initialized():
        return ""
    return str((_get_default_group() if group is None else group).group_name)


def _group_of(name: str) -> dist.ProcessGroup | None:
    resolve: Any = _resolve_process_group
    return resolve(name) if name else None


@torch.library.custom_op(
    _NAME, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor loss, Tensor grad_x, Tensor grad_w)"
)
def _operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = dict(zip(_NAMES, arguments, strict=True))
    x, w, target = (options.pop(name) for name in ("x", "w", "target"))
    tensors = {name: options.pop(name) for name in ("rows", "bias", "need_x", "need_w")}
    margin = Margin(*(options.pop(name) for name in ("m1", "m2", "m3", "easy_margin")))
    spec = LossSpec(margin=margin, group=_group_of(options.pop("group")), **options)
    check_label_values(target, spec)
    grads = discrimination_with_gradients(x, w, target, spec, **tensors)
    loss = grads.result.loss
    grad_x, grad_w = (loss.new_empty(0) if grad is None else grad for grad in (grads.x, grads.w))
    return loss, grad_x, grad_w


@_operator.register_fake
def _(x: Tensor, w: Tensor, target: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_w = values[-2:]
    dtype = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
    grad_x, grad_w = (
        like.new_empty(like.shape if needed else 0, dtype=dtype) for like, needed in ((x, need_x), (w, need_w))
    )
    return x.new_empty((), dtype=dtype), grad_x, grad_w


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.dtypes = [x.dtype if needed else None for x, needed in zip(inputs[:2], inputs[-2:])]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else backward allocates zeros as their gradients
    ctx.save_for_backward(*output[1:])


def _scale(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * len(_NAMES)
    pairs = zip(ctx.saved_tensors, ctx.dtypes)
    grads = [None if dtype is None else scaled(grad, grad_loss, dtype) for grad, dtype in pairs]
    return *grads, *(None for _ in range(len(_NAMES) - 2))


_operator.register_autograd(_scale, setup_context=_keep)
