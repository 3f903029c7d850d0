"""Gradient clipping by one norm over replicated parameters and sharded class rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megacid.classifier.partial_fc import PartialFC
from megacid.distributed.collectives import all_reduce_sum
from megacid.errors import UserError


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], heads: PartialFC | Iterable[PartialFC], max_norm: float
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for a model with sharded classifiers. A collective over each head's group.

    The norm counts replicated gradients once and every rank's class rows. All gradients are multiplied in place by
    min(1, max_norm / (norm + 1e-6)), on every rank by the same number. Call it between backward and the optimizers'
    steps, with a GradScaler after `unscale_` of each optimizer.

    Args:
        parameters: replicated parameters, or those of `fully_shard`, after the engine has reduced their gradients;
            not those of FullyShardedDataParallel, whose gradients do not say that they are parts. Parameters without a
            gradient, such as a head's weight, are ignored.
        heads: the classifiers.
        max_norm: largest norm; inf only measures it.

    Returns:
        The 2-norm before clipping, 0-d fp32, the same on every rank.

    Raises:
        UserError: max_norm is negative or no number.
    """
    if not max_norm >= 0:
        raise UserError(f"max_norm is {max_norm}, expected a number >= 0: inf only measures the norm")
    heads = [heads] if isinstance(heads, PartialFC) else list(heads)
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    squares = [_whole(torch.linalg.vector_norm(grad)).double().square() for grad in grads]
    squares += [all_reduce_sum(head.grad_norm_sq(), head.group).double() for head in heads]
    if not squares:
        return torch.zeros(())
    total = torch.stack([square.to(squares[-1].device) for square in squares]).sum().sqrt().float()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device))
    for head in heads:
        head.scale_row_grad_(factor)
    return total


def _whole(norm: Tensor) -> Tensor:
    """The norm over all shards of a gradient of FSDP."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
