"""The engine in plain PyTorch, float32 or float64, on any device.

Legend: b samples, l labels per sample, D width, S rows of w on this rank, n rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megacid_kernels.engines.interface import EngineInputs, Labels, NegativeStatistics, Samples, TargetGradient
from megacid_kernels.epilogue import Coefficients, epilogue
from megacid_kernels.loss_spec import LossSpec
from megacid_kernels.plan import SlabBytes
from megacid_kernels.targets import Target, target_of

_BLOCK_BYTES = {"cpu": 1 << 20}  # elementwise work on [S, D] in blocks that stay in a core's cache
_DEVICE_BLOCK_BYTES = 1 << 28  # elsewhere only the temporaries are to stay small


def row_blocks(x: Tensor) -> list[slice]:
    """Slices along dim 0 that `x` is worked on in, so that temporaries stay small."""
    size = _BLOCK_BYTES.get(x.device.type, _DEVICE_BLOCK_BYTES)
    step = max(1, size // max(1, x.shape[1] * x.element_size()))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def inverse_norms(x: Tensor) -> Tensor:
    """1 / |x| of every row, [..., 1]; 0 of a zero row, which so stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > torch.finfo(x.dtype).tiny, 1 / norm, torch.zeros_like(norm))


@dataclass
class _Found:
    """What `TorchBlock.negatives` collects."""

    removed: Tensor
    largest: Tensor | None = None
    hidden: Tensor | None = None  # [b, n] bool: negatives that the filter takes out
    sums: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[str, Tensor] = field(default_factory=dict)


class TorchBlock:
    """Class rows, unit rows as far as the products are concerned, without a second [n, D] in memory.

    Rows that may be overwritten are normalised in place. Others stay as they are: their cosines are divided by the norms
    instead, and so are the exponentials once they are summed, which puts the norms into both gradient products.
    """

    def __init__(self, spec: LossSpec, w_nD: Tensor, bias_n: Tensor | None, overwrite: bool):
        self.spec, self.bias = spec, bias_n
        self.inverse = inverse_norms(w_nD)
        self.w = w_nD.mul_(self.inverse) if overwrite else w_nD
        self.columns = None if overwrite else self.inverse[:, 0]  # [n], to multiply matrices [b, n] with

    def rows_of(self, slot: Tensor) -> Tensor:
        """Unit rows of these slots, [..., D]."""
        if not len(self.w):
            return self.w.new_zeros(*slot.shape, self.w.shape[1])
        rows = self.w[slot]
        return rows if self.columns is None else rows.mul_(self.columns[slot][..., None])

    def negatives(
        self, student: Samples, teacher: Samples | None, labels: Labels, keep: set[str]
    ) -> NegativeStatistics:
        found = _Found(torch.zeros(len(labels.slot), dtype=torch.int64, device=labels.slot.device))
        self._exponentials(found, student.unit, labels, self.spec.matrices("S"), keep, student=True)
        if teacher is not None:
            self._exponentials(found, teacher.unit, labels, self.spec.matrices("T"), keep, student=False)
        return NegativeStatistics(found.matrices, found.sums, found.largest, found.removed)

    def _exponentials(
        self, found: _Found, unit_bD: Tensor, labels: Labels, names: dict[str, float], keep: set[str], *, student: bool
    ) -> None:
        """The matrices `names` (name -> temperature) of one distribution; of the student also mask and maximum."""
        threshold, scale = self.spec.filter_threshold, self.spec.scale
        if not names and not (student and threshold is not None):
            return
        temperatures = list(names.items()) or [("", 1.0)]
        first = temperatures[0][1]
        logits = self._scaled((unit_bD * (scale / first)) @ self.w.T)
        _hide_labels(logits, labels)
        if student and threshold is not None:
            found.hidden = logits > threshold * (scale / first)
            found.removed = found.hidden.sum(1)
        if found.hidden is not None:
            logits.masked_fill_(found.hidden, -torch.inf)
        # Every matrix but the first is made from the first's logits, before these are overwritten.
        for name, temperature in [*temperatures[1:], temperatures[0]]:
            if not name:
                continue
            z = logits if temperature == first else logits * (first / temperature)
            shift = self.spec.shift(temperature)
            if self.bias is not None:
                z += self.bias - shift
            elif shift:
                z -= shift
            if student and temperature == first and z.shape[1]:
                found.largest = (z.amax(1) + shift) / (scale / temperature)
            found.sums[name] = z.exp_().sum(1)
            if name in keep:
                found.matrices[name] = self._scaled(z)

    def _scaled(self, matrix_bn: Tensor) -> Tensor:
        return matrix_bn if self.columns is None else matrix_bn.mul_(self.columns)

    def release_logit_rows(self) -> None:
        """The other products take the same rows."""

    def release_rows(self) -> None:
        """The Jacobian of the norm takes them."""

    def product(self, matrix_bn: Tensor, total_bD: Tensor | None = None) -> Tensor:
        return matrix_bn @ self.w if total_bD is None else total_bD.addmm_(matrix_bn, self.w)

    def add_gradient(self, grad_nD: Tensor | None, matrix_bn: Tensor, features_bD: Tensor) -> Tensor:
        if grad_nD is None:
            return torch.mm(matrix_bn.T, features_bD)
        return grad_nD.addmm_(matrix_bn.T, features_bD)

    def add_labels_(self, grad_nD: Tensor, labels: Labels, pulls: list[TargetGradient]) -> None:
        if not len(grad_nD):
            return
        w_blD = self.rows_of(labels.slot)
        for i in range(labels.slot.shape[1]):
            slot = labels.slot[:, i]
            for coefficient, cos, samples in pulls:
                toward = (samples.unit - cos[:, i, None] * w_blD[:, i]).mul_(coefficient[:, i, None])
                _add_rows_(grad_nD, slot, toward if self.columns is None else toward.mul_(self.columns[slot][:, None]))

    def through_norm_(self, grad_nD: Tensor) -> Tensor:
        for rows in row_blocks(grad_nD):
            part, w, inverse = grad_nD[rows], self.w[rows], self.inverse[rows]
            along = torch.linalg.vecdot(w, part)[:, None]
            if self.columns is None:
                part.addcmul_(w, along, value=-1).mul_(inverse)
            else:
                # `part` holds 1 / |w| already. Twice, for w is no unit row; one by one, for 1 / |w|^2 may overflow.
                part.addcmul_(w, along.mul_(inverse).mul_(inverse), value=-1)
        return grad_nD


class TorchEngine:
    def __init__(self, call: EngineInputs, dtype: torch.dtype):
        self._call, self._dtype = call, dtype
        self.num_rows = len(call.w) if call.gather is None else len(call.gather)
        self._whole: TorchBlock | None = None

    def samples(self, x_GD: Tensor) -> Samples:
        inverse = inverse_norms(x_GD)
        unit = x_GD * inverse
        return Samples(x_GD, inverse, unit, unit)

    def block(self, start: int, stop: int, products: bool) -> TorchBlock:
        call = self._call
        w_nD = call.w[start:stop] if call.gather is None else call.w.index_select(0, call.gather[start:stop])
        converted = w_nD.to(self._dtype)
        scratch = call.gather is not None or converted is not w_nD or (call.overwrite and call.whole)
        bias = None if call.bias is None else call.bias[start:stop].to(self._dtype)
        found = TorchBlock(call.spec, converted, bias, scratch)
        if call.whole:
            self._whole = found
        return found

    def _label_rows(self, slot: Tensor) -> Tensor:
        """Unit rows [b, l, D]."""
        if self._whole is not None:
            return self._whole.rows_of(slot)
        call = self._call
        if not self.num_rows:
            return torch.zeros(*slot.shape, call.w.shape[1], dtype=self._dtype, device=slot.device)
        rows = call.w[slot if call.gather is None else call.gather[slot]].to(self._dtype)
        return rows * inverse_norms(rows)

    def target(self, samples: Samples, labels: Labels, margin: bool) -> Target:
        spec = self._call.spec if margin else None
        return target_of(samples.unit, self._label_rows(labels.slot), labels.own, spec)

    def coefficients(self, stats: dict[str, Tensor], present: Tensor, share: Tensor) -> Coefficients:
        return epilogue(self._call.spec, stats, present, share)

    def finish_x(self, products: list[tuple[Tensor, Tensor]], pull: TargetGradient, labels: Labels) -> Tensor:
        unit, inverse = pull.samples.unit, pull.samples.inverse
        # Only what is tangential: at cos = +-1, where d psi is large, the rest would not cancel in the Jacobian.
        away = self._label_rows(labels.slot) - pull.cos[..., None] * unit[:, None, :]
        grad = torch.bmm(pull.coefficient[:, None, :], away)[:, 0]
        for coefficient, product in products:
            grad.addcmul_(coefficient[:, None], product)
        return grad.addcmul_(unit, torch.linalg.vecdot(unit, grad)[:, None], value=-1).mul_(inverse)

    def matrix_bytes(self) -> int:
        return self._dtype.itemsize

    def slab_bytes(self, batch: int, gradients: bool) -> SlabBytes:
        spec = self._call.spec
        matrices = max(1, len(spec.matrices("S")) + len(spec.matrices("T")))
        hidden = batch if spec.filter_threshold is not None else 0
        copies = (self._call.gather is not None) + gradients
        each = self._dtype.itemsize * (batch * matrices + copies * self._call.w.shape[1]) + hidden
        return SlabBytes(0, each, max(1, self.num_rows))


def _hide_labels(logits_bn: Tensor, labels: Labels) -> None:
    if logits_bn.shape[1]:
        at = logits_bn.gather(1, labels.slot)
        # Two labels of other ranks share slot 0 with a label of this rank at worst; -inf must win, so: minimum.
        logits_bn.scatter_reduce_(1, labels.slot, at.masked_fill_(labels.own, -torch.inf), "amin")


def _add_rows_(total: Tensor, slot: Tensor, rows: Tensor) -> None:
    """total[slot] += rows in an order that is the same in every run, also for slots that occur several times."""
    if total.device.type == "cpu":
        total.index_add_(0, slot, rows)  # one row after the other
    else:
        total.index_put_((slot,), rows, accumulate=True)  # sorts the slots, where index_add_ would use atomics
