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
from torch.utils._python_dispatch import TorchDispatchMode

import megacid_kernels.engines.triton_engine  # noqa: F401  the engine imports its kernels when it is first used

# Operators without work on the device: they allocate, or give another view of a tensor.
_FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_FREE |= {"aten::detach", "aten::alias", "aten::lift_fresh", "aten::_unsafe_view", "aten::set_"}


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self._inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)
        if not self._inside and name.startswith("aten::") and not is_view and name not in _FREE:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))

    def as_a_whole(self, function: Callable[..., Any], name_of: Callable[..., str] | None) -> Callable[..., Any]:
        """The function, counted as one launch, or as none without a name; what it calls is not counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if name_of is not None and not self._inside:
                self.launches[name_of(*args)] += 1
            self._inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._inside -= 1

        return counted


@contextmanager
def counted_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """A counter of launches by name, complete at the end of the block."""
    operators, names = _Operators(), {
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
