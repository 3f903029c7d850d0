"""L2 normalisation of rows: gathered, divided by their lengths and cast to one or two dtypes in one pass.

Legend: L rows in memory, S rows of this step, D width.

Grid: one program per `tile.rows` rows. Per row it reads w once (three times where D exceeds one block of 4096
columns) and writes the unit row in each output dtype and 1 / |w| in fp32. A row's sum of squares is one program's, in
the order of its columns. The row's largest number gives the power of two that keeps the squares in range: other rows
keep their bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import (
    INTERPRET,
    ROW_DTYPES,
    Tile,
    block_columns,
    cast,
    check_matrix,
    check_rows,
    launch,
    program_slots,
    tile_of,
)


@triton.jit
def power_of_two_for(largest):
    """2^-e, a normal number, for the exponent e of `largest` >= 0; 2^127 for 0 and subnormal numbers."""
    exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> 23, 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_norm(scaled_squares, scale):
    """1 / |w| from the sum of (w scale)^2; 0 for a row shorter than 2^-126, the smallest normal number, which stays as
    it is and gets no gradient."""
    norm = tl.sqrt_rn(scaled_squares)
    nonzero = norm > scale * 1.1754943508222875e-38
    inverse = tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), tl.where(nonzero, norm, 1.0))
    return tl.where(nonzero, inverse * scale, 0.0)


@triton.jit(do_not_specialize=["num_rows", "num_stored"])
def unit_rows_kernel(
    w_ptr,  # [L, D] fp32, fp16 or bf16
    rows_ptr,  # [S] int64, or anything with HAS_ROWS = False
    first_ptr,  # [num_stored, D] out
    second_ptr,  # [num_stored, D] out, or anything with HAS_SECOND = False
    inverse_ptr,  # [S] fp32 out
    num_rows,
    num_stored,  # at least S; further rows are 0
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, inside, source = program_slots(rows_ptr, num_rows, HAS_ROWS, ROWS)
    w_row, row = source[:, None] * D, slot[:, None] * D
    largest = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, inside, D, BLOCK)
        w = tl.load(w_ptr + w_row + column, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(w))
    scale = power_of_two_for(tl.max(largest, axis=1))
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, inside, D, BLOCK)
        w = tl.load(w_ptr + w_row + column, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        squares += w * w
    inverse = inverse_norm(tl.sum(squares, axis=1), scale)
    # Where D is one block the loops vanish and the compiler merges this load with those above; a store in between would
    # prevent that.
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, inside, D, BLOCK)
        w = tl.load(w_ptr + w_row + column, mask=mask, other=0.0).to(tl.float32)
        unit = w * inverse[:, None]
        column, mask = block_columns(start, slot < num_stored, D, BLOCK)
        tl.store(first_ptr + row + column, cast(unit, first_ptr.dtype.element_ty, INTERPRET), mask=mask)
        if HAS_SECOND:
            tl.store(second_ptr + row + column, cast(unit, second_ptr.dtype.element_ty, INTERPRET), mask=mask)
    tl.store(inverse_ptr + slot, inverse, mask=inside)


def unit_rows(
    w_LD: Tensor,
    rows_S: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    *,
    length: int | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, ...]:
    """w[rows] / |w[rows]| in each of `dtypes`.

    Args:
        w_LD: fp32, fp16 or bf16 [L, D], contiguous.
        rows_S: int64 [S], each in [0, L); None: all rows, S = L.
        dtypes: one or two of fp32, fp16, bf16. Lengths and quotients are fp32 and rounded once to these.
        length: of the matrices, at least S; None: S.
        tile: None: `tile_of(D)`.

    Returns:
        A matrix [length, D] per dtype, 0 beyond its S rows, then 1 / |w[rows]|, fp32 [S]. A zero row stays zero and has
        inverse 0; so does one shorter than 1.2e-38, the smallest normal number.
    """
    check_matrix("w", w_LD, ROW_DTYPES)
    num_rows = check_rows(rows_S, len(w_LD), w_LD)
    if not 1 <= len(dtypes) <= 2 or any(dtype not in ROW_DTYPES for dtype in dtypes):
        raise ValueError(f"dtypes is {dtypes}, expected one or two of {ROW_DTYPES}")
    width, length = w_LD.shape[1], num_rows if length is None else length
    if length < num_rows:
        raise ValueError(f"length is {length}, expected at least {num_rows}, the number of rows")
    units = [torch.empty(length, width, dtype=dtype, device=w_LD.device) for dtype in dtypes]
    inverse = torch.empty(num_rows, dtype=torch.float32, device=w_LD.device)
    launch(
        unit_rows_kernel, length, tile or tile_of(width),
        w_LD, w_LD if rows_S is None else rows_S, units[0], units[-1], inverse, num_rows, length,
        D=width, HAS_ROWS=rows_S is not None, HAS_SECOND=len(units) == 2, INTERPRET=INTERPRET,
    )  # fmt: skip
    return *units, inverse
