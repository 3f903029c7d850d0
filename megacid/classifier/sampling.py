"""Which class rows a step uses: a pure function of (seed, step, global class ids), whatever the number of ranks.

The classes of all ranks are cut into n = sample_rate * num_classes strata of (nearly) equal size and one class is drawn
from each. So a draw costs time and memory of the classes drawn, not of those that exist (a random permutation or a top-k
of random keys, as partial FC does it, touches every class); a rank finds its own part without the others; and the sum
over the drawn classes has less variance than with independent draws. The strata are turned by a random offset in every
step, so that every class has the same chance and no two classes exclude each other for ever. No host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK_62, _MASK_64 = (1 << 62) - 1, (1 << 64) - 1
_DRAW, _DIMENSIONS, _TURN = 0, 1, 5  # streams of `hash_ids`


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64. Its logical shifts are arithmetic shifts with the sign bits masked off."""
    x = x ^ ((x >> 30) & ((1 << 34) - 1))
    x = x * _signed(0xBF58476D1CE4E5B9)
    x = x ^ ((x >> 27) & ((1 << 37) - 1))
    x = x * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _mix_int(x: int) -> int:
    """`_mix` of one number, as an unsigned int: a step's key is made on the host without a tensor operation."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK_64
    return x ^ (x >> 31)


def _key(seed: int, step: int, stream: int) -> int:
    key = 0
    for word in (seed, step, stream):
        key = _mix_int((key + word * _GOLDEN + 0x632BE59BD9B4E019) & _MASK_64)
    return key


def hash_ids(ids: Tensor, *, seed: int, step: int, stream: int = 0) -> Tensor:
    """Uniform int64 in [0, 2^62) for every id, a pure function of (seed, step, stream, id); same device as `ids`."""
    return _mix(_mix(ids * _signed(_GOLDEN) + _signed(_key(seed, step, stream)))) & _MASK_62


def hash_int(number: int, *, seed: int, step: int, stream: int = 0) -> int:
    """`hash_ids` of one id on the host."""
    return _mix_int(_mix_int((number * _GOLDEN + _key(seed, step, stream)) & _MASK_64)) & _MASK_62


@dataclass(frozen=True)
class Draw:
    """The random classes of one step. Position p of the circle of strata is class (p + offset) % num_classes."""

    num_classes: int
    strata: int
    offset: int
    seed: int
    step: int

    @classmethod
    def of_step(cls, num_classes: int, sample_rate: float, *, seed: int, step: int) -> Draw:
        strata = max(1, round(sample_rate * num_classes))
        turn = hash_int(0, seed=seed, step=step, stream=_TURN)
        return cls(num_classes, strata, turn % num_classes, seed, step)

    def classes(self, start: int, stop: int, device: torch.device | str | None = None) -> Tensor:
        """Global ids, int64, sorted and unique, of those drawn in [start, stop)."""
        turned = self.offset
        # Classes below the offset lie at the end of the circle.
        parts = []
        for low, high in ((start, min(stop, turned)), (max(start, turned), stop)):
            if low < high:
                position = (low - turned) % self.num_classes
                parts.append(self._run(position, position + high - low, low - position, device))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)

    def most(self, classes: int) -> int:
        """No range of `classes` neighbouring classes gets more draws than this."""
        return min(classes, classes * self.strata // self.num_classes + 3)

    def log_q(self, class_ids: Tensor) -> Tensor:
        """ln of the probability that the draw of this step has each class, given the strata: float32 like class_ids."""
        position = torch.remainder(class_ids - self.offset, self.num_classes)
        stratum = torch.div((position + 1) * self.strata - 1, self.num_classes, rounding_mode="floor")
        return -(self._edge(stratum + 1) - self._edge(stratum)).float().log()

    def _run(self, low: int, high: int, shift: int, device: torch.device | str | None) -> Tensor:
        """What is drawn at positions [low, high), plus `shift`."""
        first, last = (((p + 1) * self.strata - 1) // self.num_classes for p in (low, high - 1))
        # Only the outermost strata can reach beyond the range. They are looked at on the host, which makes the number of
        # drawn classes known there.
        first += self._at(first) < low
        last -= last >= first and self._at(last) >= high
        return self._pick(torch.arange(first, last + 1, device=device)) + shift

    def _at(self, stratum: int) -> int:
        """`_pick` of one stratum on the host."""
        low, high = (i * self.num_classes // self.strata for i in (stratum, stratum + 1))
        return low + hash_int(stratum, seed=self.seed, step=self.step, stream=_DRAW) % (high - low)

    def _edge(self, stratum: Tensor) -> Tensor:
        return torch.div(stratum * self.num_classes, self.strata, rounding_mode="floor")

    def _pick(self, stratum: Tensor) -> Tensor:
        low = self._edge(stratum)
        size = self._edge(stratum + 1) - low
        return low + torch.remainder(hash_ids(stratum, seed=self.seed, step=self.step, stream=_DRAW), size)


def sample_dims(width: int, rate: float, *, seed: int, step: int, device: torch.device) -> Tensor:
    """Sorted indices of the feature dimensions of a step: the same on every rank, for it depends on no rank."""
    keys = hash_ids(torch.arange(width, device=device), seed=seed, step=step, stream=_DIMENSIONS)
    return torch.topk(keys, max(1, round(rate * width)), sorted=False).indices.sort().values
