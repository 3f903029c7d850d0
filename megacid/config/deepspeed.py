"""DeepSpeed's part of a run file: refused keys, rules between keys, and batch sizes that multiply up."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from megacid.config.deepspeed_keys import (
    FP16,
    DeepSpeedKeys,
    is_bf16,
    refused_keys,
    strict_model,
    without_effect,
)
from megacid.config.messages import unknown_key, user_error
from megacid.config.optimizers import OPTIMIZERS, check_optimizer
from megacid.errors import UserError


def lint_deepspeed(config: dict[str, Any], world: int) -> dict[str, Any]:
    """Check DeepSpeed's keys and complete the batch sizes.

    Args:
        config: the run file without its "megacid" block.
        world: number of ranks.

    Returns:
        The configuration with all three batch sizes.

    Raises:
        UserError: DeepSpeed would ignore or misread a key, or this trainer does not support its value.
    """
    _check_keys(config)
    optimizer = config.get("optimizer")
    kind = optimizer.get("type") if isinstance(optimizer, dict) else None
    if not isinstance(kind, str) or kind not in OPTIMIZERS:
        kinds = " | ".join(f'"{name}"' for name in OPTIMIZERS)
        raise UserError(
            f'"optimizer" is {json.dumps(optimizer)[:200]}, expected {{"type": {kinds}, "params": {{"lr": ...}}}}'
        )
    if config.get("gradient_clipping") is None:
        raise UserError(
            '"gradient_clipping" is missing and its default differs between DeepSpeed versions: write it (1.0 is '
            "usual, 0.0 turns it off)"
        )
    assert isinstance(optimizer, dict)
    if optimizer.get("params") is None:
        config = {**config, "optimizer": {**optimizer, "params": {}}}
    model = strict_model(kind)
    try:
        # As JSON, in which DeepSpeed's enumerations and paths are texts.
        checked = model.model_validate_json(json.dumps(_with_integers(config)))
    except ValidationError as error:
        raise user_error(error, model) from None
    config = checked.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    _check_precision_and_zero(config)
    check_optimizer(config)
    if found := without_effect(checked):
        raise UserError(f'"{found[0]}" has no effect without {found[1]}: remove it, or pass --set {found[0]}=null')
    return _complete_batches(config, world)


def _check_keys(config: dict[str, Any]) -> None:
    """Refuse unknown keys of the file itself, and wherever they are keys that the trainer does not drive."""
    refused = refused_keys()
    left: list[tuple[str, Any]] = [("", config)]
    while left:
        path, block = left.pop()
        for key, value in block.items():
            full = f"{path}.{key}" if path else str(key)
            if full in refused:
                remedy = "" if refused[full] == FP16 else ": remove it"
                raise UserError(f'DeepSpeed key "{full}" cannot be used, {refused[full]}{remedy}')
            if not path and key not in DeepSpeedKeys.model_fields:
                raise UserError(unknown_key(full, list(DeepSpeedKeys.model_fields)))
            if isinstance(value, dict):
                left.append((full, value))


def _with_integers(value: Any) -> Any:
    """The same tree with integers for floats such as 5e8."""
    if isinstance(value, dict):
        return {key: _with_integers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_integers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _check_precision_and_zero(config: dict[str, Any]) -> None:
    """The precision, which is fp32 or bf16, the ZeRO stage, and how gradients are reduced."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if config.get("fp16", {}).get("enabled"):
        raise UserError(f'"fp16" is enabled, {FP16}')
    bf16 = config.get("bf16", {}).get("enabled", False)
    autocast = config.get("torch_autocast", {})
    if bf16 and autocast.get("enabled"):
        raise UserError('"bf16" and "torch_autocast" are both enabled, DeepSpeed would ignore the second: remove one')
    if autocast.get("enabled") and not is_bf16(autocast.get("dtype", "fp32")):
        # Without a dtype torch takes fp16 on a GPU.
        raise UserError(f'"torch_autocast.dtype" is {json.dumps(autocast.get("dtype"))}, expected "bf16"')
    if bf16 and stage == 0:
        raise UserError(
            '"bf16" with "zero_optimization.stage" 0 keeps fp32 weights that cannot be saved by name: use stage 1, or '
            '"torch_autocast" in place of "bf16"'
        )
    for key in ("param_dtype", "grad_accum_dtype"):
        data_type = config.get("data_types", {}).get(key)
        if data_type is not None and is_bf16(data_type) and not bf16:
            raise UserError(f'"data_types.{key}" is "{data_type}" but bf16 is not enabled: remove it, or enable bf16')
    if bf16 and not is_bf16(config.get("data_types", {}).get("param_dtype", "bf16")):
        raise UserError('"data_types.param_dtype" is fp32 but bf16 is enabled: remove one of the two')
    if bf16 and stage == 1 and not is_bf16(config.get("data_types", {}).get("grad_accum_dtype", "bf16")):
        raise UserError(
            '"data_types.grad_accum_dtype" is fp32 with bf16 at "zero_optimization.stage" 1, where DeepSpeed does not '
            "tell the gradient norm: use stage 2"
        )
    for key in ("offload_param", "offload_optimizer"):
        offload = config.get("zero_optimization", {}).get(key, {})
        if offload.get("device") == "nvme" and "nvme_path" not in offload:
            raise UserError(
                f'"zero_optimization.{key}.nvme_path" is missing: write the directory for the device "nvme"'
            )
        if offload.get("device") == "nvme" and stage < 3:
            raise UserError(
                f'"zero_optimization.{key}.device" is "nvme" at ZeRO stage {stage}, where DeepSpeed offloads to the '
                'CPU at most: write "cpu", or use stage 3'
            )
    for key in ("allgather_bucket_size", "sub_group_size", "zero_hpz_partition_size"):
        if config.get("zero_optimization", {}).get(key) == 0:
            raise UserError(f'"zero_optimization.{key}" is 0, expected > 0: raise it')
    if config.get("gradient_allreduce_op") == "sum" and stage == 3:
        raise UserError('"gradient_allreduce_op" is "sum", which does not exist at ZeRO stage 3: use "mean"')
    for key, usual in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if stage >= 2 and config.get(key, usual) != usual:
            raise UserError(
                f'"{key}" is {json.dumps(config[key])} at ZeRO stage {stage}, where DeepSpeed does not support it: '
                "remove it, or use stage 1"
            )


def _complete_batches(config: dict[str, Any], world: int) -> dict[str, Any]:
    """Compute the missing ones of the three batch sizes."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total: int | None
    micro: int | None
    total, micro, accumulation = (config.get(name) for name in names)
    if total is None and micro is None:
        raise UserError(
            '"train_batch_size" and "train_micro_batch_size_per_gpu" are both missing: write the global batch, samples '
            "per step over all ranks"
        )
    if total is None and micro is not None:
        total = micro * (accumulation or 1) * world
    assert total is not None
    if micro is None:
        micro = total // ((accumulation or 1) * world)
    elif accumulation is None:
        accumulation = total // (micro * world)
    accumulation = accumulation or 1
    if micro * accumulation * world != total:
        divisors = [w for w in range(1, min(total, 100_000) + 1) if total % w == 0]
        shown = ", ".join(map(str, divisors[:12])) + (", ..." if len(divisors) > 12 else "")
        raise UserError(
            f"the batch sizes do not multiply up: train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{accumulation} x {world} ranks = {micro * accumulation * world}, expected train_batch_size {total}; "
            f"numbers of ranks that divide it: {shown}"
        )
    return {**config, **dict(zip(names, (total, micro, accumulation)))}
