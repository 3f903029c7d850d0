"""A small trainable tower over feature vectors: replaces the CLIP student in classification experiments.

Shapes: B batch, d feature width, D embedding.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from megacid.models.output import StudentOutput


class FeatureTower(nn.Module):
    """d -> [Linear, GELU, LayerNorm] x layers of width `hidden` -> Linear to D, then L2-normalised.

    Only `seed` decides the initial weights; the global random generator is left unchanged.
    """

    def __init__(self, feature_dim: int, embed_dim: int, *, hidden: int = 512, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.feature_dim, self.embed_dim = feature_dim, embed_dim
        widths = [feature_dim, *[hidden] * layers]
        with torch.random.fork_rng(devices=[]):  # the CPU generator alone: the weights must not depend on the machine
            torch.manual_seed(seed)
            parts: list[nn.Module] = []
            for before, after in itertools.pairwise(widths):
                parts += [nn.Linear(before, after), nn.GELU(), nn.LayerNorm(after)]
            self.body = nn.Sequential(*parts)
            self.projection = nn.Linear(widths[-1], embed_dim)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one input: (d,)."""
        return (self.feature_dim,)

    @property
    def text_length(self) -> int:
        """Tokens per text: features have no texts."""
        return 0

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> StudentOutput:
        """image [B, d] float, text [B, 0] int64 -> `StudentOutput` with image [B, D], text [B, 0], scale 1 and bias 0.

        For the cluster term only: the run file's validation rejects terms that compare with texts.
        """
        embedding = F.normalize(self.projection(self.body(image)).float(), dim=-1)
        return StudentOutput(embedding, embedding[:, :0], embedding.new_ones(()), embedding.new_zeros(()))
