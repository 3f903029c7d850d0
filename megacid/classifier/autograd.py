"""A loss whose gradients are made in forward, for autograd.

Legend: B local batch, D width, S rows used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megacid_kernels import Gradients


class ForwardGradients(NamedTuple):
    """What forward has found out already."""

    gradients: Gradients
    x: Tensor | None  # [B, D] gradient of this rank's embeddings, summed over the ranks
    norm_sq: Tensor  # 0-d fp32, of the slabs with weight_grad "recomputed", else 0


class PartialFCFunction(torch.autograd.Function):
    """Joins a loss whose gradients are made in forward to autograd: the embeddings' go on, the rows' are collected.

    `anchor` is a scalar that requires grad, so that a loss without a trainable student still has a backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        emb_BD: Tensor,
        anchor: Tensor,
        compute: Callable[[bool], ForwardGradients],
        collect: Callable[[ForwardGradients, Tensor], None],
        factor: int,
    ) -> tuple[Tensor, ...]:
        """factor: `gradient_factor`."""
        found = compute(ctx.needs_input_grad[0])
        ctx.found, ctx.collect, ctx.factor = found, collect, factor
        ctx.mark_non_differentiable(*found.gradients.result[1:])
        return tuple(found.gradients.result)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError("second backward through one loss of PartialFC, expected one: compute the loss again")
        found, ctx.found = ctx.found, None
        ctx.collect(found, grad_loss)
        return None if found.x is None else found.x * grad_loss * ctx.factor, None, None, None, None
