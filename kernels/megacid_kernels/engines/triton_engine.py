"""The engine of Triton kernels and cuBLAS.

Legend: G gathered batch, b samples of one chunk, l labels per sample, D width, S rows of w on this rank, n rows of a
block.

    unit_rows       reads rows of w; writes unit rows in 16 bits, once per block
    exponentials    reads 16-bit unit rows; writes the bf16 matrix and its fp32 row sums. The cosines stay in registers,
                    or occupy the same bytes ("in-place", where cuBLAS computes the product faster; see `tuning`)
    locate_labels   reads the labels; writes the rows that hold their classes, and the samples' weights
    target_margins  reads rows of x and of the labels' classes; writes fp32 cosines, psi and its derivative
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

from megacid_kernels.engines.interface import (
    DeferredNorm,
    EngineInputs,
    NegativeStatistics,
    Samples,
    TargetGradient,
    Tiles,
)
from megacid_kernels.epilogue import Coefficients, epilogue
from megacid_kernels.fused.exponentials import exponentials
from megacid_kernels.fused.exponentials_inplace import exponentials_
from megacid_kernels.fused.gemm import product_fp32
from megacid_kernels.fused.gradient_epilogue import finish_x_, rows_through_norm_
from megacid_kernels.fused.label_gradient import add_labels_, label_order
from megacid_kernels.fused.labels import locate_labels
from megacid_kernels.fused.normalize import unit_rows
from megacid_kernels.fused.row_epilogue import SoftmaxRows, row_epilogue
from megacid_kernels.fused.row_statistics import Exponentials, difference_along, pitch, pitched, with_padding
from megacid_kernels.fused.target import target_cosines, target_margins
from megacid_kernels.fused.tuning import tiles_for
from megacid_kernels.loss_spec import Distribution
from megacid_kernels.margin import SIN_FLOOR, Margin
from megacid_kernels.row_statistics import RowStatistics
from megacid_kernels.targets import BatchLabels, Labels, Target, with_margin

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
        self._gather = None if inputs.gather is None else inputs.gather[start:stop]
        self._w = inputs.w[start:stop] if self._gather is None else inputs.w
        self._bias = None if inputs.bias is None else inputs.bias[start:stop].float()
        dtypes = tuple(dict.fromkeys(_OPERANDS[inputs.spec.precision]))
        # Both gradient products take the rows and the matrices of exponentials up to their pitch: the padding is 0.
        self._rows = len(self._w if self._gather is None else self._gather)
        dtypes, length = dtypes if products else dtypes[:1], pitch(self._rows)
        *units, self.inverse = unit_rows(self._w, self._gather, dtypes, length=length)
        self._first: Tensor | None = units[0][: self._rows]
        self._second: Tensor | None = units[-1]

    def negatives(
        self, student: Samples, teacher: Samples | None, labels: Labels, keep: set[Distribution]
    ) -> NegativeStatistics:
        spec, threshold = self._spec, self._spec.filter_threshold
        stats = NegativeStatistics({}, {}, None, None)
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
                stats.matrices[distribution] = [with_padding(result.matrix)]
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
            with_padding(cos)[:, len(w) :].zero_()
            return exponentials_(cos, labels.slot, labels.own, **options)
        return exponentials(operand_bD, w, labels.slot, labels.own, store=keep, **options)

    def release_logit_rows(self) -> None:
        self._first = None

    def release_rows(self) -> None:
        self._first = self._second = None

    def product(self, matrix: Tiles, total_bD: Tensor | None = None) -> Tensor:
        assert self._second is not None
        (matrix_bn,) = matrix
        return product_fp32(matrix_bn, self._second, total_bD)

    def add_gradient(self, grad_nD: Tensor | None, matrix: Tiles, features: list[tuple[Tensor, Samples]]) -> Tensor:
        (matrix_bn,) = matrix
        (coefficient, samples), *more = features
        factors = torch.empty(samples.unit.shape, dtype=matrix_bn.dtype, device=matrix_bn.device)
        if more:
            ((other, others),) = more
            torch.addcmul(coefficient[:, None] * samples.unit, other[:, None], others.unit, out=factors)
        else:
            torch.mul(coefficient[:, None], samples.unit, out=factors)
        if grad_nD is not None:  # the padding that the first product wrote
            grad_nD = grad_nD.as_strided((pitch(self._rows), grad_nD.shape[1]), grad_nD.stride())
        return product_fp32(matrix_bn.T, factors, grad_nD)[: self._rows]

    def add_target_gradients_(self, grad_nD: Tensor, labels: Labels, target_grads: list[TargetGradient]) -> None:
        order = label_order(labels.slot, labels.own)
        for coefficient, cos, samples in target_grads:
            add_labels_(
                grad_nD, order, coefficient, cos, samples.x, samples.inverse, self._w, self._gather, self.inverse
            )

    def norm_backward_(self, grad_nD: Tensor) -> Tensor:
        rows_through_norm_(grad_nD, self._w, self._gather, self.inverse)
        return grad_nD

    def deferred_norm(self) -> DeferredNorm:
        return DeferredNorm(self._w, self._gather, self.inverse, self._w._version)


class TritonEngine:
    def __init__(self, inputs: EngineInputs):
        inputs = self._inputs = inputs._replace(w=inputs.w.contiguous())
        self.num_rows = len(inputs.w) if inputs.gather is None else len(inputs.gather)
        self._inverse = torch.empty(0 if inputs.single_block else self.num_rows, device=inputs.w.device)  # 1 / |w|

    def samples(self, x_GD: Tensor) -> Samples:
        x, operand = x_GD.contiguous(), _OPERANDS[self._inputs.spec.precision][0]
        *units, inverse = unit_rows(x, None, tuple(dict.fromkeys((torch.float32, operand))))
        return Samples(x, inverse[:, None], units[0], units[-1])

    def block(self, start: int, stop: int, products: bool) -> TritonBlock:
        block = TritonBlock(self._inputs, start, stop, products)
        if self._inputs.single_block:
            self._inverse = block.inverse
        else:
            self._inverse[start:stop] = block.inverse
        return block

    def labels(self, target_Gl: Tensor, rows: Tensor | None) -> BatchLabels:
        spec = self._inputs.spec
        return locate_labels(
            target_Gl.contiguous(), None if rows is None else rows.contiguous(), self.num_rows, spec.class_start,
            mean=spec.reduction == "mean",
        )  # fmt: skip

    def target(self, samples: Samples, labels: Labels, margin: bool) -> Target:
        inputs, spec = self._inputs, self._inputs.spec
        pairs = (samples.x, samples.inverse, inputs.w, inputs.gather, self._inverse, labels.slot, labels.own)
        chosen = (spec.margin if margin else None) or Margin()
        if type(chosen) is not Margin or chosen.m1 != 1:
            cos, sin = target_cosines(*pairs)  # m1 and other margins: PyTorch's operators
            return with_margin(cos, sin, labels.own, spec)
        cos, psi, dpsi = target_margins(
            *pairs, m2=chosen.m2, m3=chosen.m3, easy_margin=chosen.easy_margin, exact=spec.margin_grad == "exact",
            sin_floor=SIN_FLOOR,
        )  # fmt: skip
        return Target(cos, psi, dpsi)

    def gap(self, student: Samples, teacher: Samples, product_bD: Tensor) -> Tensor:
        return difference_along(teacher.unit, student.unit, product_bD)

    def coefficients(
        self, stats: RowStatistics, labels: BatchLabels, student: Target | None, teacher: Target | None
    ) -> Coefficients:
        spec, w = self._inputs.spec, self._inputs.spec.weights
        if labels.present.shape[1] > 1 or not stats.sums:
            return epilogue(spec, stats, labels, student, teacher)

        def softmax(distribution: Distribution) -> SoftmaxRows:
            target, temperature = stats.psi if distribution.source == "student" else stats.teacher_cos, distribution[1]
            assert target is not None
            return SoftmaxRows(stats.sums[distribution], target, spec.scale / temperature, spec.shift(temperature))

        plain_student, plain_teacher = Distribution("student", 1.0), Distribution("teacher", 1.0)
        soft_student, soft_teacher = spec.softened("student"), spec.softened("teacher")
        rows = row_epilogue(
            labels.share, labels.num_labels, stats.owned,
            student=softmax(plain_student) if w.alpha > 0 else None,
            teacher=softmax(plain_teacher) if w.beta > 0 else None,
            kl=(softmax(soft_student), softmax(soft_teacher)) if w.gamma > 0 else None,
            gap_b=stats.gap, dpsi_b=None if student is None else student.dpsi, own_b=labels.located.own,
            weights=(w.alpha, w.beta, w.gamma),
        )  # fmt: skip
        of_student = {plain_student: rows.coefficients[0]} if w.alpha > 0 else {}
        if w.gamma > 0:
            of_student |= {soft_student: rows.coefficients[2], soft_teacher: rows.coefficients[3]}
        return Coefficients(
            rows.raw,
            rows.student[:, None] if w.needs_student else None,
            rows.teacher[:, None] if w.beta > 0 else None,
            of_student,
            {plain_teacher: rows.coefficients[1]} if w.beta > 0 else {},
        )

    def finish_x(self, products: list[tuple[Tensor, Tensor]], target_grad: TargetGradient, labels: Labels) -> Tensor:
        (coefficient, total), *more = products
        target_coefficient, cos, samples = target_grad
        return finish_x_(
            total, coefficient, target_coefficient, cos, samples.x, samples.inverse, self._inputs.w,
            self._inputs.gather, self._inverse, labels.slot,
            more=[(product, factor) for factor, product in more],
        )  # fmt: skip
