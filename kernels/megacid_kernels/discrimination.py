"""The loss of all terms and its gradients: validation, dispatch, autograd.

Legend: G gathered batch, D width, L rows in memory, S rows of w that are used on this rank, l labels per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megacid_kernels.checks import check_inputs, check_label_values
from megacid_kernels.engines.dispatch import Implementation, engine_for, resolve
from megacid_kernels.engines.interface import EngineInputs
from megacid_kernels.loss_spec import LossSpec
from megacid_kernels.plan import plan_chunks, plan_slabs
from megacid_kernels.schedule import LossComputation, OnGradientSlab

_LEAST_SAMPLES = 8  # in a chunk; tensor cores multiply 16, and equal chunks may be half of what the budget holds


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
    w: Tensor | None  # [S, D]; None as well where slabs were consumed
    # weight_grad "recomputed": call on_grad_slab(start, stop, slab) for all slabs of the gradient of w once more, with the same bits. The
    # rows of a slab are read when its turn comes: those of the slabs before may have changed by then.
    each_slab: Callable[[OnGradientSlab], None] | None = None


class _InForward(torch.autograd.Function):
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
        spec: LossSpec,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        need_x, need_w = (grad_enabled and ctx.needs_input_grad[i] for i in (0, 1))
        found = discrimination_with_gradients(
            x, w, target, spec, rows=rows, teacher=teacher, bias=bias, need_x=need_x, need_w=need_w
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
    spec: LossSpec,
    *,
    rows: Tensor | None = None,
    teacher: Tensor | None = None,
    bias: Tensor | None = None,
) -> Discrimination:
    """Weighted sum of the student's margin cross entropy, the teacher's cross entropy and their KL, classes sharded.

    x [G, D]         embeddings of the gathered batch, identical on every rank of `spec.group`; any length
    w [S, D]         this rank's class rows (all of its shard, or those sampled); any length, also 0
    target [G]       int64 global class ids; -1 = unlabelled: left out of every term. Or [G, l], l labels per sample,
                     -1 = none: then alpha and beta weigh MLCD's ln(1 + sum_labels exp(-z)) + ln(1 + sum_negatives
                     exp(z)) (An et al., ECCV 2024) instead of the cross entropy, and gamma must be 0
    rows [S] int64   sorted: w[j] is class `spec.class_start + rows[j]`; None: rows 0 .. S-1
    teacher [G, D]   stored embeddings, needed when beta or gamma > 0; gets no gradient
    bias [S]         added to a class's logit where it is a negative: -ln(its probability of being sampled) makes the sum
                     over the sample an unbiased estimate of the sum over all classes (log-Q correction). The fixed shift
                     assumes sum_j exp(bias_j) <= num_classes

    bf16 and fp16 inputs are computed in float32; float64 stays float64. Every labelled class must be in the w of some
    rank, otherwise the loss is NaN. Memory: the [chunk, S] matrices within `spec.memory_budget_bytes`, and the
    gradients [G, D] and [S, D]. The gradient of w is exact. The gradient of x is THIS SHARD'S PARTIAL SUM: the sum over
    ranks is the gradient (the backward of `megacid.distributed.collectives.gather_rows` does it). With no labelled
    sample loss and gradients are 0. Raises ValueError for shapes, dtypes and devices that do not fit, and for labels out of
    range where they lie on the host.
    """
    check_label_values(target, spec)
    return Discrimination(*_InForward.apply(x, w, target, rows, teacher, bias, spec, torch.is_grad_enabled()))


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
    on_grad_x: Callable[[Tensor], None] | None = None,
    on_grad_slab: OnGradientSlab | None = None,
) -> Gradients:
    """`linear_margin_discrimination` without autograd: the result and the gradients of its loss at once.

    For callers with an autograd of their own: no second copy of the gradient [S, D] is made for scaling it.

    overwrite_w  w is scratch; with a stored gradient PyTorch normalises its rows in place, which saves two passes over [chunk, S]
    gather       w is [L, D], all class rows of this rank, of which `rows` are used: they are read where they lie, and no
                 [S, D] copy has to exist beside them. bias and the gradient stay [S] and [S, D]
    on_grad_x    called with the finished gradient of x before the last matrix products, so that a reduction of it over the
                 ranks runs under them
    on_grad_slab      called with (start, stop, gradient of rows [start, stop) of the S), slab by slab where the gradient is recomputed, else once;
                 then the gradient as a whole is nowhere, and `Gradients.w` is None

    Without need_x and need_w no matrix is kept, whatever weight_grad says: 2 G S D FLOP, memory within the budget.
    """
    check_inputs(x, w, target, spec, rows, teacher, bias, gather)
    wide = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
    chosen = resolve(spec.impl, x.device, wide)
    if chosen == "torch" and spec.precision not in ("auto", "fp32"):
        raise ValueError(
            f"precision is {spec.precision!r} in PyTorch, which computes in {wide}: expected 'auto' or 'fp32'"
        )
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        run = _prepare(
            x, w, target, spec, rows, teacher, bias, gather, overwrite_w, need_x or need_w, chosen, wide
        )  # fmt: skip
        out = run.compute(need_x, need_w, on_grad_x, on_grad_slab if need_w else None)
        cosine = out.target_cosine[:, 0] if target.ndim == 1 else out.target_cosine
        return Gradients(
            Discrimination(out.terms.sum(), out.raw, cosine, out.largest_negative, out.removed),
            None if out.grad_x is None else out.grad_x.to(x.dtype),
            None if out.grad_w is None else out.grad_w.to(w.dtype),
            run.each_slab if run.plan.kind == "recomputed" else None,
        )


def _prepare(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    spec: LossSpec,
    rows: Tensor | None,
    teacher: Tensor | None,
    bias: Tensor | None,
    gather: bool,
    overwrite_w: bool,
    gradients: bool,
    chosen: Implementation,
    wide: torch.dtype,
) -> LossComputation:
    by_rows = gradients and spec.weight_grad != "recomputed"
    target_Gl = target[:, None] if target.ndim == 1 else target
    call = EngineInputs(w, rows if gather else None, bias, spec, by_rows, overwrite_w and not gather)
    engine = engine_for(chosen, call, wide)
    count, device = engine.num_rows, x.device.type
    if by_rows:
        triton = chosen == "triton"
        labels = 0 if triton else target_Gl.shape[1]  # whose rows PyTorch copies
        plan = plan_chunks(
            spec,
            len(x),
            count,
            x.shape[1],
            labels,
            engine.matrix_bytes(),
            device,
            least=_LEAST_SAMPLES if triton else 0,
        )
    else:
        plan = plan_slabs(spec, count, engine.slab_bytes(len(x), gradients), gradients, device)
    teacher = None if teacher is None else teacher.to(wide)
    return LossComputation(engine, spec, plan, x.to(wide), target_Gl, rows, teacher)
