"""One order of work for every plan: loss and closed-form gradients of a batch, whatever engine does it.

Legend: G gathered batch, b samples of one chunk, D width, S rows of w on this rank, n rows of a slab, l labels per sample.

Samples are cut into chunks, class rows into slabs; one of the two into one piece.

    stored     chunks of samples, all rows: exponentials -> ONE sum all-start_all_reduce of [k, b] row statistics, hidden under the
               dX product -> dX, dW. 6 G S D FLOP. The matrices [b, S] are what has to fit the budget
    recomputed all samples, slabs of rows: first all row sums and the all-start_all_reduce; then for every slab the exponentials
               again, dX += E w, and the slab of dW, complete. 8 G S D FLOP; no [S, D] gradient has to exist
    loss-only  the first half of that, where nobody wants a gradient: 2 G S D FLOP, and no matrix is kept

The exponentials are stored un-normalised: 1 / Z scales rows, so it commutes with both gradient products and no second
pass over [b, S] is needed. With E_j = exp(z_j - kappa) for the negatives (E_y := 0), n = sum_j E_j:

    one label     CE = softplus(d), 1 - P_y = sigmoid(d), d = ln n + kappa - z_y     (no cancellation as P_y -> 1)
    several       ln(1 + sum_i exp(-z_i)) + ln(1 + n exp(kappa)), i over the labels  (MLCD, An et al., ECCV 2024)
    KL            sum_j pT_j (zT_j - zS_j) + ln ZS - ln ZT      dKL/dzS_j = pS_j - pT_j

The labels' classes are never inside E: their cosines come from full-precision rows and their gradient is a sparse extra
term. The KL's sum_j E_j (cosT_j - cosS_j) is (t - x) . (E w), a product that the gradient needs anyway, so no matrix of
cosines outlives its exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacid_kernels.engines.interface import ClassBlock, Engine, Labels, NegativeStatistics, TargetGradient
from megacid_kernels.epilogue import Coefficients
from megacid_kernels.loss_spec import LossSpec
from megacid_kernels.plan import Plan
from megacid_kernels.targets import Target, locate, within, without_repeats

OnGradientSlab = Callable[[int, int, Tensor], object]  # (start, stop, gradient of rows [start, stop) of w)


class LossOutput(NamedTuple):
    """What `LossComputation` gives; the last two only where they were asked for."""

    terms: Tensor  # [3] weighted and reduced: alpha * CE(student), beta * CE(teacher), gamma * KL
    raw: Tensor  # [3] the same without their weights
    target_cosine: Tensor  # [G, l] student's cosine to its labels; 0 where there is none, or no student term
    largest_negative: Tensor  # [G] largest logit / scale among THIS RANK's negatives; -inf without any
    removed: Tensor  # [G] int64, negatives of this rank that the filter took out
    grad_x: Tensor | None  # [G, D] this shard's partial sum
    grad_w: Tensor | None  # [S, D]; None as well where slabs were consumed


class Batch:
    """What belongs to the whole batch, and no class row."""

    def __init__(
        self, engine: Engine, x_GD: Tensor, target_Gl: Tensor, rows_S: Tensor | None, teacher_GD: Tensor | None, spec: LossSpec
    ):  # fmt: skip
        target_Gl = without_repeats(target_Gl) if target_Gl.shape[1] > 1 else target_Gl
        self.present = target_Gl >= 0
        self.labels = Labels(*locate(target_Gl, rows_S, spec.class_start, engine.num_rows))
        self.labelled = self.present.any(1)
        count = self.labelled.sum().to(x_GD.dtype)
        self.each = 1 / count.clamp_min(1) if spec.reduction == "mean" else torch.ones_like(count)
        self.student = engine.samples(x_GD)
        self.teacher = None
        if teacher_GD is not None and spec.weights.needs_teacher:
            self.teacher = engine.samples(teacher_GD)


class SampleChunk:
    """Samples `part` of a batch on their way through all slabs."""

    def __init__(self, engine: Engine, batch: Batch, spec: LossSpec, part: slice):
        self.engine, self.spec = engine, spec
        self.student = batch.student.part(part)
        self.teacher = batch.teacher.part(part) if batch.teacher is not None else None
        self.labels = Labels(batch.labels.own[part], batch.labels.slot[part])
        self.present, self.share = batch.present[part], batch.labelled[part] * batch.each
        samples = len(self.labels.slot)
        self.removed = torch.zeros(samples, dtype=torch.int64, device=self.present.device)
        self.largest: Tensor | None = None
        self.stats: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}  # matrix @ unit rows over the slabs so far
        self.found: NegativeStatistics | None = None  # of the last slab
        self.pulls: list[TargetGradient] = []
        # The KL compares the cosines under the teacher's distribution through this product, before the all-start_all_reduce.
        self.early = {spec.softened("T")} if spec.weights.gamma > 0 else set()
        self._on_x: Target | None = None
        self._on_t: Target | None = None

    def accumulate_statistics(self, block: ClassBlock, start: int, stop: int, keep: set[str]) -> None:
        """Add a slab to the row statistics; the matrices in `keep` stay in `found`."""
        found = block.negatives(self.student, self.teacher, self._labels_in(start, stop), keep | self.early)
        for name, sums in found.sums.items():
            self.stats[name] = self.stats[name] + sums if name in self.stats else sums
        self.removed = self.removed + found.removed
        if found.largest is not None:
            self.largest = found.largest if self.largest is None else torch.maximum(self.largest, found.largest)
        for name in self.early:
            self.products[name] = block.product(found.matrices[name], self.products.get(name))
        self.found = found

    def start_all_reduce(self) -> Callable[[], dict[str, Tensor]]:
        """Start the all-start_all_reduce of everything that the ranks have to know of each other's rows; the result, when called."""
        weights, labels = self.spec.weights, self.labels
        if self.teacher is not None and weights.gamma > 0:
            gap = self.teacher.unit - self.student.unit
            self.stats["gap"] = torch.linalg.vecdot(gap, self.products[self.spec.softened("T")])
        if weights.needs_student:
            self._on_x = self.engine.target(self.student, labels, True)
        if self.teacher is not None:
            self._on_t = self.engine.target(self.teacher, labels, False)
        self.stats["own"] = labels.own.sum(1).to(self.share.dtype)
        for kind, value in self._by_label():
            self.stats |= {f"{kind}{i}": column for i, column in enumerate(value.unbind(1))}
        reduced = torch.stack(list(self.stats.values()))
        names, spec, pending = list(self.stats), self.spec, None
        if spec.world > 1:
            pending = dist.all_reduce(reduced, group=spec.group, async_op=True)

        def result() -> dict[str, Tensor]:
            if pending is not None:
                pending.wait()
            return dict(zip(names, reduced.unbind()))

        return result

    def _by_label(self) -> list[tuple[str, Tensor]]:
        found = [] if self._on_x is None else [("psi", self._on_x.psi), ("cos", self._on_x.cos)]
        return found + ([] if self._on_t is None else [("cos_t", self._on_t.cos)])

    def finish_statistics(self, stats: dict[str, Tensor]) -> Coefficients:
        """From the reduced statistics: `raw` [3, b], `target_cosine` [b, l], and how labels and negatives pull."""
        rows = self.engine.coefficients(stats, self.present, self.share)
        # A label whose class no rank holds would be a wrong number; NaN is a loud one.
        lost = stats["own"] < self.present.sum(1) - 0.5
        self.raw = rows.raw.masked_fill(~self.present.any(1), 0.0).masked_fill(lost, torch.nan)
        self.target_cosine = None
        if self._on_x is not None:
            self.target_cosine = torch.stack([stats[f"cos{i}"] for i in range(self.present.shape[1])], 1)
            # dpsi is 0 where another rank owns the class
            self.pulls.append(TargetGradient(rows.target_x * self._on_x.dpsi, self._on_x.cos, self.student))
        if self.teacher is not None and self._on_t is not None and rows.target_t is not None:
            self.pulls.append(TargetGradient(rows.target_t * self.labels.own, self._on_t.cos, self.teacher))
        self.rows = rows
        return rows

    def recompute_exponentials(self, block: ClassBlock, start: int, stop: int) -> None:
        """The matrices of a slab once more."""
        names = set(self.spec.matrices("S")) | (set(self.spec.matrices("T")) if self.teacher is not None else set())
        self.found = block.negatives(self.student, self.teacher, self._labels_in(start, stop), names)

    def add_products(self, block: ClassBlock) -> None:
        """The slab in `found` into what the gradient of x needs; no reduced number is needed for that."""
        assert self.found is not None
        for name in self.spec.student_products():
            if name not in self.early:
                self.products[name] = block.product(self.found.matrices[name], self.products.get(name))

    def gradient_of_x(self) -> Tensor | None:
        """[b, D] this shard's share; None without a student's term."""
        if self._on_x is None:
            return None
        # The order of `products` is that of the additions, the same in every mode.
        parts = [
            (self.rows.with_x[name], product) for name, product in self.products.items() if name in self.rows.with_x
        ]
        self.products = {}
        return self.engine.finish_x(parts, self.pulls[0], self.labels)

    def add_gradient_of_w(self, grad_nD: Tensor | None, block: ClassBlock, start: int, stop: int) -> Tensor:
        """Add the slab in `found` to the gradient of its rows, and forget its matrices."""
        assert self.found is not None
        found, self.found = self.found, None
        for name in {**self.rows.with_x, **self.rows.with_t}:
            grad_nD = block.add_gradient(grad_nD, found.matrices.pop(name), self._features(name))
        assert grad_nD is not None
        labels, pulls = self._labels_in(start, stop), self.pulls
        if labels is not self.labels:
            pulls = [pull._replace(coefficient=torch.where(labels.own, pull.coefficient, 0)) for pull in pulls]
        block.add_labels_(grad_nD, labels, pulls)
        return grad_nD

    def _features(self, name: str) -> Tensor:
        pairs = ((self.rows.with_x.get(name), self.student), (self.rows.with_t.get(name), self.teacher))
        parts = [c[:, None] * samples.unit for c, samples in pairs if c is not None and samples is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _labels_in(self, start: int, stop: int) -> Labels:
        if (start, stop) == (0, self.engine.num_rows):
            return self.labels
        return Labels(*within(self.labels.own, self.labels.slot, start, stop))


class LossComputation:
    """One call. `compute` computes; with weight_grad "recomputed" `each_slab` gives the gradient of w once more, slab by slab."""

    def __init__(
        self,
        engine: Engine,
        spec: LossSpec,
        plan: Plan,
        x_GD: Tensor,
        target_Gl: Tensor,
        rows_S: Tensor | None,
        teacher_GD: Tensor | None,
    ):
        self.engine, self.spec, self.plan = engine, spec, plan
        self.batch = Batch(engine, x_GD, target_Gl, rows_S, teacher_GD, spec)
        size = len(x_GD)
        self._raw = x_GD.new_zeros(3)
        self._target_cosine = x_GD.new_zeros(target_Gl.shape)
        self._largest = x_GD.new_full((size,), -torch.inf)
        self._removed = torch.zeros(size, dtype=torch.int64, device=x_GD.device)
        self._grad_x: Tensor | None = None
        self._last: SampleChunk | None = None

    def compute(
        self,
        need_x: bool,
        need_w: bool,
        on_grad_x: Callable[[Tensor], None] | None = None,
        on_grad_slab: OnGradientSlab | None = None,
    ) -> LossOutput:
        """on_grad_x: called with the finished gradient of x before the last products of that of w. on_grad_slab: called with
        every slab of the gradient of w, which then is not kept; a slab's memory is the caller's."""
        spec, x = self.spec, self.batch.student.x
        self._grad_x = torch.zeros_like(x) if need_x else None
        grad_w = _Assembled(self.engine.num_rows, x) if need_w and on_grad_slab is None else None
        keep = on_grad_slab or (grad_w if need_w else None)
        if self.plan.kind == "stored":
            self._by_rows(keep, on_grad_x)
        else:
            self._by_slabs(need_x, keep, on_grad_x)
        raw = self._raw * self.batch.each
        weights = (spec.weights.alpha, spec.weights.beta, spec.weights.gamma)
        return LossOutput(
            terms=torch.stack([weight * part for weight, part in zip(weights, raw.unbind())]),
            raw=raw,
            target_cosine=self._target_cosine,
            largest_negative=self._largest,
            removed=self._removed,
            grad_x=self._grad_x,
            grad_w=None if grad_w is None else grad_w.whole,
        )

    def _by_rows(self, on_grad_slab: OnGradientSlab | None, on_grad_x: Callable[[Tensor], None] | None) -> None:
        rows, need_x = self.engine.num_rows, self._grad_x is not None
        block, grad_w = self.engine.block(0, rows, True), None
        parts = self.plan.chunks
        for part in parts:
            last = part is parts[-1]
            chunk = SampleChunk(self.engine, self.batch, self.spec, part)
            names = set(self.spec.matrices("S")) | set(self.spec.matrices("T"))
            chunk.accumulate_statistics(block, 0, rows, names)
            if last:
                block.release_logit_rows()
            pending = chunk.start_all_reduce()
            if need_x:
                chunk.add_products(block)
            if last:
                block.release_rows()
            chunk.finish_statistics(pending())
            self._note(chunk, part)
            if need_x:
                self._finish_x(chunk, part, on_grad_x if last else None)
            if on_grad_slab is not None:
                grad_w = chunk.add_gradient_of_w(grad_w, block, 0, rows)
        if not parts and on_grad_x is not None and self._grad_x is not None:
            on_grad_x(self._grad_x)
        if on_grad_slab is not None:
            on_grad_slab(0, rows, block.through_norm_(grad_w) if grad_w is not None else self._no_gradient())

    def _by_slabs(
        self, need_x: bool, on_grad_slab: OnGradientSlab | None, on_grad_x: Callable[[Tensor], None] | None
    ) -> None:
        whole = slice(0, len(self.batch.student.x))
        chunk = SampleChunk(self.engine, self.batch, self.spec, whole)
        for start, stop in self.plan.slabs:
            chunk.accumulate_statistics(self.engine.block(start, stop, bool(chunk.early)), start, stop, set())
            chunk.found = None
        chunk.finish_statistics(chunk.start_all_reduce()())
        self._note(chunk, whole)
        self._last = chunk
        if not need_x and on_grad_slab is None:
            return
        for start, stop in self.plan.slabs:
            block = self.engine.block(start, stop, True)
            chunk.recompute_exponentials(block, start, stop)
            block.release_logit_rows()
            if need_x:
                chunk.add_products(block)
                if stop == self.engine.num_rows:
                    self._finish_x(chunk, whole, on_grad_x)
            block.release_rows()
            if on_grad_slab is not None:
                on_grad_slab(start, stop, block.through_norm_(chunk.add_gradient_of_w(None, block, start, stop)))

    def each_slab(self, on_grad_slab: OnGradientSlab) -> None:
        """The slabs of the gradient of w once more, bit for bit, from class rows that may have changed in the slabs before:
        what an optimizer needs that must not move a row before a decision about the whole step. 4 G S D FLOP."""
        chunk = self._last
        if chunk is None:
            raise ValueError(
                f"weight_grad is {self.spec.weight_grad!r}, expected 'recomputed' and a gradient: nothing else makes slabs"
            )
        for start, stop in self.plan.slabs:
            block = self.engine.block(start, stop, True)
            chunk.recompute_exponentials(block, start, stop)
            block.release_logit_rows()
            on_grad_slab(start, stop, block.through_norm_(chunk.add_gradient_of_w(None, block, start, stop)))

    def _note(self, chunk: SampleChunk, part: slice) -> None:
        self._raw += chunk.raw.sum(1)
        if chunk.target_cosine is not None:
            self._target_cosine[part] = chunk.target_cosine
        if chunk.largest is not None:
            self._largest[part] = chunk.largest
        self._removed[part] = chunk.removed

    def _finish_x(self, chunk: SampleChunk, part: slice, on_grad_x: Callable[[Tensor], None] | None) -> None:
        assert self._grad_x is not None
        found = chunk.gradient_of_x()
        if found is not None:
            self._grad_x[part] = found
        if on_grad_x is not None:
            on_grad_x(self._grad_x)

    def _no_gradient(self) -> Tensor:
        x = self.batch.student.x
        return x.new_zeros(self.engine.num_rows, x.shape[1])


class _Assembled:
    """A consumer that puts slabs together."""

    def __init__(self, num_rows: int, like_GD: Tensor):
        self._shape, self._like = (num_rows, like_GD.shape[1]), like_GD
        self._whole: Tensor | None = None

    def __call__(self, start: int, stop: int, grad_nD: Tensor) -> None:
        if stop - start == self._shape[0]:
            self._whole = grad_nD
            return
        if self._whole is None:
            self._whole = self._like.new_empty(self._shape)
        self._whole[start:stop] = grad_nD

    @property
    def whole(self) -> Tensor:
        return self._like.new_zeros(self._shape) if self._whole is None else self._whole
