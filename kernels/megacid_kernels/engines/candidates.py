"""The interface of the contrastive operator's engines, and the engine in plain PyTorch.

Legend: G candidates, c anchors of one chunk, D width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class AnchorNegatives(NamedTuple):
    """Exponentials of a chunk of anchors; 0 at each anchor's own pair."""

    matrix: Tensor  # [c, G] exp(z - shift)
    sums: Tensor  # [c]
    shift: Tensor  # [c] or 0-d


class Candidates(Protocol):
    """Everything that touches a matrix [c, G] or all candidates."""

    def negatives(self, scaled_cD: Tensor, target_c: Tensor, first: int) -> AnchorNegatives:
        """scaled_cD: scale * anchors; target_c: logits of their pairs, the candidates from `first` on."""
        ...

    def product(self, matrix_cG: Tensor) -> Tensor:
        """matrix @ candidates, [c, D] float32 (float64)."""
        ...

    def add_gradient_(self, grad_GD: Tensor, matrix_cG: Tensor, features_cD: Tensor) -> None:
        """grad += matrix.T @ features"""
        ...


class TorchCandidates:
    def __init__(self, other_GD: Tensor):
        self.other = other_GD

    def negatives(self, scaled_cD: Tensor, target_c: Tensor, first: int) -> AnchorNegatives:
        z_cG = scaled_cD @ self.other.T
        z_cG[:, first : first + len(z_cG)].diagonal().fill_(-torch.inf)
        shift_c = torch.maximum(z_cG.amax(1), target_c)
        e_cG = z_cG.sub_(shift_c[:, None]).exp_()
        return AnchorNegatives(e_cG, e_cG.sum(1), shift_c)

    def product(self, matrix_cG: Tensor) -> Tensor:
        return matrix_cG @ self.other

    def add_gradient_(self, grad_GD: Tensor, matrix_cG: Tensor, features_cD: Tensor) -> None:
        grad_GD.addmm_(matrix_cG.T, features_cD)
