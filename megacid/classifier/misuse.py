"""Mistakes in the use of the classifier: invalid sizes, data-parallel wrappers and optimizers that cannot train it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from megacid.errors import UserError

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")
WRAPPED = (
    "PartialFC is inside {}, which takes the class rows of the ranks for copies of one tensor, expected outside: wrap "
    "the student alone, and train the head with its own RowAdamW or RowSGD"
)


def refuse_sharded(value: object) -> None:
    """Raise UserError for the tensors by which `fully_shard` replaces the parameters of a module."""
    if any(kind.__name__ == "DTensor" for kind in type(value).__mro__):
        raise UserError(WRAPPED.format("fully_shard"))


def keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that `nn.Module.to` and its kind apply to every tensor, without its cast."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype == tensor.dtype:
            return moved
        warnings.warn(
            f"PartialFC keeps its {tensor.dtype} tensors and ignores the cast to {moved.dtype}: cast the embeddings, "
            "which may have any floating dtype",
            stacklevel=5,
        )
        return tensor.to(moved.device)

    return move


def warn_same_step(step: int, finished: int | None) -> int | None:
    """Warn if `step` was finished before. Returns the step finished now, or None to warn only once."""
    if step != finished:
        return None if finished is None else step
    warnings.warn(
        f"PartialFC got step {step} for two updates, which then sample the same classes: call set_step with the number "
        "of the update, or once before the first",
        stacklevel=4,
    )
    return None


class _Head(Protocol):
    weight: nn.Parameter
    rows_unread: bool


@contextmanager
def user_error() -> Iterator[None]:
    """Raise the kernels' ValueError as a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def check_sizes(num_classes: int, embed_dim: int, world: int, rates: dict[str, float]) -> None:
    """Raise UserError for sizes or rates out of range."""
    if not max(1, world) <= num_classes < 1 << 31:
        raise UserError(
            f"num_classes is {num_classes}, expected {max(1, world)} (one class per rank) to 2^31 - 1 (products of ids "
            "must fit 64 bits): change it, or the number of ranks"
        )
    if embed_dim < 1:
        raise UserError(f"embed_dim is {embed_dim}, expected >= 1: pass the width of the embeddings")
    for name, rate in rates.items():
        if not 0 < rate <= 1:
            raise UserError(f"{name} is {rate}, expected a number in (0, 1]: 1 uses everything")


def check_graph(world: int, sample_rate: float, static_shapes: bool, weight_grad: str) -> None:
    """Raise UserError for a head whose steps no CUDA graph can repeat."""
    for name, value, allowed, remedy in (
        ("number of ranks", world, world == 1, "1, whose step has no collective"),
        ("weight_grad", repr(weight_grad), weight_grad != "recomputed", "'stored' or 'auto'"),
        ("sample_rate", sample_rate, sample_rate == 1 or static_shapes, "1, or static_shapes True: shapes must repeat"),
    ):
        if not allowed:
            raise UserError(f"{name} is {value} with cuda_graph True, expected {remedy}, or set cuda_graph to False")


@cache
def refuse_wrappers(head_type: type[nn.Module]) -> None:
    """From now on, raise UserError when DDP or FSDP wraps a module with a head that it does not ignore."""

    def check(parent: nn.Module, _: str, child: nn.Module) -> None:
        wrapper = next((c.__name__ for c in type(parent).__mro__ if c.__name__ in _WRAPPERS), None)
        if wrapper is None:
            return
        # DDP ignores names, FSDP modules. DDP registers the module before it overwrites a tensor.
        names = getattr(child, "_ddp_params_and_buffers_to_ignore", ())
        modules = getattr(parent, "_ignored_modules", ())
        for path, module in child.named_modules():
            tensors = {f"{path}.{name}" for name in (*module._parameters, *module._buffers)}
            if isinstance(module, head_type) and module not in modules and not tensors <= set(names):
                raise UserError(WRAPPED.format(wrapper))
        # torch's composable replicate() gives DDP a list of parameters.
        if isinstance(child, nn.ParameterList) and any(hasattr(p, "class_rows") for p in child):
            raise UserError(WRAPPED.format(wrapper))

    register_module_module_registration_hook(check)


def warn_about_foreign_optimizers(head: _Head) -> None:
    """Warn once if a torch optimizer with the head's weight steps and the row gradient is not read."""
    if head.rows_unread:
        _unread_heads().add(head)


@cache
def _unread_heads() -> WeakSet[_Head]:
    heads: WeakSet[_Head] = WeakSet()
    register_optimizer_step_post_hook(partial(_check_optimizer, heads))
    return heads


def _check_optimizer(heads: WeakSet[_Head], optimizer: Optimizer, *_: Any) -> None:
    for head in list(heads):
        if head.rows_unread and any(p is head.weight for group in optimizer.param_groups for p in group["params"]):
            head.rows_unread = False
            warnings.warn(
                f"{type(optimizer).__name__} got the weight of a PartialFC, but cannot train it, because its rows have "
                "no autograd gradient: pass it the student's parameters alone, and train the head with RowAdamW(head) "
                "or RowSGD(head)",
                stacklevel=3,
            )
        if not head.rows_unread:
            heads.discard(head)
