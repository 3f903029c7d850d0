"""The reduction of the student's fp32 gradients over ranks at ZeRO 0 and 1, each from one flat buffer that is kept.

DeepSpeed's own reduction copies every gradient two to four times per step into buffers that it allocates anew, and at
ZeRO 1 it sums all gradients on every rank. Here each gradient is copied once, and at ZeRO 1 a rank gets only the sum of
its own part. DeepSpeed's reduction remains where the run file sets one of its keys, in bf16, and at ZeRO 2 and 3.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacid.config.schema import RunFile
from megacid.distributed.collectives import Group, all_reduce_sum, reduce_scatter_flat, world_size

_KEYS = ("prescale_gradients", "gradient_predivide_factor", "communication_data_type", "data_types", "torch_autocast")
_BLOCK = 4096


class Reduction(Protocol):
    """Reduces the gradients after the last backward of a step, and computes their norm."""

    def reduce(self) -> None: ...
    def norm(self) -> Tensor: ...


def reduction_of(engine: Any, run: RunFile, group: Group) -> Reduction | None:
    """The reduction of a DeepSpeed engine; None where DeepSpeed's own is used, or where nothing is reduced."""
    if not is_left_open(run):
        return None
    scale = 1.0 / world_size(group) if run.grad_reduction == "mean" else 1.0
    if run.zero_stage == 0:
        return _Replicated([p for p in engine.module.parameters() if p.requires_grad], scale, group)
    return _Partitioned(engine.optimizer, scale, group)


def is_left_open(run: RunFile) -> bool:
    """Whether the run file leaves the reduction of fp32 gradients at ZeRO 0 or 1 to the trainer."""
    zero = run.deepspeed.get("zero_optimization", {})
    return not run.bf16 and run.zero_stage <= 1 and zero.keys() <= {"stage"} and not run.deepspeed.keys() & set(_KEYS)


def norm_sq(tensors: list[Tensor]) -> Tensor:
    """Squared 2-norm of all elements, 0-d fp64. Sums of at most 4,096 squares are fp32, which is exact enough and fast:
    one fp32 sum over an embedding table is wrong in the fifth digit."""
    norms, short = [], []
    for tensor in tensors:
        flat = tensor.float().reshape(-1)
        whole = flat.numel() // _BLOCK * _BLOCK
        if whole:
            norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1))
        if whole < flat.numel():
            short.append(flat[whole:])
    if short:
        norms.append(torch.stack(torch._foreach_norm(short)))
    return torch.cat(norms).double().square().sum()


class _FlatGradients:
    """The gradients of parameters at their offsets in one fp32 buffer."""

    def __init__(self, parameters: list[nn.Parameter], offsets: list[int], buffer: Tensor) -> None:
        self.parameters, self.buffer = parameters, buffer
        self.views = [buffer[at : at + p.numel()].view(p.shape) for p, at in zip(parameters, offsets)]

    def fill(self, scale: float) -> None:
        """Copy the gradients times `scale`; zero for a parameter without a gradient."""
        for p, view in zip(self.parameters, self.views):
            if p.grad is None:
                view.zero_()
            else:
                torch.mul(p.grad, scale, out=view)


class _Replicated:
    """ZeRO 0: every rank has the sum of all gradients."""

    def __init__(self, parameters: list[nn.Parameter], scale: float, group: Group) -> None:
        self.parameters, self.scale, self.group = parameters, scale, group
        self.flat: _FlatGradients | None = None
        if world_size(group) > 1:
            *offsets, size = itertools.accumulate((p.numel() for p in parameters), initial=0)
            self.flat = _FlatGradients(parameters, offsets, torch.zeros(size, device=parameters[0].device))

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over the ranks. A parameter without a gradient gets zeros, so weight decay applies."""
        if self.flat is None:
            for p in self.parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            return
        self.flat.fill(self.scale)
        all_reduce_sum(self.flat.buffer, self.group)
        for p, view in zip(self.parameters, self.flat.views):
            p.grad = view

    def norm(self) -> Tensor:
        """2-norm of the reduced gradients, 0-d fp64, equal on all ranks."""
        if self.flat is not None:
            return norm_sq([self.flat.buffer]).sqrt()
        return norm_sq([p.grad for p in self.parameters if p.grad is not None]).sqrt()


class _Partitioned:
    """ZeRO 1: every rank has the sum of its part, which DeepSpeed's step reads from `averaged_gradients`."""

    def __init__(self, optimizer: Any, scale: float, group: Group) -> None:
        self.optimizer, self.scale, self.group = optimizer, scale, group
        self.flats, self.parts = [], []
        for i, parameters in enumerate(optimizer.round_robin_bit16_groups):
            part = optimizer._build_compact_grad_partition_buffer(i)
            whole = part.flat_partition
            if world_size(group) > 1:
                whole = torch.zeros_like(optimizer.bit16_groups_flat[i])
            self.flats.append(_FlatGradients(parameters, optimizer.round_robin_bit16_offsets[i], whole))
            self.parts.append(part)
        largest = max(flat.buffer.numel() for flat in self.flats)
        self.received = torch.empty(largest if dist.get_backend(group) == "gloo" and world_size(group) > 1 else 0)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over the ranks into the parts of their owners."""
        for i, (flat, part) in enumerate(zip(self.flats, self.parts)):
            flat.fill(self.scale)
            if flat.buffer is not part.flat_partition:
                reduce_scatter_flat(flat.buffer, part.flat_partition, self.group, received=self.received)
            self.optimizer.averaged_gradients[i] = part
            for p in flat.parameters:
                p.grad = None

    def norm(self) -> Tensor:
        """2-norm of the reduced gradients, 0-d fp64, equal on all ranks."""
        return all_reduce_sum(norm_sq([part.flat_partition for part in self.parts]), self.group).sqrt()
