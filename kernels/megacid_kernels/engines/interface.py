"""What a schedule asks of an implementation: everything that touches class rows [n, D] or a matrix [b, n].

Legend: G gathered batch, b samples of one chunk, l labels per sample, D width, S rows of w on this rank, n rows of a block.

`schedule.py` holds one order of work, `torch_engine.py` and `fused/engine.py` the two ways to do it. An engine is made for
one call; a block is a run of its class rows, all of them where the gradient is stored.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from megacid_kernels.epilogue import Coefficients
from megacid_kernels.loss_spec import LossSpec
from megacid_kernels.plan import SlabBytes
from megacid_kernels.targets import Target


class Samples(NamedTuple):
    """One distribution's embeddings, of the student or of the teacher."""

    x: Tensor  # [G, D] as they were given
    inverse: Tensor  # [G, 1] 1 / |x|, 0 of a zero row
    unit: Tensor  # [G, D] x / |x| in full precision
    operand: Tensor  # [G, D] the same as the first product takes it

    def part(self, rows: slice) -> Samples:
        return Samples(*(tensor[rows] for tensor in self))


class Labels(NamedTuple):
    """Where the labels' classes are: `labels.locate`."""

    own: Tensor  # [b, l] bool, this rank (this block) holds the class
    slot: Tensor  # [b, l] int64, in which row


class TargetGradient(NamedTuple):
    """How the labels of one distribution pull."""

    coefficient: Tensor  # [b, l] d loss / d target cosine, 0 where not own
    cos: Tensor  # [b, l]
    samples: Samples


class NegativeStatistics(NamedTuple):
    """The matrices of exponentials of a chunk and a block, see `LossSpec.matrices`, and their row statistics."""

    matrices: dict[str, Tensor]  # name -> [b, n], of those that were asked for
    sums: dict[str, Tensor]  # name -> [b]
    largest: Tensor | None  # [b] largest logit / scale among the student's negatives; None without a student's matrix
    removed: Tensor  # [b] int64, negatives that the filter took out


class ClassBlock(Protocol):
    """Class rows [start, stop) of an engine. Slots are counted from `start`."""

    def negatives(
        self, student: Samples, teacher: Samples | None, labels: Labels, keep: set[str]
    ) -> NegativeStatistics:
        """All matrices of the spec; those in `keep` are returned."""
        ...

    def release_logit_rows(self) -> None:
        """`negatives` will not be called again."""
        ...

    def release_rows(self) -> None:
        """Nor will `product`."""
        ...

    def product(self, matrix_bn: Tensor, total_bD: Tensor | None = None) -> Tensor:
        """matrix @ unit rows, [b, D], added to `total_bD` if there is one."""
        ...

    def add_gradient(self, grad_nD: Tensor | None, matrix_bn: Tensor, features_bD: Tensor) -> Tensor:
        """grad + matrix.T @ features, in place where there is one: the gradient of the unit rows, or what
        `through_norm_` makes the right one of."""
        ...

    def add_labels_(self, grad_nD: Tensor, labels: Labels, pulls: list[TargetGradient]) -> None:
        """grad[slot] += coefficient (x - cos w) in an order that is the same in every run: the part of d loss / d w that
        is tangential to w."""
        ...

    def through_norm_(self, grad_nD: Tensor) -> Tensor:
        """The sums above -> the gradient of w, in place."""
        ...


class Engine(Protocol):
    num_rows: int

    def samples(self, x_GD: Tensor) -> Samples: ...

    def block(self, start: int, stop: int, products: bool) -> ClassBlock:
        """products: more than `ClassBlock.negatives` will be asked for."""
        ...

    def target(self, samples: Samples, labels: Labels, margin: bool) -> Target:
        """For gradients and for a loss alone after every row has been in a block."""
        ...

    def coefficients(self, stats: dict[str, Tensor], present: Tensor, share: Tensor) -> Coefficients:
        """`epilogue.epilogue`."""
        ...

    def finish_x(self, products: list[tuple[Tensor, Tensor]], pull: TargetGradient, labels: Labels) -> Tensor:
        """[b, D], this shard's part of the gradient of x from (coefficient [b], `ClassBlock.product`) and the labels' pull."""
        ...

    def matrix_bytes(self) -> int:
        """Of an entry of a matrix of exponentials."""
        ...

    def slab_bytes(self, batch: int, gradients: bool) -> SlabBytes:
        """Memory of slabs, for gradients or the loss alone."""
        ...


class EngineInputs(NamedTuple):
    """The arguments that both engines are made of."""

    w: Tensor  # [S, D], or [L, D] with `gather`: any floating dtype
    gather: Tensor | None  # int64 [S] which rows of w are meant; None: all
    bias: Tensor | None  # [S]
    spec: LossSpec
    whole: bool  # one block of all rows will be asked for, once
    overwrite: bool  # w is scratch and may be normalised in place
