"""The DeepSpeed keys that a run file may have: strict copies of DeepSpeed's own models, and ours where it has none.

DeepSpeed ignores unknown top-level keys, reads some blocks without a check, converts texts to numbers, and finds other
mistakes only after the student was built.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import types
import typing
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from megacid.config.fields import NotNegative
from megacid.config.optimizers import OPTIMIZERS

FP16 = (
    'expected bf16 or fp32: the loss scale of fp16 cannot be shared with the classifier; use "bf16": {"enabled": true}'
)
# Reason -> keys of the installed DeepSpeed that the trainer does not drive. Those it has removed it lists itself.
_REASONS = {
    FP16: "amp apex",
    "set megacid.schedule instead": "scheduler",
    "set megacid.student.grad_checkpointing instead": "activation_checkpointing",
    "set megacid.run.log_every instead": "steps_per_print",
    "the trainer silences DeepSpeed's log, which would show it": "dump_state comms_logger",
    "the trainer does not compile the engine": "compile",
    "DeepSpeed would log the learning rate alone; the metrics of a run are in its tensorboard/ folder": """
        tensorboard wandb csv_monitor comet
    """,
    "it is for DeepSpeed's checkpoints, and the trainer writes its own": """
        checkpoint load_universal_checkpoint datastates_config zero_optimization.load_from_fp32_weights
        zero_optimization.elastic_checkpoint zero_optimization.pipeline_loading_checkpoint
        zero_optimization.stage3_gather_16bit_weights_on_model_save
    """,
    "the trainer has its own loader": "data_efficiency dataloader_drop_last",
    "the student is trained with data parallelism alone": """
        tensor_parallel expert_parallel pipeline sequence_parallel_size seq_parallel_communication_data_type
        use_data_before_expert_parallelism
    """,
    "it is for mixtures of experts": """
        zero_optimization.leaf_module zero_optimization.stage3_module_granularity_threshold
    """,
    "DeepSpeed then finds the fp32 weights of other parameters under a name, and checkpoints are by name": """
        zero_optimization.round_robin_gradients
    """,
    "only DeepSpeed's own CPU optimizer divides its work, and the trainer uses PyTorch's": """
        zero_optimization.offload_optimizer.ratio
    """,
    "it is for inference, during or after training": "hybrid_engine weight_quantization",
    "it starts runs through the launcher's option --autotuning": "autotuning",
    "the trainer sets it": "log_level",
    "the trainer chooses the implementation of the optimizer": """
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer optimizer.params.foreach optimizer.params.fused
        optimizer.params.capturable optimizer.params.differentiable
    """,
    "a checkpoint has two moments per parameter": "optimizer.params.amsgrad",
    "the trainer clips the joint norm of student and classifier, see gradient_clipping": """
        optimizer.params.max_grad_norm
    """,
    "the loss is minimised": "optimizer.params.maximize",
    "the trainer needs DeepSpeed's own count of the micro-batches": "managed_gradient_accumulation",
    "DeepSpeed reads it nowhere": "disable_allgather optimizer.legacy_fusion zero_optimization.allgather_partitions",
    "it only makes DeepSpeed warn about sizes": "vocabulary_size",
    "checkpoints have fp32 weights and moments": "bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states",
    "it is for fp32 gradients at ZeRO stage 1, where DeepSpeed does not tell their norm": "bf16.immediate_grad_update",
    "it imports modules by name": "torch_autocast.lower_precision_safe_modules",
    "set data_types.buffer_dtype instead": "data_types.keep_in_fp32_modules",
    "its kernels compute in fp16, and training is in bf16 or fp32": """
        zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_gradients
        zero_optimization.zero_quantized_nontrainable_weights
    """,
    "it updates parameters apart from the step that student and classifier share": """
        zero_optimization.zenflow zero_optimization.offload_optimizer.super_offload
        zero_optimization.offload_optimizer.cpuadam_cores_perc
    """,
    "DeepSpeed has removed it": "zero_optimization.legacy_stage1",
    "the trainer clips and skips steps by this norm": "zero_optimization.compute_grad_norm",
    "it is for the optimizer Muon": "zero_optimization.save_muon_momentum_buffer_in_memory",
}
REFUSED = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}
_FP32_NAMES, _BF16_NAMES = {"fp32", "float32", "float", "torch.float32"}, {"bf16", "bfloat16", "torch.bfloat16"}


def is_bf16(data_type: str) -> bool:
    """Whether a checked data type is bf16; else it is fp32."""
    return data_type in _BF16_NAMES


def _data_type(name: str) -> str:
    if name not in _FP32_NAMES | _BF16_NAMES:
        raise ValueError(
            '"fp32" or "bf16", since training is in fp32 or bf16: the loss scale of fp16 cannot be shared with the '
            "classifier"
        )
    return name


DataType = Annotated[str, AfterValidator(_data_type)]
CountAboveZero = Annotated[int, Field(gt=0)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class _Fp16(_Block):
    enabled: bool = False


class _Autocast(_Block):
    enabled: bool = False
    dtype: DataType | None = None


class _DataTypes(_Block):
    grad_accum_dtype: DataType | None = None
    param_dtype: DataType | None = None
    buffer_dtype: DataType | None = None


class _FlopsProfiler(_Block):
    enabled: bool = False
    recompute_fwd_factor: NotNegative = 0.0
    profile_step: Annotated[int, Field(ge=0)] = 1
    module_depth: Annotated[int, Field(ge=-1)] = -1
    top_modules: Annotated[int, Field(ge=0)] = 1
    detailed: bool = True
    output_file: str | None = None


class _Aio(_Block):
    block_size: CountAboveZero = 1048576
    queue_depth: CountAboveZero = 8
    intra_op_parallelism: CountAboveZero = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class DeepSpeedKeys(_Block):
    """The run file without its "megacid" block. `strict_model` has the types of the blocks that are Any here."""

    train_batch_size: CountAboveZero | None = None
    train_micro_batch_size_per_gpu: CountAboveZero | None = None
    gradient_accumulation_steps: CountAboveZero | None = None
    gradient_clipping: NotNegative
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    prescale_gradients: bool = False
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    communication_data_type: DataType | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    optimizer: Any = None
    zero_optimization: Any = None
    bf16: Any = None
    fp16: _Fp16 | None = None
    torch_autocast: _Autocast | None = None
    data_types: _DataTypes | None = None
    flops_profiler: _FlopsProfiler | None = None
    timers: Any = None
    aio: _Aio | None = None


def _import_deepspeed() -> None:
    """Import DeepSpeed so that it neither builds C++ extensions nor prints to stdout, which may be read as JSON."""
    os.environ.setdefault("DS_BUILD_OPS", "0")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401


def _strict(annotation: Any) -> Any:
    """A type of DeepSpeed's configuration with strict models, which convert nothing, in place of DeepSpeed's."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(_strict, typing.get_args(annotation)))]  # noqa: UP007  made at run time
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return Literal[tuple(dict.fromkeys(member.value for member in annotation))]
    if not (inspect.isclass(annotation) and issubclass(annotation, BaseModel)):
        return annotation
    fields: Any = {
        name: (_strict(field.annotation), copy.copy(field))
        for name, field in annotation.model_fields.items()
        if not _replacement(field)
    }
    return create_model(annotation.__name__, __base__=_Block, **fields)


@functools.cache
def strict_model(optimizer: str) -> type[DeepSpeedKeys]:
    """The model of all keys, with DeepSpeed's own models of its blocks. optimizer: a key of OPTIMIZERS."""
    _import_deepspeed()
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    throughput: Any = _strict(DeepSpeedThroughputTimerConfig)
    timers: Any = create_model("Timers", __base__=_Block, throughput=(throughput | None, None))
    params = OPTIMIZERS[optimizer].params
    kind = create_model("Optimizer", __base__=_Block, type=(str, ...), params=(params, ...))
    return create_model(
        "DeepSpeedKeys",
        __base__=DeepSpeedKeys,
        optimizer=(kind, ...),
        zero_optimization=(_strict(DeepSpeedZeroConfig) | None, None),
        bf16=(_strict(DeepSpeedBF16Config) | None, None),
        timers=(timers | None, None),
    )


def _replacement(field: FieldInfo) -> Any:
    """The key that replaces a deprecated one; None for others."""
    extra = field.json_schema_extra
    return extra.get("new_param") if isinstance(extra, dict) and extra.get("deprecated") else None


@functools.cache
def refused_keys() -> dict[str, str]:
    """Dotted key -> why it cannot be used: `REFUSED`, and what the installed DeepSpeed removed or replaced."""
    _import_deepspeed()
    import deepspeed.runtime.config as theirs
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    top, zero = (getattr(theirs, f"_REMOVED_{part}_CONFIG_KEYS", {}) for part in ("TOP_LEVEL", "ZERO"))
    replaced = {key: new for key, field in DeepSpeedZeroConfig.model_fields.items() if (new := _replacement(field))}
    return {
        **dict.fromkeys([*top, *(f"zero_optimization.{key}" for key in zero)], "DeepSpeed has removed it"),
        **{f"zero_optimization.{key}": f"DeepSpeed has replaced it by {new}" for key, new in replaced.items()},
        **REFUSED,
    }


# ---- keys that need others -------------------------------------------------------------------------------------------

_STAGES = {  # keys of zero_optimization that not every stage above 0 reads; those named stage3_... need stage 3
    **dict.fromkeys(
        """
        offload_param sub_group_size zero_hpz_partition_size memory_efficient_linear override_module_apply
        log_trace_cache_warnings enable_sanity_checks
        """.split(),
        "3",
    ),
    **dict.fromkeys(
        "use_multi_rank_bucket_allreduce parameter_alignment allgather_bucket_size".split(),
        "1 or 2",
    ),
    "ignore_unused_parameters": "2",
}


def without_effect(keys: Any) -> tuple[str, str] | None:
    """The first key that changes nothing with the other keys, as (dotted path, what it needs); None if all do.

    Args:
        keys: of `strict_model`.
    """
    zero, stage = keys.zero_optimization, int(keys.zero_optimization.stage if keys.zero_optimization else 0)
    needs: list[tuple[str, str, bool]] = []  # key, condition, whether it holds
    for key in _changed(zero):
        stages = "3" if key.startswith("stage3_") else _STAGES.get(key, "1, 2 or 3")
        needs.append((f"zero_optimization.{key}", f"zero_optimization.stage {stages}", str(stage) in stages))
    blocks = {
        "bf16": keys.bf16, "torch_autocast": keys.torch_autocast, "flops_profiler": keys.flops_profiler,
        "timers.throughput": keys.timers and keys.timers.throughput,
    }  # fmt: skip
    for path, block in blocks.items():
        needs += [(f"{path}.{key}", f"{path}.enabled", block.enabled) for key in _changed(block)]
    offloads: dict[str, Any] = {
        f"zero_optimization.{name}": getattr(zero, name, None) for name in ("offload_param", "offload_optimizer")
    }
    for path, block in offloads.items():
        for key in _changed(block):
            devices = "cpu or nvme" if key == "pin_memory" else "nvme"
            needs.append((f"{path}.{key}", f"{path}.device {devices}", block.device in devices))
    if _changed(keys.aio):
        to_nvme = any(block.device == "nvme" for block in offloads.values() if block is not None)
        needs.append(("aio", "zero_optimization.offload_optimizer or offload_param with device nvme", to_nvme))
    if "gradient_predivide_factor" in _changed(keys):
        needs.append(("gradient_predivide_factor", "prescale_gradients false", not keys.prescale_gradients))
    return next(((key, condition) for key, condition, holds in needs if not holds), None)


def _changed(block: Any) -> list[str]:
    """Keys of a block, as a run file names them, that differ from their defaults, but those that turn it on or off."""
    if block is None:
        return []
    fields, switches = type(block).model_fields, ("enabled", "stage", "device")
    changed = [name for name in block.model_fields_set if getattr(block, name) != fields[name].default]
    return [fields[name].alias or name for name in changed if name not in switches]
