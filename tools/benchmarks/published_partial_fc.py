"""The published partial-FC scheme in plain PyTorch, as the baseline of the benchmarks.

Legend: B local batch, G gathered batch, D width, C classes, L classes of this rank, S sampled rows.

An et al., Partial FC (CVPR 2022), second version, in fp32, with CosFace's margin (Wang et al., 2018). Its costs and
defects are kept because they are part of the comparison: the weight's gradient is dense [L, D] whatever was sampled, so
a dense optimizer moves all rows; a sample's loss saturates at -ln 1e-30 = 69.0776; three all-reduces; negatives come
from the global generator; a label >= C is silently treated as no class; all ranks need equal batch sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

PROBABILITY_FLOOR = 1e-30


def _world(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _all_reduce(value: Tensor, group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> None:
    if _world(group) > 1:
        dist.all_reduce(value, op, group=group)


def _all_gather(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    parts = [torch.empty_like(value) for _ in range(_world(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts)


class _GatherRows(torch.autograd.Function):
    """[B, D] of every rank -> [G, D]. Backward: the sum over ranks times their number, which a data-parallel mean
    undoes."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.batch = group, len(x_BD)
        return _all_gather(x_BD, group)

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor, None]:
        grad_GD = grad_GD.contiguous()
        _all_reduce(grad_GD, ctx.group)
        start = dist.get_rank(ctx.group) * ctx.batch
        return grad_GD[start : start + ctx.batch] * _world(ctx.group), None


class _ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of logits whose columns are sharded over ranks. Overwrites `logits_GS` with the softmax."""

    @staticmethod
    def forward(
        ctx: Any, logits_GS: Tensor, slot_G: Tensor, group: dist.ProcessGroup | None, write_one_hot: bool
    ) -> Tensor:
        top = logits_GS.max(dim=1, keepdim=True).values
        _all_reduce(top, group, dist.ReduceOp.MAX)
        softmax = logits_GS.sub_(top).exp_()
        total = softmax.sum(dim=1, keepdim=True)
        _all_reduce(total, group)
        softmax.div_(total)
        own = torch.where(slot_G >= 0)[0]
        probability = softmax.new_zeros(len(softmax))
        probability[own] = softmax[own, slot_G[own]]
        _all_reduce(probability, group)
        ctx.save_for_backward(softmax, own, slot_G)
        ctx.write_one_hot = write_one_hot
        return -probability.clamp_min(PROBABILITY_FLOOR).log().mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, own, slot_G = ctx.saved_tensors
        if not ctx.write_one_hot:
            softmax[own, slot_G[own]] -= 1
            return softmax.mul_(grad_loss / len(softmax)), None, None, None
        one_hot = softmax.new_zeros(len(own), softmax.shape[1]).scatter_(1, slot_G[own][:, None], 1.0)
        softmax[own] -= one_hot
        return softmax.div_(len(softmax)) * grad_loss, None, None, None


class EagerPartialFC(nn.Module):
    """Sampled, class-sharded CosFace softmax with autograd. `weight` [L, D] gets a dense gradient from backward.

    tuned: apply the scale in place and make no one-hot matrix, as a careful user would. This is not the published code;
    it shows how much of a difference is tuning and how much is the scheme.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        *,
        sample_rate: float = 1.0,
        margin: float = 0.3,
        scale: float = 64.0,
        init: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        tuned: bool = False,
        device: torch.device | str | None = None,
    ):
        """init: [C, D] of all ranks, copied; None: N(0, 0.01) from the global generator."""
        super().__init__()
        world = _world(group)
        rank = dist.get_rank(group) if world > 1 else 0
        self.num_local = num_classes // world + (rank < num_classes % world)
        self.class_start = num_classes // world * rank + min(rank, num_classes % world)
        self.num_sample = int(sample_rate * self.num_local)
        self.sample_rate, self.margin, self.scale, self.group, self.tuned = sample_rate, margin, scale, group, tuned
        if init is None:
            rows = torch.randn(self.num_local, embed_dim, device=device).mul_(0.01)
        else:
            rows = init[self.class_start : self.class_start + self.num_local].to(device, copy=True)
        self.weight = nn.Parameter(rows)

    def forward(self, emb_BD: Tensor, target_B: Tensor) -> Tensor:
        """Mean loss over the global batch, 0-d. target_B: int64 global class ids; outside [0, C) means no class."""
        emb_GD, target_G = emb_BD, target_B
        if _world(self.group) > 1:
            emb_GD, target_G = _GatherRows.apply(emb_BD, self.group), _all_gather(target_B, self.group)
        local = target_G - self.class_start
        slot_G = torch.where((local >= 0) & (local < self.num_local), local, -1)
        weight: Tensor = self.weight
        if self.sample_rate < 1:
            rows_S = self._sample(slot_G)
            slot_G = torch.where(slot_G >= 0, torch.searchsorted(rows_S, slot_G), -1)
            weight = weight[rows_S]
        logits = F.linear(F.normalize(emb_GD), F.normalize(weight)).clamp(-1, 1)
        own = torch.where(slot_G >= 0)[0]
        logits[own, slot_G[own]] = logits[own, slot_G[own]] - self.margin
        logits = logits.mul_(self.scale) if self.tuned else logits * self.scale
        loss: Tensor = _ShardedCrossEntropy.apply(logits, slot_G, self.group, not self.tuned)
        return loss

    @torch.no_grad()
    def _sample(self, slot_G: Tensor) -> Tensor:
        """Sorted local ids [S]: this rank's classes of the batch, then random ones."""
        positive = torch.unique(slot_G[slot_G >= 0])
        if len(positive) > self.num_sample:
            return positive
        key = torch.rand(self.num_local, device=slot_G.device)
        key[positive] = 2.0
        return torch.topk(key, self.num_sample).indices.sort().values
