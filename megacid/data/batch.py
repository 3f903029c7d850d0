"""What the loaders give, and which positions of the stream belong to which micro-batch.

Sample j of micro-batch m of step s on rank r is position

    s * global_batch + m * (micro_batch * world) + r * micro_batch + j

of `SampleOrder`. So the global batch of a step is the same for every number of ranks, workers and micro-batches, and
resuming needs the step only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megacid.errors import UserError


class DataBudgetError(RuntimeError):
    """More bad samples than the run tolerates."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    image: float32 [b, 3, H, W], or [b, d] feature vectors; text: int64 [b, T]; label: int64 [b] or [b, l], -1 for none;
    teacher_image, teacher_text: float32 [b, Dt], L2-normalised; sample_id: int64 [b], global row in the index of the
    sample really used; replaced: one sentence for every bad sample that was passed over; failure: why the run has to
    end after this batch (its samples are then not to be learned from), so that all ranks end together in the guard's
    decision instead of one rank leaving the others waiting.
    """

    image: Tensor
    text: Tensor
    label: Tensor | None
    teacher_image: Tensor | None
    teacher_text: Tensor | None
    sample_id: Tensor
    replaced: tuple[str, ...] = ()
    failure: str | None = None

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when `pin_memory` is on."""
        return self._map(lambda t: t.pin_memory())


@dataclass(frozen=True)
class Positions:
    """The positions of every micro-batch of one rank, for steps start_step .. total_steps - 1, one list after the other.

    global_batch: samples per step over all ranks = micro_batch * accumulation * world. Raises UserError when it is not.
    """

    global_batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world: int
    start_step: int
    total_steps: int

    def __post_init__(self) -> None:
        product = self.micro_batch * self.accumulation * self.world
        if self.global_batch != product or self.global_batch < 1:
            raise UserError(
                f"global batch is {self.global_batch}, but micro batch {self.micro_batch} x accumulation "
                f"{self.accumulation} x {self.world} ranks is {product}: make them equal"
            )
        if not 0 <= self.rank < self.world:
            raise UserError(
                f"rank is {self.rank}, but 0 .. {self.world - 1} is possible in a world of {self.world}: "
                "correct the launcher"
            )

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.accumulation

    def of(self, step: int, micro: int) -> range:
        """Positions of one micro-batch."""
        first = step * self.global_batch + micro * self.micro_batch * self.world + self.rank * self.micro_batch
        return range(first, first + self.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        # Lazy: a list of every position of a long run would not fit.
        for step in range(self.start_step, self.total_steps):
            for micro in range(self.accumulation):
                yield list(self.of(step, micro))
