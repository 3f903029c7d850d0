"""The weighted loss of all terms and its gradients: validation, selection of engine and plan, autograd.

Legend: G gathered batch, D width, L rows in memory, S rows of w that are used on this rank, l labels per sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megacid_kernels.checks import check_constants, check_inputs, check_label_values
from megacid_kernels.engines.dispatch import check_precision, engine_for, resolve
from megacid_kernels.engines.interface import DeferredNorm, EngineInputs
from megacid_kernels.loss_spec import LossSpec
from megacid_kernels.plan import Sizes, make_plan, with_available_memory
from megacid_kernels.precision import fp32_products
from megacid_kernels.rows import scaled
from megacid_kernels.schedule import Batch, Discrimination, Gradients, LossComputation, OnGradientSlab, OnGradX


class _InForward(torch.autograd.Function):
    """The loss is the last operator, so forward computes its gradients. Backward multiplies them by its input, and that
    of w goes through the norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, target: Tensor, spec: LossSpec, options: dict[str, Any], grad_enabled: bool
    ) -> tuple[Tensor, ...]:
        need_x, need_w = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        options = options | {"need_x": need_x, "need_w": need_w, "defer_norm": True}
        grads = discrimination_with_gradients(x, w, target, spec, **options)
        # w itself: autograd then refuses a backward after w has changed.
        ctx.save_for_backward(grads.x, grads.w, *(() if grads.norm is None else (w, grads.norm.inverse)))
        ctx.dtypes = x.dtype, w.dtype
        ctx.mark_non_differentiable(*grads.result[1:])
        ctx.set_materialize_grads(False)  # else backward allocates zeros as the gradients of the statistics
        return tuple(grads.result)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        (grad_x, grad_w, *norm), (x_dtype, w_dtype) = ctx.saved_tensors, ctx.dtypes
        x = None if grad_x is None else scaled(grad_x, grad_loss, x_dtype)
        w = None
        if norm:
            rows, inverse = norm[0].contiguous(), norm[1]
            w = torch.empty_like(rows)  # not in place: there may be another backward
            through_norm_(grad_w, DeferredNorm(rows, None, inverse, rows._version), grad_loss, w)
        elif grad_w is not None:
            w = scaled(grad_w, grad_loss, w_dtype)
        return x, w, None, None, None, None


def linear_margin_discrimination(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    spec: LossSpec,
    *,
    rows: Tensor | None = None,
    teacher: Tensor | None = None,
    bias: Tensor | None = None,
) -> Discrimination:
    """Weighted sum of margin cross entropy, teacher cross entropy and KL, with classes sharded over ranks.

    See `Weights` for the formula. bf16 and fp16 inputs are computed in float32, float64 inputs in float64. Memory: the
    [chunk, S] matrices within `spec.memory_budget_bytes`, and both gradients. Gradients keep the computation's dtype
    until backward has multiplied them by the gradient of the loss, so that a loss scale is exact for 16-bit inputs.

    The gradient of w is exact. The gradient of x is THIS SHARD'S PARTIAL SUM: sum it over the ranks, as the backward of
    `megacid.distributed.collectives.gather_rows` does. Without a labelled sample, loss and gradients are 0. A labelled
    class that is in the w of no rank makes the loss NaN.

    Args:
        x: [G, D] floating point, embeddings of the gathered batch, identical on every rank of `spec.group`; any norm.
        w: [S, D] floating point, this rank's class rows (its whole shard, or a sample of it); any norm, S may be 0.
        target: [G] int64 global class ids; -1 marks an unlabelled sample, which is left out of every term. Or [G, l]
            labels per sample, -1 for none: then alpha and beta weigh `spec.labels_loss` instead of the cross entropy;
            gamma must be 0.
        spec: the loss.
        rows: [S] int64, sorted: w[j] is class `spec.class_start + rows[j]`; None: rows 0 .. S-1.
        teacher: [G, D] floating point, stored embeddings, required if beta or gamma > 0; receives no gradient.
        bias: [S] floating point, added to the logit of a class where it is a negative. -ln(its sampling probability)
            makes the sum over sampled classes an unbiased estimate of that over all (log-Q correction). -inf takes a
            row out: it is no negative. The fixed shift assumes sum_j exp(bias_j) <= num_classes.

    Raises:
        ValueError: wrong shapes, dtypes or devices; a label out of range (checked on the host only); a memory budget
            that is too small.
    """
    check_constants(spec.scale, bias)
    check_label_values(target, spec)
    options = {"rows": rows, "teacher": teacher, "bias": bias}
    return Discrimination(*_InForward.apply(x, w, target, spec, options, torch.is_grad_enabled()))


def through_norm_(grad_SD: Tensor, norm: DeferredNorm, factor: Tensor, out_SD: Tensor | None = None) -> Tensor:
    """Finish a gradient whose norm was deferred, see `discrimination_with_gradients`.

    Args:
        grad_SD: `Gradients.w`. Overwritten without `out_SD`.
        norm: `Gradients.norm`. Its class rows must be those of the forward.
        factor: 0-d, the gradient of the loss. Multiplies the result.
        out_SD: for the result, rounded once to its dtype.

    Returns:
        The squared length of every row of the result, fp32 [S].

    Raises:
        RuntimeError: the class rows have changed since the forward.
    """
    if norm.w._version != norm.version:
        raise RuntimeError(
            f"the class rows are at version {norm.w._version}, expected version {norm.version} of the forward: call "
            "backward before the rows change, as by an optimizer's step"
        )
    from megacid_kernels.fused import rows_through_norm_  # the one engine that defers it needs triton

    return rows_through_norm_(grad_SD, *norm[:3], factor=factor.float(), out_SD=out_SD)


def discrimination_with_gradients(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    spec: LossSpec,
    *,
    rows: Tensor | None = None,
    teacher: Tensor | None = None,
    bias: Tensor | None = None,
    need_x: bool = True,
    need_w: bool = True,
    overwrite_w: bool = False,
    gather: bool = False,
    on_grad_x: OnGradX | None = None,
    on_grad_slab: OnGradientSlab | None = None,
    defer_norm: bool = False,
) -> Gradients:
    """`linear_margin_discrimination` without autograd: the loss and its gradients at once.

    For callers with their own autograd function: no second copy of the gradient [S, D] is made to scale it. If neither
    gradient is needed, no matrix is kept: 2 G S D FLOP. The tensors are those of `linear_margin_discrimination`.

    Args:
        overwrite_w: w is scratch memory. With a stored gradient PyTorch normalises its rows in place, which saves two
            passes over [chunk, S].
        gather: w is [L, D], all class rows of this rank, and `rows` selects those that are used. They are read in
            place, without an [S, D] copy. bias and the gradient stay [S] and [S, D].
        on_grad_x: called with the finished gradient of x before the last matrix products, which the caller's reduction
            over the ranks can overlap.
        on_grad_slab: called with (start, stop, gradient of rows [start, stop) of the S): per slab with a recomputed
            gradient, else once. The whole gradient then never exists and `Gradients.w` is None.
        defer_norm: leave the norm's backward to `through_norm_`, which multiplies by the gradient of the loss as well;
            `Gradients.norm` says whether it is left: with Triton and a stored gradient that no `on_grad_slab` takes.

    Raises:
        ValueError: as in `linear_margin_discrimination`; or `spec.precision` is not available in PyTorch.
    """
    check_inputs(x, w, target, spec, rows, teacher, bias, gather)
    wide = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
    chosen = resolve(spec.impl, x.device, wide)
    check_precision(spec.precision, chosen, x.device)
    gradients, device = need_x or need_w, x.device.type
    target_Gl = target[:, None] if target.ndim == 1 else target
    sizes = Sizes(
        len(x), len(rows) if gather and rows is not None else len(w), x.shape[1], target_Gl.shape[1], wide.itemsize,
        gather=gather and rows is not None,
    )  # fmt: skip
    spec = with_available_memory(spec, x.device, spec.max_rows or sizes.rows, sizes.width)
    plan = make_plan(spec, sizes, chosen, device, gradients)
    with torch.no_grad(), torch.autocast(device, enabled=False), fp32_products("ieee"):
        used, overwrite_w = rows if gather else None, overwrite_w and not gather
        inputs = EngineInputs(w, used, bias, spec, plan.kind == "stored", overwrite_w)
        engine = engine_for(chosen, inputs, wide)
        batch = Batch(engine, spec, x.to(wide), target_Gl, rows, None if teacher is None else teacher.to(wide))
        computation = LossComputation(engine, spec, plan, batch)
        grads = computation.compute(need_x, need_w, on_grad_x, on_grad_slab if need_w else None, defer_norm)
        if target.ndim == 1:
            grads = grads._replace(result=grads.result._replace(target_cosine=grads.result.target_cosine[:, 0]))
        again = plan.kind == spec.weight_grad == "recomputed"  # not for slabs that "auto" chose: they would keep memory
        return grads._replace(each_slab=computation.each_slab if again else None)
