"""Collectives with the gradients of a class-parallel loss on the outputs of a data-parallel student.

Legend: B local batch, G gathered batch (sum of B over ranks), D width.

Every loss is the mean over the *global* batch and has the same value on every rank. Its gradient with respect to a
rank's own embeddings is exact after the backward of `gather_rows` (a sum over ranks). A data-parallel engine then
averages the student's gradients over the ranks (`"mean"`, DeepSpeed's default) or sums them (`"sum"`,
`gradient_allreduce_op: sum`). With "mean" the embedding gradient is therefore multiplied by the number of ranks, with
"sum" by one; `gradient_factor` is that number. Gradients of class-sharded rows bypass the engine and have no factor.

`group` is None for the default group; without an initialised torch.distributed every function works for one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renamed both, and warns once per process about the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

GradReduction = Literal["mean", "sum"]
Group = dist.ProcessGroup | None


class Gathered(NamedTuple):
    """A matrix that holds the rows of all ranks already, by rank; for functions that would gather it otherwise."""

    rows: Tensor


def world_size(group: Group = None) -> int:
    """Number of ranks of the group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """This process's rank in the group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def gradient_factor(group: Group, grad_reduction: GradReduction) -> int:
    """Factor of the gradient at the student's outputs; see the module's docstring."""
    if grad_reduction not in ("mean", "sum"):
        raise ValueError(
            f'grad_reduction is {grad_reduction!r}, expected "mean" or "sum": pass how the engine reduces gradients'
        )
    return world_size(group) if grad_reduction == "mean" else 1


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient is multiplied by `factor`."""
    return x if factor == 1 else _ScaleGradient.apply(x, factor)


def gather_sizes(local_size: int, group: Group = None) -> list[int]:
    """`local_size` of every rank, by rank."""
    if world_size(group) == 1:
        return [local_size]
    device = group_device(group)
    sizes = torch.empty(world_size(group), dtype=torch.int64, device=device)
    all_gather_single(sizes, torch.tensor([local_size], dtype=torch.int64, device=device), group=group)
    return [int(n) for n in sizes.tolist()]


def group_device(group: Group) -> torch.device:
    """The device of tensors that the group's backend exchanges."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )


def start_gather(x: Tensor, sizes: list[int], group: Group = None) -> Callable[[], Tensor]:
    """Start an all-gather of x along dim 0, without gradient. Returns a function that waits for the rows of all ranks.

    Uneven parts are padded to the largest, since only even all-gathers exist everywhere.

    Args:
        x: any dtype; must not change before the result is there.
        sizes: rows of each rank.
    """
    mine = x.detach()
    if len(sizes) == 1:
        return lambda: mine
    mine, largest = mine.contiguous(), max(sizes)
    if mine.shape[0] < largest:
        mine = torch.cat([mine, mine.new_zeros(largest - mine.shape[0], *mine.shape[1:])])
    out = mine.new_empty(largest * len(sizes), *mine.shape[1:])
    handle: Any = all_gather_single(out, mine, group=group, async_op=True) if largest else None

    def result() -> Tensor:
        if handle is not None:
            handle.wait()
        if all(n == largest for n in sizes):
            return out
        return torch.cat([out[i * largest : i * largest + n] for i, n in enumerate(sizes)])

    return result


def gather_plain(x: Tensor, group: Group = None, *, sizes: list[int] | None = None) -> Tensor:
    """All ranks' rows of x [B, ...] along dim 0, without gradient. Any dtype; B may differ between ranks.

    sizes: rows of each rank, if known, which saves a collective and a host synchronisation.
    """
    return start_gather(x, gather_sizes(x.shape[0], group) if sizes is None else sizes, group)()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pending: Callable[[], Tensor], sizes: list[int], group: Group, factor: int
    ) -> Tensor:
        ctx.sizes, ctx.group, ctx.factor = sizes, group, factor
        return pending()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return reduce_scatter_rows(grad, ctx.sizes, ctx.group) * ctx.factor, None, None, None, None


def reduce_scatter_rows(x_GD: Tensor, sizes: list[int], group: Group = None) -> Tensor:
    """Sum x_GD over the ranks and return this rank's rows [B, D]."""
    return start_reduce_scatter_rows(x_GD, sizes, group)()


def start_reduce_scatter_rows(x_GD: Tensor, sizes: list[int], group: Group = None) -> Callable[[], Tensor]:
    """Start `reduce_scatter_rows`. Returns a function that waits for its result; x_GD must not change before."""
    if len(sizes) == 1:
        return lambda: x_GD
    me, largest = rank(group), max(sizes)
    if largest and all(n == largest for n in sizes):
        out, sent = x_GD.new_empty(largest, *x_GD.shape[1:]), x_GD.contiguous()
        handle: Any = reduce_scatter_single(out, sent, group=group, async_op=True)
    else:
        summed = x_GD.clone(memory_format=torch.contiguous_format)
        handle = dist.all_reduce(summed, group=group, async_op=True)
        start = sum(sizes[:me])
        out = summed[start : start + sizes[me]]

    def result() -> Tensor:
        handle.wait()
        return out

    return result


def start_gather_rows(
    x_BD: Tensor, sizes: list[int], group: Group = None, *, grad_reduction: GradReduction
) -> Callable[[], Tensor]:
    """Start `gather_rows`. Returns a function that waits for x_GD, with its gradient; call it once."""
    factor = gradient_factor(group, grad_reduction)
    if len(sizes) == 1:
        return lambda: x_BD
    pending = start_gather(x_BD, sizes, group)
    return lambda: _GatherRows.apply(x_BD, pending, sizes, group, factor)


def reduce_scatter_flat(x: Tensor, out: Tensor, group: Group = None, *, received: Tensor) -> Tensor:
    """Sum x [W n] over the W ranks into out [n], this rank's part, and return it.

    received: memory of at least W n elements that may be overwritten, which only gloo needs.
    """
    if dist.get_backend(group) != "gloo":
        reduce_scatter_single(out, x, group=group)
        return out
    # gloo's own reduce-scatter is an all-reduce of a copy, which sends twice as much.
    parts = received[: x.numel()]
    dist.all_to_all_single(parts, x, group=group)
    return torch.sum(parts.view(world_size(group), -1), dim=0, out=out)


def gather_rows(
    x_BD: Tensor, group: Group = None, *, grad_reduction: GradReduction, sizes: list[int] | None = None
) -> tuple[Tensor, list[int]]:
    """Differentiable all-gather along dim 0. Batches may differ between ranks and may be empty.

    The backward sums the gradients of x_GD over the ranks and returns this rank's rows, times `gradient_factor`.

    Args:
        x_BD: rows of this rank.
        sizes: rows of each rank, if known, which saves a collective.

    Returns:
        (x_GD, rows of each rank).
    """
    sizes = gather_sizes(x_BD.shape[0], group) if sizes is None else sizes
    return start_gather_rows(x_BD, sizes, group, grad_reduction=grad_reduction)(), sizes


def all_reduce_sum(x: Tensor, group: Group = None, *, async_op: bool = False) -> Any:
    """Sum x over the ranks in place, without gradient. Returns x; with async_op a handle, or None on a single rank."""
    if world_size(group) == 1:
        return None if async_op else x
    handle = dist.all_reduce(x, group=group, async_op=async_op)
    return handle if async_op else x


def all_reduce_max(x: Tensor, group: Group = None) -> Tensor:
    """Maximum of x over the ranks, in place, without gradient. Returns x."""
    if world_size(group) > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x


def broadcast(x: Tensor, group: Group = None) -> Tensor:
    """The x of the first rank, on the device of this rank's x, which has the same shape and type."""
    if world_size(group) == 1:
        return x
    sent = x.to(group_device(group)).contiguous()
    dist.broadcast(sent, src=0, group=group)
    return sent.to(x.device)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        total = x.detach().clone()
        all_reduce_sum(total, group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Each rank has a disjoint part of the sum, and the gradient of the total is the same on every rank.
        return grad, None


def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """Sum of x over the ranks; the gradient passes unchanged to this rank's part."""
    return _SumOverRanks.apply(x, group)


def barrier(group: Group = None) -> None:
    """Wait until every rank is here."""
    if world_size(group) > 1:
        dist.barrier(group=group)
