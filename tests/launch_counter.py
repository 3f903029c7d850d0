"""Count what an operator launches on a GPU: Triton kernels, matrix products, and the other operators of PyTorch.

It works in Triton's interpreter, on CPU tensors, and counts what the same call does on a GPU: `launch` once per kernel,
`product_fp32` once per product, and nothing of the check of the labels' values, which only a host makes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megacid_kernels.engines.triton_engine  # noqa: F401  the engine imports its kernels when it is first used

# Operators without work on the device: they allocate, or give another view of a tensor.
_FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_FREE |= {"aten::detach", "aten::alias", "aten::lift_fresh", "aten::_unsafe_view", "aten::set_"}


class _Operators(TorchDispatchMode):
    def __init__(self, matrix: tuple[int, int] | None) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self._inside, self._matrix = 0, matrix

    def _count(self, name: str, *tensors: Any) -> None:
        leaves = tree_leaves(tensors) if self._matrix else []
        if not self._matrix or any(isinstance(x, Tensor) and self._is_counted(x) for x in leaves):
            self.launches[name] += 1

    def _is_counted(self, x: Tensor) -> bool:
        assert self._matrix is not None
        (rows, width), padding = self._matrix, 16
        return x.dtype == torch.float32 and x.ndim == 2 and rows <= len(x) < rows + padding and x.shape[1] == width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)
        result = func(*args, **(kwargs or {}))
        if not self._inside and name.startswith("aten::") and not is_view and name not in _FREE:
            self._count(name, args, kwargs, result)
        return result

    def as_a_whole(self, function: Callable[..., Any], name_of: Callable[..., str] | None) -> Callable[..., Any]:
        """The function, counted as one launch, or as none without a name; what it calls is not counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._inside += 1
            try:
                result = function(*args, **kwargs)
            finally:
                self._inside -= 1
            if name_of is not None and not self._inside:
                self._count(name_of(*args), args, kwargs, result)
            return result

        return counted


@contextmanager
def counted_launches(monkeypatch: pytest.MonkeyPatch, matrix: tuple[int, int] | None = None) -> Iterator[Counter[str]]:
    """A counter of launches by name, complete at the end of the block.

    matrix: count only those that read or write an fp32 matrix of this shape, or with less than 16 rows of padding.
    """
    operators, names = _Operators(matrix), {
        "launch": lambda kernel, *_: kernel.fn.__name__, "product_fp32": lambda *_: "product_fp32",
        "check_label_values": None,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            for attribute, name_of in names.items() if name.startswith("megacid_kernels") else ():
                function = vars(module).get(attribute)
                if callable(function):
                    patch.setattr(module, attribute, operators.as_a_whole(function, name_of))
        with operators:
            yield operators.launches
