"""Contrastive cross entropy over pairs without a matrix of similarities that outlives a chunk.

Legend: b anchors of this rank, G candidates, c anchors of one chunk, D width.

    z_ij = scale a_i . o_j        loss = sum_i softplus(d_i),  d_i = ln n_i + m_i - z_iy,  n_i = sum_{j != y} exp(z_ij - m_i)

y is the anchor's own pair, m_i a shift. Gradients are made in forward, chunk after chunk (the loss is the last operator),
from the un-normalised exponentials E = exp(z - m), E_iy = 0, as in `schedule`:

    da_i = scale (E_i O / Z_i - (1 - P_iy) o_y)      dO = E^T diag(scale / Z) A - scatter      dscale = sum_i a_i . da_i / scale

The last line holds because z is linear in both: no product is made for the gradient of the temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacid_kernels.engines.candidates import Candidates, TorchCandidates
from megacid_kernels.engines.dispatch import resolve
from megacid_kernels.epilogue import one_label, over_z
from megacid_kernels.loss_spec import equal_chunk

DEFAULT_BUDGET_BYTES = 1 << 28


class _Sums:
    """What one call collects over its chunks."""

    def __init__(
        self,
        anchor_bD: Tensor,
        other_GD: Tensor,
        scale: Tensor,
        start: int,
        candidates: Candidates,
        need_anchor: bool,
        need_other: bool,
    ):
        self.anchor, self.other, self.scale, self.start = anchor_bD, other_GD, scale, start
        self.candidates = candidates
        self.loss = anchor_bD.new_zeros(())
        self.grad_anchor = torch.empty_like(anchor_bD) if need_anchor else None
        self.grad_other = torch.zeros_like(other_GD) if need_other else None

    def chunk(self, part: slice) -> None:
        own = slice(self.start + part.start, self.start + part.stop)
        scaled_cD, pair_cD = self.anchor[part] * self.scale, self.other[own]
        target_c = torch.linalg.vecdot(scaled_cD, pair_cD)
        found = self.candidates.negatives(scaled_cD, target_c, own.start)
        softmax = one_label(found.sums, target_c[:, None], found.shift)
        self.loss += softmax.loss.sum()
        inverse_z = over_z(torch.ones_like(target_c), softmax.log_z)[:, None]
        pull = softmax.pull
        if self.grad_anchor is not None:
            grad = self.candidates.product(found.matrix).mul_(inverse_z)
            self.grad_anchor[part] = grad.addcmul_(pull, pair_cD, value=-1).mul_(self.scale)
        if self.grad_other is not None:
            self.candidates.add_gradient_(self.grad_other, found.matrix, scaled_cD * inverse_z)
            self.grad_other[own].addcmul_(pull, scaled_cD, value=-1)


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor_bD: Tensor, other_GD: Tensor, scale: Tensor, start: int, step: int, chosen: str, train: bool
    ) -> Tensor:
        ctx.dtypes = [x.dtype for x in (anchor_bD, other_GD, scale)]
        dtype = torch.float64 if torch.float64 in ctx.dtypes[:2] else torch.float32
        anchor, other, scale = anchor_bD.to(dtype), other_GD.to(dtype), scale.to(dtype)
        needs = [train and needed for needed in ctx.needs_input_grad[:3]]
        sums = _Sums(anchor, other, scale, start, _candidates(chosen, other, scale), needs[0] or needs[2], needs[1])
        for low in range(0, len(anchor), step):
            sums.chunk(slice(low, min(low + step, len(anchor))))
        grad_scale = None
        if needs[2] and sums.grad_anchor is not None:
            grad_scale = torch.linalg.vecdot(anchor, sums.grad_anchor).sum() / scale
        grads = (sums.grad_anchor if needs[0] else None, sums.grad_other, grad_scale)
        ctx.save_for_backward(*grads)
        return sums.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else (g * grad_loss).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return *grads, None, None, None, None


def _candidates(chosen: str, other_GD: Tensor, scale: Tensor) -> Candidates:
    if chosen == "torch":
        return TorchCandidates(other_GD)
    from megacid_kernels.engines.triton_candidates import TritonCandidates

    return TritonCandidates(other_GD, scale)


def contrastive_cross_entropy(
    anchor_bD: Tensor,
    other_GD: Tensor,
    scale: Tensor,
    start: int = 0,
    *,
    impl: str = "auto",
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Sum over the anchors of -ln softmax(scale * anchor . other)[own pair], 0-d, differentiable once.

    anchor_bD  this rank's anchors, any b
    other_GD   the candidates of all ranks; the pair of anchor i is row start + i
    scale      0-d, 1 / temperature > 0, on the device of the others
    impl       "torch": float32, and float64 where an input is; 16-bit inputs are computed in float32. "triton": unit rows,
               scale < 60,000; fp16 factors of the logits, bf16 exponentials, fp32 sums and own pairs; see
               `fused.contrastive`. "auto": Triton on CUDA where it imports and no input is float64
    memory_budget_bytes  for the one live [chunk, G] matrix; None: 256 MiB. One anchor at a time at least

    The gradient of other_GD is this rank's part: the sum over ranks is the gradient. No host synchronisation. ValueError
    for shapes that do not fit, and for an `impl` that cannot be had.
    """
    if anchor_bD.ndim != 2 or other_GD.ndim != 2 or anchor_bD.shape[1] != other_GD.shape[1]:
        raise ValueError(
            f"anchor is {tuple(anchor_bD.shape)} and other {tuple(other_GD.shape)}, expected [b, D] and [G, D] with one D"
        )
    if not 0 <= start <= len(other_GD) - len(anchor_bD):
        raise ValueError(
            f"start is {start} with {len(anchor_bD)} anchors and {len(other_GD)} candidates, expected a pair for every anchor"
        )
    if scale.ndim:
        raise ValueError(f"scale is {tuple(scale.shape)}, expected a 0-d tensor")
    if memory_budget_bytes is not None and memory_budget_bytes <= 0:
        raise ValueError(f"memory_budget_bytes is {memory_budget_bytes}, expected > 0, or None for the default")
    widest = torch.promote_types(anchor_bD.dtype, other_GD.dtype)
    chosen = resolve(impl, anchor_bD.device, widest)
    itemsize = 2 if chosen == "triton" else 8 if widest == torch.float64 else 4
    most = max(1, (memory_budget_bytes or DEFAULT_BUDGET_BYTES) // (max(1, len(other_GD)) * itemsize))
    step = equal_chunk(len(anchor_bD), most)
    with torch.autocast(anchor_bD.device.type, enabled=False):
        loss: Tensor = _Contrastive.apply(anchor_bD, other_GD, scale, start, step, chosen, torch.is_grad_enabled())
    return loss
