"""Which implementation a call gets, and why not another."""

from __future__ import annotations

import importlib
import os
import warnings
from functools import lru_cache
from typing import Literal

import torch

from megacid_kernels.engines.interface import Engine, EngineInputs
from megacid_kernels.engines.torch_engine import TorchEngine
from megacid_kernels.loss_spec import IMPLEMENTATIONS

Implementation = Literal["torch", "triton"]


@lru_cache
def _why_no_triton() -> str | None:
    """None where the kernels can be imported. Asked once per process; a CPU-only run does not ask."""
    try:
        importlib.import_module("megacid_kernels.fused")
    except ImportError as error:
        return str(error)
    return None


@lru_cache
def _warn_once(why: str) -> None:
    warnings.warn(
        f"Triton cannot be imported ({why}): losses on CUDA are computed in plain PyTorch, several times slower; "
        'install triton, or say impl="torch" to agree',
        stacklevel=2,
    )


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> Implementation:
    """ "auto": Triton for float32 and 16-bit inputs on CUDA where it imports, else PyTorch; float64 is PyTorch's alone.

    dtype: the widest of the inputs. ValueError for "triton" where it cannot be. TRITON_INTERPRET=1, set before the import
    of triton, lets "triton" run on a CPU, for tests.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, available are {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "auto":
        if device.type != "cuda" or dtype == torch.float64:
            return "torch"
        why = _why_no_triton()
        if why is not None:
            _warn_once(why)
        return "torch" if why is not None else "triton"
    if impl == "torch":
        return "torch"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl is {impl!r} and the tensors are on {device.type}, where available are 'auto', 'torch': Triton's kernels "
            "run on CUDA devices"
        )
    if dtype == torch.float64:
        raise ValueError(f"impl is {impl!r} and an input is {dtype}, expected float32 or 16 bits, or impl 'torch'")
    why = _why_no_triton()
    if why is not None:
        raise ValueError(
            f"impl is {impl!r}, but Triton cannot be imported ({why}): install triton, or say impl 'torch'"
        )
    return "triton"


def engine_for(chosen: Implementation, call: EngineInputs, dtype: torch.dtype) -> Engine:
    if chosen == "torch":
        return TorchEngine(call, dtype)
    from megacid_kernels.engines.triton_engine import TritonEngine

    return TritonEngine(call)
