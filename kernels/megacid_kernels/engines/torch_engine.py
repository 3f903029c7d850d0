"""The engine in plain PyTorch: float32 or float64, any device.

Legend: b samples, l labels per sample, D width, S rows of w on this rank, n rows of a block.

It makes no second copy [n, D] of the class rows: rows that may be overwritten are normalised in place. Other rows stay
as they are; their norms divide the cosines instead, and later the exponentials (after they are summed), which puts the
norms into both gradient products. Rows with extreme norms are copied on a CPU. On a device, where looking at the norms
would synchronise, their exponentials may overflow, which makes gradients inf or NaN.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megacid_kernels.engines.interface import EngineInputs, NegativeStatistics, Samples, TargetGradient, Tiles
from megacid_kernels.epilogue import Coefficients, epilogue
from megacid_kernels.loss_spec import Distribution, LossSpec, Source
from megacid_kernels.products import tiles, times, times_transposed, transposed_times
from megacid_kernels.row_statistics import RowStatistics
from megacid_kernels.rows import are_extreme, inverse_norms, is_on_host, row_blocks
from megacid_kernels.targets import BatchLabels, Labels, Target, batch_labels, target_of

_CPU_TILE_ROWS = 2048  # class rows of a tile on a CPU


class TorchBlock:
    """Class rows; on a CPU in tiles, so that what passes over a matrix of cosines finds it in the cache."""

    def __init__(self, spec: LossSpec, w_nD: Tensor, bias_n: Tensor | None, overwrite: bool):
        self.spec, self.bias = spec, bias_n
        in_tiles = is_on_host(w_nD) and len(w_nD) > 0
        self.tiles = tiles(len(w_nD), _CPU_TILE_ROWS) if in_tiles else [slice(0, len(w_nD))]
        self.inverse = inverse_norms(w_nD)
        self.w, self.column_scale = w_nD, None
        if overwrite:
            w_nD.mul_(self.inverse)
        elif are_extreme(self.inverse):
            self.w = w_nD * self.inverse
        else:
            self.column_scale = self.inverse[:, 0]  # [n] factors for the columns of matrices [b, n]

    def unit_rows(self, slot: Tensor) -> Tensor:
        """[..., D]"""
        if not len(self.w):
            return self.w.new_zeros(*slot.shape, self.w.shape[1])
        rows = self.w[slot]
        return rows if self.column_scale is None else rows.mul_(self.column_scale[slot][..., None])

    def negatives(
        self, student: Samples, teacher: Samples | None, labels: Labels, keep: set[Distribution]
    ) -> NegativeStatistics:
        if len(self.tiles) == 1:
            return self._negatives(self.tiles[0], student, teacher, labels, keep)
        parts = [(rows, labels.in_rows(rows.start, rows.stop)) for rows in self.tiles]
        return functools.reduce(
            NegativeStatistics.joined, (self._negatives(rows, student, teacher, own, keep) for rows, own in parts)
        )

    def _negatives(
        self, rows: slice, student: Samples, teacher: Samples | None, labels: Labels, keep: set[Distribution]
    ) -> NegativeStatistics:
        """`negatives` of one tile."""
        spec, threshold = self.spec, self.spec.filter_threshold
        bias_n = None if self.bias is None else self.bias[rows]
        stats = NegativeStatistics({}, {}, None, None)
        hidden: Tensor | None = None  # [b, n] bool, negatives removed by the filter
        sources: list[tuple[Source, Samples | None]] = [("student", student), ("teacher", teacher)]
        for source, samples in sources:
            distributions, filters = spec.distributions(source), source == "student" and threshold is not None
            if samples is None or not (distributions or filters):
                continue
            first = distributions[0].temperature if distributions else 1.0
            logits = self._scale_columns_(times_transposed(samples.unit * (spec.scale / first), self.w[rows]), rows)
            _hide_labels_(logits, labels)
            if source == "student" and threshold is not None:
                hidden = logits > threshold * (spec.scale / first)
                if bias_n is not None:
                    hidden &= bias_n > -torch.inf
                stats = stats._replace(removed=hidden.sum(1))
            if hidden is not None:
                logits.masked_fill_(hidden, -torch.inf)
            # The first distribution comes last, because it overwrites the logits.
            for distribution in [*distributions[1:], *distributions[:1]]:
                temperature = distribution.temperature
                z = logits if temperature == first else logits * (first / temperature)
                shift = spec.shift(temperature)
                if bias_n is not None:
                    z += bias_n - shift
                elif shift:
                    z -= shift
                if source == "student" and temperature == first and z.shape[1]:
                    stats = stats._replace(largest=(z.amax(1) + shift) / (spec.scale / temperature))
                stats.sums[distribution] = z.exp_().sum(1)
                if distribution in keep:
                    stats.matrices[distribution] = [self._scale_columns_(z, rows)]
        return stats

    def _scale_columns_(self, matrix_bn: Tensor, rows: slice) -> Tensor:
        return matrix_bn if self.column_scale is None else matrix_bn.mul_(self.column_scale[rows])

    def release_logit_rows(self) -> None:
        """Nothing: all products use the same rows."""

    def release_rows(self) -> None:
        """Nothing: `norm_backward_` uses them."""

    def product(self, matrix: Tiles, total_bD: Tensor | None = None) -> Tensor:
        for rows, tile in zip(self.tiles, matrix):
            total_bD = times(tile, self.w[rows], total_bD)
        assert total_bD is not None
        return total_bD

    def add_gradient(self, grad_nD: Tensor | None, matrix: Tiles, features: list[tuple[Tensor, Samples]]) -> Tensor:
        features_bD = functools.reduce(torch.add, [factor[:, None] * samples.unit for factor, samples in features])
        total = self.w.new_empty(self.w.shape) if grad_nD is None else grad_nD
        for rows, tile in zip(self.tiles, matrix):
            transposed_times(tile, features_bD, out=total[rows], add=grad_nD is not None)
        return total

    def add_target_gradients_(self, grad_nD: Tensor, labels: Labels, target_grads: list[TargetGradient]) -> None:
        if not len(grad_nD):
            return
        w_blD, scale = self.unit_rows(labels.slot), self.column_scale
        for i in range(labels.slot.shape[1]):
            slot = labels.slot[:, i]
            for coefficient, cos, samples in target_grads:
                tangent = (samples.unit - cos[:, i, None] * w_blD[:, i]).mul_(coefficient[:, i, None])
                _add_rows_(grad_nD, slot, tangent if scale is None else tangent.mul_(scale[slot][:, None]))

    def norm_backward_(self, grad_nD: Tensor) -> Tensor:
        for rows in row_blocks(grad_nD):
            part, w, inverse = grad_nD[rows], self.w[rows], self.inverse[rows]
            along = torch.linalg.vecdot(w, part)[:, None]
            if self.column_scale is None:
                part.addcmul_(w, along, value=-1).mul_(inverse)
            else:
                # `part` already contains one 1 / |w|. w is not a unit row, so multiply by 1 / |w| twice; in two steps,
                # because 1 / |w|^2 may overflow.
                part.addcmul_(w, along.mul_(inverse).mul_(inverse), value=-1)
        return grad_nD

    def deferred_norm(self) -> None:
        return None


class TorchEngine:
    def __init__(self, inputs: EngineInputs, dtype: torch.dtype):
        self._inputs, self._dtype = inputs, dtype
        self.num_rows = len(inputs.w) if inputs.gather is None else len(inputs.gather)
        self._whole: TorchBlock | None = None

    def samples(self, x_GD: Tensor) -> Samples:
        inverse = inverse_norms(x_GD)
        unit = x_GD * inverse
        return Samples(x_GD, inverse, unit, unit)

    def labels(self, target_Gl: Tensor, rows: Tensor | None) -> BatchLabels:
        return batch_labels(target_Gl, rows, self._inputs.spec, self.num_rows, self._dtype)

    def block(self, start: int, stop: int, products: bool) -> TorchBlock:
        inputs, gather = self._inputs, self._inputs.gather
        w_nD = inputs.w[start:stop] if gather is None else inputs.w.index_select(0, gather[start:stop])
        converted = w_nD.to(self._dtype)
        is_copy = gather is not None or converted is not w_nD
        bias = None if inputs.bias is None else inputs.bias[start:stop].to(self._dtype)
        block = TorchBlock(inputs.spec, converted, bias, is_copy or (inputs.overwrite_w and inputs.single_block))
        if inputs.single_block:
            self._whole = block
        return block

    def _label_rows(self, slot: Tensor) -> Tensor:
        """Unit rows [b, l, D]."""
        if self._whole is not None:
            return self._whole.unit_rows(slot)
        w, gather = self._inputs.w, self._inputs.gather
        if not self.num_rows:
            return torch.zeros(*slot.shape, w.shape[1], dtype=self._dtype, device=slot.device)
        rows = w[slot if gather is None else gather[slot]].to(self._dtype)
        return rows * inverse_norms(rows)

    def target(self, samples: Samples, labels: Labels, margin: bool) -> Target:
        spec = self._inputs.spec if margin else None
        return target_of(samples.unit, self._label_rows(labels.slot), labels.own, spec)

    def gap(self, student: Samples, teacher: Samples, product_bD: Tensor) -> Tensor:
        return torch.linalg.vecdot(teacher.unit - student.unit, product_bD)

    def coefficients(
        self, stats: RowStatistics, labels: BatchLabels, student: Target | None, teacher: Target | None
    ) -> Coefficients:
        return epilogue(self._inputs.spec, stats, labels, student, teacher)

    def finish_x(self, products: list[tuple[Tensor, Tensor]], target_grad: TargetGradient, labels: Labels) -> Tensor:
        unit, inverse = target_grad.samples.unit, target_grad.samples.inverse
        # Only the tangential part: at cos = +-1, where d psi is large, the rest would not cancel in the Jacobian.
        tangent = self._label_rows(labels.slot) - target_grad.cos[..., None] * unit[:, None, :]
        grad = torch.bmm(target_grad.coefficient[:, None, :], tangent)[:, 0]
        for coefficient, product in products:
            grad.addcmul_(coefficient[:, None], product)
        return grad.addcmul_(unit, torch.linalg.vecdot(unit, grad)[:, None], value=-1).mul_(inverse)


def _hide_labels_(logits_bn: Tensor, labels: Labels) -> None:
    if logits_bn.shape[1]:
        at = logits_bn.gather(1, labels.slot)
        # Labels owned by other ranks may share a slot with an owned one, whose -inf must win: take the minimum.
        logits_bn.scatter_reduce_(1, labels.slot, at.masked_fill_(labels.own, -torch.inf), "amin")


def _add_rows_(total: Tensor, slot: Tensor, rows: Tensor) -> None:
    """total[slot] += rows in a reproducible order, also for repeated slots."""
    if total.device.type == "cpu":
        total.index_add_(0, slot, rows)  # sequential
    else:
        total.index_put_((slot,), rows, accumulate=True)  # sorts the slots; index_add_ would use atomics
