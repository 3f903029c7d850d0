"""Optimizers that update only the class rows used in a step: other rows keep their weight and state.

Legend: D width, L local classes, S rows used in this step, b rows of a block of them.

`lazy` decides how a row accounts for the steps in which it was not used:

    "none"   not at all (as in partial FC): its moments average its own gradients, bias correction counts its updates
    "decay"  as if its gradient had been zero: at its next use the moments shrink by beta and the weight by
             1 - lr * weight_decay per missed step, with the learning rates of those steps. Updates by momentum alone
             are left out. Bias correction counts all steps.

Until that next use, weight and moments do not change in a bit. The loss depends only on a row's direction, which a
late weight decay does not change. The betas and the momentum of missed steps are those of the next use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from megacid.classifier.head_optimizer import HeadOptimizer, check_number
from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.row_state import (
    MissingRowsError,
    ReadRows,
    copy_rows,
    read_rows,
    round_to_bf16,
    rounding_bits,
    rounding_keys,
    write_rows,
)
from megacid.errors import UserError
from megacid_kernels.rows import is_on_host

Moments = Literal["fp32", "bf16"]
Lazy = Literal["none", "decay"]

# Bytes of fp32 rows per block. On a CPU (per thread) a block is small enough for the caches and large enough to hide
# the cost of the calls; on a GPU it hides kernel launches.
_CPU_BLOCK_BYTES, _GPU_BLOCK_BYTES = 1 << 19, 1 << 26
# The decay clock counts integer units of 2^-44. Integer sums do not round, so a resumed run whose clock starts at zero
# gets the same differences, and the factors are exact to 2^-45 per step.
_DECAY_UNIT = 1 << 44

Factor = float | Tensor  # of every row, or one per row: fp32 [S, 1]


class RowOptimizer(HeadOptimizer):
    """Base of the row optimizers: blocks of rows, the decay clock, state by global class id."""

    _OWN = ("head", "moments", "lazy", "_steps", "_decay")
    _MOMENTS: tuple[str, ...] = ()  # names of the stored moments, one or two

    def __init__(self, head: PartialFC, defaults: dict[str, Any], moments: Moments, lazy: Lazy):
        for name, word, known in (("moments", moments, ("fp32", "bf16")), ("lazy", lazy, ("none", "decay"))):
            if word not in known:
                raise UserError(f"classifier {name} is {word!r}, expected {known[0]!r} or {known[1]!r}")
        super().__init__(head, defaults)
        self.moments, self.lazy = moments, lazy
        # The decay clock: steps, and the sum of log(1 - lr * weight_decay) over them; now, and per row at its last use.
        self._steps = self._decay = 0
        dtype = torch.bfloat16 if moments == "bf16" else torch.float32
        updates = torch.zeros(head.num_local, dtype=torch.int32, device=head.weight.device)
        state = self.rows_state
        state |= {name: torch.zeros_like(head.weight, dtype=dtype) for name in self._MOMENTS} | {"updates": updates}
        if lazy == "decay":
            state["last_steps"] = torch.zeros_like(updates)
            state["last_decay"] = torch.zeros_like(updates, dtype=torch.int64)

    def check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            check_number(group, name, "a finite number >= 0")

    def _moments(self) -> dict[str, Tensor]:
        """name -> [L, D]."""
        return {name: self.rows_state[name] for name in self._MOMENTS}

    def _factors(self, count_S: Tensor, missed_S: Tensor | None, decay_S: Tensor | None) -> tuple[Factor, ...]:
        """Factors for `_update` from float64 [S]: count_S, the updates (lazy = "decay": steps) including this one; with
        lazy = "decay" missed_S, the steps since the last use, and decay_S, the log of the weight's pending factor."""
        raise NotImplementedError

    def _update(
        self, weight_bD: Tensor, moments: list[Tensor], grad_bD: Tensor, spare_bD: Tensor, factors: tuple[Factor, ...]
    ) -> None:
        """Update a block of fp32 rows in place. spare_bD is scratch."""
        raise NotImplementedError

    def _step_fused(self, grad_SD: Tensor, factors: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Update all rows in one Triton kernel."""
        raise NotImplementedError

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float | Tensor] | None = None, *, grad_scale: float | Tensor = 1.0
    ) -> float | Tensor | None:
        """Update the rows of `head.row_grad()`. No host synchronisation.

        Every call moves `head.step` on by one and, with lazy = "decay", the decay clock, also a call without rows.

        Args:
            closure: computes the loss and its backward before the update.
            grad_scale: factor of the gradients, from gradient clipping.

        Returns:
            The loss of `closure`, None without one.

        Raises:
            UserError: a hyper-parameter out of range; lr * weight_decay >= 1 with lazy = "decay", which would leave
                nothing of a weight.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.follow_head()
        self.check_group(self.group)
        lr, weight_decay, last = self.group["lr"], self.group["weight_decay"], self.rows_state
        shrink = lr * weight_decay
        if self.lazy == "decay" and not shrink < 1:
            raise UserError(
                f"classifier lr * weight_decay is {lr} * {weight_decay} = {shrink}, expected less than 1 "
                'with lazy "decay": lower one of them'
            )
        steps, decay = self._steps + 1, self._decay
        if self.lazy == "decay":
            decay += round(math.log1p(-shrink) * _DECAY_UNIT)

        def update(rows_S: Tensor, grad_SD: Tensor) -> None:
            if len(rows_S):
                self._step_rows(rows_S, grad_SD, grad_scale)
            if self.lazy == "decay":
                last["last_steps"].index_fill_(0, rows_S, steps)
                last["last_decay"].index_fill_(0, rows_S, decay)

        if isinstance(self.head, PartialFC):
            self.head.for_each_row_grad(update)
            self.head.finish_step()
        else:  # any object with rows and their gradients
            update(*self.head.row_grad())
        if self.lazy == "decay":
            self._steps, self._decay = steps, decay
        return loss

    def _step_rows(self, rows_S: Tensor, grad_SD: Tensor, grad_scale: float | Tensor) -> None:
        state = self.rows_state
        count = state["updates"][rows_S] + 1
        missed = pending_decay = None
        if self.lazy == "decay":
            steps = self._steps - state["last_steps"][rows_S]
            count += steps
            if not is_on_host(rows_S) or steps.any():  # else all factors are those of lazy = "none"
                missed = steps.double()
                pending_decay = (self._decay - state["last_decay"][rows_S]).double() / _DECAY_UNIT
        factors = self._factors(count.double(), missed, pending_decay)
        keys = None
        fused = isinstance(self.head, PartialFC) and self.head.fused
        if self.moments == "bf16":
            keys = rounding_keys(
                rows_S, count, grad_SD.shape[1], seed=self.head.seed, class_start=self.head.class_start, fused=fused
            )
        if fused:
            # Rows are sorted and unique, so num_local of them are all rows.
            selected = None if len(rows_S) == self.head.num_local else rows_S
            self._step_fused(grad_SD, factors, {"rows_S": selected, "grad_scale": grad_scale, "keys": keys})
        else:
            self._step_blocks(rows_S, grad_SD, grad_scale, factors, keys)
        state["updates"].index_copy_(0, rows_S, count)

    def _step_blocks(
        self,
        rows_S: Tensor,
        grad_SD: Tensor,
        grad_scale: float | Tensor,
        factors: tuple[Factor, ...],
        keys: tuple[Tensor, Tensor] | None,
    ) -> None:
        stored = list(self._moments().values())
        size = min(len(rows_S), _block_rows(grad_SD))
        spares = grad_SD.new_empty(3 + len(stored), size, grad_SD.shape[1])
        for low in range(0, len(rows_S), size):
            part = slice(low, min(low + size, len(rows_S)))
            where = part if len(rows_S) == self.head.num_local else rows_S[part]
            spare_weight, spare, grad, *spare_averages = spares[:, : part.stop - low]
            if isinstance(grad_scale, Tensor) or grad_scale != 1:
                torch.mul(grad_SD[part], grad_scale, out=grad)
            else:
                grad = grad_SD[part]
            weight = read_rows(self.head.weight, where, spare_weight)
            moments = [read_rows(state, where, buffer) for state, buffer in zip(stored, spare_averages)]
            cut = tuple(factor[part] if isinstance(factor, Tensor) else factor for factor in factors)
            self._update(weight, moments, grad, spare, cut)
            write_rows(self.head.weight, where, weight)
            if keys is not None:
                # The weight is written back: its buffer and `spare` are free.
                bits = rounding_bits(keys[0][part], keys[1], spare.view(torch.int32), spare_weight.view(torch.int32))
                # 16 random bits for each of two moments.
                halves = bits & 0xFFFF, bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
                moments = [round_to_bf16(moment, half) for moment, half in zip(moments, halves)]
            for state, moment in zip(stored, moments):
                write_rows(state, where, moment)

    def state_rows(self) -> dict[str, Tensor]:
        """This rank's state for a checkpoint: the moments, fp32 or bf16 [L, D], and "updates" int32 [L]; with lazy =
        "decay" also "missed_steps" int32 [L] and "missed_decay" float64 [L], the log of the weight's pending factor."""
        live = self.rows_state
        state = self._moments() | {"updates": live["updates"]}
        if self.lazy == "decay":
            state["missed_steps"] = self._steps - live["last_steps"]
            state["missed_decay"] = (self._decay - live["last_decay"]).double() / _DECAY_UNIT
        return state

    def load_state_rows(self, read: ReadRows) -> None:
        """Load this rank's rows from read(name, start, stop), written by any number of ranks in any dtype.

        Args:
            read: raises KeyError or UserError for a name that the state lacks.

        Raises:
            UserError: a state of another optimizer, size or `lazy`.
        """
        has, lazy = ("", "decay") if self._has_decay(read) else ("no ", "none")
        if lazy != self.lazy:
            raise UserError(
                f"the state has {has}'missed_steps', so it is of lazy {lazy!r}, expected {self.lazy!r}: make the "
                f"optimizer with lazy={lazy!r}"
            )
        own = self.state_rows()
        copy_rows(own, read, self.head.class_start, self.head.class_stop)
        if self.lazy == "decay":
            self._steps = self._decay = 0
            self.rows_state["last_steps"] = -own["missed_steps"]
            self.rows_state["last_decay"] = -(own["missed_decay"] * _DECAY_UNIT).round().long()

    def _has_decay(self, read: ReadRows) -> bool:
        try:
            read("missed_steps", self.head.class_start, self.head.class_stop)
        except (KeyError, MissingRowsError):
            return False
        except UserError:
            return self.lazy == "decay"  # reading all rows reports it
        return True


def _block_rows(grad_SD: Tensor) -> int:
    size = _CPU_BLOCK_BYTES * torch.get_num_threads() if grad_SD.device.type == "cpu" else _GPU_BLOCK_BYTES
    return max(1, size // (4 * grad_SD.shape[1]))


def column(x_S: Tensor) -> Tensor:
    """x_S as the factors of rows, fp32 [S, 1]."""
    return x_S.float()[:, None]
