"""Counts the memory of a student's forward and backward by running both on fake tensors, which hold no data."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megacid.models.feature_tower import FeatureTower

if TYPE_CHECKING:
    from megacid.models.student import Student


class Activations(NamedTuple):
    """Bytes of one micro-batch, without the parameters.

    after_forward: what backward needs, and the outputs. peak: the largest sum of live tensors in forward and backward,
    without gradients of parameters. peak_with_gradients: the same with the gradients that exist by then.
    """

    after_forward: int
    peak: int
    peak_with_gradients: int


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, of those made inside this mode."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.peak_with_gradients = 0
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            storage = value.untyped_storage() if isinstance(value, Tensor) else None
            if storage is not None and storage not in self._seen:
                self._seen[storage] = None
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size

    def take_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient apart from the activations."""
        if parameter.grad is not None:
            self.gradients += parameter.grad.nbytes
            parameter.grad = None


def count_activations(
    student: Student | FeatureTower, micro_batch: int, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> Activations:
    """Run forward and backward of a micro-batch on fake tensors of the CPU, which takes seconds and no memory.

    Gradient checkpointing is respected. On a GPU other kernels may keep a little more or less.

    Args:
        dtype: of the weights and images.
        autocast: of the operations under torch.autocast; None without it.
    """
    with FakeTensorMode(), _fake_parameters(student, dtype) as known:
        images = torch.empty(micro_batch, *student.image_shape, dtype=dtype)
        texts = torch.zeros(micro_batch, student.text_length, dtype=torch.int64)
        with _LiveBytes(known) as bytes_, torch.random.fork_rng(devices=[]):
            inputs = images.clone(), texts.clone()
            del images, texts
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                out = [value for value in student(*inputs) if value.requires_grad]
            after_forward = bytes_.live
            hooks = [p.register_post_accumulate_grad_hook(bytes_.take_gradient) for p in known if p.requires_grad]
            torch.autograd.backward(out, [torch.empty_like(value) for value in out])
            for hook in hooks:
                hook.remove()
    return Activations(after_forward, bytes_.peak, bytes_.peak_with_gradients)


@contextlib.contextmanager
def _fake_parameters(student: nn.Module, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Replace the parameters and buffers of a module by fake ones inside the block. Yields them."""
    places = [
        (table, name, value)
        for module in student.modules()
        for table in (module._parameters, module._buffers)
        for name, value in table.items()
        if value is not None
    ]
    fake: dict[int, Tensor] = {}
    for _, _, value in places:
        if id(value) not in fake:
            made = torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
            is_parameter = isinstance(value, nn.Parameter)
            fake[id(value)] = nn.Parameter(made, requires_grad=value.requires_grad) if is_parameter else made
    try:
        for table, name, value in places:
            table[name] = fake[id(value)]  # type: ignore[assignment]
        yield list(fake.values())
    finally:
        for table, name, value in places:
            table[name] = value  # type: ignore[assignment]
