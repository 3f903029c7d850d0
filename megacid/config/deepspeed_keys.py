"""The DeepSpeed keys that a run file may have, and a strict check of their values, all the way down.

DeepSpeed ignores unknown top-level keys, reads some blocks without a check, and checks others only after the student
was built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from megacid.errors import UserError, nearest

ZERO_KEYS = {
    "integer": """
        stage stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size
        stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_module_granularity_threshold
    """,
    "integer above 0": "reduce_bucket_size allgather_bucket_size sub_group_size zero_hpz_partition_size",
    "flag": """
        contiguous_gradients reduce_scatter allgather_partitions stage3_gather_16bit_weights_on_model_save
        round_robin_gradients ignore_unused_parameters use_multi_rank_bucket_allreduce allgather_sequential
        pipeline_loading_checkpoint log_trace_cache_warnings memory_efficient_linear
    """,
    "flag or null": "overlap_comm",
    "block": "offload_param offload_optimizer",
}
# Block -> kind of value -> keys. "" is the run file itself; the keys of optimizer.params depend on the type.
BLOCKS = {
    "": {
        "integer above 0": """
            train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print
        """,
        "number": "gradient_clipping",
        "number above 0": "gradient_predivide_factor",
        "flag": "prescale_gradients wall_clock_breakdown dump_state memory_breakdown disable_allgather",
        "text": "gradient_allreduce_op",
        "data type": "communication_data_type seq_parallel_communication_data_type",
        "block": """
            optimizer bf16 fp16 torch_autocast data_types zero_optimization flops_profiler comms_logger aio timers
        """,
    },
    "optimizer": {"text": "type", "block": "params"},
    "bf16": {"flag": "enabled immediate_grad_update check_grad_overflow"},
    "fp16": {"flag": "enabled"},
    "torch_autocast": {"flag": "enabled", "data type": "dtype"},
    "data_types": {"data type": "grad_accum_dtype param_dtype buffer_dtype"},
    "zero_optimization": ZERO_KEYS,
    "zero_optimization.offload_param": {
        "device": "device", "text": "nvme_path", "integer": "buffer_count buffer_size max_in_cpu", "flag": "pin_memory",
    },
    "zero_optimization.offload_optimizer": {
        "device": "device", "text": "nvme_path", "integer": "buffer_count", "fraction": "ratio",
        "flag": "pin_memory pipeline_read pipeline_write fast_init",
    },
    "flops_profiler": {
        "flag": "enabled detailed", "number": "recompute_fwd_factor", "integer": "profile_step top_modules",
        "integer or -1": "module_depth", "text": "output_file",
    },
    "comms_logger": {"flag": "enabled prof_all verbose debug", "list": "prof_ops"},
    "aio": {
        "integer above 0": "block_size queue_depth intra_op_parallelism",
        "flag": "single_submit overlap_events use_gds",
    },
    "timers": {"block": "throughput"},
    "timers.throughput": {"flag": "enabled synchronized"},
}  # fmt: skip
_ADAM = {"number": "lr eps weight_decay", "pair": "betas"}
OPTIMIZER_PARAMS = {
    "AdamW": _ADAM | {"flag": "torch_adam"},
    "apex_fused_adam": _ADAM | {"flag": "bias_correction adam_w_mode"},
    "apex_fused_lamb": {
        "number": "lr eps weight_decay max_grad_norm", "pair": "betas",
        "flag": "bias_correction adam_w_mode grad_averaging use_nvlamb",
    },
}  # fmt: skip
KNOWN_KEYS = {key for keys in BLOCKS[""].values() for key in keys.split()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _is_integer(value: Any) -> bool:
    return _is_number(value) and value < 2**63 and value == int(value)  # 5e8 is a float to the reader


_FP32, _BF16 = {"fp32", "float32", "float", "torch.float32"}, {"bf16", "bfloat16", "torch.bfloat16"}
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "flag": (lambda v: isinstance(v, bool), "true or false"),
    "flag or null": (lambda v: v is None or isinstance(v, bool), "true, false or null"),
    "integer": (_is_integer, "an integer >= 0"),
    "integer or -1": (lambda v: _is_integer(v) or v == -1, "an integer >= 0, or -1"),
    "integer above 0": (lambda v: _is_integer(v) and v >= 1, "an integer >= 1"),
    "number": (_is_number, "a number >= 0"),
    "fraction": (lambda v: _is_number(v) and v <= 1, "a number from 0 to 1"),
    "number above 0": (lambda v: _is_number(v) and v > 0, "a number > 0"),
    "pair": (
        lambda v: isinstance(v, list) and len(v) == 2 and all(_is_number(x) and x < 1 for x in v),
        "a list of two numbers >= 0 and < 1",
    ),
    "text": (lambda v: isinstance(v, str), "text"),
    "list": (lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v), "a list of texts"),
    "device": (lambda v: v in ("none", "cpu", "nvme"), '"none", "cpu" or "nvme"'),
    "data type": (
        lambda v: isinstance(v, str) and v in _FP32 | _BF16,
        '"fp32" or "bf16", since training is in fp32 or bf16: the loss scale of fp16 cannot be shared with the '
        "classifier",
    ),
    "block": (lambda v: isinstance(v, dict), "a block {...}"),
}


def is_bf16(data_type: str) -> bool:
    """Whether a checked data type is bf16; else it is fp32."""
    return data_type in _BF16


def check_block(block: dict[str, Any], optimizer: str, path: str = "") -> dict[str, Any]:
    """Check the keys and values of one block and of the blocks in it.

    Args:
        optimizer: a key of OPTIMIZER_PARAMS.
        path: of the block, dotted; "" for the run file.

    Returns:
        The block without null blocks, with integers for floats such as 5e8 and the reverse where DeepSpeed needs them.

    Raises:
        UserError: a key is unknown, or a value is of another type than DeepSpeed expects.
    """
    kinds = OPTIMIZER_PARAMS[optimizer] if path == "optimizer.params" else BLOCKS[path]
    kind_of = {key: kind for kind, keys in kinds.items() for key in keys.split()}
    checked = {}
    for key, value in block.items():
        full = f"{path}.{key}" if path else key
        if key not in kind_of:
            raise UserError(
                f'DeepSpeed key "{full}" is unknown, or not supported by this trainer: {nearest(key, sorted(kind_of))}'
            )
        kind = kind_of[key]
        if value is None and kind == "block":
            continue
        is_valid, expected = _KINDS[kind]
        if not is_valid(value):
            raise UserError(_invalid_value(full, value, expected))
        if kind == "block":
            value = check_block(value, optimizer, full)
        elif kind.startswith("integer"):
            value = int(value)
        elif kind.startswith("number"):
            value = float(value)
        elif kind == "pair":
            value = [float(x) for x in value]
        checked[key] = value
    return checked


def _invalid_value(key: str, value: Any, expected: str) -> str:
    if value == "auto":
        return f'DeepSpeed key "{key}" is "auto", which this trainer does not resolve: write the value'
    message = f'"{key}" is {json.dumps(value)}, expected {expected}'
    if key == "zero_optimization" and value in (1, 2, 3):
        return f'{message}: write {{"stage": {int(value)}}}'
    if isinstance(value, str) and "text" not in expected:
        try:
            unquoted = json.loads(value)
        except (ValueError, RecursionError):
            return message
        return f"{message}: remove the quotes" if isinstance(unquoted, int | float) else message
    return message
