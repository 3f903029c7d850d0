"""The embeddings of the global batch, shared by the loss terms of a step.

Legend: b local batch, G gathered batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from megacid.distributed.collectives import (
    GradReduction,
    Group,
    gather_sizes,
    gradient_factor,
    rank,
    scale_gradient,
    start_gather,
    start_gather_rows,
    world_size,
)
from megacid.errors import UserError

STUDENT = ("image_S", "text_S")
TEACHER = ("image_T", "text_T")


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def check_shapes(image: Tensor, **others: Tensor) -> None:
    """Raise UserError unless all embeddings have the shape of the student's."""
    for name, other in others.items():
        if other.shape != image.shape:
            raise UserError(
                f"{name} has shape {tuple(other.shape)}, expected the student's {tuple(image.shape)}: "
                "build the student with the teacher's width"
            )


def check_rows(image: Tensor, **others: Tensor) -> None:
    """Raise UserError unless all embeddings have as many rows as the student's."""
    for name, other in others.items():
        if len(other) != len(image):
            raise UserError(
                f"{name} has {len(other)} rows, expected the student's {len(image)}: pass those of the same samples"
            )


class GlobalBatch:
    """Gathers each embedding matrix once, when it is known, for all terms that use it.

    The gradients of the terms at a gathered matrix are summed before its one reduce-scatter.

    Args:
        size: number of samples of this rank.
        group: ranks of the global batch; None is the default group.
        grad_reduction: how the engine combines gradients over ranks.
        equal_batches: whether every rank has `size` samples, which saves an exchange of their numbers.
    """

    def __init__(
        self, size: int, group: Group = None, grad_reduction: GradReduction = "mean", *, equal_batches: bool = False
    ):
        self.size, self.group, self.grad_reduction, self.equal_batches = size, group, grad_reduction, equal_batches
        self._pending: dict[str, Callable[[], Tensor]] = {}
        self._gathered: dict[str, Tensor] = {}
        self._local: dict[str, Tensor] = {}

    @cached_property
    def sizes(self) -> list[int]:
        """Number of samples of each rank. A collective with a host synchronisation, unless batches are equal."""
        return [self.size] * world_size(self.group) if self.equal_batches else gather_sizes(self.size, self.group)

    @property
    def count(self) -> int:
        """Size of the global batch, at least 1."""
        return max(1, sum(self.sizes))

    @property
    def own(self) -> slice:
        """Rows of this rank in the gathered matrices."""
        start = sum(self.sizes[: rank(self.group)])
        return slice(start, start + self.size)

    def start(self, **local: Tensor) -> None:
        """Start to gather matrices [b, D] of this rank; what is computed until their first use overlaps with it.

        local: by name, among image_S and text_S of the student, which get a gradient, and image_T and text_T of the
            teacher, which are sent in the dtype that they have.
        """
        for name, x in local.items():
            if name in STUDENT:
                self._pending[name] = start_gather_rows(
                    at_least_fp32(x), self.sizes, self.group, grad_reduction=self.grad_reduction
                )
            else:
                self._pending[name] = start_gather(x, self.sizes, self.group)

    def keep(self, **local: Tensor) -> None:
        """Take matrices [b, D] of the student, of which terms need this rank's rows alone: nothing is gathered."""
        factor = gradient_factor(self.group, self.grad_reduction)
        self._local |= {name: scale_gradient(at_least_fp32(x), factor) for name, x in local.items()}

    def rows(self, name: str) -> Tensor:
        """This rank's rows of a matrix, [b, D] in float32 (float64), gathered or not."""
        return self._local[name] if name in self._local else self[name][self.own]

    def finish(self) -> None:
        """Wait for the matrices that are being gathered."""
        for name in list(self._pending):
            self[name]

    def __getitem__(self, name: str) -> Tensor:
        """The matrix of all ranks, [G, D] in float32 (float64)."""
        if name not in self._gathered:
            self._gathered[name] = at_least_fp32(self._pending.pop(name)())
        # A new view for each term, at which autograd sums the gradients of the term before those of all terms.
        return self._gathered[name].view_as(self._gathered[name])
