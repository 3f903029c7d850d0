"""The student's optimizers: their parameters in a run file, the ZeRO stages that they work at, and their state."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from megacid.config.fields import Beta, NotNegative
from megacid.errors import UserError

BOTH_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)
_WHOLE = "but ZeRO gives an optimizer flat parts of them"


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    lr: NotNegative
    weight_decay: NotNegative = 0.0


class _Lion(_Params):
    betas: tuple[Beta, Beta] = (0.9, 0.99)


class _Adam(_Params):
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: NotNegative = 1e-8


class _AdamW(_Adam):
    torch_adam: bool = True


class _Lamb(_Adam):
    eps: NotNegative = 1e-6


class _Muon(_Adam):
    momentum: Beta = 0.95


class _ApexAdam(_Adam):
    bias_correction: bool = True
    adam_w_mode: bool = True


class _ApexLamb(_Lamb):
    bias_correction: bool = True
    adam_w_mode: bool = True
    grad_averaging: bool = True
    use_nvlamb: bool = False


class OptimizerKind(NamedTuple):
    """An optimizer of the student.

    params: model of `optimizer.params`. stages: ZeRO stages that it works at. why: why it works at no other.
    offload: devices of `offload_optimizer`. moments: names of the tensors that it keeps for a parameter; Muon has
    MUON_MOMENTS for those that it updates itself.
    """

    params: type[BaseModel]
    stages: tuple[int, ...] = (0, 1, 2, 3)
    why: str = ""
    offload: tuple[str, ...] = ("cpu",)
    moments: tuple[str, ...] = BOTH_MOMENTS


OPTIMIZERS = {
    "AdamW": OptimizerKind(_AdamW, offload=("cpu", "nvme")),
    "Lion": OptimizerKind(_Lion, moments=("exp_avg",)),
    "Lamb": OptimizerKind(_Lamb, (0,), f"it scales the updates of whole parameters by their norms, {_WHOLE}"),
    "Muon": OptimizerKind(_Muon, (0,), f"it orthogonalizes the updates of whole matrices, {_WHOLE}"),
    "apex_fused_adam": OptimizerKind(
        _ApexAdam, (0, 1, 2), "it counts the updates of a parameter group, which ZeRO stage 3 updates in pieces", ()
    ),
    "apex_fused_lamb": OptimizerKind(
        _ApexLamb, (0,), f"it scales the updates of whole parameters by their norms, {_WHOLE}", ()
    ),
}


def check_optimizer(config: dict[str, Any]) -> None:
    """Raise UserError unless the optimizer works with the parameters, ZeRO stage and offload of a configuration."""
    kind, zero = config["optimizer"]["type"], config.get("zero_optimization", {})
    optimizer, stage = OPTIMIZERS[kind], zero.get("stage", 0)
    if stage not in optimizer.stages:
        allowed = ", ".join(map(str, optimizer.stages))
        raise UserError(
            f'"optimizer.type" is "{kind}" at "zero_optimization.stage" {stage}, expected stage {allowed}, since '
            f"{optimizer.why}: lower the stage, or use AdamW"
        )
    params = config["optimizer"]["params"]
    if issubclass(optimizer.params, _Lamb) and not (params.get("weight_decay") or params.get("use_nvlamb")):
        raise UserError(
            f'"optimizer.params.weight_decay" is {params.get("weight_decay", 0.0)} with "optimizer.type" "{kind}", '
            "expected > 0, since it scales the updates of weights with decay alone: raise it, or use AdamW"
        )
    device = zero.get("offload_optimizer", {}).get("device", "none")
    if device not in ("none", *optimizer.offload):
        allowed = " or ".join(f'"{name}"' for name in ("none", *optimizer.offload))
        raise UserError(
            f'"zero_optimization.offload_optimizer.device" is "{device}" with "optimizer.type" "{kind}", expected '
            f"{allowed}: change it, or use AdamW"
        )
