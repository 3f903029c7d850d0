"""Selection of the implementation: PyTorch or Triton."""

from __future__ import annotations

import importlib
import os
import warnings
from functools import lru_cache

import torch

from megacid_kernels.engines.interface import Engine, EngineInputs
from megacid_kernels.engines.torch_engine import TorchEngine
from megacid_kernels.loss_spec import IMPLEMENTATIONS
from megacid_kernels.plan import Implementation


@lru_cache
def _why_no_triton() -> str | None:
    """The import error of the kernels, or None. Evaluated once per process, and never in a CPU-only run."""
    try:
        importlib.import_module("megacid_kernels.fused")
    except ImportError as error:
        return str(error)
    return None


@lru_cache
def _warn_once(why: str) -> None:
    warnings.warn(
        f"Triton cannot be imported ({why}): losses on CUDA are computed in plain PyTorch, several times slower; "
        'install triton, or pass impl="torch" to silence this warning',
        stacklevel=2,
    )


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> Implementation:
    """Choose the implementation for inputs on `device` whose widest dtype is `dtype`.

    Args:
        impl: "torch"; "triton"; or "auto": Triton for float32 and 16-bit inputs on CUDA from sm_80 on if it can be
            imported (without it, one warning), otherwise PyTorch.

    Raises:
        ValueError: `impl` is unknown, or is "triton" without CUDA, with float64, or without the triton package.
            TRITON_INTERPRET=1, set before triton is imported, allows "triton" on a CPU, for tests.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "auto":
        if device.type != "cuda" or dtype == torch.float64 or _lacks_bf16(device):
            return "torch"
        why = _why_no_triton()
        if why is not None:
            _warn_once(why)
        return "torch" if why is not None else "triton"
    if impl == "torch":
        return "torch"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl is {impl!r} with tensors on {device.type}, expected 'auto' or 'torch': Triton needs a CUDA device"
        )
    if dtype == torch.float64:
        raise ValueError(f"impl is {impl!r} and an input is {dtype}, expected float32 or 16 bits: pass impl='torch'")
    why = _why_no_triton()
    if why is not None:
        raise ValueError(
            f"impl is {impl!r}, but Triton cannot be imported ({why}): install triton, or pass impl='torch'"
        )
    return "triton"


def _lacks_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)


def check_precision(precision: str, chosen: Implementation, device: torch.device) -> None:
    """Raise ValueError for a precision that the implementation, or the GPU, does not have."""
    if chosen == "torch":
        if precision not in ("auto", "fp32"):
            raise ValueError(f"precision is {precision!r} with impl 'torch', expected 'auto' or 'fp32'")
    elif precision != "fp32" and _lacks_bf16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"precision is {precision!r} on a GPU sm_{major}{minor}, expected 'fp32' or impl='torch': the exponentials "
            "are bf16, which needs sm_80"
        )


def engine_for(chosen: Implementation, inputs: EngineInputs, dtype: torch.dtype) -> Engine:
    if chosen == "torch":
        return TorchEngine(inputs, dtype)
    from megacid_kernels.engines.triton_engine import TritonEngine

    return TritonEngine(inputs)
