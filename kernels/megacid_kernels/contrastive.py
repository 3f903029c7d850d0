"""Contrastive cross entropy over pairs, without a matrix of similarities larger than one chunk.

Legend: b anchors of this rank, G candidates, c anchors of one chunk, D width.

    z_ij = scale a_i . o_j     loss = sum_i softplus(d_i), d_i = ln n_i + m_i - z_iy, n_i = sum_{j != y} exp(z_ij - m_i)

y is the anchor's own pair, m_i a shift. The loss is the last operator, so forward computes its gradients chunk by chunk
from the un-normalised exponentials E = exp(z - m), E_iy = 0, as in `schedule`:

    da_i = scale (E_i O / Z_i - (1 - P_iy) o_y)        dO = E^T diag(scale / Z) A - scatter
    dscale = sum_i a_i . da_i / scale

The last equation holds because z is linear in both; so the gradient of the temperature needs no matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacid_kernels.engines.candidates import Candidates, TorchCandidates
from megacid_kernels.engines.dispatch import resolve
from megacid_kernels.epilogue import divide_by_z, one_label
from megacid_kernels.loss_spec import check_budget, equal_chunk_size
from megacid_kernels.rows import scaled

DEFAULT_BUDGET_BYTES = 1 << 28


class PairLoss(torch.autograd.Function):
    """Base of losses of anchors and candidates whose forward computes the gradients; backward scales and rounds them.

    Arguments of forward: anchors, candidates, scale and any further tensors with a gradient, whose dtypes it keeps as
    `ctx.dtypes`; then those without.
    """

    @staticmethod
    def keep(
        ctx: Any,
        needs: list[bool],
        anchor: Tensor,
        scale: Tensor,
        grad_anchor: Tensor | None,
        grad_other: Tensor | None,
        *further: Tensor | None,
    ) -> None:
        """Save the gradients that are needed, and that of the scale, which follows from those of the anchors."""
        grad_scale = None
        if needs[2] and grad_anchor is not None:
            grad_scale = torch.linalg.vecdot(anchor, grad_anchor).sum() / scale
        ctx.save_for_backward(grad_anchor if needs[0] else None, grad_other, grad_scale, *further)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else scaled(g, grad_loss, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


class _Contrastive(PairLoss):
    @staticmethod
    def forward(
        ctx: Any, anchor_bD: Tensor, other_GD: Tensor, scale: Tensor, start: int, step: int, chosen: str, train: bool
    ) -> Tensor:
        ctx.dtypes = [x.dtype for x in (anchor_bD, other_GD, scale)]
        dtype = torch.float64 if torch.float64 in ctx.dtypes[:2] else torch.float32
        anchor, other, scale = anchor_bD.to(dtype), other_GD.to(dtype), scale.to(dtype)
        needs = [train and needed for needed in ctx.needs_input_grad[:3]]
        loss, candidates = anchor.new_zeros(()), _candidates(chosen, other, scale)
        grad_anchor = torch.empty_like(anchor) if needs[0] or needs[2] else None
        grad_other = torch.zeros_like(other) if needs[1] else None
        for low in range(0, len(anchor), step):
            high = min(low + step, len(anchor))
            part, own = slice(low, high), slice(start + low, start + high)
            scaled_cD, pair_cD = anchor[part] * scale, other[own]
            target_c = torch.linalg.vecdot(scaled_cD, pair_cD)
            negatives = candidates.negatives(scaled_cD, target_c, own.start)
            softmax = one_label(negatives.sums, target_c[:, None], negatives.shift)
            loss += softmax.loss.sum()
            inverse_z = divide_by_z(torch.ones_like(target_c), softmax.log_z)[:, None]
            if grad_anchor is not None:
                grad = candidates.product(negatives.matrix).mul_(inverse_z)
                grad_anchor[part] = grad.addcmul_(softmax.residual, pair_cD, value=-1).mul_(scale)
            if grad_other is not None:
                candidates.add_gradient_(grad_other, negatives.matrix, scaled_cD * inverse_z)
                grad_other[own].addcmul_(softmax.residual, scaled_cD, value=-1)
        PairLoss.keep(ctx, needs, anchor, scale, grad_anchor, grad_other)
        return loss


def _candidates(chosen: str, other_GD: Tensor, scale: Tensor) -> Candidates:
    if chosen == "torch":
        return TorchCandidates(other_GD)
    from megacid_kernels.engines.triton_candidates import TritonCandidates

    return TritonCandidates(other_GD, scale)


def check_pairs(anchor_bD: Tensor, other_GD: Tensor, start: int, **scalars: Tensor) -> None:
    """Raise ValueError unless the shapes fit and every anchor has its pair."""
    if anchor_bD.ndim != 2 or other_GD.ndim != 2 or anchor_bD.shape[1] != other_GD.shape[1]:
        raise ValueError(
            f"anchor is {tuple(anchor_bD.shape)} and other {tuple(other_GD.shape)}, expected [b, D] and [G, D], equal D"
        )
    if not 0 <= start <= len(other_GD) - len(anchor_bD):
        raise ValueError(
            f"start is {start} with {len(anchor_bD)} anchors and {len(other_GD)} candidates, expected a pair for every "
            "anchor: pass the candidates of all ranks"
        )
    for name, value in scalars.items():
        if value.ndim:
            raise ValueError(f"{name} is {tuple(value.shape)}, expected a 0-d tensor")


def contrastive_cross_entropy(
    anchor_bD: Tensor,
    other_GD: Tensor,
    scale: Tensor,
    start: int = 0,
    *,
    impl: str = "auto",
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Contrastive cross entropy: -ln softmax(scale * anchor . other)[own pair], summed over the anchors.

    Args:
        anchor_bD: [b, D] floating point, this rank's anchors.
        other_GD: [G, D] floating point, the candidates of all ranks; the pair of anchor i is row start + i.
        scale: 0-d, 1 / temperature > 0, on the device of the other tensors; never read on the host.
        start: row of the first anchor's pair.
        impl: "torch" computes in float32, or float64 if an input is. "triton" expects unit rows and scale < 60,000; it
            uses fp16 factors for the logits, bf16 exponentials, and fp32 sums and own pairs. "auto": Triton on CUDA if
            it can be imported and no input is float64.
        memory_budget_bytes: bound on the one live [chunk, G] matrix (at least one anchor per chunk); None: 256 MiB.

    Returns:
        The 0-d loss, differentiable once. The gradient of other_GD is this rank's part: sum it over the ranks.

    Raises:
        ValueError: wrong shapes, or `impl` is not available.
    """
    check_pairs(anchor_bD, other_GD, start, scale=scale)
    check_budget(memory_budget_bytes)
    widest = torch.promote_types(anchor_bD.dtype, other_GD.dtype)
    chosen = resolve(impl, anchor_bD.device, widest)
    itemsize = 2 if chosen == "triton" else 8 if widest == torch.float64 else 4
    limit = max(1, (memory_budget_bytes or DEFAULT_BUDGET_BYTES) // (max(1, len(other_GD)) * itemsize))
    step = equal_chunk_size(len(anchor_bD), limit)
    with torch.autocast(anchor_bD.device.type, enabled=False):
        loss: Tensor = _Contrastive.apply(anchor_bD, other_GD, scale, start, step, chosen, torch.is_grad_enabled())
    return loss
