"""What the fused kernels share: tiles, launching, rounding of casts, checks of tensors.

Legend: D width, S rows worked on.
"""

# No `from __future__ import annotations` where kernels are: Triton reads their annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# With 128 threads, 16 elements of every operand per thread: AdamW's four operands and temporaries stay in registers.
_TILE_ELEMENTS = 2048
_MIN_BLOCK, _MAX_BLOCK = 16, 4096


def _power_of_two(value: int) -> bool:
    return value >= 1 and value & (value - 1) == 0


@dataclass(frozen=True)
class Tile:
    """What one program works on: `rows` rows, `block` columns at a time, with `warps` warps. Powers of two."""

    rows: int
    block: int
    warps: int

    def __post_init__(self):
        for name, value in (("rows", self.rows), ("block", self.block), ("warps", self.warps)):
            if not _power_of_two(value):
                raise ValueError(f"{name} of a tile is {value}, expected a power of two")
        if self.warps > 32:
            raise ValueError(f"warps of a tile is {self.warps}, expected at most 32")


def tile_of(width: int) -> Tile:
    """The tile for rows of this width. Up to 4096 columns a row is one block: it is read once and stays in registers."""
    block = min(max(triton.next_power_of_2(width), _MIN_BLOCK), _MAX_BLOCK)
    return Tile(max(1, _TILE_ELEMENTS // block), block, 8 if block > _TILE_ELEMENTS else 4)


@triton.jit
def cast(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 -> dtype, to nearest even. Triton's interpreter truncates to bf16, which would shrink every number by 0.2 % on
    average, and makes 1e-38 of a zero: there the bits are put together by hand."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)  # a carry could make a NaN a zero
        return (rounded >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def slots(rows_ptr, num_rows, HAS_ROWS: tl.constexpr, ROWS: tl.constexpr):
    """(slot [ROWS]: 0 .. S-1 of this program, inside [ROWS], source [ROWS]: the row of the [L, D] tensors), int64: an
    offset slot * D can pass 2^31."""
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = slot < num_rows
    source = slot
    if HAS_ROWS:
        source = tl.load(rows_ptr + slot, mask=inside, other=0)
    return slot, inside, source


@triton.jit
def columns(start, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """(column [1, BLOCK], mask) of the block at `start`. D is constexpr: the compiler sees how rows are aligned, and
    no mask on columns is left where blocks are full."""
    column = (start + tl.arange(0, BLOCK))[None, :]
    mask = inside[:, None]
    if D % BLOCK != 0:
        mask = mask & (column < D)
    return column, mask


@triton.jit
def inverse_norm(sum_of_squares):
    """1 / |w|; 0 of a zero row, which so stays zero and gets no gradient."""
    found = sum_of_squares > 0.0
    norm = tl.sqrt_rn(tl.where(found, sum_of_squares, 1.0))
    return tl.where(found, tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm), 0.0)


# The decorator's result says whether TRITON_INTERPRET was set when this module was imported, which is what counts.
INTERPRET = not isinstance(cast, triton.JITFunction)


def launch(kernel: Any, num_rows: int, tile: Tile, *args: Any, **constants: Any) -> None:
    """Run `kernel` on all rows. args[0] is a tensor on the device that it runs on."""
    device = args[0].device
    if device.type == "cpu" and not INTERPRET:
        raise ValueError(
            "the tensors are on the cpu, expected a GPU: on a CPU these kernels only run in Triton's interpreter, for "
            "tests, with TRITON_INTERPRET=1 set before the import"
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
    """ValueError unless x is a contiguous matrix [n, D >= 1] of one of `dtypes`, of `shape`, on the device of `like`."""
    if x.ndim != 2 or x.shape[1] < 1 or (shape is not None and tuple(x.shape) != shape):
        raise ValueError(
            f"{name} is {list(x.shape)}, expected {'[rows, width >= 1]' if shape is None else list(shape)}"
        )
    _check_storage(name, x, dtypes, like)


def check_column(name: str, x: Tensor, length: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """x as [length]; ValueError unless it is a contiguous [length], [length, 1] or [1, length] of `dtype`."""
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


def check_pulls(
    like: Tensor,
    samples: int,
    num_slots: int,
    pull_bl: Tensor,
    cos_bl: Tensor,
    x_bD: Tensor,
    inverse_x_b: Tensor,
    w_LD: Tensor,
    inverse_w_S: Tensor,
    row_bl: Tensor,
) -> tuple[Tensor, Tensor]:
    """(inverse_x [b], inverse_w [S]). ValueError unless these are the labels' pulls of b = `samples`, their embeddings, and
    class rows of which S = `num_slots` are used: fp32, row int64, of the width of `like` [n, D] and on its device."""
    width, shape = like.shape[1], (samples, pull_bl.shape[-1])
    check_matrix("x", x_bD, (torch.float32,), (samples, width), like)
    check_matrix("w", w_LD, (torch.float32,), (len(w_LD), width), like)
    for name, value in (("pull", pull_bl), ("cos", cos_bl)):
        check_matrix(name, value, (torch.float32,), shape, like)
    check_matrix("row", row_bl, (torch.int64,), shape, like)
    inverse_x = check_column("inverse_x", inverse_x_b, samples, torch.float32, like)
    return inverse_x, check_column("inverse_w", inverse_w_S, num_slots, torch.float32, like)


def check_rows(rows_S: Tensor | None, num_rows: int, like: Tensor) -> int:
    """S. ValueError unless rows_S is int64 [S] on the right device. Its values are not looked at: that would wait for
    the device."""
    if rows_S is None:
        return num_rows
    if rows_S.ndim != 1:
        raise ValueError(f"rows is {list(rows_S.shape)}, expected one dimension")
    _check_storage("rows", rows_S, (torch.int64,), like)
    return len(rows_S)
