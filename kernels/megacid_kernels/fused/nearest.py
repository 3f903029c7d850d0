"""The nearest centroid of every row without a matrix of similarities: the product's tiles end in a maximum.

Legend: b rows, K centroids, D width, T strips of centroids.

A program keeps the best (value, label) of its rows while it goes through the tiles of a strip; one more kernel takes the
best of at most 64 strips. Maxima are exact: neither the strips nor the order of programs can be seen in the result, and of
equal values the lower label is taken, as `torch.max` does. Read per tile: its operands; written: 8 bytes per row and strip.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import INTERPRET, Tile, check_column, launch
from megacid_kernels.fused.product import ProductTile, check_factors, product, tile_of_program
from megacid_kernels.fused.tuning import tiles_for

Precision = Literal["ieee", "tf32x3"]
_MOST_STRIPS = 64
_MOST_CENTROIDS = 1 << 30  # labels and what is a strip beyond them fit int32
_PROGRAMS = 2048  # several rounds of any GPU: the last one, half empty, then is a small part


@triton.jit(do_not_specialize=["num_rows", "num_columns", "tiles_per_strip"])
def nearest_kernel(
    x_ptr,  # [b, D] fp16, bf16 or fp32
    c_ptr,  # [K, D] likewise
    half_norm_ptr,  # [K] fp32, or anything with HAS_NORM = False
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
    row_tile, strip = tile_of_program(tl.cdiv(num_rows, ROWS), strips, GROUP)
    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_row = tl.minimum(row, num_rows - 1)
    first = strip * tiles_per_strip * BLOCK
    end = tl.minimum(first + tiles_per_strip * BLOCK, num_columns)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    label = tl.full((ROWS,), 0, tl.int32) + first
    while first < end:  # not `range`: older interpreters cannot take a bound that they read from an argument
        column = first + tl.arange(0, BLOCK)
        c_row = tl.minimum(column, num_columns - 1)
        if HAS_NORM:  # before the product, which hides how long it takes
            half_norm = tl.load(half_norm_ptr + c_row)
        value = product(x_ptr, c_ptr, x_row, c_row.to(tl.int64), D, PRECISION, INTERPRET, ROWS, BLOCK, DEPTH)
        if HAS_NORM:
            value -= half_norm[None, :]
        if first + BLOCK > num_columns:
            value = tl.where((column < num_columns)[None, :], value, float("-inf"))
        largest = tl.max(value, axis=1)
        at = tl.min(tl.where(value == largest[:, None], column[None, :], 0x7FFFFFFF), axis=1)
        better = largest > best  # not >=: of equal values the earlier tile's stays
        label = tl.where(better, at, label)
        best = tl.where(better, largest, best)
        first += BLOCK
    part = strip.to(tl.int64) * num_rows + row
    tl.store(value_ptr + part, best, mask=row < num_rows)
    tl.store(label_ptr + part, label, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_strips"])
def best_strip_kernel(
    value_part_ptr,  # [T, b] fp32
    label_part_ptr,  # [T, b] int32
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
    value = tl.load(value_part_ptr + strip.to(tl.int64) * num_rows + row[None, :], mask=mask, other=float("-inf"))
    label = tl.load(label_part_ptr + strip.to(tl.int64) * num_rows + row[None, :], mask=mask, other=0x7FFFFFFF)
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
    """(largest x . c - half_norm fp32 [b], which of the K it is int64 [b]): the nearest centroid by cosine where rows are
    of unit length, by distance with half_norm = |c|^2 / 2, for |x - c|^2 = |x|^2 - 2 (x . c - |c|^2 / 2).

    x_bD, c_KD    contiguous, both fp16, bf16 or fp32; 1 <= K < 2^30. fp32 products and sums
    half_norm_K   fp32
    precision     of fp32 operands: "ieee", or "tf32x3", three tensor core products that give nearly as many bits
    tile          None: as `tuning` says for this device, dtype and width

    Of equal values the lower label is taken. Values must not be NaN, which are not looked for. Bitwise repeatable; the result
    depends on tile.depth alone (how products are rounded). At most 12 bytes times 64 b are allocated besides the result.
    No host synchronisation, not seen by autograd. ValueError for what cannot be used.
    """
    check_factors(x_bD, c_KD, "c")
    samples, count, width = len(x_bD), len(c_KD), x_bD.shape[1]
    if not 1 <= count < _MOST_CENTROIDS:
        raise ValueError(f"c has {count} rows, expected at least 1 and fewer than {_MOST_CENTROIDS}: split larger sets")
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, expected one of {get_args(Precision)}")
    half_norm = c_KD
    if half_norm_K is not None:
        half_norm = check_column("half_norm", half_norm_K, count, torch.float32, c_KD)
    tile = tile or tiles_for(x_bD.device, x_bD.dtype, width).nearest
    value = torch.empty(samples, dtype=torch.float32, device=x_bD.device)
    label = torch.empty(samples, dtype=torch.int64, device=x_bD.device)
    row_tiles, column_tiles = triton.cdiv(samples, tile.rows), triton.cdiv(count, tile.columns)
    wanted = min(_MOST_STRIPS, triton.cdiv(_PROGRAMS, max(1, row_tiles)), column_tiles)
    tiles_per_strip = triton.cdiv(column_tiles, wanted)
    strips = triton.cdiv(column_tiles, tiles_per_strip)
    value_part = torch.empty(strips, samples, dtype=torch.float32, device=x_bD.device)
    label_part = torch.empty(strips, samples, dtype=torch.int32, device=x_bD.device)
    launch(
        nearest_kernel, row_tiles * strips * tile.rows, tile.launch_tile,
        x_bD, c_KD, half_norm, value_part, label_part, samples, count, tiles_per_strip,
        D=width, HAS_NORM=half_norm_K is not None, PRECISION=precision, INTERPRET=INTERPRET, **tile.constants,
    )  # fmt: skip
    launch(
        best_strip_kernel, samples, Tile(32, triton.next_power_of_2(strips), 4),
        value_part, label_part, value, label, samples, strips,
    )  # fmt: skip
    return value, label
