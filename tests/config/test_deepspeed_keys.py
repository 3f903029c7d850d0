"""DeepSpeed's half of a run file is as strict as ours: one line before data, whatever the key or the value."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from megacid.config.deepspeed import lint_deepspeed
from megacid.config.deepspeed_keys import REFUSED, DeepSpeedKeys, refused_keys, strict_model
from megacid.config.optimizers import OPTIMIZERS
from megacid.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OPTIMIZER: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "gradient_clipping": 1.0}


@pytest.mark.parametrize(
    ("given", "world", "want"),
    [
        ({"train_batch_size": 64}, 4, (64, 16, 1)),
        ({"train_micro_batch_size_per_gpu": 8}, 4, (32, 8, 1)),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}, 2, (64, 8, 4)),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 2}, 4, (64, 8, 2)),
    ],
)
def test_two_batch_sizes_give_the_third(given: dict[str, int], world: int, want: tuple[int, int, int]) -> None:
    done = lint_deepspeed({**OPTIMIZER, **given}, world)
    assert (
        done["train_batch_size"],
        done["train_micro_batch_size_per_gpu"],
        done["gradient_accumulation_steps"],
    ) == want


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train_batch_size": 10}, "numbers of ranks that divide it: 1, 2, 5, 10"),
        ({"train_batch_size": 8, "zero_optimisation": {"stage": 1}}, 'did you mean "zero_optimization"'),
        ({"train_batch_size": 8, "amp": {"enabled": False}}, '"amp" cannot be used'),
        ({"train_batch_size": 8, "bf16": {"enabled": True}}, "use stage 1"),
        (
            {"train_batch_size": 8, "gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}},
            "does not exist at ZeRO stage 3",
        ),
        ({"train_batch_size": 8, "optimizer": {"type": "Adagrad"}}, '"optimizer" is'),
        ({"train_batch_size": "8"}, "expected an integer"),
    ],
)
def test_what_deepspeed_would_ignore_or_misread_is_an_error(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        lint_deepspeed({**OPTIMIZER, **keys}, 4)
    assert said in str(error.value)


HALF = "training is in fp32 or bf16"
REFUSED_BEFORE_DATA: dict[str, tuple[dict[str, Any], str]] = {
    # fp16 by any door
    "the block": ({"fp16": {"enabled": True}}, "expected bf16 or fp32"),
    "text for the flag": ({"fp16": {"enabled": "true"}}, '"fp16.enabled" is "true", expected true or false'),
    "a loss scale": ({"fp16": {"enabled": False, "loss_scale": 8}}, '"fp16.loss_scale" is unknown, or not supported'),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, HALF),
    "autocast by default": ({"torch_autocast": {"enabled": True}}, '"torch_autocast.dtype" is null, expected "bf16"'),
    "autocast in capitals": ({"torch_autocast": {"enabled": True, "dtype": "FP16"}}, HALF),
    "apex": ({"amp": {"enabled": True, "opt_level": "O1"}}, "expected bf16 or fp32"),
    "gradients on the wire": ({"communication_data_type": "fp16"}, HALF),
    "accumulated gradients": ({"data_types": {"grad_accum_dtype": "half"}}, HALF),
    "parameters": ({"data_types": {"param_dtype": "torch.float16"}}, HALF),
    "buffers": ({"data_types": {"buffer_dtype": "fp16"}}, HALF),
    "parameters in bf16 alone": ({"data_types": {"param_dtype": "bf16"}}, "bf16 is not enabled"),
    "quantized weights": ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "compute in fp16"),
    # values that DeepSpeed would find out about after the student was built, or never
    "zero as a flag": ({"zero_optimization": True}, 'is true, expected a block {...}: write {"stage": 1}'),
    "zero as a number": ({"zero_optimization": 2}, 'is 2, expected a block {...}: write {"stage": 2}'),
    "zero as text": ({"zero_optimization": "2"}, 'is "2", expected a block'),
    "quoted batch": ({"train_batch_size": "8"}, 'is "8", expected an integer: remove the quotes'),
    "quoted stage": ({"zero_optimization": {"stage": "1"}}, '"zero_optimization.stage" is "1", expected 0, 1, 2 or 3'),
    "quoted rate": ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-4"}}}, "expected a number: remove the quotes"),
    "quoted decay": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1, "betas": ["0.9", 0.9]}}},
        'params.betas.0" is "0.9", expected a number: remove the quotes',
    ),
    "quoted clipping": ({"gradient_clipping": "1.0"}, "expected a number: remove the quotes"),
    "quoted device": ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, '"none", "cpu" or "nvme"'),
    "a fraction": ({"zero_optimization": {"stage3_prefetch_bucket_size": 15099494.4}}, "expected an integer"),
    "negative": ({"gradient_clipping": -1}, '"gradient_clipping" is -1, expected >= 0: raise it'),
    "auto": ({"bf16": {"enabled": "auto"}}, 'is "auto", which this trainer does not resolve'),
    "auto for a block": ({"zero_optimization": "auto"}, 'is "auto", which this trainer does not resolve'),
    "auto for a rate": ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, 'params.lr" is "auto"'),
    "a mistyped parameter": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1, "weight_decy": 0.1}}}, 'did you mean "weight_decay"?',
    ),
    "a parameter of another optimizer": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1, "amsgrad": True}}},
        '"optimizer.params.amsgrad" cannot be used, a checkpoint has two moments',
    ),
    "a key next to the parameters": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1}, "weight_decay": 0.1}}, '"optimizer.weight_decay"',
    ),
    "no parameters": ({"optimizer": {"type": "AdamW"}}, '"optimizer.params.lr" is missing'),
    "parameters as null": ({"optimizer": {"type": "AdamW", "params": None}}, '"optimizer.params.lr" is missing'),
    "a list for the optimizer": ({"optimizer": [1]}, '"optimizer" is [1], expected {"type": "AdamW"'),
    "a list for its type": ({"optimizer": {"type": ["AdamW"]}}, '"optimizer" is {"type": ["AdamW"]}'),
    "null for a flag": ({"bf16": {"enabled": None}}, '"bf16.enabled" is null, expected true or false'),
    "a number for a flag": ({"wall_clock_breakdown": 1}, "expected true or false"),
    "no steps": ({"gradient_accumulation_steps": 0}, '"gradient_accumulation_steps" is 0, expected > 0: raise it'),
    "an empty bucket": ({"zero_optimization": {"reduce_bucket_size": 0}}, "is 0, expected > 0: raise it"),
    "division by zero": ({"gradient_predivide_factor": 0}, "is 0, expected > 0: raise it"),
    "nvme without a place": ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "nvme_path"),
    "bf16 accumulated in fp32": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        "use stage 2",
    ),
    "modules to import": ({"torch_autocast": {"lower_precision_safe_modules": ["os.system"]}}, "modules by name"),
    "an empty group": ({"zero_optimization": {"stage": 3, "sub_group_size": 0}}, "is 0, expected > 0: raise it"),
    "nvme at stage 2": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
        "where DeepSpeed offloads to the CPU",
    ),
    "a batch of which nobody counts the divisors": (
        {"train_batch_size": 2**62 - 1, "train_micro_batch_size_per_gpu": 2}, "numbers of ranks that divide it: 1, ",
    ),
    "beyond 64 bits": ({"zero_optimization": {"reduce_bucket_size": 1e300}}, "expected an integer"),
    "a mistyped block": ({"optimiser": {}}, 'did you mean "optimizer"'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_BEFORE_DATA)
def test_a_value_that_deepspeed_cannot_use_is_one_line_before_data(case: str) -> None:
    keys, message = REFUSED_BEFORE_DATA[case]
    with pytest.raises(UserError) as error:
        lint_deepspeed({"train_batch_size": 8, **OPTIMIZER, **keys}, 4)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"fp16": {"enabled": False}, "bf16": None},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "offload_param": None, "overlap_comm": None}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        {"flops_profiler": {"enabled": True, "module_depth": -1}, "communication_data_type": "bf16"},
    ],
)
def test_fp32_and_bf16_and_the_usual_keys_of_deepspeed_are_accepted(keys: dict[str, Any]) -> None:
    checked = lint_deepspeed({"train_batch_size": 8, **OPTIMIZER, **keys}, 4)
    zero = checked.get("zero_optimization", {})
    assert zero.get("reduce_bucket_size") in (None, 500_000_000) and type(zero.get("reduce_bucket_size")) is not float
    assert None not in (checked.get("bf16", {}), zero.get("offload_param", {}))


def test_whole_numbers_for_rates_become_floats_as_torch_needs_them() -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 1, "betas": [0, 0.9], "eps": 0}}
    params = lint_deepspeed({"train_batch_size": 8, **OPTIMIZER, "optimizer": optimizer}, 4)["optimizer"]["params"]
    assert [type(x) for x in (params["lr"], params["eps"], *params["betas"])] == [float] * 4


def lint(**keys: Any) -> dict[str, Any]:
    return lint_deepspeed({"train_batch_size": 8, **OPTIMIZER, **keys}, 4)


# ---- what DeepSpeed knows and the trainer does not drive ---------------------------------------------------------


def _zero(key: str, value: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, key: value}}


KNOWN_TO_DEEPSPEED: dict[str, tuple[dict[str, Any], str]] = {
    "gradients in another order": (_zero("round_robin_gradients", True), "fp32 weights of other parameters"),
    "modules as one": (_zero("stage3_module_granularity_threshold", 100), "mixtures of experts"),
    "partial offload": (_zero("offload_optimizer", {"device": "cpu", "ratio": 0.5}), "own CPU optimizer divides"),
    "zenflow": (_zero("zenflow", {"topk_ratio": 0.1}), "apart from the step that student and classifier share"),
    "leaf modules": (_zero("leaf_module", {"classes": ["x"]}), "it is for mixtures of experts"),
    "untested optimizers": ({"zero_allow_untested_optimizer": True}, "chooses the implementation"),
    "its checkpoints": (_zero("load_from_fp32_weights", False), "the trainer writes its own"),
    "16-bit weights for its checkpoints": (
        _zero("stage3_gather_16bit_weights_on_model_save", True), "the trainer writes its own",
    ),
    "a key that nothing reads": (_zero("allgather_partitions", False), "DeepSpeed reads it nowhere"),
    "no gradient norm": (_zero("compute_grad_norm", False), "clips and skips steps by this norm"),
    "bf16 master weights": (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "fp32 weights and moments",
    ),
    "removed": ({"elasticity": {"enabled": True}}, "DeepSpeed has removed it"),
    "removed from ZeRO": (_zero("mics_shard_size", 2), "DeepSpeed has removed it"),
    "deprecated": (_zero("cpu_offload", True), "DeepSpeed has replaced it by offload_optimizer"),
    "deepcompile": ({"compile": {"deepcompile": True}}, "does not compile the engine"),
    "reports in a log that is silenced": ({"steps_per_print": 10}, "set megacid.run.log_every instead"),
    "a summary that nobody asks for": ({"comms_logger": {"enabled": True}}, "silences DeepSpeed's log"),
    "monitors": ({"csv_monitor": {"enabled": True}}, "the metrics of a run are in its tensorboard/ folder"),
    "tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}}, "data parallelism alone"),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOWN_TO_DEEPSPEED)
def test_a_key_that_deepspeed_knows_and_we_do_not_drive_is_refused_with_a_true_reason(case: str) -> None:
    keys, reason = KNOWN_TO_DEEPSPEED[case]
    with pytest.raises(UserError) as error:
        lint(**keys)
    assert reason in str(error.value) and "ignore" not in str(error.value) and "\n" not in str(error.value)


def test_what_is_refused_exists_in_the_installed_deepspeed_and_is_not_offered() -> None:
    import deepspeed

    folder = Path(deepspeed.__file__).parent
    source = "".join(path.read_text() for path in folder.rglob("*.py") if re.search("config|constants", path.name))
    zero = typing.get_args(strict_model("AdamW").model_fields["zero_optimization"].annotation)[0].model_fields
    names = {name for key, field in zero.items() for name in (key, field.alias)}
    for key in set(REFUSED) - {"apex"}:  # a name that people take for "amp"
        assert key not in DeepSpeedKeys.model_fields
        path, _, name = key.rpartition(".")
        if path == "zero_optimization":
            assert name in names, key
        elif path != "optimizer.params":  # these are torch's, see below
            assert re.search(rf"\b{name}\b", source), key
    assert {"elasticity", "zero_optimization.mics_shard_size"} <= refused_keys().keys()


def test_every_parameter_of_adamw_is_offered_or_refused_with_a_reason() -> None:
    offered = set(OPTIMIZERS["AdamW"].params.model_fields)
    theirs = set(inspect.signature(torch.optim.AdamW).parameters) - {"params"}
    assert offered - {"torch_adam"} <= theirs
    assert {f"optimizer.params.{name}" for name in theirs - offered} <= set(REFUSED)


# ---- keys without effect -----------------------------------------------------------------------------------------

FOR_NOTHING: dict[str, tuple[dict[str, Any], str]] = {
    "a key of stage 3": (_zero("stage3_max_live_parameters", 10), "zero_optimization.stage 3"),
    "parameters offloaded at stage 2": (_zero("offload_param", {"device": "cpu"}), "zero_optimization.stage 3"),
    "a key of stages 1 and 2": (
        {"zero_optimization": {"stage": 3, "use_multi_rank_bucket_allreduce": False}}, "zero_optimization.stage 1 or 2",
    ),
    "stage 0": ({"zero_optimization": {"reduce_bucket_size": 10}}, "zero_optimization.stage 1, 2 or 3"),
    "offload to nowhere": (_zero("offload_optimizer", {"pin_memory": False}), "offload_optimizer.device cpu or nvme"),
    "nvme": (_zero("offload_optimizer", {"device": "cpu", "buffer_count": 5}), "offload_optimizer.device nvme"),
    "aio": ({"aio": {"queue_depth": 4}}, "device nvme"),
    "bf16 off": ({"bf16": {"check_grad_overflow": False}}, "bf16.enabled"),
    "autocast off": ({"torch_autocast": {"dtype": "bf16"}}, "torch_autocast.enabled"),
    "profiler off": ({"flops_profiler": {"profile_step": 5}}, "flops_profiler.enabled"),
    "timers off": ({"timers": {"throughput": {"enabled": False, "synchronized": False}}}, "timers.throughput.enabled"),
    "predivide": ({"prescale_gradients": True, "gradient_predivide_factor": 2}, "prescale_gradients false"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOR_NOTHING)
def test_a_key_without_effect_is_refused_with_what_it_needs(case: str) -> None:
    keys, needed = FOR_NOTHING[case]
    with pytest.raises(UserError) as error:
        lint(**keys)
    assert f"has no effect without {needed}" in str(error.value) or needed in str(error.value)
    assert "has no effect" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        _zero("stage3_max_live_parameters", 1e9),  # its default
        {"flops_profiler": {"enabled": False, "module_depth": -1}},
        {
            "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}},
            "aio": {"queue_depth": 4},
        },
        {"prescale_gradients": True, "zero_optimization": {"stage": 1}},
    ],
)  # fmt: skip
def test_keys_with_an_effect_and_defaults_are_accepted(keys: dict[str, Any]) -> None:
    assert lint(**keys).keys() >= keys.keys()


def test_gradient_scaling_that_fails_in_the_engine_is_refused_before_it() -> None:
    for key, value in (("prescale_gradients", True), ("gradient_predivide_factor", 2.0)):
        with pytest.raises(UserError, match="at ZeRO stage 2, where DeepSpeed does not support it"):
            lint(**{key: value}, zero_optimization={"stage": 2})


# ---- every key ---------------------------------------------------------------------------------------------------


def leaves(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key of every value, and the type of the value."""
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *typing.get_args(field.annotation)) if inspect.isclass(kind)]
        blocks = [kind for kind in kinds if issubclass(kind, BaseModel)]
        key = f"{path}{field.alias or name}"
        if blocks:
            yield from leaves(blocks[0], f"{key}.")
        else:
            yield key, field.annotation


def at(key: str, value: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of the tree with a value at a dotted key."""
    name, _, rest = key.partition(".")
    return {**tree, name: at(rest, value, tree.get(name, {})) if rest else value}


NVME = {"device": "nvme", "nvme_path": "/nvme"}
BASES: list[dict[str, Any]] = [{}, *({"zero_optimization": {"stage": stage}} for stage in (1, 2, 3))]
BASES += [
    {"zero_optimization": {"stage": 3, "offload_param": NVME, "offload_optimizer": NVME}},
    {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    {"flops_profiler": {"enabled": True}},
    {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
    *({"optimizer": {"type": kind, "params": {"lr": 1e-3, "weight_decay": 0.1}}} for kind in OPTIMIZERS),
]


def test_every_key_changes_what_deepspeed_gets_or_is_refused_with_a_reason() -> None:
    keys = {key for kind in OPTIMIZERS for key, _ in leaves(strict_model(kind))}
    values = [
        True,
        False,
        0,
        1,
        2,
        3,
        16,
        0.5,
        "bf16",
        "bfloat16",
        "fp32",
        "sum",
        "cpu",
        "nvme",
        "text",
        ["all_reduce"],
        [0.5, 0.6],
    ]
    never = set()
    for key in keys - {"optimizer.type"}:
        accepted = 0
        for base in BASES:
            plain = lint(**base)
            for value in values:
                tree = at(key, value, {"train_batch_size": 8, **OPTIMIZER, **base})
                try:
                    got = lint_deepspeed(tree, 4)
                except UserError as error:
                    assert "\n" not in str(error)
                    continue
                accepted += got != plain
        if not accepted:
            never.add(key)
    # Refused by name: the keys that DeepSpeed has and the trainer does not drive.
    assert {key for key in never if not any(f"{key}.".startswith(f"{name}.") for name in REFUSED)} == set()


def test_reading_a_run_file_prints_nothing_on_a_host_without_a_gpu(tmp_path: Path) -> None:
    """--print-config writes JSON to stdout, where DeepSpeed would report the accelerator that it chose."""
    program = "from megacid.config.load import load_run; load_run('configs/digits_cpu.json', world=1)"
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout == b""
