"""The engine of Triton kernels and cuBLAS.

Legend: G gathered batch, b samples of one chunk, l labels per sample, D width, S rows of w on this rank, n rows of a
block.

    unit_rows       reads fp32 rows of w; writes unit rows in 16 bits, once per block
    exponentials    reads 16-bit unit rows; writes the bf16 matrix and its fp32 row sums. The cosines stay in registers,
                    or occupy the same bytes ("in-place", where cuBLAS computes the product faster; see `tuning`)
    target_cosines  reads fp32 rows of x and of the labels' classes; writes fp32 cosines and sines
    -- all-reduce, under the product for the gradient of x: all coefficients need the sums of all ranks --
    row_epilogue    reads the reduced sums; writes losses and coefficients
    cuBLAS          reads the matrix; writes both gradient products in fp32
    add_labels_, finish_x_, rows_through_norm_    add the labels' part; backward of both normalisations

Exponentials are bf16 because its exponent range holds exp(+-64), and so are all factors of the gradient products,
because a row factor 1 / Z may be 1e-30.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megacid_kernels.engines.interface import EngineInputs, NegativeStatistics, Samples, TargetGradient
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
from megacid_kernels.loss_spec import Distribution
from megacid_kernels.row_statistics import RowStatistics
from megacid_kernels.targets import Labels, Target, with_margin

# precision -> dtypes of the unit rows in the first product, and in that of the gradient of x
_OPERANDS = {
    "auto": (torch.float16, torch.bfloat16),
    "fp16": (torch.float16, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}


class TritonBlock:
    """Class rows [start, stop) of those that are used."""

    def __init__(self, inputs: EngineInputs, start: int, stop: int, products: bool):
        """products: `product` will be called as well as `negatives`."""
        self._spec = inputs.spec
        gather = None if inputs.gather is None else inputs.gather[start:stop]
        if inputs.w.dtype == torch.float32:
            # Read in place, without a copy.
            self._w, self._gather = (inputs.w[start:stop] if gather is None else inputs.w), gather
        else:
            self._w, self._gather = (inputs.w[start:stop] if gather is None else inputs.w[gather]).float(), None
        self._bias = None if inputs.bias is None else inputs.bias[start:stop].float()
        dtypes = tuple(dict.fromkeys(_OPERANDS[inputs.spec.precision]))
        *units, self.inverse = unit_rows(self._w, self._gather, dtypes if products else dtypes[:1])
        self._first: Tensor | None = units[0]
        self._second: Tensor | None = units[-1]

    def negatives(
        self, student: Samples, teacher: Samples | None, labels: Labels, keep: set[Distribution]
    ) -> NegativeStatistics:
        spec, threshold = self._spec, self._spec.filter_threshold
        stats = NegativeStatistics({}, {}, None, torch.zeros_like(labels.slot[:, 0]))
        hidden: Tensor | None = None  # [b, n] bool, negatives removed by the filter
        operands = [(student.operand, distribution) for distribution in spec.distributions("student")]
        if threshold is not None and not operands:
            plain = Distribution("student", 1.0)
            filtered = self._exponentials(student.operand, labels, plain, threshold=threshold)
            stats, hidden = stats._replace(removed=filtered.removed), filtered.hidden
        if teacher is not None:
            operands += [(teacher.operand, distribution) for distribution in spec.distributions("teacher")]
        for operand, distribution in operands:
            first = distribution.source == "student" and not stats.sums
            result = self._exponentials(
                operand, labels, distribution,
                threshold=threshold if first else None, hidden_bn=hidden, keep=distribution in keep, largest=first,
            )  # fmt: skip
            if first:
                stats, hidden = stats._replace(largest=result.largest, removed=result.removed), result.hidden
            stats.sums[distribution] = result.sums
            if result.matrix is not None:
                stats.matrices[distribution] = result.matrix
        return stats

    def _exponentials(
        self,
        operand_bD: Tensor,
        labels: Labels,
        distribution: Distribution,
        *,
        threshold: float | None = None,
        hidden_bn: Tensor | None = None,
        keep: bool = False,
        largest: bool = False,
    ) -> Exponentials:
        w = self._first
        assert w is not None
        options: dict[str, Any] = {
            "scale": self._spec.scale / distribution.temperature, "shift": self._spec.shift(distribution.temperature),
            "bias_S": self._bias, "threshold": threshold, "hidden_bS": hidden_bn, "largest": largest,
        }  # fmt: skip
        # cuBLAS does not write fp16 from bf16 factors, and bf16 is too coarse for a cosine.
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

    def add_target_gradients_(self, grad_nD: Tensor, labels: Labels, target_grads: list[TargetGradient]) -> None:
        order = label_order(*reversed(labels))
        row = labels.slot if self._gather is None or not len(grad_nD) else self._gather[labels.slot]
        for coefficient, cos, samples in target_grads:
            add_labels_(grad_nD, order, coefficient, cos, samples.x, samples.inverse, self._w, self.inverse, row)

    def norm_backward_(self, grad_nD: Tensor) -> Tensor:
        rows_through_norm_(grad_nD, self._w, self._gather, self.inverse)
        return grad_nD


class TritonEngine:
    def __init__(self, inputs: EngineInputs):
        self._inputs = inputs
        self.num_rows = len(inputs.w) if inputs.gather is None else len(inputs.gather)
        self._inverse = torch.zeros(self.num_rows, device=inputs.w.device)  # 1 / |w|, filled block by block

    def samples(self, x_GD: Tensor) -> Samples:
        x, operand = x_GD.contiguous(), _OPERANDS[self._inputs.spec.precision][0]
        *units, inverse = unit_rows(x, None, tuple(dict.fromkeys((torch.float32, operand))))
        return Samples(x, inverse[:, None], units[0], units[-1])

    def block(self, start: int, stop: int, products: bool) -> TritonBlock:
        block = TritonBlock(self._inputs, start, stop, products)
        self._inverse[start:stop] = block.inverse
        return block

    def target(self, samples: Samples, labels: Labels, margin: bool) -> Target:
        w, row = self._label_rows(labels)
        cos, sin = target_cosines(samples.x, samples.inverse, w, self._inverse, row, labels.slot, labels.own)
        return with_margin(cos, sin, labels.own, self._inputs.spec if margin else None)

    def _label_rows(self, labels: Labels) -> tuple[Tensor, Tensor]:
        """A matrix of fp32 rows, and the index int64 [b, l] of each label's row in it."""
        w, gather, row = self._inputs.w, self._inputs.gather, labels.slot
        if gather is not None and self.num_rows:
            row = gather[row]
        if w.dtype == torch.float32 or not self.num_rows:
            return w.float(), row
        return w[row.flatten()].float(), torch.arange(row.numel(), device=row.device).view(row.shape)

    def coefficients(self, stats: RowStatistics, present: Tensor, share: Tensor) -> Coefficients:
        spec, weights = self._inputs.spec, self._inputs.spec.weights
        if weights.beta > 0 or weights.gamma > 0 or present.shape[1] > 1 or stats.psi is None:
            return epilogue(spec, stats, present, share)
        plain = Distribution("student", 1.0)
        loss, coefficient, residual = row_epilogue(
            stats.sums[plain], stats.psi[:, 0], share * weights.alpha, scale=spec.scale, shift=spec.shift()
        )
        zero = torch.zeros_like(loss)
        return Coefficients(torch.stack([loss, zero, zero]), residual[:, None], None, {plain: coefficient}, {})

    def finish_x(self, products: list[tuple[Tensor, Tensor]], target_grad: TargetGradient, labels: Labels) -> Tensor:
        (coefficient, total), *more = products
        if more:
            total = coefficient[:, None] * total
            for other, product in more:
                total.addcmul_(other[:, None], product)
            coefficient = torch.ones_like(coefficient)
        w, row = self._label_rows(labels)
        target_coefficient, cos, samples = target_grad
        return finish_x_(
            total, coefficient, target_coefficient, cos, samples.x, samples.inverse, w, self._inverse, row, labels.slot
        )
