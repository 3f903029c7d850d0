"""The batch that loaders return, and the assignment of stream positions to steps, micro-batches and ranks.

Sample j of micro-batch m of step s on rank r is at position

    s * global_batch + m * (micro_batch * world) + r * micro_batch + j

of `SampleOrder`. The global batch of a step is therefore the same for every number of ranks, workers and micro-batches,
and resuming needs the step only.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megacid.errors import UserError


class DataBudgetError(RuntimeError):
    """More bad samples than the run tolerates."""


@dataclass(frozen=True)
class ReaderProgress:
    """How far a reader of commands that write tars was when it made a batch; see `data/pipes/`.

    Attributes:
        reader: its number on this rank.
        turn: the next one of the sequence of tars.
        tars: tars that it has begun.
        failed: one reason for each of them that could not be read since its last batch.
        left_out: samples that it has left out, by reason.
    """

    reader: int
    turn: int
    tars: int
    failed: tuple[str, ...]
    left_out: dict[str, int]


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        image: uint8 [b, 3, H, W], or float32 [b, d] feature vectors.
        text: int64 [b, T].
        label: int64 [b], or [b, l] for several labels per sample; -1 for none.
        teacher_image, teacher_text: float16 (float32) [b, Dt] as they are stored, L2-normalised.
        sample_id: int64 [b], global row in the index of the sample that was used.
        replaced: one reason for every bad sample that was replaced.
        progress: of the reader that made the batch from the output of commands; None for indexed shards.
        failure: why the run has to end without training on this batch. It is data instead of an exception so that all
            ranks end together in the guard's decision.
    """

    image: Tensor
    text: Tensor
    label: Tensor | None
    teacher_image: Tensor | None
    teacher_text: Tensor | None
    sample_id: Tensor
    replaced: tuple[str, ...] = ()
    progress: ReaderProgress | None = None
    failure: str | None = None

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with copies of its tensors, except for sample_id, which the host reads."""
        return replace(self._map(copy), sample_id=self.sample_id)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the DataLoader calls this when `pin_memory` is on."""
        return self._map(lambda t: t.pin_memory())


@dataclass(frozen=True)
class Positions:
    """Iterates over the lists of positions of one rank's micro-batches, for steps start_step to total_steps - 1.

    Args:
        global_batch: samples per step over all ranks, micro_batch * accumulation * world.

    Raises:
        UserError: the sizes do not multiply to global_batch, or the rank is outside of the world.
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
                f"global batch is {self.global_batch}, expected {product} (micro batch {self.micro_batch} x "
                f"accumulation {self.accumulation} x {self.world} ranks): make them equal"
            )
        if not 0 <= self.rank < self.world:
            raise UserError(
                f"rank is {self.rank}, expected 0 .. {self.world - 1} in a world of {self.world}: correct the launcher"
            )

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.accumulation

    def of(self, step: int, micro: int) -> range:
        """Positions of one micro-batch."""
        first = step * self.global_batch + micro * self.micro_batch * self.world + self.rank * self.micro_batch
        return range(first, first + self.micro_batch)

    def __iter__(self) -> Generator[list[int], None, None]:
        # Lazy: the list of all positions of a long run would not fit into memory.
        for step in range(self.start_step, self.total_steps):
            for micro in range(self.accumulation):
                yield list(self.of(step, micro))
