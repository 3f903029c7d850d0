"""Sampling of class rows and feature dimensions: a pure function of (seed, step, global ids), for any number of ranks.

The classes of all ranks are cut into n = sample_rate * num_classes strata of (nearly) equal size and one class is drawn
from each. The cost of a draw grows with the drawn classes, not with all classes (a random permutation or a top-k of
random keys, as in partial FC, touches every class); a rank draws its own part without communication; and a sum over
the drawn classes has less variance than with independent draws. Each step rotates the strata by a random offset:
every class is equally likely, and no two classes exclude each other permanently. No host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK_62, _MASK_64 = (1 << 62) - 1, (1 << 64) - 1
# With static shapes the number of rows is rounded up to this: whole tiles of the products, and as a rule more than the
# number of distinct labels varies, so that hardly more than two shapes occur.
ROW_MULTIPLE = 512


class RandomStream(IntEnum):
    """Independent streams of `hash_ids`. The values decide the bits of every run: never change or reuse one."""

    CLASS = 0  # the class of each stratum
    DIMENSION = 1  # the feature dimensions of a step
    ROTATION = 5  # the offset of the strata
    ROUNDING_ROW = 16  # stochastic rounding of the optimizer's moments
    ROUNDING_UPDATE = 17
    ROUNDING_COLUMN = 18


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
    """`_mix` of one unsigned number on the host, without a tensor operation."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK_64
    return x ^ (x >> 31)


def _key(seed: int, step: int, stream: RandomStream) -> int:
    key = 0
    for word in (seed, step, stream):
        key = _mix_int((key + word * _GOLDEN + 0x632BE59BD9B4E019) & _MASK_64)
    return key


def hash_ids(ids: Tensor, *, seed: int, step: int, stream: RandomStream = RandomStream.CLASS) -> Tensor:
    """Uniform int64 in [0, 2^62) per id: a pure function of (seed, step, stream, id), on the device of `ids`."""
    return _mix(_mix(ids * _signed(_GOLDEN) + hash_key(seed, step, stream))) & _MASK_62


def hash_key(seed: int, step: int, stream: RandomStream) -> int:
    """What `hash_ids` adds before it mixes, for kernels: signed, 64 bits."""
    return _signed(_key(seed, step, stream))


def hash_int(number: int, *, seed: int, step: int, stream: RandomStream = RandomStream.CLASS) -> int:
    """`hash_ids` of one id on the host."""
    return _mix_int(_mix_int((number * _GOLDEN + _key(seed, step, stream)) & _MASK_64)) & _MASK_62


@dataclass(frozen=True)
class Draw:
    """The random classes of one step. Position p of the rotated classes is class (p + offset) % num_classes."""

    num_classes: int
    strata: int
    offset: int
    seed: int
    step: int

    @classmethod
    def of_step(cls, num_classes: int, sample_rate: float, *, seed: int, step: int) -> Draw:
        strata = max(1, round(sample_rate * num_classes))
        offset = hash_int(0, seed=seed, step=step, stream=RandomStream.ROTATION) % num_classes
        return cls(num_classes, strata, offset, seed, step)

    def classes(self, start: int, stop: int, device: torch.device | str | None = None) -> Tensor:
        """The drawn classes in [start, stop): global ids, int64, sorted and unique."""
        strata = [torch.arange(part.start, part.stop, device=device) for part in self.strata_of(start, stop)]
        return torch.remainder(self._pick(torch.cat(strata)) + self.offset, self.num_classes)

    def strata_of(self, start: int, stop: int) -> tuple[range, range]:
        """The strata whose drawn class is in [start, stop): below the offset, and from it on. The classes below the
        offset have the last positions. An empty range stands between the strata before and behind it."""
        middle = min(max(start, self.offset), stop)
        return self._strata_between(start, middle), self._strata_between(middle, stop)

    @property
    def key(self) -> int:
        """The `hash_key` of the draw."""
        return hash_key(self.seed, self.step, RandomStream.CLASS)

    def max_count(self, classes: int) -> int:
        """Upper bound of the drawn classes in any range of `classes` neighbouring classes."""
        return min(classes, classes * self.strata // self.num_classes + 3)

    def log_q(self, class_ids: Tensor) -> Tensor:
        """Log-probability that this step draws each class, given its strata: float32, the shape of class_ids."""
        position = torch.remainder(class_ids - self.offset, self.num_classes)
        stratum = torch.div((position + 1) * self.strata - 1, self.num_classes, rounding_mode="floor")
        return -(self._edge(stratum + 1) - self._edge(stratum)).float().log()

    def _strata_between(self, start: int, stop: int) -> range:
        """The strata whose drawn class is in [start, stop), whose classes have increasing positions."""
        if start == stop:
            return range(0)
        low = (start - self.offset) % self.num_classes
        high = low + stop - start
        first, last = (((p + 1) * self.strata - 1) // self.num_classes for p in (low, high - 1))
        # Only the first and the last stratum can reach beyond the range. Checking them on the host makes the number of
        # drawn classes known there.
        first += self._pick_on_host(first) < low
        last -= last >= first and self._pick_on_host(last) >= high
        return range(first, last + 1)

    def _pick_on_host(self, stratum: int) -> int:
        low, high = (i * self.num_classes // self.strata for i in (stratum, stratum + 1))
        return low + hash_int(stratum, seed=self.seed, step=self.step) % (high - low)

    def _edge(self, stratum: Tensor) -> Tensor:
        return torch.div(stratum * self.num_classes, self.strata, rounding_mode="floor")

    def _pick(self, stratum: Tensor) -> Tensor:
        """The drawn position of each stratum."""
        low = self._edge(stratum)
        size = self._edge(stratum + 1) - low
        return low + torch.remainder(hash_ids(stratum, seed=self.seed, step=self.step), size)


def padded_rows(most: int, widest: int, *, static_shapes: bool) -> int:
    """The rows that every rank computes with if none uses more than `most`; widest: rows of the largest shard."""
    return min(widest, -(-most // ROW_MULTIPLE) * ROW_MULTIPLE if static_shapes else most)


def num_dims(width: int, rate: float) -> int:
    """Number of feature dimensions that a step draws.

    Of 32 dimensions or more it is a multiple of 16: tensor cores multiply 16 columns at a time.
    """
    if width < 32 or rate == 1:
        return max(1, round(rate * width))
    return min(width, max(16, 16 * round(rate * width / 16)))


def sample_dims(width: int, rate: float, *, seed: int, step: int, device: torch.device) -> Tensor:
    """Sorted indices of the feature dimensions of a step, int64, the same on every rank (as in UNICOM)."""
    count = num_dims(width, rate)
    keys = hash_ids(torch.arange(width, device=device), seed=seed, step=step, stream=RandomStream.DIMENSION)
    return torch.topk(keys, count, sorted=False).indices.sort().values
