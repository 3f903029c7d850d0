"""The student's optimizer: PyTorch's fused AdamW, or an optimizer that the run file asks for and the host has."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from megacid.errors import UserError


def apex_optimizer(kind: str) -> type[torch.optim.Optimizer]:
    """The optimizer of NVIDIA Apex. Raises UserError where it is not installed."""
    # PyPI's package "apex" is unrelated to NVIDIA's, which is known by its CUDA extension.
    if importlib.util.find_spec("amp_C") is None:
        raise UserError(
            f'"optimizer.type" is "{kind}" but NVIDIA Apex with its CUDA extensions is not installed: '
            'build it from source (not from PyPI), or use "AdamW"'
        )
    from apex import optimizers

    return {"apex_fused_adam": optimizers.FusedAdam, "apex_fused_lamb": optimizers.FusedLAMB}[kind]


def adamw_params(params: dict[str, Any], device: str) -> dict[str, Any]:
    """AdamW's parameters for DeepSpeed on a device type: PyTorch's fused implementation.

    DeepSpeed's own default is FusedAdam (DeepSpeedCPUAdam with offload), a C++ extension that it compiles at the first
    start. Most GPU hosts have no compiler, so "torch_adam": false asks for it.
    """
    if params.get("torch_adam", True):
        return {**params, "torch_adam": True, "fused": True}
    if device == "cpu":
        raise UserError('"optimizer.params.torch_adam" is false, which needs a GPU: remove it')
    from torch.utils.cpp_extension import CUDA_HOME  # warns on a host without a GPU

    if CUDA_HOME is None:
        raise UserError(
            '"optimizer.params.torch_adam" is false but the CUDA compiler nvcc, which builds FusedAdam, was not found: '
            "remove the key to use PyTorch's fused AdamW, or set CUDA_HOME"
        )
    return params
