"""Autograd function of a loss whose gradients are computed in forward.

Legend: B local batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megacid_kernels import Gradients


class ForwardGradients(NamedTuple):
    """Loss and gradients from forward."""

    gradients: Gradients
    x: Tensor | None  # [B, D] float32 (float64), gradient of this rank's embeddings, summed over the ranks
    norm_sq: Tensor | None  # 0-d fp32, squared norm of the row gradient with weight_grad "recomputed"


class PartialFCFunction(torch.autograd.Function):
    """Passes the embedding gradient on to autograd and the row gradient to a callback.

    Args of `apply`: emb_BD; anchor, a scalar that requires grad, which gives a loss without a trainable student a
    backward; compute(); accumulate(forward gradients, gradient of the loss); factor of the embedding gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        emb_BD: Tensor,
        anchor: Tensor,
        compute: Callable[[], ForwardGradients],
        accumulate: Callable[[ForwardGradients, Tensor], None],
        factor: int,
    ) -> tuple[Tensor, ...]:
        forward = compute()
        ctx.forward_gradients, ctx.accumulate, ctx.factor, ctx.dtype = forward, accumulate, factor, emb_BD.dtype
        ctx.mark_non_differentiable(*forward.gradients.result[1:])
        ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
        return tuple(forward.gradients.result)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        forward, ctx.forward_gradients = ctx.forward_gradients, None
        if forward is None:
            raise RuntimeError("second backward through one loss of PartialFC, expected one: compute the loss again")
        ctx.accumulate(forward, grad_loss)
        # Rounded to the dtype of the embeddings after a loss scale, not before.
        grad = None if forward.x is None else (forward.x * grad_loss * ctx.factor).to(ctx.dtype)
        return grad, None, None, None, None
