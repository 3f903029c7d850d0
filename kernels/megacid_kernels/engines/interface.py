"""The interface between the schedule and an engine: everything that touches class rows [n, D] or a matrix [b, n].

Legend: G gathered batch, b samples of one chunk, l labels per sample, D width, L rows in memory, S rows of w that are
used on this rank, n rows of a block.

`schedule.py` defines the order of work; `torch_engine.py` and `triton_engine.py` implement it. An engine lives for one
call. A block is a contiguous range of its class rows: all of them for a stored gradient, a slab otherwise. Per block

    negatives       reads x, w; writes the matrices of exponentials and their row sums        before the all-reduce
    product         reads a matrix, w; writes its part of the gradient of x, not divided by Z  during the all-reduce
    add_gradient    reads a matrix, x * coefficient; writes the gradient of w                  after the all-reduce
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megacid_kernels.epilogue import Coefficients
from megacid_kernels.loss_spec import Distribution, LossSpec
from megacid_kernels.row_statistics import RowStatistics
from megacid_kernels.targets import BatchLabels, Labels, Target


class EngineInputs(NamedTuple):
    """Constructor arguments of an engine."""

    w: Tensor  # [S, D], or [L, D] with `gather`; any floating dtype
    gather: Tensor | None  # int64 [S] the rows of w that are used; None: all
    bias: Tensor | None  # [S]
    spec: LossSpec
    single_block: bool  # one block of all rows will be requested, once
    overwrite_w: bool  # w is scratch memory and may be normalised in place


class Samples(NamedTuple):
    """Embeddings of the student or of the teacher."""

    x: Tensor  # [G or b, D] as given
    inverse: Tensor  # [G or b, 1] 1 / |x|, 0 for a zero row
    unit: Tensor  # [G or b, D] x / |x| in full precision
    operand: Tensor  # [G or b, D] x / |x| in the dtype of the first product

    def samples(self, part: slice) -> Samples:
        return Samples(*(tensor[part] for tensor in self))


class TargetGradient(NamedTuple):
    """Gradient of one source's target cosines."""

    coefficient: Tensor  # [b, l] d loss / d target cosine, 0 where not own
    cos: Tensor  # [b, l]
    samples: Samples


Tiles = list[Tensor]  # a matrix [b, n], cut between columns


class NegativeStatistics(NamedTuple):
    """Exponentials of the negatives of a chunk and a block, and their row statistics."""

    matrices: dict[Distribution, Tiles]  # those that were requested
    sums: dict[Distribution, Tensor]  # [b]
    largest: Tensor | None  # [b] largest logit / scale of the student; None without a student distribution
    removed: Tensor | None  # [b] int64, negatives removed by the filter; None without a filter

    def joined(self, further: NegativeStatistics) -> NegativeStatistics:
        """The statistics of these columns and of `further` ones, whose tiles are appended to these."""
        for name, tiles in further.matrices.items():
            self.matrices[name].extend(tiles)
        sums = {name: total + further.sums[name] for name, total in self.sums.items()}
        largest, removed = self.largest, self.removed
        if largest is not None and further.largest is not None:
            largest = torch.maximum(largest, further.largest)
        if removed is not None and further.removed is not None:
            removed = removed + further.removed
        return NegativeStatistics(self.matrices, sums, largest, removed)


class DeferredNorm(NamedTuple):
    """What the backward of the norm of class rows still needs, see `discrimination.through_norm_`."""

    w: Tensor  # [L, D] fp32, fp16 or bf16
    rows: Tensor | None  # int64 [S] those that are used; None: all
    inverse: Tensor  # [S] 1 / their length
    version: int  # of w: PyTorch counts its changes in place


class ClassBlock(Protocol):
    """Class rows [start, stop) of an engine. Slots are counted from `start`."""

    def negatives(
        self, student: Samples, teacher: Samples | None, labels: Labels, keep: set[Distribution]
    ) -> NegativeStatistics:
        """Compute all distributions of the spec; return the matrices of those in `keep`."""
        ...

    def release_logit_rows(self) -> None:
        """Free what only `negatives` needs."""
        ...

    def release_rows(self) -> None:
        """Free what only `negatives` and `product` need."""
        ...

    def product(self, matrix: Tiles, total_bD: Tensor | None = None) -> Tensor:
        """matrix @ unit rows [b, D], added to `total_bD` in place if given."""
        ...

    def add_gradient(self, grad_nD: Tensor | None, matrix: Tiles, features: list[tuple[Tensor, Samples]]) -> Tensor:
        """grad + matrix.T @ (sum of coefficient [b] * unit rows), in place if grad is given; becomes the gradient of w
        in `norm_backward_`."""
        ...

    def add_target_gradients_(self, grad_nD: Tensor, labels: Labels, target_grads: list[TargetGradient]) -> None:
        """grad[slot] += coefficient * (x - cos w), the part of d loss / d w tangential to w; reproducible order."""
        ...

    def norm_backward_(self, grad_nD: Tensor) -> Tensor:
        """Backward of the row normalisation, in place: the sums above -> the gradient of w."""
        ...

    def deferred_norm(self) -> DeferredNorm | None:
        """For a `norm_backward_` that the caller does later, together with its own factor; None if there is none."""
        ...


class Engine(Protocol):
    num_rows: int

    def samples(self, x_GD: Tensor) -> Samples: ...

    def labels(self, target_Gl: Tensor, rows: Tensor | None) -> BatchLabels:
        """See `targets.batch_labels`."""
        ...

    def block(self, start: int, stop: int, products: bool) -> ClassBlock:
        """products: more than `ClassBlock.negatives` will be called."""
        ...

    def target(self, samples: Samples, labels: Labels, margin: bool) -> Target:
        """Call it after every row has been in a block."""
        ...

    def gap(self, student: Samples, teacher: Samples, product_bD: Tensor) -> Tensor:
        """[b] sum_j E_j (cosT_j - cosS_j) from the product of the KL's teacher."""
        ...

    def coefficients(
        self, stats: RowStatistics, labels: BatchLabels, student: Target | None, teacher: Target | None
    ) -> Coefficients:
        """See `epilogue.epilogue`."""
        ...

    def finish_x(self, products: list[tuple[Tensor, Tensor]], target_grad: TargetGradient, labels: Labels) -> Tensor:
        """This shard's part [b, D] of the gradient of x, from pairs (coefficient [b], `ClassBlock.product`)."""
        ...
