"""The gradient of the class rows that a step used: held as a matrix, or made slab by slab when it is asked for.

Legend: D width, S rows of this step, n rows of a slab.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megacid.errors import UserError
from megacid_kernels import OnGradientSlab

OnRowGradient = Callable[[Tensor, Tensor], object]  # (local row ids [n], gradient [n, D])


class StoredRowGradient:
    """rows_S: local ids, sorted and unique; grad_SD: fp32."""

    def __init__(self, rows_S: Tensor, grad_SD: Tensor):
        self.rows, self._grad = rows_S, grad_SD

    def add(self, other: StoredRowGradient, union_U: Tensor | None, *, same_rows: bool) -> StoredRowGradient:
        """The sum; union_U: the rows of both where they are known, same_rows: that they are the same anyway."""
        if same_rows:
            self._grad += other._grad
            return self
        if union_U is None:
            union_U = torch.unique(torch.cat([self.rows, other.rows]))  # asks the device
        total = other._grad.new_zeros(len(union_U), other._grad.shape[1])
        # Each part's rows are unique, so both additions are of one number per element: any order, same bits.
        total.index_add_(0, torch.searchsorted(union_U, self.rows), self._grad)
        total.index_add_(0, torch.searchsorted(union_U, other.rows), other._grad)
        return StoredRowGradient(union_U, total)

    def matrix(self) -> Tensor:
        return self._grad

    def norm_sq(self) -> Tensor:
        if self._grad.device.type == "cpu":
            return self._grad.square().sum()
        return torch.linalg.vector_norm(self._grad).square()  # without a second [S, D]

    def each(self, take: OnRowGradient) -> None:
        take(self.rows, self._grad)


class RecomputedRowGradient:
    """Made anew, slab by slab, from the class rows as they are at that time: a slab may be followed by the update of its
    rows, for no other slab needs them. So nothing of size [S, D] is held, and no row moves before the decision of the
    guard. Its norm is that of the slabs which forward made and dropped.

    scale: 0-d, what the gradient of the loss is multiplied by. widen: from the dimensions that the step used to D.
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

    def norm_sq(self) -> Tensor:
        return self._norm_sq * self._scale.square()

    def each(self, take: OnRowGradient) -> None:
        self._each_slab(lambda start, stop, grad: take(self.rows[start:stop], self._scaled(grad)))

    def _scaled(self, grad_nD: Tensor) -> Tensor:
        return self._widen(grad_nD).mul_(self._scale)


def second_backward_error() -> UserError:
    return UserError(
        'second backward of the classifier before zero_grad with weight_grad "recomputed", which stores no gradient to add '
        'to: use one micro-batch per step, or weight_grad "stored"'
    )
