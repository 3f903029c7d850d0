"""The labels of a batch: which rank and row hold their classes, and their cosines and margin in full precision.

Legend: G gathered batch, b samples of one chunk, l labels per sample, D width, S rows of w on this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megacid_kernels.loss_spec import LossSpec


class Target(NamedTuple):
    """Values at the labels of every sample; zero where another rank owns the class."""

    cos: Tensor  # [b, l]
    psi: Tensor  # [b, l] cosine after the margin
    dpsi: Tensor  # [b, l] d psi / d cos


class Labels(NamedTuple):
    """Where the classes of the labels are."""

    own: Tensor  # [G or b, l] bool, this rank (or slab) holds the class
    slot: Tensor  # [G or b, l] int64, the row that holds it; any valid row where not own

    def samples(self, part: slice) -> Labels:
        return Labels(self.own[part], self.slot[part])

    def in_rows(self, start: int, stop: int) -> Labels:
        """The same for the rows [start, stop) alone, with slots counted from `start`."""
        own = self.own & (self.slot >= start) & (self.slot < stop)
        return Labels(own, (self.slot - start).clamp(0, max(stop - start - 1, 0)))


class BatchLabels(NamedTuple):
    """The labels of a batch or of a chunk, and what each sample weighs."""

    located: Labels
    present: Tensor  # [G or b, l] bool, which labels exist
    num_labels: Tensor  # [G or b]
    owned: Tensor  # [G or b] number of labels whose class this rank holds
    share: Tensor  # [G or b] weight of the sample in the loss; 0 without a label
    sample_weight: Tensor  # 0-d, weight of every labelled sample

    def samples(self, part: slice) -> BatchLabels:
        present, num_labels, owned, share = (tensor[part] for tensor in self[1:5])
        return BatchLabels(self.located.samples(part), present, num_labels, owned, share, self.sample_weight)


def batch_labels(
    target_Gl: Tensor, rows_S: Tensor | None, spec: LossSpec, num_rows: int, dtype: torch.dtype
) -> BatchLabels:
    """Find the labels of a batch, no class twice in one sample; its numbers get `dtype`."""
    present = target_Gl >= 0
    located = locate(target_Gl, rows_S, spec.class_start, num_rows)
    labelled = present.any(1)
    count = labelled.sum().to(dtype)
    weight = 1 / count.clamp_min(1) if spec.reduction == "mean" else torch.ones_like(count)
    return BatchLabels(located, present, present.sum(1), located.own.sum(1).to(dtype), labelled * weight, weight)


def locate(target_Gl: Tensor, rows_S: Tensor | None, class_start: int, num_rows: int) -> Labels:
    """Find the labels among this rank's rows, without host synchronisation."""
    local = target_Gl - class_start
    if num_rows == 0:
        return Labels(torch.zeros_like(target_Gl, dtype=torch.bool), torch.zeros_like(target_Gl))
    if rows_S is None:
        slot = local.clamp(0, num_rows - 1)
        own = slot == local
    else:
        slot = torch.searchsorted(rows_S, local).clamp(max=num_rows - 1)
        own = rows_S[slot] == local
    return Labels(own & (target_Gl >= 0), slot)


def drop_repeated_labels(target_Gl: Tensor) -> Tensor:
    """Set every further occurrence of a class within one sample to -1, so that it counts once."""
    earlier = torch.ones(target_Gl.shape[1], target_Gl.shape[1], dtype=torch.bool, device=target_Gl.device).tril(-1)
    repeated = ((target_Gl[:, :, None] == target_Gl[:, None, :]) & earlier).any(2)
    return target_Gl.masked_fill(repeated, -1)


def target_of(x_bD: Tensor, w_blD: Tensor, own: Tensor, spec: LossSpec | None) -> Target:
    """Target cosines from unit rows; spec None: no margin. sin = |x - w| |x + w| / 2 keeps its digits at cos = +-1.

    A zero row has the cosine 0 and the sine 1. The two lengths recognise it: the sum of their squares is 4 for unit
    rows, 2 if one of them is zero, 0 if both are.
    """
    x, sin = x_bD[:, None, :], None
    cos = torch.linalg.vecdot(x, w_blD)
    if spec is not None and spec.margin is not None:
        apart, along = torch.linalg.vector_norm(x - w_blD, dim=2), torch.linalg.vector_norm(x + w_blD, dim=2)
        sin = torch.where(apart.square() + along.square() < 3, 1.0, apart * along / 2)
    return with_margin(cos, sin, own, spec)


def with_margin(cos: Tensor, sin: Tensor | None, own: Tensor, spec: LossSpec | None) -> Target:
    """Apply the margin of `spec`, which needs `sin`; all tensors [b, l]."""
    psi, dpsi = cos, torch.ones_like(cos)
    if spec is not None and spec.margin is not None and sin is not None:
        psi, exact = spec.margin.target(cos, sin)
        dpsi = exact if spec.margin_grad == "exact" else dpsi
    zero = torch.zeros_like(cos)
    return Target(*(torch.where(own, value, zero) for value in (cos, psi, dpsi)))
