"""Exponentials of cosine logits straight out of the matrix product: the cosines exist in registers only.

Legend: b samples, S rows of w on this rank, D width, l labels per sample, T tiles of columns. See `negatives` for E.

A program makes one tile of the product, turns it into exponentials, leaves their row sums in [T, b] and, where it is
wanted, stores the tile. Per entry of [b, S] nothing is read, 2 bytes are written (fp32 operands: 4), none without a matrix.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import INTERPRET, cast, launch
from megacid_kernels.fused.product import ProductTile, check_factors, product, tile_of_program
from megacid_kernels.fused.row_statistics import (
    LOG2E,
    Exponentials,
    count_labels,
    counting,
    pitch,
    pitched,
    without_labels,
)
from megacid_kernels.fused.tuning import tiles_for

_PARTS_BYTES = 1 << 28  # of the tiles' row statistics, see `_rows_per_launch`
_LOG2E = tl.constexpr(LOG2E)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def exponentials_kernel(
    x_ptr,  # [b, D] fp16, bf16 or fp32
    w_ptr,  # [S, D] likewise
    slot_ptr,  # [b, l] int64
    own_ptr,  # [b, l] uint8
    bias_ptr,  # [S] fp32, or anything with HAS_BIAS = False
    hidden_ptr,  # [b, S] uint8: in with HAS_HIDDEN, out with FILTER, else anything
    matrix_ptr,  # [b, S] bf16 or fp32 out, or anything with STORE = False
    sums_ptr,  # [T, b] fp32 out
    largest_ptr,  # [T, b] fp32 out, or anything with LARGEST = False
    removed_ptr,  # [T, b] int32 out, or anything with FILTER = False
    num_rows,
    num_columns,
    matrix_stride,
    hidden_stride,
    scale_log2,
    shift_log2,
    threshold,
    D: tl.constexpr,
    LABELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FILTER: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    LARGEST: tl.constexpr,
    STORE: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = tile_of_program(tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, BLOCK), GROUP)
    first = column_tile * BLOCK
    sample = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = first + tl.arange(0, BLOCK)
    inside = sample < num_rows
    x_row = tl.minimum(sample, num_rows - 1)
    w_row = tl.minimum(slot, num_columns - 1)
    hits = count_labels(slot_ptr, own_ptr, sample, inside, first, first + BLOCK, LABELS)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + w_row)
    cos = product(x_ptr, w_ptr, x_row, w_row.to(tl.int64), D, "ieee", INTERPRET, ROWS, BLOCK, DEPTH)

    # -inf is what does not count: its exponential is 0, it is no maximum and above no threshold.
    column = slot[None, :]
    if hits > 0:
        cos = without_labels(cos, slot_ptr, own_ptr, sample, inside, column, LABELS)
    if first + BLOCK > num_columns:
        cos = tl.where(column < num_columns, cos, float("-inf"))
    if HAS_HIDDEN:
        mask = inside[:, None] & (column < hidden_stride)
        given = tl.load(hidden_ptr + sample[:, None] * hidden_stride + column, mask=mask, other=0)
        cos = tl.where(given != 0, float("-inf"), cos)
    part = column_tile.to(tl.int64) * num_rows + sample
    if FILTER:
        hidden = cos > threshold
        mask = inside[:, None] & (column < hidden_stride)
        tl.store(hidden_ptr + sample[:, None] * hidden_stride + column, hidden.to(tl.uint8), mask=mask)
        tl.store(removed_ptr + part, tl.sum(hidden.to(tl.int32), axis=1), mask=inside)
        cos = tl.where(hidden, float("-inf"), cos)
    if HAS_BIAS:
        exponent = tl.fma(cos, scale_log2, bias[None, :] * _LOG2E - shift_log2)
    else:
        exponent = tl.fma(cos, scale_log2, -shift_log2)
    if LARGEST:
        tl.store(largest_ptr + part, tl.max(exponent if HAS_BIAS else cos, axis=1), mask=inside)
    found = tl.exp2(exponent)
    tl.store(sums_ptr + part, tl.sum(found, axis=1), mask=inside)
    if STORE:
        # Up to the stride, not to S: the mask then is one of whole 128-bit stores. What lies between becomes 0.
        mask = inside[:, None] & (column < matrix_stride)
        at = sample[:, None] * matrix_stride + column
        tl.store(matrix_ptr + at, cast(found, matrix_ptr.dtype.element_ty, INTERPRET), mask=mask)


def exponentials(
    x_bD: Tensor,
    w_SD: Tensor,
    slot_bl: Tensor,
    own_bl: Tensor,
    *,
    scale: float,
    shift: float,
    bias_S: Tensor | None = None,
    threshold: float | None = None,
    hidden_bS: Tensor | None = None,
    store: bool = True,
    largest: bool = True,
    tile: ProductTile | None = None,
) -> Exponentials:
    """exp(scale x . w + bias - shift) of the negatives, their row sums and what the filter took out, in one pass.

    x_bD, w_SD   unit rows, contiguous, both fp16, both bf16 (matrix in bf16) or both fp32 (matrix in fp32). fp32 products
                 and sums. A matrix in fp16 could not hold the exponentials
    slot_bl      int64, which row of w a label is, looked at where own_bl (bool) alone
    bias_S       fp32, added to the logits
    threshold    negatives with x . w > threshold count as 0; `hidden` in the result says which
    hidden_bS    bool, the same negatives for another x: `hidden` of an earlier result
    store        False: no matrix, for the loss alone
    largest      False: no `largest`
    tile         None: as `tuning` says for this device, dtype and width

    scale + ln S - shift <= 88 keeps all finite, see `LossSpec.shift`. Bitwise repeatable; the bits of a row depend on
    tile.columns and tile.depth, not on the other rows. b = 0 and S = 0 are allowed. No host synchronisation. Not seen by
    autograd. ValueError for what cannot be used.
    """
    check_factors(x_bD, w_SD)
    samples, columns = len(x_bD), len(w_SD)
    rule = counting(
        x_bD, (samples, columns), slot_bl, own_bl, scale=scale, shift=shift, bias_S=bias_S, threshold=threshold,
        hidden_bS=hidden_bS, largest=largest,
    )  # fmt: skip
    width = x_bD.shape[1]
    if tile is None:
        tile = tiles_for(x_bD.device, x_bD.dtype, width).forward
        if threshold is not None or hidden_bS is not None:
            tile = tile.with_room_for_masks()
    dtype = torch.float32 if x_bD.dtype == torch.float32 else torch.bfloat16
    result = rule.result(pitched(samples, columns, dtype, x_bD.device) if store else None, samples, columns, like=x_bD)
    hidden = rule.given if result.hidden is None else result.hidden.view(torch.uint8)
    if not columns:
        return result
    tiles = triton.cdiv(columns, tile.columns)
    step = _rows_per_launch(tiles, tile.rows, 4 * (1 + largest + (threshold is not None)))
    for start in range(0, samples, step):
        rows = slice(start, min(start + step, samples))
        x, length = x_bD[rows], rows.stop - start
        parts = rule.parts(tiles, length)
        launch(
            exponentials_kernel, triton.cdiv(length, tile.rows) * tiles * tile.rows, tile.launch_tile,
            x, w_SD, rule.slot[rows], rule.own[rows], w_SD if rule.bias is None else rule.bias,
            w_SD if hidden is None else hidden[rows], w_SD if result.matrix is None else result.matrix[rows], *parts,
            length, columns, pitch(columns), 0 if hidden is None else hidden.stride(0),
            rule.scale_log2, rule.shift_log2, threshold or 0.0,
            D=width, STORE=store, INTERPRET=INTERPRET, **rule.constants, **tile.constants,
        )  # fmt: skip
        rule.reduce(parts, result, rows)
    return result


def _rows_per_launch(tiles: int, tile_rows: int, bytes_each: int) -> int:
    """As many whole tiles of rows as keep the statistics of the tiles small: with ten million classes they would take
    more than the rest of a pass that stores no matrix."""
    return max(1, _PARTS_BYTES // (tiles * bytes_each * tile_rows)) * tile_rows
