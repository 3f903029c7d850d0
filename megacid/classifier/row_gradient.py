"""Gradient of the class rows used in a step: stored as a matrix, or recomputed slab by slab.

Legend: D width, S rows of this step, U rows of several micro-batches, n rows of a slab.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megacid.errors import UserError
from megacid_kernels import OnGradientSlab

OnRowGradient = Callable[[Tensor, Tensor], object]  # (local row ids [n], gradient [n, D])


class StoredRowGradient:
    """rows_S: local ids, sorted and unique; grad_SD: fp32; norm_sq: its squared norm, 0-d fp32, if it is known."""

    def __init__(self, rows_S: Tensor, grad_SD: Tensor, norm_sq: Tensor | None = None):
        self.rows, self._grad, self._norm_sq = rows_S, grad_SD, norm_sq
        self._sparse: Tensor | None = None

    def add(self, other: StoredRowGradient, rows_U: Tensor | None, *, same_rows: bool) -> StoredRowGradient:
        """The sum of two micro-batches. rows_U: the rows of both, if known; same_rows: both have the same rows."""
        if same_rows:
            self.matrix().add_(other.matrix())
            return self
        if rows_U is None:
            rows_U = torch.unique(torch.cat([self.rows, other.rows]))  # synchronises with the device
        total = other._grad.new_zeros(len(rows_U), other._grad.shape[1])
        # Rows are unique within each part, so an element is the sum of two numbers: the same bits in any order.
        total.index_add_(0, torch.searchsorted(rows_U, self.rows), self.matrix())
        total.index_add_(0, torch.searchsorted(rows_U, other.rows), other.matrix())
        return StoredRowGradient(rows_U, total)

    def matrix(self) -> Tensor:
        """The gradient, which the caller may change."""
        self._norm_sq = None
        # An operation in place on a sparse tensor may give it other values.
        return self._grad if self._sparse is None else self._sparse._values()

    def sparse(self, num_rows: int) -> Tensor:
        """The gradient as a sparse tensor [num_rows, D] on the same memory."""
        self._norm_sq = None
        if self._sparse is None:
            size = num_rows, self._grad.shape[1]
            # Without checks, which would synchronise with the device.
            self._sparse = torch.sparse_coo_tensor(
                self.rows[None], self._grad, size, check_invariants=False, is_coalesced=True
            )
        return self._sparse

    def stored(self) -> StoredRowGradient:
        return self

    def scale_(self, factor: Tensor) -> None:
        self.matrix().mul_(factor)

    def norm_sq(self) -> Tensor:
        if self._norm_sq is not None:
            return self._norm_sq
        if self._grad.device.type == "cpu":
            return self.matrix().square().sum()
        return torch.linalg.vector_norm(self.matrix()).square()  # without a second [S, D]

    def for_each_part(self, update: OnRowGradient) -> None:
        update(self.rows, self.matrix())


def without_padding(each_slab: Callable[[OnGradientSlab], None], num_rows: int) -> Callable[[OnGradientSlab], None]:
    """`each_slab` for the first num_rows rows alone."""

    def each(take: OnGradientSlab) -> None:
        def take_rows(start: int, stop: int, grad_nD: Tensor) -> None:
            if start < num_rows:
                take(start, min(stop, num_rows), grad_nD[: num_rows - start])

        each_slab(take_rows)

    return each


class RecomputedRowGradient:
    """Recomputes its slabs from the current class rows. A slab depends only on its own rows, so they may be updated
    right after it. No [S, D] tensor is stored, no row changes before the guard's decision, and the norm is forward's.

    scale: 0-d, gradient of the loss. widen: maps a slab from the sampled feature dimensions to D.
    """

    def __init__(
        self,
        rows_S: Tensor,
        width: int,
        each_slab: Callable[[OnGradientSlab], None],
        norm_sq: Tensor,
        scale: Tensor,
        widen: Callable[[Tensor], Tensor],
    ):
        self.rows, self._width, self._each_slab, self._widen = rows_S, width, each_slab, widen
        self._norm_sq, self._scale = norm_sq, scale

    def matrix(self) -> Tensor:
        whole = self._norm_sq.new_empty(len(self.rows), self._width)
        self._each_slab(lambda start, stop, grad: whole[start:stop].copy_(self._scaled(grad)))
        return whole

    def stored(self) -> StoredRowGradient:
        return StoredRowGradient(self.rows, self.matrix())

    def scale_(self, factor: Tensor) -> None:
        self._scale = self._scale * factor

    def norm_sq(self) -> Tensor:
        return self._norm_sq * self._scale.square()

    def for_each_part(self, update: OnRowGradient) -> None:
        self._each_slab(lambda start, stop, grad: update(self.rows[start:stop], self._scaled(grad)))

    def _scaled(self, grad_nD: Tensor) -> Tensor:
        return self._widen(grad_nD).mul_(self._scale)


RowGradient = StoredRowGradient | RecomputedRowGradient


def add_row_gradients(
    old: RowGradient | None, new: RowGradient, rows_U: Tensor | None, *, same_rows: bool
) -> RowGradient:
    """The sum of two micro-batches, see `StoredRowGradient.add`; old is None before the first."""
    if old is None:
        return new
    if isinstance(old, RecomputedRowGradient) or isinstance(new, RecomputedRowGradient):
        raise UserError(
            'second backward of the classifier before zero_grad with weight_grad "recomputed", expected one: use one '
            'micro-batch per step, or weight_grad "stored"'
        )
    return old.add(new, rows_U, same_rows=same_rows)
