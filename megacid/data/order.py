"""Training order: a pure function from a position in the endless stream to (epoch, shard, row).

Epochs follow one another without a gap: with n samples, position p belongs to epoch p // n. In every epoch the shards
are permuted and split into blocks of `block_shards`, and the samples of a block are permuted among themselves. A
process therefore reads few files at a time. The order has no state: the step determines every batch, whatever the
number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from megacid.errors import UserError

Block = tuple[int, int, np.ndarray]  # first position, end, shards
_ROUNDS = 4
_MASK64 = (1 << 64) - 1


@overload
def splitmix64(x: int) -> int: ...
@overload
def splitmix64(x: np.ndarray) -> np.ndarray: ...
def splitmix64(x: int | np.ndarray) -> int | np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014) on uint64: a mixing bijection of 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def derive_key(*parts: int) -> int:
    """One 64-bit key from several integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = splitmix64(key ^ (int(part) & _MASK64))
    return key


class KeyedPermutation:
    """A permutation of range(n) chosen by a 64-bit key, evaluated at any point without a table.

    Four Feistel rounds on the smallest even number of bits that can represent n - 1, with cycle walking: a value
    outside of the range is mapped again until it falls inside (Black & Rogaway 2002). The domain is smaller than 4 n,
    so this takes fewer than four rounds on average.
    """

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"got n = {n}, expected at least 1")
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = [np.uint64(derive_key(key, r)) for r in range(_ROUNDS)]

    def _feistel(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (splitmix64(right ^ key) & self._mask)
        return (left << self._half) | right

    @overload
    def __call__(self, i: int) -> int: ...
    @overload
    def __call__(self, i: np.ndarray) -> np.ndarray: ...
    def __call__(self, i: int | np.ndarray) -> int | np.ndarray:
        """Image of one index, or of an int64 array of indices in [0, n)."""
        x = np.atleast_1d(np.asarray(i, np.int64))
        if x.size and (x.min() < 0 or x.max() >= self.n):
            raise IndexError(f"got indices {x.min()} .. {x.max()}, expected 0 .. {self.n - 1}")
        y = self._feistel(x.astype(np.uint64))
        outside = np.flatnonzero(y >= self.n)
        while outside.size:
            y[outside] = self._feistel(y[outside])
            outside = outside[y[outside] >= self.n]
        out = y.astype(np.int64)
        return int(out[0]) if np.ndim(i) == 0 else out.reshape(np.shape(i))


@dataclass(frozen=True)
class _EpochPlan:
    shard_order: np.ndarray  # int64 [shards] the permuted shards
    starts: np.ndarray  # int64 [shards + 1] first position of each, in that order
    block_starts: np.ndarray  # int64 [blocks + 1]


class SampleOrder:
    """Maps positions of the stream to samples.

    Args:
        sizes_per_shard: usable samples of each shard (after `keep`); zeros are allowed.
        seed: determines the order.
        block_shards: number of shards whose samples are shuffled with each other. 1 reads one shard after another; the
            number of shards is a full shuffle.
    """

    def __init__(self, sizes_per_shard: Sequence[int] | np.ndarray, *, seed: int, block_shards: int = 64) -> None:
        self.sizes = np.asarray(sizes_per_shard, np.int64)
        self.num_samples = int(self.sizes.sum())
        if self.num_samples < 1 or self.sizes.min() < 0:
            raise UserError(
                f"the shards have {self.num_samples} usable samples, expected at least 1: check them and data.keep"
            )
        if block_shards < 1:
            raise UserError(f"block_shards is {block_shards}, expected at least 1: 64 is the default")
        self.seed = seed
        self.block_shards = block_shards
        self._plans: dict[int, _EpochPlan] = {}

    def _plan(self, epoch: int) -> _EpochPlan:
        plan = self._plans.get(epoch)
        if plan is None:
            shards = len(self.sizes)
            order = KeyedPermutation(shards, derive_key(self.seed, epoch))(np.arange(shards))
            starts = np.concatenate([[0], np.cumsum(self.sizes[order])]).astype(np.int64)
            block_starts = np.append(starts[:-1][:: self.block_shards], starts[-1])
            plan = _EpochPlan(order, starts, block_starts)
            # A batch lies in one epoch or spans two: two plans are enough.
            self._plans = dict([*list(self._plans.items())[-1:], (epoch, plan)])
        return plan

    def blocks(self, position: int) -> Iterator[Block]:
        """(First position, end, int64 shards) of the block that holds a position and of all that follow, endlessly."""
        epoch, offset = divmod(position, self.num_samples)
        while True:
            plan = self._plan(epoch)
            ends, start = plan.block_starts[1:], epoch * self.num_samples
            for b in range(int(np.searchsorted(ends, offset, side="right")), len(ends)):
                if plan.block_starts[b] < ends[b]:
                    shards = plan.shard_order[b * self.block_shards : (b + 1) * self.block_shards]
                    yield start + int(plan.block_starts[b]), start + int(ends[b]), shards[self.sizes[shards] > 0]
            epoch, offset = epoch + 1, 0

    def locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard, row) of one position; `row` counts the usable samples of the shard."""
        epoch, shard, row = self.locate_many(np.array([position], np.int64))
        return int(epoch[0]), int(shard[0]), int(row[0])

    def locate_many(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`locate` for int64 [m] positions: three int64 [m] arrays."""
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise IndexError(f"got position {positions.min()}, expected at least 0")
        epoch, offset = np.divmod(positions, self.num_samples)
        shard, row = np.empty_like(epoch), np.empty_like(epoch)
        for e in np.unique(epoch):
            plan = self._plan(int(e))
            in_epoch = np.flatnonzero(epoch == e)
            # side="right" skips empty blocks, which begin where the next one begins.
            block = np.searchsorted(plan.block_starts, offset[in_epoch], side="right") - 1
            for b in np.unique(block):
                here = in_epoch[block == b]
                first, stop = int(plan.block_starts[b]), int(plan.block_starts[b + 1])
                inside = KeyedPermutation(stop - first, derive_key(self.seed, int(e), int(b), 1))
                at = first + inside(offset[here] - first)
                place = np.searchsorted(plan.starts, at, side="right") - 1
                shard[here] = plan.shard_order[place]
                row[here] = at - plan.starts[place]
        return epoch, shard, row
