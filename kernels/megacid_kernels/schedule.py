"""The order of work for a loss and its closed-form gradients, for every plan and either engine.

Legend: G gathered batch, b samples of a chunk, l labels per sample, D width, S rows of w, n rows of a slab.

Either the samples are cut into chunks or the class rows into slabs (see `plan`):

    stored      chunks of samples, all rows. Per chunk: exponentials -> ONE sum all-reduce of [k, b] row statistics,
                which overlaps the dX product -> dX, dW. 6 G S D FLOP; the matrices [b, S] must fit the budget
    recomputed  all samples, slabs of rows. First the row sums of every slab, then the all-reduce, then per slab the
                exponentials again, dX += E w, and the complete slab of dW. 8 G S D FLOP; no [S, D] gradient exists
    loss-only   the first half of "recomputed", if no gradient is needed. 2 G S D FLOP; no matrix is kept

The all-reduce stands between the exponentials and dW because every coefficient of a gradient contains a row sum over
the classes of all ranks. The exponentials are stored un-normalised: 1 / Z scales rows, so it commutes with both
gradient products and no second pass over [b, S] is needed. With E_j = exp(z_j - kappa), E_y := 0, and n = sum_j E_j:

    one label     CE = softplus(d), 1 - P_y = sigmoid(d), d = ln n + kappa - z_y     (no cancellation as P_y -> 1)
    several       ln(1 + sum_i exp(-z_i)) + ln(1 + n exp(kappa)), i over the labels  (MLCD, An et al., ECCV 2024)
    their mean    1/l sum_i CE_i with n_i = n + sum_{k != i} exp(z_k - kappa), k over the other labels
    KL            sum_j pT_j (zT_j - zS_j) + ln ZS - ln ZT      dKL/dzS_j = pS_j - pT_j

The labels' classes are never part of E: their cosines come from full-precision rows, and their gradient is a sparse
extra term. The KL's sum_j E_j (cosT_j - cosS_j) equals (t - x) . (E w), a product that the gradient needs anyway, so no
matrix of cosines outlives its exponentials.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, overload

import torch
from torch import Tensor

from megacid_kernels.engines.interface import (
    ClassBlock,
    DeferredNorm,
    Engine,
    NegativeStatistics,
    Samples,
    TargetGradient,
)
from megacid_kernels.epilogue import Coefficients
from megacid_kernels.loss_spec import Distribution, LossSpec
from megacid_kernels.plan import Plan
from megacid_kernels.precision import fp32_products
from megacid_kernels.row_statistics import RowStatistics
from megacid_kernels.targets import Labels, Target, drop_repeated_labels

OnGradX = Callable[[Tensor], None]
OnGradientSlab = Callable[[int, int, Tensor], object]  # (start, stop, gradient of rows [start, stop) of w)


class Discrimination(NamedTuple):
    """Result of `linear_margin_discrimination`. Only `loss` has a gradient.

    Attributes:
        loss: 0-d weighted sum of the terms, the same on every rank.
        raw: [3] CE(student), CE(teacher) and KL without their weights; 0 if not computed.
        target_cosine: shaped like target, the student's cosine to its labels; 0 without a label or a student term.
        largest_negative: [G] largest cosine (logit / scale, bias included) of THIS RANK's negatives; -inf without any.
        removed: [G] int64, negatives of this rank that `filter_threshold` removed.
    """

    loss: Tensor
    raw: Tensor
    target_cosine: Tensor
    largest_negative: Tensor
    removed: Tensor


class Gradients(NamedTuple):
    """Result of `discrimination_with_gradients`: the loss and its gradients.

    Attributes:
        result: the detached loss and statistics.
        x: [G, D] this shard's partial sum of the gradient of x, float32 (float64); None if not requested.
        w: [S, D] gradient of w, float32 (float64); None if not requested or passed to `on_grad_slab`.
        norm: if not None, w is the gradient of the unit rows, and `through_norm_` makes the gradient of w of it.
        each_slab: with weight_grad "recomputed", a function that calls take(start, stop, slab) for every slab of the
            gradient of w again, with the same bits. It reads the rows of a slab when its turn comes, so rows of earlier
            slabs may have changed by then. None otherwise.
    """

    result: Discrimination
    x: Tensor | None
    w: Tensor | None
    norm: DeferredNorm | None = None
    each_slab: Callable[[OnGradientSlab], None] | None = None


class Batch:
    """The part of a computation that does not depend on class rows."""

    def __init__(
        self,
        engine: Engine,
        spec: LossSpec,
        x_GD: Tensor,
        target_Gl: Tensor,
        rows: Tensor | None,
        teacher: Tensor | None,
    ):
        self.labels = engine.labels(drop_repeated_labels(target_Gl) if target_Gl.shape[1] > 1 else target_Gl, rows)
        self.student = engine.samples(x_GD)
        self.teacher = None
        if teacher is not None and spec.weights.needs_teacher:
            self.teacher = engine.samples(teacher)


class SampleChunk:
    """A chunk of samples on its way through all slabs."""

    def __init__(self, engine: Engine, batch: Batch, spec: LossSpec, part: slice):
        self.engine, self.spec = engine, spec
        self.student = batch.student.samples(part)
        self.teacher = batch.teacher.samples(part) if batch.teacher is not None else None
        self.labels = batch.labels.samples(part)
        self.statistics: NegativeStatistics | None = None  # of all slabs so far, without matrices
        self.raw: Tensor | None = None  # [3, b]
        self.target_cosine: Tensor | None = None  # [b, l], None: no student term
        self.slab: NegativeStatistics | None = None  # of the latest slab
        # The KL needs this product before the all-reduce, for its gap between the cosines.
        self.early = {spec.softened("teacher")} if spec.weights.gamma > 0 else set()
        self._products: dict[Distribution, Tensor] = {}  # matrix @ unit rows, summed over the slabs so far
        self._target_grads: list[TargetGradient] = []
        self._student_target: Target | None = None
        self._teacher_target: Target | None = None
        self._coefficients: Coefficients | None = None

    def accumulate_statistics(self, block: ClassBlock, start: int, stop: int, keep: set[Distribution]) -> None:
        """Add a slab to the row statistics; keep the matrices in `keep`."""
        slab = block.negatives(self.student, self.teacher, self._labels_in(start, stop), keep | self.early)
        self.slab, further = slab, slab._replace(matrices={})
        self.statistics = further if self.statistics is None else self.statistics.joined(further)
        self._add_products(block, self.early)

    def start_all_reduce(self) -> Callable[[], RowStatistics]:
        """Start the all-reduce of the row statistics; the returned function waits for it."""
        weights, gap, student, teacher = self.spec.weights, None, None, None
        if self.teacher is not None and weights.gamma > 0:
            gap = self.engine.gap(self.student, self.teacher, self._products[self.spec.softened("teacher")])
        if weights.needs_student:
            student = self._student_target = self.engine.target(self.student, self.labels.located, True)
        if self.teacher is not None:
            teacher = self._teacher_target = self.engine.target(self.teacher, self.labels.located, False)
        psi, cos = (None, None) if student is None else (student.psi, student.cos)
        teacher_cos = None if teacher is None else teacher.cos
        assert self.statistics is not None
        stats = RowStatistics(self.statistics.sums, gap, self.labels.owned, psi, cos, teacher_cos)
        return stats.start_all_reduce(self.spec.group, self.spec.world)

    def finish_statistics(self, stats: RowStatistics) -> None:
        """Compute losses and gradient coefficients from the reduced statistics."""
        student, teacher = self._student_target, self._teacher_target
        rows = self._coefficients = self.engine.coefficients(stats, self.labels, student, teacher)
        self.raw, self.target_cosine = rows.raw, stats.cos
        for coefficient, target, samples in (
            (rows.student_target, student, self.student),
            (rows.teacher_target, teacher, self.teacher),
        ):
            if coefficient is not None and target is not None and samples is not None:
                self._target_grads.append(TargetGradient(coefficient, target.cos, samples))

    def recompute_exponentials(self, block: ClassBlock, start: int, stop: int) -> None:
        keep = set(self.spec.distributions())
        self.slab = block.negatives(self.student, self.teacher, self._labels_in(start, stop), keep)

    def add_products(self, block: ClassBlock) -> None:
        """Add the latest slab to the products for the gradient of x; this needs no reduced statistics."""
        self._add_products(block, [name for name in self.spec.student_products() if name not in self.early])

    def _add_products(self, block: ClassBlock, names: set[Distribution] | list[Distribution]) -> None:
        assert self.slab is not None
        for name in names:
            self._products[name] = block.product(self.slab.matrices[name], self._products.get(name))

    def gradient_of_x(self) -> Tensor | None:
        """[b, D] this shard's part; None without a student term."""
        if self._student_target is None:
            return None
        assert self._coefficients is not None
        by_name = self._coefficients.student
        # The order of `_products` is the order of the additions, the same for every plan.
        pairs = [(by_name[name], product) for name, product in self._products.items() if name in by_name]
        self._products = {}
        return self.engine.finish_x(pairs, self._target_grads[0], self.labels.located)

    def add_gradient_of_w(self, grad_nD: Tensor | None, block: ClassBlock, start: int, stop: int) -> Tensor:
        """Add the latest slab to the gradient of its rows, and free its matrices."""
        assert self.slab is not None and self._coefficients is not None
        slab, self.slab = self.slab, None
        for name in {**self._coefficients.student, **self._coefficients.teacher}:
            grad_nD = block.add_gradient(grad_nD, slab.matrices.pop(name), self._features(name))
        assert grad_nD is not None
        labels, target_grads = self._labels_in(start, stop), self._target_grads
        if labels is not self.labels.located:
            target_grads = [
                grad._replace(coefficient=torch.where(labels.own, grad.coefficient, 0)) for grad in target_grads
            ]
        block.add_target_gradients_(grad_nD, labels, target_grads)
        return grad_nD

    def _features(self, name: Distribution) -> list[tuple[Tensor, Samples]]:
        assert self._coefficients is not None
        student, teacher = self._coefficients.student.get(name), self._coefficients.teacher.get(name)
        pairs = ((student, self.student), (teacher, self.teacher))
        return [(c, samples) for c, samples in pairs if c is not None and samples is not None]

    def _labels_in(self, start: int, stop: int) -> Labels:
        labels = self.labels.located
        return labels if (start, stop) == (0, self.engine.num_rows) else labels.in_rows(start, stop)


class LossComputation:
    """One call of an operator."""

    def __init__(self, engine: Engine, spec: LossSpec, plan: Plan, batch: Batch):
        self.engine, self.spec, self.plan, self.batch = engine, spec, plan, batch
        self._raw: Tensor | None = None
        self._target_cosine: Tensor | None = None
        self._largest: Tensor | None = None
        self._removed: Tensor | None = None
        self._grad_x: Tensor | None = None
        self._grad_w: Tensor | None = None
        self._chunk: SampleChunk | None = None  # of the whole batch, for `each_slab`

    def compute(
        self,
        need_x: bool,
        need_w: bool,
        on_grad_x: OnGradX | None = None,
        on_grad_slab: OnGradientSlab | None = None,
        defer_norm: bool = False,
    ) -> Gradients:
        """The loss and the requested gradients; arguments as in `discrimination_with_gradients`."""
        take, norm = on_grad_slab or (self._assemble if need_w else None), None
        if self.plan.kind == "stored":
            norm = self._compute_chunks(need_x, take, on_grad_x, defer_norm and on_grad_slab is None)
        else:
            self._compute_slabs(need_x, take, on_grad_x)
        return Gradients(self._result(), self._grad_x, self._grad_w, norm)

    def _result(self) -> Discrimination:
        """The loss and the statistics; those that no term or filter needed have their neutral values."""
        x, w, labels = self.batch.student.x, self.spec.weights, self.batch.labels
        raw = x.new_zeros(3) if self._raw is None else self._raw * labels.sample_weight
        terms = [weight * term for weight, term in zip((w.alpha, w.beta, w.gamma), raw.unbind()) if weight > 0]
        loss = functools.reduce(torch.add, terms) if terms else x.new_zeros(())
        cosine, largest, removed = self._target_cosine, self._largest, self._removed
        cosine = x.new_zeros(labels.present.shape) if cosine is None else cosine
        if self._chunk is not None:
            cosine = cosine.clone()  # `each_slab` reads it later, when the caller may have changed the result
        largest = x.new_full((len(x),), -torch.inf) if largest is None else largest
        if removed is None:
            removed = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return Discrimination(loss, raw, cosine, largest, removed)

    def _compute_chunks(
        self, need_x: bool, take: OnGradientSlab | None, on_grad_x: OnGradX | None, defer_norm: bool
    ) -> DeferredNorm | None:
        rows = self.engine.num_rows
        block, grad_w = self.engine.block(0, rows, True), None
        for part in self.plan.chunks:
            last = part is self.plan.chunks[-1]
            chunk = SampleChunk(self.engine, self.batch, self.spec, part)
            chunk.accumulate_statistics(block, 0, rows, set(self.spec.distributions()))
            if last:
                block.release_logit_rows()
            reduced = chunk.start_all_reduce()
            if need_x:
                chunk.add_products(block)
            if last:
                block.release_rows()
            chunk.finish_statistics(reduced())
            self._store_results(chunk, part)
            if need_x:
                self._finish_x(chunk, part, on_grad_x if last else None)
            if take is not None:
                grad_w = chunk.add_gradient_of_w(grad_w, block, 0, rows)
        if not self.plan.chunks and need_x:
            self._finish_x(None, slice(0, 0), on_grad_x)
        if take is None:
            return None
        x, norm = self.batch.student.x, block.deferred_norm() if defer_norm else None
        if grad_w is None:
            grad_w = x.new_zeros(rows, x.shape[1])
        elif norm is None:
            grad_w = block.norm_backward_(grad_w)
        take(0, rows, grad_w)
        return norm

    def _compute_slabs(self, need_x: bool, take: OnGradientSlab | None, on_grad_x: OnGradX | None) -> None:
        whole = slice(0, len(self.batch.student.x))
        chunk = SampleChunk(self.engine, self.batch, self.spec, whole)
        for start, stop in self.plan.slabs:
            chunk.accumulate_statistics(self.engine.block(start, stop, bool(chunk.early)), start, stop, set())
            chunk.slab = None
        chunk.finish_statistics(chunk.start_all_reduce()())
        self._store_results(chunk, whole)
        self._chunk = chunk
        if not need_x and take is None:
            return
        for start, stop in self.plan.slabs:
            block = self._recomputed(chunk, start, stop)
            if need_x:
                chunk.add_products(block)
                if stop == self.engine.num_rows:
                    self._finish_x(chunk, whole, on_grad_x)
            block.release_rows()
            if take is not None:
                take(start, stop, block.norm_backward_(chunk.add_gradient_of_w(None, block, start, stop)))
            del block  # before the rows of the next slab are copied

    def _recomputed(self, chunk: SampleChunk, start: int, stop: int) -> ClassBlock:
        block = self.engine.block(start, stop, True)
        chunk.recompute_exponentials(block, start, stop)
        block.release_logit_rows()
        return block

    def each_slab(self, take: OnGradientSlab) -> None:
        """Compute the slabs of the gradient of w again: 4 G S D FLOP, the same bits. See `Gradients.each_slab`."""
        chunk = self._chunk
        if chunk is None:
            raise ValueError(f"weight_grad is {self.spec.weight_grad!r}, expected 'recomputed', and a needed gradient")
        with fp32_products("ieee"):
            for start, stop in self.plan.slabs:
                block = self._recomputed(chunk, start, stop)
                take(start, stop, block.norm_backward_(chunk.add_gradient_of_w(None, block, start, stop)))
                del block

    def _store_results(self, chunk: SampleChunk, part: slice) -> None:
        stats = chunk.statistics
        assert chunk.raw is not None and stats is not None
        raw, size = chunk.raw.sum(1), len(self.batch.student.x)
        self._raw = raw if self._raw is None else self._raw + raw
        self._target_cosine = _placed(self._target_cosine, chunk.target_cosine, part, size)
        self._largest = _placed(self._largest, stats.largest, part, size)
        self._removed = _placed(self._removed, stats.removed, part, size)

    def _finish_x(self, chunk: SampleChunk | None, part: slice, on_grad_x: OnGradX | None) -> None:
        x = self.batch.student.x
        grad = None if chunk is None else chunk.gradient_of_x()
        self._grad_x = _placed(self._grad_x, torch.zeros_like(x[part]) if grad is None else grad, part, len(x))
        if on_grad_x is not None:
            on_grad_x(self._grad_x)

    def _assemble(self, start: int, stop: int, grad_nD: Tensor) -> None:
        rows = self.engine.num_rows
        if stop - start == rows:
            self._grad_w = grad_nD
            return
        if self._grad_w is None:
            self._grad_w = grad_nD.new_empty(rows, grad_nD.shape[1])
        self._grad_w[start:stop] = grad_nD


@overload
def _placed(whole: Tensor | None, value: Tensor, part: slice, size: int) -> Tensor: ...


@overload
def _placed(whole: Tensor | None, value: Tensor | None, part: slice, size: int) -> Tensor | None: ...


def _placed(whole: Tensor | None, value: Tensor | None, part: slice, size: int) -> Tensor | None:
    """`whole`, of `size` samples, with those of `part`. The value itself, without a copy, if `part` is all of them."""
    if value is None or len(value) == size:
        return value
    if whole is None:
        whole = value.new_empty(size, *value.shape[1:])
    whole[part] = value
    return whole
