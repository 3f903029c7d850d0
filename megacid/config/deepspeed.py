"""DeepSpeed's part of a run file: the keys it may have, and batch sizes that multiply up.

DeepSpeed ignores unknown top-level keys: `"zero_optimisation"` would silently train without ZeRO.
"""

from __future__ import annotations

from typing import Any

from megacid.errors import UserError, nearest

KNOWN_KEYS = set(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer gradient_clipping
    prescale_gradients gradient_predivide_factor gradient_allreduce_op bf16 fp16 torch_autocast
    zero_optimization steps_per_print wall_clock_breakdown dump_state memory_breakdown communication_data_type
    seq_parallel_communication_data_type activation_checkpointing flops_profiler comms_logger tensorboard wandb
    csv_monitor comet aio data_types compile timers disable_allgather
""".split()
)
_ZERO_KEYS = set(
    """
    stage contiguous_gradients reduce_scatter reduce_bucket_size allgather_partitions allgather_bucket_size
    overlap_comm offload_param offload_optimizer sub_group_size stage3_max_live_parameters
    stage3_max_reuse_distance stage3_prefetch_bucket_size stage3_param_persistence_threshold
    stage3_model_persistence_threshold stage3_gather_16bit_weights_on_model_save
    stage3_module_granularity_threshold round_robin_gradients zero_hpz_partition_size zero_quantized_weights
    zero_quantized_gradients ignore_unused_parameters use_multi_rank_bucket_allreduce allgather_sequential
    pipeline_loading_checkpoint log_trace_cache_warnings memory_efficient_linear
""".split()
)
_REMOVED = set(
    """
    amp elasticity curriculum_learning sparse_gradients nebula sparse_attention progressive_layer_drop
    compression_training quantize_training eigenvalue pld data_efficiency hybrid_engine checkpoint
    load_universal_checkpoint scheduler autotuning
""".split()
)


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
    config = dict(config)
    for key, value in config.items():
        if key in _REMOVED:
            why = "set megacid.schedule instead" if key == "scheduler" else "this trainer or DeepSpeed 0.19 ignores it"
            raise UserError(f'DeepSpeed key "{key}" cannot be used, {why}: remove it')
        if key not in KNOWN_KEYS:
            close = nearest(key, sorted(KNOWN_KEYS | {"megacid"}))
            raise UserError(f'unknown DeepSpeed key "{key}", DeepSpeed would silently ignore it: {close}')
        if value == "auto":
            raise UserError(f'DeepSpeed key "{key}" is "auto", which this trainer does not resolve: write the value')
    _check_precision_and_zero(config)
    if "gradient_clipping" not in config:
        raise UserError(
            '"gradient_clipping" is missing and its default differs between DeepSpeed versions: write it (1.0 is '
            "usual, 0.0 turns it off)"
        )
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, dict) or optimizer.get("type") not in ("AdamW", "apex_fused_adam", "apex_fused_lamb"):
        raise UserError(
            f'"optimizer" is {optimizer!r}, expected {{"type": "AdamW" | "apex_fused_adam" | "apex_fused_lamb", '
            '"params": {"lr": ...}}'
        )
    if "lr" not in optimizer.get("params", {}):
        raise UserError('"optimizer.params.lr" is missing: write the peak learning rate of the student')
    return _complete_batches(config, world)


def _check_precision_and_zero(config: dict[str, Any]) -> None:
    """The ZeRO stage and its keys, the precision, and how gradients are reduced."""
    zero = config.get("zero_optimization", {})
    for key in zero:
        if key not in _ZERO_KEYS:
            raise UserError(f'unknown DeepSpeed key "zero_optimization.{key}": {nearest(key, sorted(_ZERO_KEYS))}')
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f'"zero_optimization.stage" is {stage!r}, expected 0, 1, 2 or 3')
    if config.get("fp16", {}).get("enabled"):
        raise UserError(
            '"fp16" is enabled, expected bf16 or fp32: its loss scale cannot be shared with the classifier; use '
            '"bf16": {"enabled": true}'
        )
    bf16 = config.get("bf16", {}).get("enabled", False)
    if bf16 and config.get("torch_autocast", {}).get("enabled"):
        raise UserError('"bf16" and "torch_autocast" are both enabled, DeepSpeed would ignore the second: remove one')
    if bf16 and stage == 0:
        raise UserError(
            '"bf16" with "zero_optimization.stage" 0 keeps fp32 weights that cannot be saved by name: use stage 1'
        )
    reduction = config.get("gradient_allreduce_op", "mean")
    if reduction not in ("mean", "sum"):
        raise UserError(f'"gradient_allreduce_op" is {reduction!r}, expected "mean" or "sum"')
    if reduction == "sum" and stage == 3:
        raise UserError('"gradient_allreduce_op" is "sum", which does not exist at ZeRO stage 3: use "mean"')


def _complete_batches(config: dict[str, Any], world: int) -> dict[str, Any]:
    """Compute the missing ones of the three batch sizes."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for name in names:
        if name in config and (not isinstance(config[name], int) or isinstance(config[name], bool) or config[name] < 1):
            raise UserError(f'"{name}" is {config[name]!r}, expected an integer >= 1')
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
