"""Row state keyed by global class id, independent of the number of ranks; blocks of its rows, and its storage in bf16.

Legend: D width, L local classes, S rows, b rows of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megacid.classifier.sampling import RandomStream, hash_ids, hash_key
from megacid.distributed.collectives import gather_plain
from megacid.errors import UserError

# read(name, start, stop) -> the rows of the global tensor `name`, [stop - start, ...], on any device.
ReadRows = Callable[[str, int, int], Tensor]


class MissingRowsError(UserError):
    """A state has no rows of a name."""


def copy_rows(own: Mapping[str, Tensor], read: ReadRows, start: int, stop: int) -> None:
    """Fill `own` in place with global rows [start, stop). UserError (and no change) for another shape."""
    # Reads and checks everything before changing anything: a truncated file leaves no half-loaded state.
    loaded = {name: read(name, start, stop) for name in own}
    for name, rows in loaded.items():
        if rows.shape != own[name].shape:
            raise UserError(
                f"rows [{start}, {stop}) of {name!r} have shape {tuple(rows.shape)}, expected "
                f"{tuple(own[name].shape)}: load a state of the same number of classes, width and optimizer"
            )
    with torch.no_grad():
        for name, rows in loaded.items():
            own[name].copy_(rows)


class _Shard(Protocol):
    class_start: int
    class_stop: int
    num_classes: int


def rows_of_rank(name: str, rows: Tensor, start: int, shard: _Shard) -> Tensor:
    """The rows of `shard` in a tensor of all classes, or in one of the same shard; start: the tensor's first class."""
    stop = start + len(rows)
    if stop - start == shard.num_classes:
        return rows[shard.class_start : shard.class_stop]
    if (start, stop) == (shard.class_start, shard.class_stop):
        return rows
    raise UserError(
        f"the state has rows {start} to {stop - 1} of {name!r}, expected {shard.class_start} to {shard.class_stop - 1} "
        f"or all {shard.num_classes}: load this rank's own state, or a full_state() if the number of ranks changed"
    )


def gather_state(own: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """All ranks' rows of every tensor: [num_classes, ...] on the host, on every rank. A collective."""
    return {name: gather_plain(rows, group).cpu() for name, rows in own.items()}


def reader_of(state: Mapping[str, Tensor], num_rows: int, *, first: int = 0) -> ReadRows:
    """A reader of the classes first to first + num_rows - 1 in memory."""

    def read(name: str, start: int, stop: int) -> Tensor:
        if name not in state:
            raise MissingRowsError(
                f"the state has no {name!r}, only {sorted(state)}: load a state that this class wrote"
            )
        if len(state[name]) != num_rows:
            raise UserError(
                f"{name!r} has {len(state[name])} rows, expected {num_rows}: load a state of that many classes"
            )
        return state[name][start - first : stop - first]

    return read


def read_rows(state_LD: Tensor, where: slice | Tensor, buffer_bD: Tensor) -> Tensor:
    """Rows `where` in fp32: a view if possible, else a copy in the buffer."""
    if isinstance(where, slice):
        rows = state_LD[where]
        return rows if rows.dtype == torch.float32 else buffer_bD.copy_(rows)
    if state_LD.dtype == torch.float32:
        return torch.index_select(state_LD, 0, where, out=buffer_bD)
    return buffer_bD.copy_(state_LD.index_select(0, where))


def write_rows(state_LD: Tensor, where: slice | Tensor, rows_bD: Tensor) -> None:
    """Write back the result of `read_rows`, in the dtype of the state, unless it is a view of the state."""
    if isinstance(where, slice):
        if state_LD.dtype != torch.float32:
            state_LD[where] = rows_bD
    elif _has_few_cpu_threads(state_LD, most=2):
        # NumPy copies whole rows, index_copy_ one element at a time. NumPy has no bf16, so copy the bits.
        bits = torch.int32 if state_LD.dtype == torch.float32 else torch.int16
        state_LD.view(bits).numpy()[where.numpy()] = rows_bD.view(bits).numpy()
        torch.autograd.graph.increment_version(state_LD)
    else:
        state_LD.index_copy_(0, where, rows_bD)


def correctly_rounded_sqrt(x_bD: Tensor, out: Tensor) -> Tensor:
    """Write the square root of x_bD fp32 into `out` and return it. Any number of threads of a CPU gives the same bits.

    On a CPU PyTorch calls MKL, which rounds some roots wrongly and takes up to 30 times as long for denormals and 5
    times for zeros: the second moments of classes far from all samples. NumPy does neither, in one thread. The root of
    a float64 has enough digits that rounding it gives the same.
    """
    if x_bD.device.type != "cpu":
        return torch.sqrt(x_bD, out=out)
    if _has_few_cpu_threads(x_bD, most=4):
        np.sqrt(x_bD.numpy(), out=out.numpy())
        return out
    return out.copy_(x_bD.double().sqrt_())


def _has_few_cpu_threads(x: Tensor, most: int) -> bool:
    """Whether PyTorch computes x in at most so many threads that NumPy's single one is faster."""
    return x.device.type == "cpu" and torch.get_num_threads() <= most


def rounding_keys(
    rows_S: Tensor, updates_S: Tensor, width: int, *, seed: int, class_start: int = 0, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """(row keys int32 [S, 1], column keys int32 [1, width]) for `rounding_bits`.

    They depend only on (seed, update count, global class id, column), so any number of ranks rounds alike.

    Args:
        rows_S: int64 ids; class_start is added.
        updates_S: int32 update counts.
        width: of the rows.
        seed: of the run.
        class_start: global class id of row 0.
        fused: make the row keys in a Triton kernel; the same bits.
    """
    columns = _column_keys(width, seed, rows_S.device)
    if fused:
        from megacid_kernels.fused.hashing import rounding_row_keys  # needs triton

        streams = RandomStream.ROUNDING_ROW, RandomStream.ROUNDING_UPDATE
        row, update = (hash_key(seed, 0, stream) for stream in streams)
        return rounding_row_keys(rows_S, updates_S, class_start, (row, update)), columns
    ids = hash_ids(rows_S + class_start, seed=seed, step=0, stream=RandomStream.ROUNDING_ROW)
    rows = hash_ids(ids + updates_S, seed=seed, step=0, stream=RandomStream.ROUNDING_UPDATE)
    return _low_bits(rows)[:, None], columns


@functools.lru_cache(maxsize=8)
def _column_keys(width: int, seed: int, device: torch.device) -> Tensor:
    column = torch.arange(width, device=device)
    return _low_bits(hash_ids(column, seed=seed, step=0, stream=RandomStream.ROUNDING_COLUMN))[None]


def _low_bits(x: Tensor) -> Tensor:
    return (x & 0x7FFFFFFF).to(torch.int32)


def rounding_bits(row_S1: Tensor, column_1D: Tensor, out_SD: Tensor, spare_SD: Tensor) -> Tensor:
    """Write 32 random bits per element into out_SD (int32, contiguous) and return it: murmur3's finaliser of both keys.

    spare_SD: int32 scratch of the same shape. In place and in 32 bits, because this dominates the cost of bf16 moments.
    """
    torch.bitwise_xor(row_S1, column_1D, out=out_SD)
    for shift, factor in ((16, 0x85EBCA6B - (1 << 32)), (13, 0xC2B2AE35 - (1 << 32)), (16, 1)):
        # The shift is arithmetic: the mask removes the copies of the sign bit.
        torch.bitwise_right_shift(out_SD, shift, out=spare_SD).bitwise_and_((1 << (32 - shift)) - 1)
        out_SD.bitwise_xor_(spare_SD)
        if factor != 1:
            out_SD.mul_(factor)
    return out_SD


def round_to_bf16(x_SD: Tensor, bits_SD: Tensor) -> Tensor:
    """Round stochastically to bf16, unbiased: x_SD fp32, contiguous, overwritten; bits_SD int32, uniform in [0, 2^16).

    Rounding to nearest would freeze a moving average: with beta = 0.999 a step changes it by less than 2^-9 of itself,
    half the distance between two bf16 numbers.
    """
    pattern = x_SD.view(torch.int32)
    # A carry out of the lower half rounds up; the upper half is the bf16 number.
    return pattern.add_(bits_SD).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
