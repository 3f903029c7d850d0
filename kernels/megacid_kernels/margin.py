"""The combined margin on the target class: cos(m1 * theta + m2) - m3 (Deng et al., 2019). Negatives have no margin."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIN_FLOOR = 1e-3


@dataclass(frozen=True)
class Margin:
    """psi(theta) = cos(m1 * theta + m2) - m3, continued monotonically where the angle exceeds pi.

    For m1 = 1 and theta + m2 > pi, psi = cos(theta) - m2 * sin(m2) - m3: ArcFace's linear continuation, which drops by
    about m2^2 / 2 there. For m1 != 1, SphereFace's continuation (-1)^k cos(m1 * theta + m2) - 2k - m3 is continuous.

    Attributes:
        m1: factor of the angle, >= 1 (SphereFace).
        m2: offset of the angle in radians, 0 <= m2 < pi (ArcFace).
        m3: offset of the cosine, >= 0 (CosFace).
        easy_margin: apply m1 and m2 only where cos > 0 (psi is discontinuous at cos = 0); m3 always applies.

    Raises:
        ValueError: a value is out of range.
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    easy_margin: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.m1) and self.m1 >= 1):
            raise ValueError(f"margin m1 is {self.m1}, expected >= 1: 1 disables it")
        if not 0 <= self.m2 < math.pi:
            raise ValueError(f"margin m2 is {self.m2} rad, expected 0 <= m2 < pi: 0.5 is usual")
        if not (math.isfinite(self.m3) and self.m3 >= 0):
            raise ValueError(f"margin m3 is {self.m3}, expected >= 0: 0.3 is usual")

    @classmethod
    def arcface(cls, m: float = 0.5, *, easy_margin: bool = False) -> Margin:
        return cls(m2=m, easy_margin=easy_margin)

    @classmethod
    def cosface(cls, m: float = 0.3) -> Margin:
        return cls(m3=m)

    @classmethod
    def sphereface(cls, m: float = 1.35, *, easy_margin: bool = False) -> Margin:
        return cls(m1=m, easy_margin=easy_margin)

    def target(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the margin.

        Args:
            cos: target cosines, any shape, float32 or float64.
            sin: sines of the same angles; an argument because the caller can compute them without cancellation.

        Returns:
            psi and d psi / d cos, shaped like `cos`. The derivative grows like 1 / sin near cos = +-1, while the
            gradient of the embedding stays bounded; it clamps sin to >= 0.001, so it is at most 1000 m1.
        """
        one = torch.ones_like(cos)
        if self.m1 == 1.0 and self.m2 == 0.0:
            return cos - self.m3, one
        if self.m1 == 1.0:
            cos_m, sin_m = math.cos(self.m2), math.sin(self.m2)
            psi = cos * cos_m - sin * sin_m
            dpsi = cos_m + sin_m * cos / sin.clamp_min(SIN_FLOOR)
            if not self.easy_margin:
                inside = cos > math.cos(math.pi - self.m2)
                psi = torch.where(inside, psi, cos - self.m2 * sin_m)
                dpsi = torch.where(inside, dpsi, one)
        else:
            psi, dpsi = self._multiplied(cos, sin)
        if self.easy_margin:
            psi, dpsi = torch.where(cos > 0, psi, cos), torch.where(cos > 0, dpsi, one)
        return psi - self.m3, dpsi

    def _multiplied(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        theta = torch.atan2(sin, cos)
        angle = self.m1 * theta + self.m2
        fold = torch.floor(angle / math.pi).detach()
        sign = 1 - 2 * torch.remainder(fold, 2)
        psi = sign * torch.cos(angle) - 2 * fold
        # Evaluated away from 0 and pi: sin(m1 theta) / sin(theta) is smooth there.
        inner = theta.clamp(SIN_FLOOR, math.pi - SIN_FLOOR)
        angle = self.m1 * inner + self.m2
        sign = 1 - 2 * torch.remainder(torch.floor(angle / math.pi), 2)
        return psi, sign * self.m1 * torch.sin(angle) / torch.sin(inner)
