"""The nearest centroid of every row without a matrix of similarities: the epilogue of each product tile is a maximum.

Legend: b rows, K centroids, D width, T strips of centroids.

`nearest_kernel`: one program per `tile.rows` rows and strip of centroids. It keeps the best (value, label) of its rows
while it loops over the tiles of the strip, and writes 8 bytes per row into partials [T, b].
`best_strip_kernel`: one program per 32 rows takes the best of at most 64 strips.

A maximum is exact, and of equal values the lower label wins, as in `torch.max`: the result depends neither on the
strips nor on the order of programs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import INTERPRET, Tile, check_column, launch
from megacid_kernels.fused.product import ProductTile, check_factors, position_of, product
from megacid_kernels.fused.tuning import tiles_for

Precision = Literal["ieee", "tf32x3"]
_MAX_STRIPS = 64
_MAX_CENTROIDS = 1 << 30  # labels, and a strip beyond the last, fit int32
_PROGRAMS = 2048  # several waves on any GPU: the last one, partly empty, is a small share


@triton.jit(do_not_specialize=["num_rows", "num_columns", "tiles_per_strip"])
def nearest_kernel(
    x_ptr,  # [b, D] fp16, bf16 or fp32
    c_ptr,  # [K, D] same dtype
    half_norm_ptr,  # [K] fp32, unused unless HAS_NORM
    value_ptr,  # [T, b] fp32 out
    label_ptr,  # [T, b] int32 out
    num_rows,
    num_columns,
    tiles_per_strip,
    D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    strips = tl.cdiv(tl.cdiv(num_columns, BLOCK), tiles_per_strip)
    row_tile, strip = position_of(tl.program_id(0), tl.cdiv(num_rows, ROWS), strips, GROUP)
    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_row = tl.minimum(row, num_rows - 1)
    first = strip * tiles_per_strip * BLOCK
    end = tl.minimum(first + tiles_per_strip * BLOCK, num_columns)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    label = tl.full((ROWS,), 0, tl.int32) + first
    while first < end:  # not `range`: older interpreters accept no runtime bound
        column = first + tl.arange(0, BLOCK)
        c_row = tl.minimum(column, num_columns - 1)
        if HAS_NORM:  # before the product, which hides the load's latency
            half_norm = tl.load(half_norm_ptr + c_row)
        value = product(x_ptr, c_ptr, x_row, c_row.to(tl.int64), D, PRECISION, INTERPRET, ROWS, BLOCK, DEPTH)
        if HAS_NORM:
            value -= half_norm[None, :]
        if first + BLOCK > num_columns:
            value = tl.where((column < num_columns)[None, :], value, float("-inf"))
        largest = tl.max(value, axis=1)
        lowest = tl.min(tl.where(value == largest[:, None], column[None, :], 0x7FFFFFFF), axis=1)
        better = largest > best  # not >=: the earlier tile keeps equal values
        label = tl.where(better, lowest, label)
        best = tl.where(better, largest, best)
        first += BLOCK
    partial = strip.to(tl.int64) * num_rows + row
    tl.store(value_ptr + partial, best, mask=row < num_rows)
    tl.store(label_ptr + partial, label, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_strips"])
def best_strip_kernel(
    value_partial_ptr,  # [T, b] fp32
    label_partial_ptr,  # [T, b] int32
    value_ptr,  # [b] fp32 out
    label_ptr,  # [b] int64 out
    num_rows,
    num_strips,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= T
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    strip = tl.arange(0, BLOCK)[:, None]
    mask = (strip < num_strips) & (row < num_rows)[None, :]
    value = tl.load(value_partial_ptr + strip.to(tl.int64) * num_rows + row[None, :], mask=mask, other=float("-inf"))
    label = tl.load(label_partial_ptr + strip.to(tl.int64) * num_rows + row[None, :], mask=mask, other=0x7FFFFFFF)
    largest = tl.max(value, axis=0)
    lowest = tl.min(tl.where(value == largest[None, :], label, 0x7FFFFFFF), axis=0)
    tl.store(value_ptr + row, largest, mask=row < num_rows)
    tl.store(label_ptr + row, lowest.to(tl.int64), mask=row < num_rows)


def nearest(
    x_bD: Tensor,
    c_KD: Tensor,
    half_norm_K: Tensor | None = None,
    *,
    precision: Precision = "ieee",
    tile: ProductTile | None = None,
) -> tuple[Tensor, Tensor]:
    """The centroid with the largest x . c - half_norm of every row.

    That is the nearest by cosine for unit rows, and by distance with half_norm = |c|^2 / 2, since |x - c|^2 = |x|^2 -
    2 (x . c - |c|^2 / 2).

    Args:
        x_bD, c_KD: contiguous, both fp16, bf16 or fp32; 1 <= K < 2^30. Products and sums are fp32. NaN is not detected.
        half_norm_K: fp32.
        precision: of fp32 operands: "ieee", or "tf32x3", three tensor core products with nearly as many bits.
        tile: None: looked up in `tuning` by device, dtype and width. The result depends on tile.depth only.

    Returns:
        (value fp32 [b], label int64 [b]). Besides these at most 12 * 64 * b bytes are allocated.
    """
    check_factors(x_bD, c_KD, "c")
    samples, count, width = len(x_bD), len(c_KD), x_bD.shape[1]
    if not 1 <= count < _MAX_CENTROIDS:
        raise ValueError(f"c has {count} rows, expected at least 1 and fewer than {_MAX_CENTROIDS}: split larger sets")
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, expected one of {get_args(Precision)}")
    half_norm = c_KD
    if half_norm_K is not None:
        half_norm = check_column("half_norm", half_norm_K, count, torch.float32, c_KD)
    tile = tile or tiles_for(x_bD.device, x_bD.dtype, width).nearest
    value = torch.empty(samples, dtype=torch.float32, device=x_bD.device)
    label = torch.empty(samples, dtype=torch.int64, device=x_bD.device)
    row_tiles, column_tiles = triton.cdiv(samples, tile.rows), triton.cdiv(count, tile.columns)
    max_strips = min(_MAX_STRIPS, triton.cdiv(_PROGRAMS, max(1, row_tiles)), column_tiles)
    tiles_per_strip = triton.cdiv(column_tiles, max_strips)
    strips = triton.cdiv(column_tiles, tiles_per_strip)
    value_partial = torch.empty(strips, samples, dtype=torch.float32, device=x_bD.device)
    label_partial = torch.empty(strips, samples, dtype=torch.int32, device=x_bD.device)
    launch(
        nearest_kernel, row_tiles * strips * tile.rows, tile.launch_tile,
        x_bD, c_KD, half_norm, value_partial, label_partial, samples, count, tiles_per_strip,
        D=width, HAS_NORM=half_norm_K is not None, PRECISION=precision, INTERPRET=INTERPRET, **tile.constants,
    )  # fmt: skip
    launch(
        best_strip_kernel, samples, Tile(32, triton.next_power_of_2(strips), 4),
        value_partial, label_partial, value, label, samples, strips,
    )  # fmt: skip
    return value, label
