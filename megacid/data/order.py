"""The order of training: a pure function from a position in the endless stream to (epoch, shard, row).

Epochs follow one another without a gap: position p belongs to epoch p // n. In every epoch the shards are permuted
and taken in blocks of `block_shards`; the samples of a block are permuted among themselves. A process therefore
touches few files at a time, and yet nothing has to be remembered: the state of the loader is one integer, whatever
the number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from megacid.errors import UserError

_ROUNDS = 4
_MASK64 = (1 << 64) - 1


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014) on uint64 arrays: a good mixing bijection of 64 bits."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """One 64-bit key from several integers; the order of the parts matters."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = splitmix64(key ^ np.array([part & _MASK64], np.uint64))
    return int(key[0])


class KeyedPermutation:
    """A permutation of range(n) chosen by a 64-bit key, evaluated at any point without a table.

    Four Feistel rounds on the smallest even number of bits that holds n, and cycle walking: a value outside the
    range is mapped again until it falls inside (Black & Rogaway 2002). On average fewer than four walks, because
    the domain is less than 4 n.
    """

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs n >= 1, got {n}")
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
            raise IndexError(f"an index outside of [0, {self.n}): {x.min()} .. {x.max()}")
        y = self._feistel(x.astype(np.uint64))
        outside = np.flatnonzero(y >= self.n)
        while outside.size:
            y[outside] = self._feistel(y[outside])
            outside = outside[y[outside] >= self.n]
        out = y.astype(np.int64)
        return int(out[0]) if np.ndim(i) == 0 else out.reshape(np.shape(i))


@dataclass(frozen=True)
class _EpochPlan:
    shard_order: np.ndarray  # int64 [shards] which shard comes when
    starts: np.ndarray  # int64 [shards + 1] first position of each, in that order
    block_starts: np.ndarray  # int64 [blocks + 1]


class SampleOrder:
    """Where position p of the stream lies.

    Args:
        sizes_per_shard: samples that take part, per shard (after `keep`); zeros are allowed.
        seed: the whole order follows from it.
        block_shards: shards whose samples are mixed with each other; 1 keeps reading strictly local, all of them
            is a full shuffle.
    """

    def __init__(self, sizes_per_shard: Sequence[int] | np.ndarray, *, seed: int, block_shards: int = 16) -> None:
        self.sizes = np.asarray(sizes_per_shard, np.int64)
        self.num_samples = int(self.sizes.sum())
        if self.num_samples < 1 or self.sizes.min() < 0:
            raise UserError(
                f"the shards hold {self.num_samples} samples, but at least one is needed: check the shards and `keep`"
            )
        if block_shards < 1:
            raise UserError(f"block_shards is {block_shards}, but must be at least 1: 16 is a good value")
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
            # A batch lies in one epoch or across one border: two plans are all that is ever wanted at once.
            self._plans = dict([*list(self._plans.items())[-1:], (epoch, plan)])
        return plan

    def locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard, row) of one position; row counts the samples of that shard that take part."""
        epoch, shard, row = self.locate_many(np.array([position], np.int64))
        return int(epoch[0]), int(shard[0]), int(row[0])

    def locate_many(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same for int64 [m] positions: three int64 [m] arrays."""
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise IndexError(f"a position must not be negative, got {positions.min()}")
        epoch, offset = np.divmod(positions, self.num_samples)
        shard, row = np.empty_like(epoch), np.empty_like(epoch)
        for e in np.unique(epoch):
            plan = self._plan(int(e))
            in_epoch = np.flatnonzero(epoch == e)
            # side="right" skips empty blocks: they begin where the next one begins.
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
