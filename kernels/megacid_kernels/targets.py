"""The labels of a batch: where their classes live, and their cosines and margin from full-precision rows.

Legend: G gathered batch, b samples of one chunk, l labels per sample, D width, S rows of w on this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megacid_kernels.loss_spec import LossSpec


class Target(NamedTuple):
    """The labels' classes of every sample, zeros where another rank owns the class."""

    cos: Tensor  # [b, l]
    psi: Tensor  # [b, l]
    dpsi: Tensor  # [b, l]


def locate(target_Gl: Tensor, rows_S: Tensor | None, class_start: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """(own [G, l] bool, slot [G, l]: the row of w that holds the class, 0-clamped where not owned). No host sync."""
    local = target_Gl - class_start
    if num_rows == 0:
        return torch.zeros_like(target_Gl, dtype=torch.bool), torch.zeros_like(target_Gl)
    if rows_S is None:
        slot = local.clamp(0, num_rows - 1)
        own = slot == local
    else:
        slot = torch.searchsorted(rows_S, local).clamp(max=num_rows - 1)
        own = rows_S[slot] == local
    return own & (target_Gl >= 0), slot


def without_repeats(target_Gl: Tensor) -> Tensor:
    """A class that a sample names twice counts once: later ones become -1."""
    earlier = torch.ones(target_Gl.shape[1], target_Gl.shape[1], dtype=torch.bool, device=target_Gl.device).tril(-1)
    again = ((target_Gl[:, :, None] == target_Gl[:, None, :]) & earlier).any(2)
    return target_Gl.masked_fill(again, -1)


def within(own: Tensor, slot: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """`locate`'s answer for the rows [start, stop) alone, counted from `start`."""
    own = own & (slot >= start) & (slot < stop)
    return own, (slot - start).clamp(0, max(stop - start - 1, 0))


def target_of(x_bD: Tensor, w_blD: Tensor, own: Tensor, spec: LossSpec | None) -> Target:
    """From unit rows; spec: whose margin acts, if one does. sin = |x - w| |x + w| / 2 keeps its digits at cos -> +-1."""
    x, sin = x_bD[:, None, :], None
    cos = torch.linalg.vecdot(x, w_blD)
    if spec is not None and spec.margin is not None:
        sin = torch.linalg.vector_norm(x - w_blD, dim=2) * torch.linalg.vector_norm(x + w_blD, dim=2) / 2
    return with_margin(cos, sin, own, spec)


def with_margin(cos: Tensor, sin: Tensor | None, own: Tensor, spec: LossSpec | None) -> Target:
    """All [b, l]; sin is needed where a margin acts."""
    psi, dpsi = cos, torch.ones_like(cos)
    if spec is not None and spec.margin is not None and sin is not None:
        psi, exact = spec.margin.target(cos, sin)
        dpsi = exact if spec.margin_grad == "exact" else dpsi
    zero = torch.zeros_like(cos)
    return Target(*(torch.where(own, value, zero) for value in (cos, psi, dpsi)))
