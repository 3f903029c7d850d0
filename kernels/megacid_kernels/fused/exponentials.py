"""Exponentials of cosine logits fused into the matrix product: the cosines exist in registers only.

Legend: b samples, S rows of w on this rank, D width, l labels per sample, T column tiles. See `row_statistics` for E.

Grid: one program per [tile.rows, tile.columns] tile of x . w, ordered in groups of row tiles (`position_of`). With
tensor descriptors the grid is persistent: as many programs as run at once, which take turns over the tiles. A program
makes the product of a tile in fp32, turns it into exponentials, writes their row sums into partials [T, b] and, if
asked, stores the tile. Per entry of [b, S] nothing is read and 2 bytes are written (fp32 operands: 4; without a
matrix: none). A filter or a given mask adds one byte per entry.

The bits of a row depend on tile.columns and tile.depth, not on the other rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megacid_kernels.fused.launch import INTERPRET, cast, launch
from megacid_kernels.fused.product import (
    ProductTile,
    check_factors,
    position_of,
    product,
    product_of_descriptors,
)
from megacid_kernels.fused.row_statistics import (
    LOG2E,
    Exponentials,
    count_labels,
    exponentials_spec,
    pitch,
    pitched,
    without_labels,
)
from megacid_kernels.fused.tuning import tiles_for

_PARTIAL_BYTES = 1 << 28  # limit of the partial row statistics, see `_rows_per_launch`
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _finish(
    cos,
    first,
    slot_ptr,
    own_ptr,
    bias_ptr,
    hidden_ptr,
    sample,
    inside,
    hits,
    num_columns,
    hidden_stride,
    scale_log2,
    shift_log2,
    threshold,
    LABELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FILTER: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(exponentials, their sums, largest cosine or exponent, how many the filter removed) of the BLOCK columns from
    `first` on; the last two are the sums where they are not asked for."""
    # An excluded entry is -inf: its exponential is 0, and it is neither a maximum nor above a threshold.
    slot = first + tl.arange(0, BLOCK)
    column = slot[None, :]
    if hits > 0:
        cos = without_labels(cos, slot_ptr, own_ptr, sample, inside, column, LABELS)
    if first + BLOCK > num_columns:
        cos = tl.where(column < num_columns, cos, float("-inf"))
    if HAS_HIDDEN or FILTER:
        hidden_at = hidden_ptr + sample[:, None] * hidden_stride + column
        mask = inside[:, None] & (column < hidden_stride)
    if HAS_HIDDEN:
        cos = tl.where(tl.load(hidden_at, mask=mask, other=0) != 0, float("-inf"), cos)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + tl.minimum(slot, num_columns - 1))[None, :]
    if FILTER:
        hidden = cos > threshold
        if HAS_BIAS:
            hidden = hidden & (bias > float("-inf"))
        tl.store(hidden_at, hidden.to(tl.uint8), mask=mask)
        cos = tl.where(hidden, float("-inf"), cos)
    if HAS_BIAS:
        exponent = tl.fma(cos, scale_log2, bias * _LOG2E - shift_log2)
    else:
        exponent = tl.fma(cos, scale_log2, -shift_log2)
    exponential = tl.exp2(exponent)
    sums = tl.sum(exponential, axis=1)
    largest = sums
    removed = sums
    if LARGEST:
        largest = tl.max(exponent if HAS_BIAS else cos, axis=1)
    if FILTER:
        removed = tl.sum(hidden.to(tl.int32), axis=1)
    return exponential, sums, largest, removed


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def exponentials_kernel(
    x_ptr,  # [b, D] fp16, bf16 or fp32, or with DESCRIPTORS its descriptor
    w_ptr,  # [S, D] same dtype, or its descriptor
    slot_ptr,  # [b, l] int64
    own_ptr,  # [b, l] uint8
    bias_ptr,  # [S] fp32, unused unless HAS_BIAS
    hidden_ptr,  # [b, S] uint8: in with HAS_HIDDEN, out with FILTER, else unused
    matrix_ptr,  # [b, S] bf16 or fp32 out, or its descriptor, unused unless STORE
    sums_ptr,  # [T, b] fp32 out
    largest_ptr,  # [T, b] fp32 out, unused unless LARGEST
    removed_ptr,  # [T, b] int32 out, unused unless FILTER
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
    DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, BLOCK)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = position_of(tile, row_tiles, column_tiles, GROUP)
        first = column_tile * BLOCK
        sample = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = sample < num_rows
        hits = count_labels(slot_ptr, own_ptr, sample, inside, first, first + BLOCK, LABELS)
        partial = column_tile.to(tl.int64) * num_rows + sample
        if DESCRIPTORS:
            cos = product_of_descriptors(x_ptr, w_ptr, row_tile * ROWS, first, D, "ieee", INTERPRET, ROWS, BLOCK, DEPTH)
            # In halves: the first is on its way to memory while the second is computed, in half of the shared memory.
            HALF: tl.constexpr = BLOCK // 2
            left, right = tl.split(tl.permute(tl.reshape(cos, (ROWS, 2, HALF)), (0, 2, 1)))
            exponential, sums, largest, removed = _finish(
                left, first, slot_ptr, own_ptr, bias_ptr, hidden_ptr, sample, inside, hits, num_columns, hidden_stride,
                scale_log2, shift_log2, threshold, LABELS, HAS_BIAS, FILTER, HAS_HIDDEN, LARGEST, HALF,
            )  # fmt: skip
            if STORE:
                matrix_ptr.store([row_tile * ROWS, first], cast(exponential, matrix_ptr.dtype, INTERPRET))
            exponential, more, largest2, removed2 = _finish(
                right, first + HALF, slot_ptr, own_ptr, bias_ptr, hidden_ptr, sample, inside, hits, num_columns,
                hidden_stride, scale_log2, shift_log2, threshold, LABELS, HAS_BIAS, FILTER, HAS_HIDDEN, LARGEST, HALF,
            )  # fmt: skip
            if STORE:
                matrix_ptr.store([row_tile * ROWS, first + HALF], cast(exponential, matrix_ptr.dtype, INTERPRET))
            sums, largest, removed = sums + more, tl.maximum(largest, largest2), removed + removed2
        else:
            x_row = tl.minimum(sample, num_rows - 1)
            w_row = tl.minimum(first + tl.arange(0, BLOCK), num_columns - 1)
            cos = product(x_ptr, w_ptr, x_row, w_row.to(tl.int64), D, "ieee", INTERPRET, ROWS, BLOCK, DEPTH)
            exponential, sums, largest, removed = _finish(
                cos, first, slot_ptr, own_ptr, bias_ptr, hidden_ptr, sample, inside, hits, num_columns, hidden_stride,
                scale_log2, shift_log2, threshold, LABELS, HAS_BIAS, FILTER, HAS_HIDDEN, LARGEST, BLOCK,
            )  # fmt: skip
            if STORE:
                # Up to the stride, not to S: the mask then covers whole 128-bit stores. The padding becomes 0.
                column = (first + tl.arange(0, BLOCK))[None, :]
                mask = inside[:, None] & (column < matrix_stride)
                offset = sample[:, None] * matrix_stride + column
                tl.store(matrix_ptr + offset, cast(exponential, matrix_ptr.dtype.element_ty, INTERPRET), mask=mask)
        tl.store(sums_ptr + partial, sums, mask=inside)
        if LARGEST:
            tl.store(largest_ptr + partial, largest, mask=inside)
        if FILTER:
            tl.store(removed_ptr + partial, removed, mask=inside)


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
    """exp(scale x . w + bias - shift) of the negatives, with row statistics, in one pass.

    Args:
        x_bD, w_SD: unit rows, contiguous; both fp16 or both bf16 (the matrix is bf16: fp16 cannot hold the
            exponentials), or both fp32 (the matrix is fp32). Products and sums are fp32.
        slot_bl: int64, the row of w that a label is; read where own_bl only.
        own_bl: bool, whether the label's class is on this rank.
        scale, shift: of the logits; finite if scale + ln S - shift <= 88, see `LossSpec.shift`.
        bias_S: fp32, added to the logits.
        threshold: negatives with x . w > threshold count as 0; `hidden` of the result is their mask.
        hidden_bS: bool, negatives to exclude: `hidden` of an earlier result. Not together with a threshold.
        store: False: no matrix, for the loss alone.
        largest: False: no `largest`.
        tile: None: looked up in `tuning` by device, dtype and width.
    """
    check_factors(x_bD, w_SD)
    samples, columns = len(x_bD), len(w_SD)
    spec = exponentials_spec(
        x_bD, (samples, columns), slot_bl, own_bl, scale=scale, shift=shift, bias_S=bias_S, threshold=threshold,
        hidden_bS=hidden_bS, largest=largest,
    )  # fmt: skip
    width = x_bD.shape[1]
    if tile is None:
        tile = tiles_for(x_bD.device, x_bD.dtype, width).forward
        if threshold is not None or hidden_bS is not None:
            tile = tile.with_room_for_masks()
    dtype = torch.float32 if x_bD.dtype == torch.float32 else torch.bfloat16
    result = spec.result(pitched(samples, columns, dtype, x_bD.device) if store else None, samples, columns, like=x_bD)
    hidden = spec.hidden if result.hidden is None else result.hidden.view(torch.uint8)
    if not columns:
        return result
    tiles = triton.cdiv(columns, tile.columns)
    step = _rows_per_launch(tiles, tile.rows, 4 * (1 + largest + (threshold is not None)))
    for start in range(0, samples, step):
        rows = slice(start, min(start + step, samples))
        length = rows.stop - start
        matrix: Any = w_SD if result.matrix is None else result.matrix[rows]
        descriptors, x, w = tile.factors(x_bD[rows], w_SD)
        count = triton.cdiv(length, tile.rows) * tiles
        if descriptors:
            count = tile.programs(count, x_bD.device)
            if result.matrix is not None:  # up to the stride: the padding becomes 0
                shape, strides = [length, pitch(columns)], list(result.matrix.stride())
                matrix = TensorDescriptor(matrix, shape, strides, [tile.rows, tile.columns // 2])
        partials = spec.partials(tiles, length)
        launch(
            exponentials_kernel, count * tile.rows, tile.launch_tile,
            x, w, spec.slot[rows], spec.own[rows], w_SD if spec.bias is None else spec.bias,
            w_SD if hidden is None else hidden[rows], matrix, *partials,
            length, columns, pitch(columns), 0 if hidden is None else hidden.stride(0),
            spec.scale_log2, spec.shift_log2, threshold or 0.0,
            D=width, STORE=store, DESCRIPTORS=descriptors, INTERPRET=INTERPRET, **spec.constants, **tile.constants,
        )  # fmt: skip
        spec.reduce(partials, result, rows)
        del partials  # before those of the next rows are allocated
    return result


def _rows_per_launch(tiles: int, tile_rows: int, bytes_each: int) -> int:
    """The whole row tiles whose partial statistics fit _PARTIAL_BYTES: with ten million classes those of a large batch
    would exceed everything else that a pass without a matrix allocates."""
    return max(1, _PARTIAL_BYTES // (tiles * bytes_each * tile_rows)) * tile_rows
