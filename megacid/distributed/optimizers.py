"""The student's optimizer: PyTorch's fused AdamW, or one that the run file asks for and the host has."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megacid.config.optimizers import MUON_MOMENTS, OPTIMIZERS
from megacid.errors import UserError


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for the groups with "muon", and fused AdamW for the others, as one optimizer.

    The updates of Muon get the root mean square of AdamW's, so both have one learning rate and weight decay:
    Liu et al. 2025, arXiv 2502.16982.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, **adamw: Any) -> None:
        super().__init__(groups, {"lr": lr})
        matrices, others = ([group for group in self.param_groups if group["muon"] is muon] for muon in (True, False))
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        ]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr, fused=True, **adamw))
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def make_optimizer(config: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
    """The optimizer of a DeepSpeed configuration on a host that `check_host` accepts.

    None for AdamW, which DeepSpeed makes from the keys that this function completes. For another optimizer it replaces
    "optimizer" in the configuration by the key that lets DeepSpeed take it.

    Args:
        groups: parameter groups, see `parameter_groups`.

    Raises:
        UserError: the groups have none of the parameters that the optimizer is for.
    """
    kind, params = config["optimizer"]["type"], config["optimizer"]["params"]
    if kind == "AdamW":
        config["optimizer"]["params"] = adamw_params(params)
        return None
    check_groups(config["optimizer"], groups)
    if kind == "Lamb":
        params = {**params, "max_grad_norm": None}  # the trainer clips
    elif kind == "apex_fused_lamb":
        params = {**params, "max_grad_norm": float("inf")}
    del config["optimizer"]
    config["zero_force_ds_cpu_optimizer"] = False  # with offload DeepSpeed would refuse another than DeepSpeedCPUAdam
    return _implementation(kind)(groups, **params)


def moment_names(kind: str, groups: Iterable[dict[str, Any]]) -> dict[nn.Parameter, tuple[str, ...]]:
    """Trained parameter -> names of the tensors that the optimizer keeps for it.

    kind: `optimizer.type` of the run file.
    """
    moments = OPTIMIZERS[kind].moments
    return {p: MUON_MOMENTS if group.get("muon") else moments for group in groups for p in group["params"]}


def check_host(optimizer: dict[str, Any], device: str) -> None:
    """Raise UserError when the host lacks what the "optimizer" block of a run file needs. Imports no optimizer."""
    kind = optimizer["type"]
    if kind == "AdamW" and not optimizer["params"].get("torch_adam", True):
        _check_compiler_of_fused_adam(device)
    if kind == "Muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(
            f'"optimizer.type" is "Muon" but PyTorch {torch.__version__} has none: install torch >= 2.9, or use "AdamW"'
        )
    # PyPI's package "apex" is unrelated to NVIDIA's, which is known by its CUDA extension.
    if kind.startswith("apex_") and importlib.util.find_spec("amp_C") is None:
        raise UserError(
            f'"optimizer.type" is "{kind}" but NVIDIA Apex with its CUDA extensions is not installed: '
            'build it from source (not from PyPI), or use "AdamW"'
        )


def check_groups(optimizer: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raise UserError when parameter groups have none of the parameters that an optimizer of a run file is for."""
    if optimizer["type"] == "Muon" and not any(group["muon"] for group in groups):
        raise UserError('"optimizer.type" is "Muon", but no block of a tower has a matrix that is trained: use "AdamW"')


def adamw_params(params: dict[str, Any]) -> dict[str, Any]:
    """AdamW's parameters for DeepSpeed: PyTorch's fused implementation.

    DeepSpeed's own default is FusedAdam (DeepSpeedCPUAdam with offload), a C++ extension that it compiles at the first
    start. Most GPU hosts have no compiler, so "torch_adam": false asks for it.
    """
    return {**params, "torch_adam": True, "fused": True} if params.get("torch_adam", True) else params


def _check_compiler_of_fused_adam(device: str) -> None:
    if device == "cpu":
        raise UserError('"optimizer.params.torch_adam" is false, which needs a GPU: remove it')
    from torch.utils.cpp_extension import CUDA_HOME  # warns on a host without a GPU

    if CUDA_HOME is None:
        raise UserError(
            '"optimizer.params.torch_adam" is false but the CUDA compiler nvcc, which builds FusedAdam, was not found: '
            "remove the key to use PyTorch's fused AdamW, or set CUDA_HOME"
        )


def _implementation(kind: str) -> type[torch.optim.Optimizer]:
    if kind == "Muon":
        return MuonWithAdamW
    if kind.startswith("apex_"):
        from apex import optimizers

        return {"apex_fused_adam": optimizers.FusedAdam, "apex_fused_lamb": optimizers.FusedLAMB}[kind]
    import timm.optim

    return {"Lion": timm.optim.Lion, "Lamb": timm.optim.Lamb}[kind]
