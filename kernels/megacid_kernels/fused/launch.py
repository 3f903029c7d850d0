"""Shared by all fused kernels: tiles, the launcher, rounding of casts, checks of arguments.

Legend: D width, L rows of the weight in memory, S rows of this step (all L, or some), b samples, l labels per sample.

Every launcher of this package promises the same and says only where it differs: arguments are checked (ValueError names
the argument, its value and what is expected), indices are not; the host never waits for the device; autograd does not
see the call. Kernels use no atomics and add in a fixed order, so two calls with equal inputs give equal bits.
"""

# No `from __future__ import annotations` where kernels are: Triton reads their annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# With 128 threads, 16 elements of every operand per thread: AdamW's four operands and temporaries stay in registers.
_TILE_ELEMENTS = 2048
_MIN_BLOCK, _MAX_BLOCK = 16, 4096
ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of rows that kernels read and convert to fp32


def _power_of_two(value: int) -> bool:
    return value >= 1 and value & (value - 1) == 0


@dataclass(frozen=True)
class Tile:
    """The work of one program: `rows` rows, `block` columns per iteration, `warps` warps. All are powers of two."""

    rows: int
    block: int
    warps: int

    def __post_init__(self):
        for name, value in (("rows", self.rows), ("block", self.block), ("warps", self.warps)):
            if not _power_of_two(value):
                raise ValueError(f"{name} of a tile is {value}, expected a power of two")
        if self.warps > 32:
            raise ValueError(f"warps of a tile is {self.warps}, expected at most 32")


@functools.cache
def tile_of(width: int) -> Tile:
    """The default tile for rows of this width. A row of up to 4096 columns is one block and stays in registers."""
    block = min(max(triton.next_power_of_2(width), _MIN_BLOCK), _MAX_BLOCK)
    return Tile(max(1, _TILE_ELEMENTS // block), block, 8 if block > _TILE_ELEMENTS else 4)


@triton.jit
def cast(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 -> dtype, rounded to nearest even. In Triton's interpreter bf16 is made bit by bit: its own cast truncates,
    which shrinks every number by 0.2 % on average, and turns 0 into 1e-38."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)  # a carry could turn a NaN into 0
        return (rounded >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def program_slots(rows_ptr, num_rows, HAS_ROWS: tl.constexpr, ROWS: tl.constexpr):
    """(slot in 0 .. S-1, whether it exists, its row in the [L, D] tensors), [ROWS]. int64: slot * D can exceed 2^31."""
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = slot < num_rows
    source = slot
    if HAS_ROWS:
        source = tl.load(rows_ptr + slot, mask=inside, other=0)
    return slot, inside, source


@triton.jit
def first_not_less(sorted_ptr, num_sorted, wanted, active, ROWS: tl.constexpr):
    """For each of [ROWS] wanted ids: how many of the sorted int64 ids are less; 0 where not active."""
    slot = tl.zeros((ROWS,), tl.int64)
    end = slot + num_sorted
    width = num_sorted
    while width > 0:  # the interval [slot, end) is halved until it is empty
        middle = (slot + end) // 2
        open_ = active & (slot < end)
        less = tl.load(sorted_ptr + middle, mask=open_, other=0) < wanted
        slot = tl.where(open_ & less, middle + 1, slot)
        end = tl.where(open_ & (less == 0), middle, end)
        width = width // 2
    return slot


@triton.jit
def block_columns(start, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """(column [1, BLOCK], mask) of the block at `start`. D is constexpr: the compiler then knows the rows' alignment
    and drops the mask of columns where blocks are full."""
    column = (start + tl.arange(0, BLOCK))[None, :]
    mask = inside[:, None]
    if D % BLOCK != 0:
        mask = mask & (column < D)
    return column, mask


# Triton reads TRITON_INTERPRET when it decorates a kernel: the type of a decorated function tells what it read.
INTERPRET = not isinstance(cast, triton.JITFunction)


def launch(kernel: Any, num_rows: int, tile: Tile, *args: Any, **constants: Any) -> None:
    """Run `kernel` with one program per `tile.rows` of `num_rows`, if any, on the device of the first tensor."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))  # not of a tensor descriptor
    if device.type == "cpu" and not INTERPRET:
        raise ValueError(
            "the tensors are on the cpu, expected a GPU: on a CPU these kernels only run in Triton's interpreter (for "
            "tests), with TRITON_INTERPRET=1 set before the import"
        )
    if num_rows:
        guard = contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)
        with guard:
            kernel[(triton.cdiv(num_rows, tile.rows),)](
                *args, **constants, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps
            )


def check_matrix(
    name: str,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None = None,
    like: Tensor | None = None,
) -> None:
    """Raises ValueError unless x is contiguous [n, D >= 1] of one of `dtypes`, of `shape`, on the device of `like`."""
    if x.ndim != 2 or x.shape[1] < 1 or (shape is not None and tuple(x.shape) != shape):
        raise ValueError(
            f"{name} is {list(x.shape)}, expected {'[rows, width >= 1]' if shape is None else list(shape)}"
        )
    _check_storage(name, x, dtypes, like)


def check_column(name: str, x: Tensor, length: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """x as [length]; raises ValueError unless it is contiguous [length], [length, 1] or [1, length] of `dtype`."""
    if x.numel() != length or x.ndim not in (1, 2) or (x.ndim == 2 and 1 not in x.shape):
        raise ValueError(f"{name} is {list(x.shape)}, expected [{length}] or [{length}, 1]")
    _check_storage(name, x, (dtype,), like)
    return x.reshape(-1)


def _check_storage(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor | None) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}, expected {' or '.join(map(str, dtypes))}")
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()} for shape {list(x.shape)}, expected it contiguous")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device} like the other tensors")


def check_label_terms(
    like: Tensor,
    samples: int,
    num_slots: int,
    grad_cos_bl: Tensor,
    cos_bl: Tensor,
    x_bD: Tensor,
    inverse_x_b: Tensor,
    w_LD: Tensor,
    rows_S: Tensor | None,
    inverse_w_S: Tensor,
) -> tuple[Tensor, Tensor]:
    """(inverse_x [b], inverse_w [S]) after checking the arguments that `finish_x_` and `add_labels_` share: b =
    `samples`, S = `num_slots`, the width and device of `like` [n, D]. Raises ValueError."""
    width, shape = like.shape[1], (samples, grad_cos_bl.shape[-1])
    check_matrix("x", x_bD, (torch.float32,), (samples, width), like)
    for name, value in (("grad_cos", grad_cos_bl), ("cos", cos_bl)):
        check_matrix(name, value, (torch.float32,), shape, like)
    inverse_x = check_column("inverse_x", inverse_x_b, samples, torch.float32, like)
    return inverse_x, check_class_rows(w_LD, rows_S, inverse_w_S, num_slots, like)


def check_class_rows(w_LD: Tensor, rows_S: Tensor | None, inverse_w_S: Tensor, num_slots: int, like: Tensor) -> Tensor:
    """inverse_w [S] after checking w, the rows of it that are used, and 1 / their lengths: S = `num_slots`, the width
    and device of `like` [n, D]. Raises ValueError."""
    check_matrix("w", w_LD, ROW_DTYPES, (len(w_LD), like.shape[1]), like)
    if (used := check_rows(rows_S, len(w_LD), like)) != num_slots:
        raise ValueError(f"{used} rows of w are used, expected {num_slots}: pass rows with the row of each slot")
    return check_column("inverse_w", inverse_w_S, num_slots, torch.float32, like)


def check_rows(rows_S: Tensor | None, num_rows: int, like: Tensor) -> int:
    """S, the number of rows of this step. Raises ValueError unless rows_S is int64 [S] on the device of `like`."""
    if rows_S is None:
        return num_rows
    if rows_S.ndim != 1:
        raise ValueError(f"rows is {list(rows_S.shape)}, expected one dimension")
    _check_storage("rows", rows_S, (torch.int64,), like)
    return len(rows_S)
