"""Which class rows a step uses: a pure function of (seed, step, global class ids), drawn without host syncs."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_62 = (1 << 62) - 1
_POSITIVE = (1 << 63) - 1  # above every hash


def shard_range(num_classes: int, rank: int, world: int) -> tuple[int, int]:
    """Global ids [start, stop) of the classes of `rank`: the formula published partial-FC checkpoints use."""
    start = num_classes // world * rank + min(rank, num_classes % world)
    return start, start + num_classes // world + (rank < num_classes % world)


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


def hash_ids(ids: Tensor, *, seed: int, step: int, stream: int = 0) -> Tensor:
    """Uniform int64 in [0, 2^62) for every id, a pure function of (seed, step, stream, id); same device as `ids`."""
    key = torch.zeros((), dtype=torch.int64)  # on the host: a 0-d tensor joins `ids` on any device without a copy
    for word in (seed, step, stream):
        key = _mix(key + _signed(word * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019))
    return _mix(_mix(ids * _signed(0x9E3779B97F4A7C15) + key)) & _MASK_62


def sample_size(num_local: int, sample_rate: float, gathered_batch: int) -> int:
    """Rows a rank uses: its share `sample_rate`, but never fewer than the gathered batch could have classes, so that
    all positives fit whatever the labels are and the size is known without looking at them."""
    return num_local if sample_rate >= 1 else min(num_local, max(round(sample_rate * num_local), gathered_batch, 1))


def sample_rows(target_G: Tensor, start: int, stop: int, size: int, *, seed: int, step: int) -> Tensor:
    """Local ids [size], sorted and unique, of the rows of classes [start, stop): every class of `target_G` (global ids,
    int64) in that range, then those with the largest hashes. Needs size >= the number of such classes."""
    keys = hash_ids(torch.arange(start, stop, device=target_G.device), seed=seed, step=step)
    if size == stop - start:
        return torch.arange(size, device=target_G.device)
    inside = (target_G >= start) & (target_G < stop)
    # One slot past the end takes the ids of other ranks: an index list of known length, so no nonzero().
    keys = torch.cat([keys, keys.new_zeros(1)])
    keys[torch.where(inside, target_G - start, stop - start)] = _POSITIVE
    return torch.topk(keys[:-1], size, sorted=False).indices.sort().values


def sample_dims(width: int, rate: float, *, seed: int, step: int, device: torch.device) -> Tensor:
    """Sorted indices of the feature dimensions of a step: the same on every rank, for it depends on no rank."""
    keys = hash_ids(torch.arange(width, device=device), seed=seed, step=step, stream=1)
    return torch.topk(keys, max(1, round(rate * width)), sorted=False).indices.sort().values
