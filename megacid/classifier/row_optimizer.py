"""Optimizers that update only the class rows used in a step: other rows keep their weight and state.

Legend: D width, L local classes, S rows used in this step, b rows of a block of them.

`lazy` decides how a row accounts for the steps in which it was not used:

    "none"   not at all (as in partial FC): its moments average its own gradients, bias correction counts its updates
    "decay"  as if its gradient had been zero: at its next use the moments shrink by beta and the weight by
             1 - lr * weight_decay per missed step, with the learning rates of those steps. Updates by momentum alone
             are left out. Bias correction counts all steps.

Until that next use, weight and moments do not change in a bit. The loss depends only on a row's direction, which a
late weight decay does not change.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.row_state import (
    ReadRows,
    copy_rows,
    gather_state,
    reader_of,
    round_to_bf16,
    rounding_bits,
    rounding_keys,
)
from megacid.errors import UserError

Moments = Literal["fp32", "bf16"]
Lazy = Literal["none", "decay"]

# Bytes of fp32 rows per block. On a CPU (per thread) a block and its temporaries fit the core's cache; on a GPU a block
# is large enough to hide kernel launches.
_CPU_BLOCK_BYTES, _GPU_BLOCK_BYTES = 1 << 18, 1 << 26
# The decay clock counts integer units of 2^-44. Integer sums do not round, so a resumed run whose clock starts at zero
# gets the same differences, and the factors are exact to 2^-45 per step.
_DECAY_UNIT = 1 << 44

Factor = float | Tensor  # of every row, or one per row: fp32 [S, 1]


class RowOptimizer:
    """Base of the row optimizers: hyper-parameters, blocks of rows, state by global class id.

    `lr` and `weight_decay` may be set at any time, for example by a schedule.
    """

    def __init__(self, head: PartialFC, lr: float, weight_decay: float, moments: Moments, lazy: Lazy):
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"classifier {name} is {value}, expected a finite number >= 0")
        for name, word, known in (("moments", moments, ("fp32", "bf16")), ("lazy", lazy, ("none", "decay"))):
            if word not in known:
                raise UserError(f"classifier {name} is {word!r}, expected {known[0]!r} or {known[1]!r}")
        self.head, self.lr, self.weight_decay = head, lr, weight_decay
        head.rows_unread = False
        self.moments, self.lazy = moments, lazy
        self.updates = torch.zeros(head.num_local, dtype=torch.int32, device=head.weight.device)
        # The decay clock: steps, and the sum of log(1 - lr * weight_decay) over them; now, and per row at its last use.
        self._steps = self._decay = 0
        if lazy == "decay":
            self._last_steps = torch.zeros_like(self.updates)
            self._last_decay = torch.zeros_like(self.updates, dtype=torch.int64)

    def _zeros(self) -> Tensor:
        return torch.zeros_like(self.head.weight, dtype=torch.bfloat16 if self.moments == "bf16" else torch.float32)

    def _moments(self) -> dict[str, Tensor]:
        """name -> [L, D], one or two tensors."""
        raise NotImplementedError

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
    def step(self, grad_scale: float | Tensor = 1.0) -> None:
        """Update the rows of `head.row_grad()`. No host synchronisation.

        Every call moves `head.step` on by one and, with lazy = "decay", the decay clock, also a call without rows.

        Args:
            grad_scale: factor of the gradients, from gradient clipping.

        Raises:
            UserError: lr * weight_decay >= 1 with lazy = "decay", which would leave nothing of a weight.
        """
        shrink = self.lr * self.weight_decay
        if self.lazy == "decay" and not shrink < 1:
            raise UserError(
                f"classifier lr * weight_decay is {self.lr} * {self.weight_decay} = {shrink}, expected less than 1 "
                'with lazy "decay": lower one of them'
            )
        steps, decay = self._steps + 1, self._decay
        if self.lazy == "decay":
            decay += round(math.log1p(-shrink) * _DECAY_UNIT)

        def update(rows_S: Tensor, grad_SD: Tensor) -> None:
            if len(rows_S):
                self._step_rows(rows_S, grad_SD, grad_scale)
            if self.lazy == "decay":
                self._last_steps.index_fill_(0, rows_S, steps)
                self._last_decay.index_fill_(0, rows_S, decay)

        if isinstance(self.head, PartialFC):
            self.head.for_each_row_grad(update)
            self.head.finish_step()
        else:  # any object with rows and their gradients
            update(*self.head.row_grad())
        if self.lazy == "decay":
            self._steps, self._decay = steps, decay

    def _step_rows(self, rows_S: Tensor, grad_SD: Tensor, grad_scale: float | Tensor) -> None:
        count = self.updates[rows_S] + 1
        missed = pending_decay = None
        if self.lazy == "decay":
            steps = self._steps - self._last_steps[rows_S]
            count += steps
            missed, pending_decay = steps.double(), (self._decay - self._last_decay[rows_S]).double() / _DECAY_UNIT
        factors = self._factors(count.double(), missed, pending_decay)
        keys = None
        if self.moments == "bf16":
            ids = rows_S + self.head.class_start
            keys = rounding_keys(ids, count, grad_SD.shape[1], seed=self.head.seed)
        if isinstance(self.head, PartialFC) and self.head.fused:
            # Rows are sorted and unique, so num_local of them are all rows.
            selected = None if len(rows_S) == self.head.num_local else rows_S
            self._step_fused(grad_SD, factors, {"rows_S": selected, "grad_scale": grad_scale, "keys": keys})
        else:
            self._step_blocks(rows_S, grad_SD, grad_scale, factors, keys)
        self.updates.index_copy_(0, rows_S, count)

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
            weight = _read_rows(self.head.weight, where, spare_weight)
            moments = [_read_rows(state, where, buffer) for state, buffer in zip(stored, spare_averages)]
            cut = tuple(factor[part] if isinstance(factor, Tensor) else factor for factor in factors)
            self._update(weight, moments, grad, spare, cut)
            _write_rows(self.head.weight, where, weight)
            if keys is not None:
                # The weight is written back: its buffer and `spare` are free.
                bits = rounding_bits(keys[0][part], keys[1], spare.view(torch.int32), spare_weight.view(torch.int32))
                # 16 random bits for each of two moments.
                halves = bits & 0xFFFF, bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
                moments = [round_to_bf16(moment, half) for moment, half in zip(moments, halves)]
            for state, moment in zip(stored, moments):
                _write_rows(state, where, moment)

    def zero_grad(self) -> None:
        self.head.zero_grad()

    def state_rows(self) -> dict[str, Tensor]:
        """This rank's state for a checkpoint: the moments, fp32 or bf16 [L, D], and "updates" int32 [L]; with lazy =
        "decay" also "missed_steps" int32 [L] and "missed_decay" float64 [L], the log of the weight's pending factor."""
        state = self._moments() | {"updates": self.updates}
        if self.lazy == "decay":
            state["missed_steps"] = self._steps - self._last_steps
            state["missed_decay"] = (self._decay - self._last_decay).double() / _DECAY_UNIT
        return state

    def load_state_rows(self, read: ReadRows) -> None:
        """Load this rank's rows from read(name, start, stop), written by any number of ranks in any dtype.

        Raises:
            UserError: a state of another optimizer, size or `lazy`.
        """
        own = self.state_rows()
        copy_rows(own, read, self.head.class_start, self.head.class_stop)
        if self.lazy == "decay":
            self._steps = self._decay = 0
            self._last_steps = -own["missed_steps"]
            self._last_decay = -(own["missed_decay"] * _DECAY_UNIT).round().long()

    def full_state(self) -> dict[str, Tensor]:
        """`state_rows` of all ranks: name -> [C, ...] on the host, on every rank. A collective."""
        return gather_state(self.state_rows(), self.head.group)

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Load this rank's rows of a `full_state`.

        Raises:
            UserError: as `load_state_rows`; also for a state of lazy = "decay" where `lazy` is "none".
        """
        has, lazy = ("", "decay") if "missed_steps" in state else ("no ", "none")
        if lazy != self.lazy and "updates" in state:
            raise UserError(
                f"the state has {has}'missed_steps', so it is of lazy {lazy!r}, expected {self.lazy!r}: make the "
                f"optimizer with lazy={lazy!r}"
            )
        self.load_state_rows(reader_of(state, self.head.num_classes))


def _block_rows(grad_SD: Tensor) -> int:
    size = _CPU_BLOCK_BYTES * torch.get_num_threads() if grad_SD.device.type == "cpu" else _GPU_BLOCK_BYTES
    return max(1, size // (4 * grad_SD.shape[1]))


def _read_rows(state_LD: Tensor, where: slice | Tensor, buffer_bD: Tensor) -> Tensor:
    """Rows `where` in fp32: a view if possible, else a copy in the buffer."""
    if isinstance(where, slice):
        rows = state_LD[where]
        return rows if rows.dtype == torch.float32 else buffer_bD.copy_(rows)
    if state_LD.dtype == torch.float32:
        return torch.index_select(state_LD, 0, where, out=buffer_bD)
    return buffer_bD.copy_(state_LD.index_select(0, where))


def _write_rows(state_LD: Tensor, where: slice | Tensor, rows_bD: Tensor) -> None:
    """Write back the result of `_read_rows`, unless it is a view of the state."""
    if not isinstance(where, slice):
        state_LD.index_copy_(0, where, rows_bD)
    elif state_LD.dtype != torch.float32:
        state_LD[where] = rows_bD


def _column(x_S: Tensor) -> Tensor:
    return x_S.float()[:, None]


class RowAdamW(RowOptimizer):
    """AdamW on the class rows of a step; equals torch.optim.AdamW if every row is used.

    Args:
        head: the classifier; its `row_grad` is read by `step`.
        lr: learning rate.
        betas: decay rates of the first and the second moment, in [0, 1).
        weight_decay: decoupled weight decay per unit of learning rate.
        moments: dtype of the stored moments, "fp32" or "bf16"; arithmetic is fp32. "bf16" halves their memory and
            rounds stochastically, without bias and identically for any number of ranks.
        lazy: how a row accounts for steps without it: "none", or "decay" for the decays of a zero gradient.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        head: PartialFC,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        *,
        moments: Moments = "fp32",
        lazy: Lazy = "none",
    ):
        super().__init__(head, lr, weight_decay, moments, lazy)
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"classifier betas are {betas}, expected two numbers in [0, 1)")
        if not eps > 0:
            raise UserError(f"classifier eps is {eps}, expected > 0: 1e-8 is usual")
        self.betas, self.eps = betas, eps
        self.exp_avg, self.exp_avg_sq = self._zeros(), self._zeros()

    def _moments(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def _factors(self, count_S: Tensor, missed_S: Tensor | None, decay_S: Tensor | None) -> tuple[Factor, ...]:
        beta1, beta2 = self.betas
        # float64, because 1 - beta ** n loses all but 4 digits in float32 for beta = 0.999.
        correct1, correct2 = 1 - beta1**count_S, (1 - beta2**count_S).sqrt()
        keep1: Factor = beta1
        keep2: Factor = beta2
        shrink: Factor = 1 - self.lr * self.weight_decay
        if missed_S is not None and decay_S is not None:
            keep1, keep2 = _column(beta1 ** (missed_S + 1)), _column(beta2 ** (missed_S + 1))
            shrink = _column(decay_S.exp() * shrink)
        # (m / c1) / (sqrt(v) / c2 + eps) with both corrections as factors per row: saves two passes over [b, D].
        return keep1, keep2, shrink, _column(self.lr * correct2 / correct1), _column(self.eps * correct2)

    def _update(
        self, weight_bD: Tensor, moments: list[Tensor], grad_bD: Tensor, spare_bD: Tensor, factors: tuple[Factor, ...]
    ) -> None:
        mean, square = moments
        keep1, keep2, shrink, rate, eps = factors
        mean.mul_(keep1).add_(grad_bD, alpha=1 - self.betas[0])
        square.mul_(keep2).addcmul_(grad_bD, grad_bD, value=1 - self.betas[1])
        torch.sqrt(square, out=spare_bD).add_(eps)
        torch.div(mean, spare_bD, out=spare_bD)
        assert isinstance(rate, Tensor)
        weight_bD.mul_(shrink).addcmul_(spare_bD, rate, value=-1)

    def _step_fused(self, grad_SD: Tensor, factors: tuple[Any, ...], options: dict[str, Any]) -> None:
        from megacid_kernels.fused import AdamWFactors, adamw_rows_  # needs triton

        adamw_rows_(
            self.head.weight, self.exp_avg, self.exp_avg_sq, grad_SD, AdamWFactors(*factors), betas=self.betas,
            **options,
        )  # fmt: skip


class RowSGD(RowOptimizer):
    """SGD with momentum on the class rows of a step; equals torch.optim.SGD if every row is used.

    Args:
        head: the classifier; its `row_grad` is read by `step`.
        lr: learning rate.
        momentum: decay rate of the velocity, in [0, 1).
        weight_decay: coupled: this multiple of the weight is added to the gradient.
        moments: dtype of the stored velocity, as in `RowAdamW`.
        lazy: as in `RowAdamW`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        head: PartialFC,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        *,
        moments: Moments = "fp32",
        lazy: Lazy = "none",
    ):
        super().__init__(head, lr, weight_decay, moments, lazy)
        if not 0 <= momentum < 1:
            raise UserError(f"classifier momentum is {momentum}, expected a number in [0, 1)")
        self.momentum = momentum
        self.velocity = self._zeros()

    def _moments(self) -> dict[str, Tensor]:
        return {"velocity": self.velocity}

    def _factors(self, count_S: Tensor, missed_S: Tensor | None, decay_S: Tensor | None) -> tuple[Factor, ...]:
        if missed_S is None or decay_S is None:
            return self.momentum, 1.0
        return _column(self.momentum ** (missed_S + 1)), _column(decay_S.exp())

    def _update(
        self, weight_bD: Tensor, moments: list[Tensor], grad_bD: Tensor, spare_bD: Tensor, factors: tuple[Factor, ...]
    ) -> None:
        (velocity,) = moments
        keep, shrink = factors
        if isinstance(shrink, Tensor):
            weight_bD.mul_(shrink)
        velocity.mul_(keep).add_(grad_bD).add_(weight_bD, alpha=self.weight_decay)
        weight_bD.add_(velocity, alpha=-self.lr)

    def _step_fused(self, grad_SD: Tensor, factors: tuple[Any, ...], options: dict[str, Any]) -> None:
        from megacid_kernels.fused import SGDFactors, sgd_rows_  # needs triton

        sgd_rows_(
            self.head.weight, self.velocity, grad_SD, SGDFactors(*factors), lr=self.lr, weight_decay=self.weight_decay,
            **options,
        )  # fmt: skip
