"""Exponentials of cosine logits written over the cosines, which cuBLAS has computed.

Legend: b samples, S rows of w on this rank, l labels per sample, T column strips. See `row_statistics` for E.

fp16 holds cosines well (11 bits, |c| <= 1) but not exponentials; with bf16 it is the other way round. So 2 bytes are
read as fp16 and written as bf16 in the same place: 4 bytes per entry and no second matrix (fp32: 8 bytes).

Grid: one program per `tile.rows` rows and strip of BLOCKS blocks of columns. It writes the row sums of its strip into
partials [T, b]. The bits of a row depend on tile.block only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import INTERPRET, Tile, cast, launch
from megacid_kernels.fused.row_statistics import (
    LOG2E,
    Exponentials,
    check_pitched,
    count_labels,
    exponentials_spec,
    without_labels,
)

TILE = Tile(rows=1, block=2048, warps=4)  # two 128-bit loads of fp16 per thread and block
BLOCKS = 8  # per strip: 16384 columns per program amortise its start
_LOG2E = tl.constexpr(LOG2E)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def exponentials_in_place_kernel(
    cos_ptr,  # [b, S] fp16 or fp32 in
    matrix_ptr,  # [b, S] bf16 or fp32 out, the same bytes
    slot_ptr,  # [b, l] int64
    own_ptr,  # [b, l] uint8
    bias_ptr,  # [S] fp32, unused unless HAS_BIAS
    hidden_ptr,  # [b, S] uint8: in with HAS_HIDDEN, out with FILTER, else unused
    sums_ptr,  # [T, b] fp32 out
    largest_ptr,  # [T, b] fp32 out, unused unless LARGEST
    removed_ptr,  # [T, b] int32 out, unused unless FILTER
    num_rows,
    num_columns,
    stride,
    hidden_stride,
    scale_log2,
    shift_log2,
    threshold,
    LABELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FILTER: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    LARGEST: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    strips = tl.cdiv(num_columns, BLOCKS * BLOCK)
    strip = tl.program_id(0) % strips
    sample = (tl.program_id(0) // strips).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = sample < num_rows
    row, hidden_row = sample[:, None] * stride, sample[:, None] * hidden_stride
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    largest = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    removed = tl.zeros((ROWS, BLOCK), tl.int32)
    start = strip * BLOCKS * BLOCK
    hits = count_labels(slot_ptr, own_ptr, sample, inside, start, start + BLOCKS * BLOCK, LABELS)
    for block in range(BLOCKS):
        first = start + block * BLOCK
        column = (first + tl.arange(0, BLOCK))[None, :]
        if first < num_columns:
            full = first + BLOCK <= num_columns  # a mask of columns would split the loads into 16 bits
            if full:
                cos = tl.load(cos_ptr + row + column, mask=inside[:, None], other=0.0).to(tl.float32)
            else:
                mask = inside[:, None] & (column < num_columns)
                cos = tl.load(cos_ptr + row + column, mask=mask, other=float("-inf")).to(tl.float32)
            # An excluded entry is -inf: its exponential is 0, and it is neither a maximum nor above a threshold.
            if hits > 0:
                cos = without_labels(cos, slot_ptr, own_ptr, sample, inside, column, LABELS)
            if HAS_HIDDEN:
                mask = inside[:, None] & (column < hidden_stride)
                given_mask = tl.load(hidden_ptr + hidden_row + column, mask=mask, other=0)
                cos = tl.where(given_mask != 0, float("-inf"), cos)
            if HAS_BIAS:
                bias = tl.load(bias_ptr + column, mask=column < num_columns, other=0.0)
            if FILTER:
                hidden = cos > threshold
                if HAS_BIAS:
                    hidden = hidden & (bias > float("-inf"))
                mask = inside[:, None] & (column < hidden_stride)
                tl.store(hidden_ptr + hidden_row + column, hidden.to(tl.uint8), mask=mask)
                removed += hidden.to(tl.int32)
                cos = tl.where(hidden, float("-inf"), cos)
            if HAS_BIAS:
                exponent = tl.fma(cos, scale_log2, bias * _LOG2E - shift_log2)
            else:
                exponent = tl.fma(cos, scale_log2, -shift_log2)
            if LARGEST:
                largest = tl.maximum(largest, exponent if HAS_BIAS else cos)
            exponential = tl.exp2(exponent)
            sums += exponential
            stored = cast(exponential, matrix_ptr.dtype.element_ty, INTERPRET)
            if full:
                tl.store(matrix_ptr + row + column, stored, mask=inside[:, None])
            else:
                tl.store(matrix_ptr + row + column, stored, mask=inside[:, None] & (column < num_columns))
    partial = strip.to(tl.int64) * num_rows + sample
    tl.store(sums_ptr + partial, tl.sum(sums, axis=1), mask=inside)
    if LARGEST:
        tl.store(largest_ptr + partial, tl.max(largest, axis=1), mask=inside)
    if FILTER:
        tl.store(removed_ptr + partial, tl.sum(removed, axis=1), mask=inside)


def exponentials_(
    cos_bS: Tensor,
    slot_bl: Tensor,
    own_bl: Tensor,
    *,
    scale: float,
    shift: float,
    bias_S: Tensor | None = None,
    threshold: float | None = None,
    hidden_bS: Tensor | None = None,
    largest: bool = True,
    tile: Tile | None = None,
) -> Exponentials:
    """`exponentials.exponentials` from cosines that exist already; they are overwritten.

    Args:
        cos_bS: fp16 or fp32, contiguous rows; fastest with the row stride of `row_statistics.pitched`. The matrix of
            the result is the same storage: bf16 for fp16, cos_bS itself for fp32.
        tile: None: one row times 2048 columns per iteration.

    The other arguments and the result are those of `exponentials`.
    """
    check_pitched("cos", cos_bS, (torch.float16, torch.float32), None, cos_bS)
    samples, columns = cos_bS.shape
    spec = exponentials_spec(
        cos_bS, (samples, columns), slot_bl, own_bl, scale=scale, shift=shift, bias_S=bias_S, threshold=threshold,
        hidden_bS=hidden_bS, largest=largest,
    )  # fmt: skip
    matrix = cos_bS.view(torch.bfloat16) if cos_bS.dtype == torch.float16 else cos_bS
    result = spec.result(matrix, samples, columns, like=cos_bS)
    hidden = spec.hidden if result.hidden is None else result.hidden.view(torch.uint8)
    tile = tile or TILE
    strips = triton.cdiv(columns, BLOCKS * tile.block)
    if samples and columns:
        partials = spec.partials(strips, samples)
        launch(
            exponentials_in_place_kernel, triton.cdiv(samples, tile.rows) * strips * tile.rows, tile,
            cos_bS, matrix, spec.slot, spec.own, cos_bS if spec.bias is None else spec.bias,
            cos_bS if hidden is None else hidden, *partials, samples, columns, cos_bS.stride(0),
            0 if hidden is None else hidden.stride(0), spec.scale_log2, spec.shift_log2, threshold or 0.0,
            BLOCKS=BLOCKS, INTERPRET=INTERPRET, **spec.constants,
        )  # fmt: skip
        spec.reduce(partials, result, slice(0, samples))
    return result
