"""State by global row: the same names and numbers for any number of ranks; and its storage in bf16.

Legend: D width, S rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.classifier.sampling import hash_ids
from megacid.distributed.collectives import gather_plain
from megacid.errors import UserError

# read(name, start, stop) -> the rows of the global tensor `name`, [stop - start, ...], on any device.
ReadRows = Callable[[str, int, int], Tensor]

# Streams of `hash_ids` that sampling does not use.
_ROW_STREAM, _UPDATE_STREAM, _COLUMN_STREAM = 16, 17, 18


def copy_rows(own: Mapping[str, Tensor], read: ReadRows, start: int, stop: int) -> None:
    """Fill the tensors of `own` [stop - start, ...] in place with global rows [start, stop), converted to their types."""
    # Everything is read and checked before anything changes: a file that ends early leaves no half-loaded state.
    found = {name: read(name, start, stop) for name in own}
    for name, rows in found.items():
        if rows.shape != own[name].shape:
            raise UserError(
                f"rows [{start}, {stop}) of {name!r} have shape {tuple(rows.shape)}, expected {tuple(own[name].shape)}: "
                "load a state of the same number of classes, width and optimizer"
            )
    with torch.no_grad():
        for name, rows in found.items():
            own[name].copy_(rows)


def gather_state(own: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """All ranks' rows of every tensor, on the host of every rank: [num_classes, ...]. A collective."""
    return {name: gather_plain(rows, group).cpu() for name, rows in own.items()}


def reader_of(state: Mapping[str, Tensor], num_classes: int) -> ReadRows:
    """Rows out of full tensors in memory."""

    def read(name: str, start: int, stop: int) -> Tensor:
        if name not in state:
            raise UserError(f"the state has no {name!r}, only {sorted(state)}: load one that this class wrote")
        if len(state[name]) != num_classes:
            raise UserError(
                f"{name!r} has {len(state[name])} rows, expected {num_classes}: load a state of as many classes"
            )
        return state[name][start:stop]

    return read


def rounding_keys(ids_S: Tensor, updates_S: Tensor, width: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """(int32 [S, 1], int32 [1, D]): what `rounding_bits` mixes, a pure function of (seed, update count, global row,
    column). ids_S: global rows, int64. updates_S: how often each has been updated."""
    ids = hash_ids(ids_S, seed=seed, step=0, stream=_ROW_STREAM)
    rows = hash_ids(ids + updates_S, seed=seed, step=0, stream=_UPDATE_STREAM)
    columns = hash_ids(torch.arange(width, device=ids_S.device), seed=seed, step=0, stream=_COLUMN_STREAM)
    return _low_bits(rows)[:, None], _low_bits(columns)[None]


def _low_bits(x: Tensor) -> Tensor:
    return (x & 0x7FFFFFFF).to(torch.int32)


def rounding_bits(row_S1: Tensor, column_1D: Tensor, out_SD: Tensor, spare_SD: Tensor) -> Tensor:
    """32 random bits per element of out_SD (int32, contiguous), which is returned: murmur3's finaliser of the two keys.

    spare_SD: int32 of the same shape that is overwritten. In place and on 32 bits, for this is the costly part of bf16.
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
    """x_SD (fp32, contiguous, overwritten) as bf16, up or down with the odds that make the mean x: `bits_SD` holds 16
    random bits, int32 in [0, 65536).

    To nearest would be wrong for an average: with beta = 0.999 a step changes it by less than 2^-9 of itself, half the
    distance of two bf16 numbers, and it would stand still.
    """
    pattern = x_SD.view(torch.int32)
    # A carry out of the lower half is the rounding up; the upper half is the bf16 number.
    return pattern.add_(bits_SD).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
