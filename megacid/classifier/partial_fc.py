"""The class-sharded, sampled margin classifier.

Legend: B local batch, G gathered batch, D width, C classes, L local classes, S sampled rows.

Embeddings and labels are gathered, every rank computes its own classes' share of each softmax, one sum all-reduce joins
the shares, and the embedding gradients are scattered back (An et al., Partial FC, CVPR 2022). The classifier lives
beside the data-parallel engine: its rows have their own gradient (`row_grad`) and optimizer (`RowAdamW`, `RowSGD`).
"""

from __future__ import annotations

from os import PathLike
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacid.classifier.margin import Margin
from megacid.classifier.row_state import ReadRows, copy_rows, gather_state, reader_of
from megacid.classifier.sampling import sample_dims, sample_rows, sample_size, shard_range
from megacid.config import UserError
from megacid.distributed.collectives import GradReduction, gather_plain, gather_rows, gradient_factor, rank, world_size
from megacid_kernels import Discrimination, Problem, Weights, linear_margin_discrimination

Init = np.ndarray | Tensor | str | PathLike[str]

_INIT_STD = 0.01
_INIT_BLOCK = 1024  # rows per generator: a shard draws only the blocks it touches, whatever the number of ranks


def _random_rows(start: int, stop: int, width: int, seed: int) -> Tensor:
    """Rows [start, stop) of one global N(0, 0.01) matrix that depends on the seed alone."""
    rows = torch.empty(stop - start, width)
    for block in range(start // _INIT_BLOCK, -(-stop // _INIT_BLOCK)):
        words = np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, block]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0]))
        drawn = torch.randn(_INIT_BLOCK, width, generator=generator) * _INIT_STD
        first = block * _INIT_BLOCK
        low, high = max(start, first), min(stop, first + _INIT_BLOCK)
        rows[low - start : high - start] = drawn[low - first : high - first]
    return rows


def _given_rows(init: Init, start: int, stop: int, shape: tuple[int, int]) -> Tensor:
    """Rows [start, stop) of given centroids; of a file only these are read."""
    given: np.ndarray | Tensor
    said = "init" if isinstance(init, np.ndarray | Tensor) else f"init {str(init)!r}"
    if isinstance(init, np.ndarray | Tensor):
        given = init
    else:
        try:
            given = np.load(init, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{said} is not a readable .npy file ({error}): pass centroids.npy of a clusters directory"
            ) from error
    if tuple(given.shape) != shape:
        raise UserError(
            f"{said} has shape {tuple(given.shape)}, wanted {shape} = (num_classes, embed_dim): "
            "take the centroids of that k and teacher"
        )
    rows = (
        given[start:stop].float()
        if isinstance(given, Tensor)
        else torch.as_tensor(np.array(given[start:stop], dtype=np.float32))
    )
    finite = torch.isfinite(rows).all(1)
    if not finite.all():
        raise UserError(f"{said} row {start + int((~finite).nonzero()[0])} is not finite: make the centroids again")
    return rows


class PartialFC(nn.Module):
    """Margin softmax over `num_classes` classes sharded over `group`. Arguments: see `__init__`.

    `weight` fp32 [L, D] holds classes class_start .. class_start + num_local. It is not trained by autograd: after the
    backward of a loss, `row_grad()` has the gradient of the rows that were used.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        *,
        sample_rate: float = 1.0,
        margin: Margin | None = None,
        scale: float = 64.0,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        init: Init | None = None,
        margin_grad: Literal["exact", "straight_through"] = "exact",
        grad_reduction: GradReduction = "mean",
        feature_rate: float = 1.0,
        filter_threshold: float | None = None,
        impl: str = "auto",
        mode: str = "auto",
        memory_budget_bytes: int | None = None,
        device: torch.device | str | None = None,
    ):
        """
        sample_rate      share of its classes that a rank uses in a step, (0, 1]; classes of the batch are always used
        margin           None: Margin.cosface(0.3)
        group            ranks the classes are sharded over; None: the default group, or a single process
        init             [C, D] centroids: array, memmap, tensor or path of a .npy file (each rank reads its own rows);
                         None: N(0, 0.01), the same matrix for every number of ranks
        margin_grad      "straight_through" takes d psi / d cos = 1
        grad_reduction   what the data-parallel engine does with the student's gradients
        feature_rate     share of the D dimensions used in a step, (0, 1], the same on every rank
        filter_threshold negatives whose cosine to the sample is larger leave the denominator
        memory_budget_bytes  for the [chunk, S] matrices; None: 1 GiB
        """
        super().__init__()
        world = world_size(group)
        if num_classes < max(1, world):
            raise UserError(
                f"num_classes is {num_classes}, wanted at least one class for each of {world} ranks: use fewer ranks"
            )
        if embed_dim < 1:
            raise UserError(f"embed_dim is {embed_dim}, wanted the width of the embeddings")
        for name, rate in (("sample_rate", sample_rate), ("feature_rate", feature_rate)):
            if not 0 < rate <= 1:
                raise UserError(f"{name} is {rate}, wanted a number in (0, 1]: 1 uses everything")
        gradient_factor(group, grad_reduction)  # refuses an unknown word now and not in the first step
        self.num_classes, self.embed_dim, self.group, self.seed = num_classes, embed_dim, group, seed
        self.sample_rate, self.feature_rate, self.grad_reduction = sample_rate, feature_rate, grad_reduction
        self.class_start, self.class_stop = shard_range(num_classes, rank(group), world)
        self.num_local = self.class_stop - self.class_start
        # Rank 0 has the largest shard; chunks must be cut alike everywhere.
        self._widest = shard_range(num_classes, 0, world)[1]
        self._options = {
            "scale": scale, "margin": margin or Margin.cosface(0.3), "margin_grad": margin_grad,
            "filter_threshold": filter_threshold, "impl": impl, "mode": mode, "memory_budget_bytes": memory_budget_bytes,
        }  # fmt: skip
        self._problem(Weights(), 1)
        if init is None:
            rows = _random_rows(self.class_start, self.class_stop, embed_dim, seed)
        else:
            rows = _given_rows(init, self.class_start, self.class_stop, (num_classes, embed_dim))
        self.weight = nn.Parameter(rows.clone().to(device), requires_grad=False)
        self.step = 0
        self._grad_rows: Tensor | None = None  # [S] sorted unique
        self._grad: Tensor | None = None  # [S, D]
        self._last: tuple[Discrimination, Tensor, Tensor | None] | None = None

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, here {self.class_start}..{self.class_stop}, width {self.embed_dim}"

    def set_step(self, step: int) -> None:
        """The optimizer step of the next batches. Sampling is a pure function of (seed, step, classes of the batch),
        so micro-batches of one step share their negatives and a resumed run draws what it would have drawn."""
        self.step = step

    def forward(self, emb_BD: Tensor, target_B: Tensor) -> Tensor:
        """Mean margin cross entropy over the labelled samples of the global batch, 0-d, the same on every rank.

        emb_BD: local embeddings, need not be normalised, batches may differ between ranks and may be empty.
        target_B: int64 global class ids, -1 = unlabelled. UserError on every rank for a label out of range.
        """
        return self.discriminate(emb_BD, target_B).loss

    def discriminate(
        self, emb_BD: Tensor, target_B: Tensor, *, teacher_BD: Tensor | None = None, weights: Weights | None = None
    ) -> Discrimination:
        """The weighted sum of `megacid_kernels.Weights` over the rows sampled for this step; `forward` is alpha = 1.

        teacher_BD: stored teacher embeddings [B, D], needed when beta or gamma is > 0, no gradient. A collective.
        """
        weights = weights or Weights()
        self._check(emb_BD, target_B, teacher_BD if weights.needs_teacher else None, weights)
        emb_GD, _ = gather_rows(emb_BD, self.group, grad_reduction=self.grad_reduction)
        target_G = gather_plain(target_B, self.group)
        teacher_GD = gather_plain(teacher_BD, self.group) if teacher_BD is not None and weights.needs_teacher else None
        self._check_labels(target_G)  # of the gathered labels: every rank raises, none waits in a collective
        rows_S, w_SD = self._sampled(target_G)
        if self.feature_rate < 1:
            dims = sample_dims(self.embed_dim, self.feature_rate, seed=self.seed, step=self.step, device=w_SD.device)
            emb_GD, w_SD = emb_GD.index_select(1, dims), w_SD.index_select(1, dims)
            teacher_GD = teacher_GD.index_select(1, dims) if teacher_GD is not None else None
        problem = self._problem(weights, len(target_G))
        out = linear_margin_discrimination(emb_GD, w_SD, target_G, problem, rows=rows_S, teacher=teacher_GD)
        self._last = (Discrimination(*(part.detach() for part in out)), target_G, rows_S)
        return out

    def _problem(self, weights: Weights, batch: int) -> Problem:
        try:
            return Problem(
                num_classes=self.num_classes,
                class_start=self.class_start,
                max_rows=sample_size(self._widest, self.sample_rate, batch),
                group=self.group,
                weights=weights,
                **self._options,  # type: ignore[arg-type]
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    def _check(self, emb: Tensor, target: Tensor, teacher: Tensor | None, weights: Weights) -> None:
        if emb.ndim != 2 or emb.shape[1] != self.embed_dim:
            raise UserError(
                f"embeddings have shape {tuple(emb.shape)}, wanted [B, {self.embed_dim}]: "
                "build the head with the student's width"
            )
        if target.dtype != torch.int64 or target.shape != emb.shape[:1]:
            raise UserError(
                f"labels are {target.dtype} {tuple(target.shape)}, wanted torch.int64 [{len(emb)}]: "
                "one class id per sample, -1 for none"
            )
        if weights.needs_teacher and teacher is None:
            raise UserError(
                "teacher embeddings are missing, but beta or gamma is > 0: pass them, or set both weights to 0"
            )
        if teacher is not None and teacher.shape != emb.shape:
            raise UserError(
                f"teacher embeddings have shape {tuple(teacher.shape)}, wanted {tuple(emb.shape)} like the student's"
            )

    def _check_labels(self, target_G: Tensor) -> None:
        if len(target_G) == 0:
            return
        for value in torch.stack(torch.aminmax(target_G)).tolist():
            if not -1 <= value < self.num_classes:
                raise UserError(
                    f"label {value} is out of range, wanted -1 (none) or 0 to {self.num_classes - 1}: "
                    "use labels of the same clustering"
                )

    def _sampled(self, target_G: Tensor) -> tuple[Tensor | None, Tensor]:
        """(local row ids [S] or None for all, the rows [S, D] as a leaf whose gradient arrives in `row_grad`)."""
        size = sample_size(self.num_local, self.sample_rate, len(target_G))
        rows_S = None
        w_SD = self.weight.detach()
        if self.sample_rate < 1:
            rows_S = sample_rows(target_G, self.class_start, self.class_stop, size, seed=self.seed, step=self.step)
            w_SD = w_SD[rows_S]
        if torch.is_grad_enabled():
            w_SD.requires_grad_()
            w_SD.register_post_accumulate_grad_hook(lambda leaf: self._collect(rows_S, leaf))
        return rows_S, w_SD

    def _collect(self, rows_S: Tensor | None, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        rows = torch.arange(self.num_local, device=grad.device) if rows_S is None else rows_S
        if self._grad is None or self._grad_rows is None:
            self._grad_rows, self._grad = rows, grad
        elif rows_S is None:
            self._grad = self._grad + grad
        else:
            union, place = torch.unique(torch.cat([self._grad_rows, rows]), return_inverse=True)
            total = grad.new_zeros(len(union), grad.shape[1])
            # Each part's rows are unique, so both additions are of one number per element: any order, same bits.
            total.index_add_(0, place[: len(self._grad_rows)], self._grad)
            total.index_add_(0, place[len(self._grad_rows) :], grad)
            self._grad_rows, self._grad = union, total

    def row_grad(self) -> tuple[Tensor, Tensor]:
        """(local row ids [S] sorted unique, d loss / d weight[rows] [S, D] fp32), summed over the backwards since
        `zero_grad`. Exact: no factor of the number of ranks. Empty before the first backward."""
        if self._grad is None or self._grad_rows is None:
            return torch.empty(0, dtype=torch.int64, device=self.weight.device), self.weight.new_empty(
                0, self.embed_dim
            )
        return self._grad_rows, self._grad

    def grad_norm_sq(self) -> Tensor:
        """Squared norm of this rank's row gradient, 0-d fp32; the sum over ranks is the classifier's."""
        return self.row_grad()[1].square().sum()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the row gradients."""
        super().zero_grad(set_to_none)
        self._grad_rows = self._grad = None

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Of the last batch, 0-d tensors, no host sync and no collective; {} before the first batch.

        target_cosine: mean cosine of the labelled samples to their class (student). accuracy: share of them whose class
        outweighs all sampled negatives together (P > 1/2 without margin), a lower bound of top-1 among the sampled.
        positive_share: share of this rank's sampled rows that are classes of the batch.
        """
        if self._last is None:
            return {}
        out, target_G, rows_S = self._last
        labelled = target_G >= 0
        count = labelled.sum().clamp_min(1)
        inside = (target_G >= self.class_start) & (target_G < self.class_stop)
        present = torch.zeros(self.num_local + 1, dtype=torch.bool, device=target_G.device)
        present[torch.where(inside, target_G - self.class_start, self.num_local)] = True
        sampled = self.num_local if rows_S is None else len(rows_S)
        return {
            "target_cosine": (out.target_cosine * labelled).sum() / count,
            "accuracy": out.hit.sum() / count,
            "positive_share": present[:-1].sum() / sampled,
        }

    def state_rows(self) -> dict[str, Tensor]:
        """This rank's rows of everything that is to be saved: {"weight": [L, D]}."""
        return {"weight": self.weight.detach()}

    def load_state_rows(self, read: ReadRows) -> None:
        """Take rows class_start .. class_stop from read(name, start, stop), whatever number of ranks wrote them."""
        copy_rows(self.state_rows(), read, self.class_start, self.class_stop)

    def full_state(self) -> dict[str, Tensor]:
        """{"weight": [C, D]} on the host of every rank. A collective for small heads: checkpoints use `state_rows`."""
        return gather_state(self.state_rows(), self.group)

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Take this rank's rows of a `full_state`."""
        self.load_state_rows(reader_of(state, self.num_classes))
