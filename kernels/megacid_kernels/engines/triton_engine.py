"""The engine of Triton's kernels and cuBLAS.

Legend: G gathered batch, b samples of one chunk, l labels per sample, D width, L rows of w in memory, S rows of w on this
rank, n rows of a block.

Unit rows are made once per block, in 16 bits for the products. The cosines of the first product exist in registers only,
or in the bytes of their exponentials ("in-place", where cuBLAS is the faster product, see `tuning`). The exponentials are
bf16, whose exponents hold exp(+-64); so are all factors of the gradient products, for a row scale of 1 / Z may be 1e-30.
Labels' cosines and pulls come from the fp32 rows where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megacid_kernels.engines.interface import EngineInputs, Labels, NegativeStatistics, Samples, TargetGradient
from megacid_kernels.epilogue import Coefficients, epilogue
from megacid_kernels.fused.exponentials import exponentials
from megacid_kernels.fused.exponentials_inplace import exponentials_
from megacid_kernels.fused.gemm import product_fp32
from megacid_kernels.fused.gradient_epilogue import finish_x_, rows_through_norm_
from megacid_kernels.fused.label_gradient import add_labels_, label_order
from megacid_kernels.fused.normalize import unit_rows
from megacid_kernels.fused.row_epilogue import row_epilogue
from megacid_kernels.fused.row_statistics import Exponentials, pitched
from megacid_kernels.fused.target import target_cosines
from megacid_kernels.fused.tuning import tiles_for
from megacid_kernels.plan import SlabBytes
from megacid_kernels.targets import Target, with_margin

# Of the unit rows in the first product, and in that of the gradient of x.
_OPERANDS = {
    "auto": (torch.float16, torch.bfloat16),
    "fp16": (torch.float16, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}
_LOSS_SLAB_ROWS = 1 << 18  # a loss alone keeps no matrix; longer slabs make no product faster
_TILE_STATISTICS = 12 / 64  # bytes per entry at most: three numbers per tile of 64 columns


class TritonBlock:
    """Rows [start, stop) of those that a call uses."""

    def __init__(self, call: EngineInputs, start: int, stop: int, products: bool):
        """products: `product` will be called, not `negatives` alone."""
        self._loss_spec = call.spec
        gather = None if call.gather is None else call.gather[start:stop]
        if call.w.dtype == torch.float32:
            # Read where they lie.
            self._w, self._gather = (call.w[start:stop] if gather is None else call.w), gather
        else:
            self._w, self._gather = (call.w[start:stop] if gather is None else call.w[gather]).float(), None
        self._bias = None if call.bias is None else call.bias[start:stop].float()
        dtypes = tuple(dict.fromkeys(_OPERANDS[call.spec.precision]))
        *units, self.inverse = unit_rows(self._w, self._gather, dtypes if products else dtypes[:1])
        self._first: Tensor | None = units[0]
        self._second: Tensor | None = units[-1]

    def negatives(
        self, student: Samples, teacher: Samples | None, labels: Labels, keep: set[str]
    ) -> NegativeStatistics:
        spec, threshold = self._loss_spec, self._loss_spec.filter_threshold
        found = NegativeStatistics({}, {}, None, torch.zeros_like(labels.slot[:, 0]))
        hidden: Tensor | None = None
        student_names = list(spec.matrices("S").items())
        if threshold is not None and not student_names:
            filtered = self._exponentials(student.operand, labels, 1.0, threshold, None, keep=False, largest=False)
            found, hidden = found._replace(removed=filtered.removed), filtered.hidden
        for name, temperature in student_names:
            first = not found.sums
            limit = threshold if first else None
            given = self._exponentials(
                student.operand, labels, temperature, limit, hidden, keep=name in keep, largest=first
            )
            if first:
                found, hidden = found._replace(largest=given.largest, removed=given.removed), given.hidden
            _note(found, name, given)
        if teacher is not None:
            for name, temperature in spec.matrices("T").items():
                given = self._exponentials(
                    teacher.operand, labels, temperature, None, hidden, keep=name in keep, largest=False
                )
                _note(found, name, given)
        return found

    def _exponentials(
        self,
        operand_bD: Tensor,
        labels: Labels,
        temperature: float,
        threshold: float | None,
        hidden_bn: Tensor | None,
        *,
        keep: bool,
        largest: bool,
    ) -> Exponentials:
        w = self._first
        assert w is not None
        options: dict[str, Any] = {
            "scale": self._loss_spec.scale / temperature, "shift": self._loss_spec.shift(temperature), "bias_S": self._bias,
            "threshold": threshold, "hidden_bS": hidden_bn, "largest": largest,
        }  # fmt: skip
        # cuBLAS writes no fp16 from bf16, and bf16 cannot hold a cosine.
        by_cublas = operand_bD.dtype != torch.bfloat16 and keep
        if by_cublas and tiles_for(w.device, w.dtype, w.shape[1]).matrix == "in-place":
            cos = pitched(len(operand_bD), len(w), operand_bD.dtype, w.device)
            torch.mm(operand_bD, w.T, out=cos)
            return exponentials_(cos, labels.slot, labels.own, **options)
        return exponentials(operand_bD, w, labels.slot, labels.own, store=keep, **options)

    def release_logit_rows(self) -> None:
        if self._first is not self._second:
            self._first = None

    def release_rows(self) -> None:
        self._first = self._second = None

    def product(self, matrix_bn: Tensor, total_bD: Tensor | None = None) -> Tensor:
        assert self._second is not None
        return product_fp32(matrix_bn, self._second, total_bD)

    def add_gradient(self, grad_nD: Tensor | None, matrix_bn: Tensor, features_bD: Tensor) -> Tensor:
        return product_fp32(matrix_bn.T, features_bD.to(matrix_bn.dtype), grad_nD)

    def add_labels_(self, grad_nD: Tensor, labels: Labels, pulls: list[TargetGradient]) -> None:
        order = label_order(*reversed(labels))
        row = labels.slot if self._gather is None or not len(grad_nD) else self._gather[labels.slot]
        for coefficient, cos, samples in pulls:
            add_labels_(grad_nD, order, coefficient, cos, samples.x, samples.inverse, self._w, self.inverse, row)

    def through_norm_(self, grad_nD: Tensor) -> Tensor:
        rows_through_norm_(grad_nD, self._w, self._gather, self.inverse)
        return grad_nD


def _note(found: NegativeStatistics, name: str, given: Exponentials) -> None:
    found.sums[name] = given.sums
    if given.matrix is not None:
        found.matrices[name] = given.matrix


class TritonEngine:
    def __init__(self, call: EngineInputs):
        self._call = call
        self.num_rows = len(call.w) if call.gather is None else len(call.gather)
        self._inverse = torch.zeros(self.num_rows, device=call.w.device)  # filled as blocks are made

    def samples(self, x_GD: Tensor) -> Samples:
        x, operand = x_GD.contiguous(), _OPERANDS[self._call.spec.precision][0]
        *units, inverse = unit_rows(x, None, tuple(dict.fromkeys((torch.float32, operand))))
        return Samples(x, inverse[:, None], units[0], units[-1])

    def block(self, start: int, stop: int, products: bool) -> TritonBlock:
        found = TritonBlock(self._call, start, stop, products)
        self._inverse[start:stop] = found.inverse
        return found

    def target(self, samples: Samples, labels: Labels, margin: bool) -> Target:
        w, row = self._label_rows(labels)
        cos, sin = target_cosines(samples.x, samples.inverse, w, self._inverse, row, labels.slot, labels.own)
        return with_margin(cos, sin, labels.own, self._call.spec if margin else None)

    def _label_rows(self, labels: Labels) -> tuple[Tensor, Tensor]:
        """(fp32 rows, int64 [b, l] which of them the labels are)."""
        call, row = self._call, labels.slot
        if call.gather is not None and self.num_rows:
            row = call.gather[row]
        if call.w.dtype == torch.float32 or not self.num_rows:
            return call.w.float(), row
        return call.w[row.flatten()].float(), torch.arange(row.numel(), device=row.device).view(row.shape)

    def coefficients(self, stats: dict[str, Tensor], present: Tensor, share: Tensor) -> Coefficients:
        spec, weights = self._call.spec, self._call.spec.weights
        if weights.beta > 0 or weights.gamma > 0 or present.shape[1] > 1:
            return epilogue(spec, stats, present, share)
        each = share * weights.alpha
        loss, over_z, pull = row_epilogue(
            stats["S"], stats["psi0"], each, scale=spec.scale, shift=spec.shift()
        )  # fmt: skip
        nothing = torch.zeros_like(loss)
        return Coefficients(torch.stack([loss, nothing, nothing]), pull[:, None], None, {"S": over_z}, {})

    def finish_x(self, products: list[tuple[Tensor, Tensor]], pull: TargetGradient, labels: Labels) -> Tensor:
        (coefficient, total), *more = products
        if more:
            total = coefficient[:, None] * total
            for other, product in more:
                total.addcmul_(other[:, None], product)
            coefficient = torch.ones_like(coefficient)
        w, row = self._label_rows(labels)
        x, inverse = pull.samples.x, pull.samples.inverse
        return finish_x_(total, coefficient, pull.coefficient, pull.cos, x, inverse, w, self._inverse, row, labels.slot)

    def matrix_bytes(self) -> int:
        return 4 if self._call.spec.precision == "fp32" else 2

    def slab_bytes(self, batch: int, gradients: bool) -> SlabBytes:
        spec, width = self._call.spec, self._call.w.shape[1]
        kept = len(spec.matrices("S")) + len(spec.matrices("T")) if gradients else int(spec.weights.gamma > 0)
        hidden = spec.filter_threshold is not None
        each = batch * (kept * self.matrix_bytes() + hidden + _TILE_STATISTICS)
        each += width * (4 + 4 * gradients)  # the unit rows, and their gradient
        if self._call.w.dtype != torch.float32:
            each += 4 * width
        return SlabBytes(4 * self.num_rows, int(each), max(1, self.num_rows) if kept else _LOSS_SLAB_ROWS)
