"""DeepSpeed's part of a run file: refused keys, rules between keys, and batch sizes that multiply up."""

from __future__ import annotations

import json
from typing import Any

from megacid.config.deepspeed_keys import OPTIMIZER_PARAMS, check_block, is_bf16
from megacid.errors import UserError

_NO_EFFECT = "this trainer or DeepSpeed 0.19 ignores it"
_FP16 = (
    'expected bf16 or fp32: the loss scale of fp16 cannot be shared with the classifier; use "bf16": {"enabled": true}'
)
_QUANTIZED = "its kernels compute in fp16, and training is in bf16 or fp32"
REFUSED = {
    **dict.fromkeys(
        """
        elasticity curriculum_learning sparse_gradients nebula sparse_attention progressive_layer_drop
        compression_training quantize_training eigenvalue pld data_efficiency hybrid_engine checkpoint
        load_universal_checkpoint autotuning
        """.split(),
        _NO_EFFECT,
    ),
    "scheduler": "set megacid.schedule instead",
    "amp": _FP16,
    "apex": _FP16,
    "compile": _NO_EFFECT,
    "activation_checkpointing": "this trainer ignores it; set megacid.student.grad_checkpointing instead",
    **dict.fromkeys(
        ("tensorboard", "wandb", "csv_monitor", "comet"),
        "DeepSpeed would log the learning rate alone; the metrics of a run are in its tensorboard/ folder",
    ),
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
}


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
    zero = config.get("zero_optimization")
    nested = {f"zero_optimization.{key}": value for key, value in zero.items()} if isinstance(zero, dict) else {}
    for key in [*config, *nested]:
        if key in REFUSED:
            remedy = "" if REFUSED[key] == _FP16 else ": remove it"
            raise UserError(f'DeepSpeed key "{key}" cannot be used, {REFUSED[key]}{remedy}')
    optimizer = config.get("optimizer")
    kind = optimizer.get("type", "AdamW") if isinstance(optimizer, dict) else "AdamW"
    known = isinstance(kind, str) and kind in OPTIMIZER_PARAMS
    if known:  # else the parameters cannot be known either
        config = check_block(config, kind)
    if not known or "type" not in config.get("optimizer", {}):
        raise UserError(
            f'"optimizer" is {json.dumps(optimizer)}, expected {{"type": "AdamW" | "apex_fused_adam" | '
            '"apex_fused_lamb", "params": {"lr": ...}}'
        )
    _check_precision_and_zero(config)
    if "gradient_clipping" not in config:
        raise UserError(
            '"gradient_clipping" is missing and its default differs between DeepSpeed versions: write it (1.0 is '
            "usual, 0.0 turns it off)"
        )
    if "lr" not in config["optimizer"].get("params", {}):
        raise UserError('"optimizer.params.lr" is missing: write the peak learning rate of the student')
    return _complete_batches(config, world)


def _check_precision_and_zero(config: dict[str, Any]) -> None:
    """The precision, which is fp32 or bf16, the ZeRO stage, and how gradients are reduced."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f'"zero_optimization.stage" is {stage!r}, expected 0, 1, 2 or 3')
    if config.get("fp16", {}).get("enabled"):
        raise UserError(f'"fp16" is enabled, {_FP16}')
    bf16 = config.get("bf16", {}).get("enabled", False)
    autocast = config.get("torch_autocast", {})
    if bf16 and autocast.get("enabled"):
        raise UserError('"bf16" and "torch_autocast" are both enabled, DeepSpeed would ignore the second: remove one')
    if autocast.get("enabled") and not is_bf16(autocast.get("dtype", "fp32")):
        # Without a dtype torch takes fp16 on a GPU.
        raise UserError(f'"torch_autocast.dtype" is {json.dumps(autocast.get("dtype"))}, expected "bf16"')
    if bf16 and stage == 0:
        raise UserError(
            '"bf16" with "zero_optimization.stage" 0 keeps fp32 weights that cannot be saved by name: use stage 1'
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
    reduction = config.get("gradient_allreduce_op", "mean")
    if reduction not in ("mean", "sum"):
        raise UserError(f'"gradient_allreduce_op" is {reduction!r}, expected "mean" or "sum"')
    if reduction == "sum" and stage == 3:
        raise UserError('"gradient_allreduce_op" is "sum", which does not exist at ZeRO stage 3: use "mean"')


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
        divisors = [w for w in range(1, total + 1) if total % w == 0]
        shown = ", ".join(map(str, divisors[:12])) + (", ..." if len(divisors) > 12 else "")
        raise UserError(
            f"the batch sizes do not multiply up: train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{accumulation} x {world} ranks = {micro * accumulation * world}, expected train_batch_size {total}; "
            f"numbers of ranks that divide it: {shown}"
        )
    return {**config, **dict(zip(names, (total, micro, accumulation)))}
