"""The student in a DeepSpeed engine: forward, backward, gradient norm, step or skip, and its state by name.

The only module that runs deepspeed. The classifier stays outside of the engine, since DeepSpeed would overwrite
every class shard with rank 0's. To step both optimizers as one, the student's gradient norm is read *before* the step,
the trainer decides once, and `step` applies exactly the clipping factor that it gets.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megacid.config.schema import RunFile
from megacid.distributed.consensus import as_user_error, fail_together
from megacid.distributed.optimizers import make_optimizer, moment_names
from megacid.distributed.parallel import Parallel
from megacid.distributed.reduction import is_left_open, norm_sq, reduction_of
from megacid.distributed.weight_average import WeightAverage, load_average
from megacid.errors import UserError, one_line

os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import deepspeed
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)


def quiet(level: int = logging.WARNING) -> None:
    """Silence DeepSpeed's report of all settings at each start; warnings and errors stay."""
    deepspeed_logger.setLevel(level)
    # DeepSpeed calls two collectives by names that torch 2.14 has deprecated.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}", category=FutureWarning)


def _without_compiled_extension() -> None:
    # On a CPU DeepSpeed would compile a C++ extension at the first start, for inference only: it takes 5 to 20 s, races
    # between launches that share its cache, and crashes without a compiler. A table in which nothing is compatible also
    # skips the compiler probes of all other operators.
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)


def _check_nvme(config: dict[str, Any]) -> None:
    for key in ("offload_param", "offload_optimizer"):
        offload = config.get("zero_optimization", {}).get(key) or {}
        if offload.get("device") == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(
                f'"zero_optimization.{key}.device" is "nvme", which needs DeepSpeed\'s async_io: install libaio-dev '
                'and a C++ compiler, or write "cpu"'
            )


def _check_config(config: dict[str, Any]) -> None:
    """DeepSpeed's own rules between its keys, before its first collective."""
    try:
        deepspeed.DeepSpeedConfig(copy.deepcopy(config))
    except Exception as error:  # assertions, ValueError, pydantic's ValidationError
        raise UserError(f"DeepSpeed refuses its settings ({one_line(error, 160)}): correct them") from None


class Engine:
    """The student's forward, backward and step under ZeRO 0, 1, 2 or 3.

    Args:
        groups: optimizer parameter groups of `student`, see `parameter_groups`.
    """

    def __init__(self, student: nn.Module, groups: list[dict[str, Any]], run: RunFile, parallel: Parallel) -> None:
        quiet()
        # A frozen block is in eval mode, where attention without graph would have other bits than with it.
        torch.backends.mha.set_fastpath_enabled(False)
        if parallel.device.type == "cpu":
            _without_compiled_extension()
        os.environ.setdefault("LOCAL_RANK", str(parallel.local_rank))  # DeepSpeed reads it even without a launcher
        deepspeed.init_distributed(dist_backend="nccl" if parallel.device.type == "cuda" else "gloo", verbose=False)
        # The clipped norm includes the classifier, so DeepSpeed's own clipping is off until `step` sets it.
        config = {**copy.deepcopy(run.deepspeed), "gradient_clipping": 0.0}
        config.setdefault("steps_per_print", 1 << 40)
        if run.zero_stage == 1 and is_left_open(run):  # its hooks on every gradient are of no use to our reduction
            config["zero_optimization"]["contiguous_gradients"] = False
        moments = moment_names(config["optimizer"]["type"], groups)
        self._moments = {name: moments.get(p, ()) for name, p in student.named_parameters()}
        # Of frozen parameters DeepSpeed keeps no fp32 values, and under bf16 the module has rounded ones.
        self._frozen = {
            name: p.detach().float().cpu().clone() for name, p in student.named_parameters() if not p.requires_grad
        }
        with fail_together(parallel.group):  # the hosts may have different packages and compilers
            _check_nvme(config)
            optimizer = make_optimizer(config, groups)
            _check_config(config)
        if optimizer is not None and type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
            # DeepSpeed refuses others. With its key zero_allow_untested_optimizer it would warn that ours are untested.
            ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))
        with as_user_error("DeepSpeed cannot be set up"):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=student, optimizer=optimizer, model_parameters=None if optimizer else groups, config=config
            )
        self.stage = run.zero_stage
        self.dtype = torch.bfloat16 if run.bf16 else torch.float32
        self.device, self.parallel = parallel.device, parallel
        self._norm: Tensor | None = None
        self.reduction = reduction_of(self.engine, run, parallel.group)
        if self.reduction is not None:
            self.engine.enable_backward_allreduce = False
        if self.stage in (1, 2):
            self._check_names()
        decay, trained = run.megacid.student.ema_decay, self._trained_parameters()
        self.average = None if decay is None else WeightAverage(trained, decay, self.stage, parallel)

    def _trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if name not in self._frozen)

    def _check_names(self) -> None:
        """Raise UserError when DeepSpeed's fp32 weights by name, which checkpoints hold, are not the student's."""
        for name, p in self._trained_parameters():
            fp32 = safe_get_full_fp32_param(p).reshape(p.shape).to(p.dtype)
            if not torch.allclose(fp32, p, rtol=0, atol=0, equal_nan=True):
                raise UserError(
                    f"DeepSpeed has other fp32 weights than the student's under the name {name}, so checkpoints would "
                    "be wrong: remove settings of zero_optimization that reorder parameters"
                )

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def __call__(self, image: Tensor, text: Tensor, seed: int) -> Any:
        """image [B, 3, H, W] or features [B, d], text int64 [B, T] -> the student's fp32 output.

        seed: of the random numbers that the student draws, such as those of dropout.
        """
        on_gpu = self.device.type == "cuda"
        image, text = (x.to(self.device, non_blocking=True) for x in (image, text))
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            torch.random.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed(seed)
            return self.engine(image.to(self.dtype), text)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's share of the loss; the last backward of a step reduces them."""
        self.engine.backward(loss, scale_wrt_gas=False)
        if self.reduction is not None and self.at_boundary:
            self.reduction.reduce()

    @property
    def at_boundary(self) -> bool:
        """True from the last backward of a step until `step` or `skip`."""
        return bool(self.engine.is_gradient_accumulation_boundary())

    def micro_step(self) -> None:
        """Count a micro-batch that is not the last of its step."""
        self.engine.step()

    # ---- one step ----------------------------------------------------------------------------------------------

    def gradient_norm(self) -> Tensor:
        """2-norm (0-d fp32) of the student's reduced gradients, unclipped, equal on all ranks; NaN if not finite."""
        if self.reduction is not None:
            norm = self.reduction.norm()
        elif self.stage == 0:
            norm = norm_sq([p.grad for p in self.module.parameters() if p.grad is not None]).sqrt()
        elif self.stage == 3:
            norms = torch.stack([torch.as_tensor(n, device=self.device) for n in self.optimizer._get_norm_groups()])
            norm = torch.where((norms < 0).any(), math.nan, norms.norm())  # DeepSpeed returns -1 for NaN and inf
        else:
            norm = torch.as_tensor(self.optimizer.scaled_global_norm(), device=self.device)
            norm = torch.where(norm < 0, math.nan, norm)
        self._norm = norm.float()
        return self._norm

    def step(self, lr: float, clip_scale: float) -> None:
        """Update with the gradients times clip_scale (at most 1). Call `gradient_norm` before."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.stage == 0:
            if clip_scale < 1:
                torch._foreach_mul_([p.grad for p in self.module.parameters() if p.grad is not None], clip_scale)
            self.engine.step()
        else:
            # DeepSpeed divides by (norm + 1e-6) / clip_grad when that is above 1.
            norm = float(self._norm) if self._norm is not None else 0.0
            self.optimizer.clip_grad = clip_scale * (norm + 1e-6) if clip_scale < 1 else 0.0
            with self._known_norm(self._norm):
                self.engine.step()
        self._norm = None  # of these gradients only
        if not self.engine.was_step_applied():
            raise RuntimeError(
                "DeepSpeed did not apply a step that the guard had accepted: continuing would desynchronise the "
                "student and the classifier"
            )
        if self.average is not None:
            self.average.update()

    @contextlib.contextmanager
    def _known_norm(self, norm: Tensor | None) -> Iterator[None]:
        """Let DeepSpeed's step at ZeRO 1 to 3 take this gradient norm; None: it computes the norm."""
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        if norm is not None:
            setattr(self.optimizer, name, lambda *_: [norm] if self.stage == 3 else norm)
        try:
            yield
        finally:
            if norm is not None:
                delattr(self.optimizer, name)

    def skip(self) -> None:
        """Drop the accumulated gradients. No parameter and no moment changes."""
        if self.stage == 0:
            # torch's optimizers skip parameters without a gradient.
            for p in self.module.parameters():
                p.grad = None
            steps = copy.deepcopy([group.get("step") for group in self.optimizer.param_groups])
            self.engine.step()
            for group, step in zip(self.optimizer.param_groups, steps):
                # Apex and timm count steps by group, also those without a gradient, from the first one on.
                if step is None:
                    group.pop("step", None)
                else:
                    group["step"] = step
            return
        # DeepSpeed skips a step whose norm is not finite: give it such a norm.
        checks = self.optimizer.__dict__.get("check_grad_overflow")
        if checks is False:
            self.optimizer.check_grad_overflow = True
        level = deepspeed_logger.level
        deepspeed_logger.setLevel(logging.ERROR)  # the guard has warned already, with the samples
        try:
            with self._known_norm(torch.tensor(-1.0, device=self.device)):
                self.engine.step()
        finally:
            deepspeed_logger.setLevel(level)
            if checks is False:
                self.optimizer.check_grad_overflow = False
        if self.engine.was_step_applied():
            raise RuntimeError(
                "DeepSpeed applied a step that the guard had refused: continuing would desynchronise the student "
                "and the classifier"
            )

    # ---- named state, independent of the number of ranks ---------------------------------------------------------

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def _link_moments(self) -> None:
        # DeepSpeed links names to moments after the step of the *first* parameter group, when the others have none yet.
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def named_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield (name, {"param" or name of a moment: whole fp32 copy on the host}) by parameter. A collective.

        The optimizer decides on the moments; a frozen parameter has none. With student.ema_decay the others have "ema".
        """
        updated = any(self._base_optimizer().state.values())
        if updated:
            self._link_moments()
        for name, p in self.module.named_parameters():
            if name in self._frozen:
                yield name, {"param": self._frozen[name].clone()}
                continue
            tensors = {"param": p.detach() if self.stage == 0 else safe_get_full_fp32_param(p)}
            for key in self._moments[name]:
                if not updated:  # every step so far was skipped
                    tensors[key] = torch.zeros_like(tensors["param"])
                elif self.stage == 0:
                    tensors[key] = self._base_optimizer().state[p][key]
                else:
                    tensors[key] = safe_get_full_optimizer_state(p, key)
            if self.average is not None:
                tensors["ema"] = self.average.whole(name)
            shape = getattr(p, "ds_shape", p.shape)  # a ZeRO-3 parameter is empty while it is not gathered
            yield name, {key: value.detach().float().cpu().clone().reshape(shape) for key, value in tensors.items()}

    def named_buffers(self) -> dict[str, Tensor]:
        """Copies of the persistent buffers, such as a batch norm's running statistics, on the host."""
        parameters = {name for name, _ in self.module.named_parameters()}
        values = self.module.state_dict().items()
        return {name: value.detach().cpu().clone() for name, value in values if name not in parameters}

    @torch.no_grad()
    def replica_digest(self) -> str | None:
        """A digest that differs between ranks when a bit of the student does; None at ZeRO 3, which has no replicas.

        Takes one pass over the parameters and one host synchronisation.
        """
        if self.stage == 3:
            return None
        words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = [p.detach().view(words[p.element_size()]).sum(dtype=torch.int64) for p in self.module.parameters()]
        # The second sum weights by position, so two parameters that swap places are detected.
        return "-".join(f"{value & (2**64 - 1):x}" for value in torch.stack(
            [torch.stack(sums).sum(), (torch.stack(sums) * torch.arange(1, len(sums) + 1, device=self.device)).sum()]
        ).tolist())  # fmt: skip

    def materialise_state(self, image_shape: tuple[int, ...], text_length: int, accumulation: int) -> None:
        """Create the optimizer's state by a step with zero gradients and learning rate 0, for `load_named_state`."""
        for _ in range(accumulation):
            out = self(
                torch.zeros(1, *image_shape, device=self.device),
                torch.zeros(1, text_length, dtype=torch.int64, device=self.device),
                seed=0,
            )
            self.backward(sum((value.sum() * 0.0 for value in out), torch.zeros((), device=self.device)))
            if not self.at_boundary:
                self.micro_step()
        self.gradient_norm()
        self.step(lr=0.0, clip_scale=1.0)

    @torch.no_grad()
    def load_named_state(self, state: Any, step: int) -> None:
        """Load every parameter and its moments. A collective.

        Args:
            state: (name, kind) -> whole fp32 tensor, for the kinds of `named_state`.
            step: number of updates in the moments.
        """
        self._link_moments()
        for name, p in self.module.named_parameters():
            value = state(name, "param")
            if name in self._frozen:
                self._frozen[name] = value.clone()
                with self.gathered(p):
                    p.data.copy_(value.to(p.dtype))
                continue
            if self.stage == 0:
                p.copy_(value)
                for key in self._moments[name]:
                    self._base_optimizer().state[p][key].copy_(state(name, key))
                continue
            if self.stage == 3:
                safe_set_local_fp32_param(p, self._partition(p, value))
                for key in self._moments[name]:
                    safe_set_local_optimizer_state(p, self._partition(p, state(name, key)), key)
            else:
                safe_set_full_fp32_param(p, value.to(self.device))
                for key in self._moments[name]:
                    safe_set_full_optimizer_state(p, state(name, key).to(self.device), key)
            # The parameter too, or else the first forward runs with the old weights.
            with self.gathered(p):
                p.data.copy_(value.to(p.dtype))
        # Apex and timm count steps by group.
        for entry in (*self._base_optimizer().state.values(), *self._base_optimizer().param_groups):
            if "step" in entry:
                entry["step"] = torch.full_like(entry["step"], float(step)) if torch.is_tensor(entry["step"]) else step

    def load_average(self, read: Callable[[str], Tensor] | None) -> None:
        """Load the EMA of the weights by parameter name; None: the checkpoint has none."""
        load_average(self.average, read)

    def _partition(self, p: Any, value: Tensor) -> Tensor:
        """This rank's ZeRO-3 part of a tensor. DeepSpeed's own setter fails when the ranks do not divide the size."""
        size = p.ds_tensor.ds_numel
        flat = torch.nn.functional.pad(value.flatten(), (0, size * self.parallel.world - value.numel()))
        return flat[size * self.parallel.rank : size * (self.parallel.rank + 1)].to(self.device)

    @torch.no_grad()
    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Copy values into the buffers of these names."""
        own = dict(self.module.named_buffers())
        for name, value in buffers.items():
            own[name].copy_(value)

    def gathered(self, p: nn.Parameter, modifier_rank: int | None = 0) -> Any:
        """A block in which p is whole, at ZeRO 3 too, and `modifier_rank` may change it. A collective."""
        return deepspeed.zero.GatheredParameters([p], modifier_rank) if self.stage == 3 else contextlib.nullcontext()
