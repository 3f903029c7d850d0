"""What makes gradients of the two products: row scale, labels' pull and the Jacobian of the norm, one pass in place each.

Legend: b samples, l labels per sample, D width, L rows of the weight in memory, S rows of this step.

    g_x = coefficient E w + sum over labels of pull (w_y - cos x)        d loss / d x = (g_x - u (u . g_x)) / |x|

with unit rows u. Of a label's row only what is tangential to x: where cos is close to +-1 and the margin's derivative is
large, the rest would not cancel in the Jacobian.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import (
    Tile,
    check_column,
    check_matrix,
    check_pulls,
    check_rows,
    columns,
    launch,
    slots,
    tile_of,
)


@triton.jit
def _with_labels(
    total,
    unit,
    w_ptr,
    inverse_w_ptr,
    pull_ptr,
    cos_ptr,
    row_ptr,
    slot_ptr,
    sample,
    inside,
    column,
    num_w,
    num_slots,
    D: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total + sum over labels of pull (w_y - cos unit), [ROWS, BLOCK]. Unrolled, so that the compiler sees that two calls
    load the same. A row is read where its pull is not 0; a NaN of it is not 0, and then the index may be anything."""
    for label in tl.static_range(LABELS):
        at = sample * LABELS + label
        pull = tl.load(pull_ptr + at, mask=inside, other=0.0)
        cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
        row = tl.load(row_ptr + at, mask=inside, other=-1)
        slot = tl.load(slot_ptr + at, mask=inside, other=-1)
        there = (pull != 0.0) & (row >= 0) & (row < num_w) & (slot >= 0) & (slot < num_slots)
        inverse = tl.load(inverse_w_ptr + slot, mask=there, other=0.0)
        mask = there[:, None]
        if D % BLOCK != 0:
            mask = mask & (column < D)
        w = tl.load(w_ptr + row[:, None] * D + column, mask=mask, other=0.0) * inverse[:, None]
        total += pull[:, None] * (w - cos[:, None] * unit)
    return total


@triton.jit(do_not_specialize=["num_rows", "num_w", "num_slots"])
def finish_x_kernel(
    product_ptr,  # [b, D] fp32, in; the gradient, out
    coefficient_ptr,  # [b] fp32
    pull_ptr,  # [b, l] fp32
    cos_ptr,  # [b, l] fp32
    x_ptr,  # [b, D] fp32
    inverse_x_ptr,  # [b] fp32
    w_ptr,  # [L, D] fp32
    inverse_w_ptr,  # [S] fp32
    row_ptr,  # [b, l] int64
    slot_ptr,  # [b, l] int64
    num_rows,
    num_w,
    num_slots,
    D: tl.constexpr,
    LABELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, inside, _source = slots(product_ptr, num_rows, False, ROWS)
    row = sample[:, None] * D
    coefficient = tl.load(coefficient_ptr + sample, mask=inside, other=0.0)[:, None]
    inverse = tl.load(inverse_x_ptr + sample, mask=inside, other=0.0)[:, None]
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = columns(start, inside, D, BLOCK)
        unit = tl.load(x_ptr + row + column, mask=mask, other=0.0) * inverse
        grad = tl.load(product_ptr + row + column, mask=mask, other=0.0) * coefficient
        grad = _with_labels(
            grad, unit, w_ptr, inverse_w_ptr, pull_ptr, cos_ptr, row_ptr, slot_ptr, sample, inside, column,
            num_w, num_slots, D, LABELS, BLOCK,
        )  # fmt: skip
        products += unit * grad
    along = tl.sum(products, axis=1)[:, None]
    for start in range(0, D, BLOCK):
        column, mask = columns(start, inside, D, BLOCK)
        unit = tl.load(x_ptr + row + column, mask=mask, other=0.0) * inverse
        grad = tl.load(product_ptr + row + column, mask=mask, other=0.0) * coefficient
        grad = _with_labels(
            grad, unit, w_ptr, inverse_w_ptr, pull_ptr, cos_ptr, row_ptr, slot_ptr, sample, inside, column,
            num_w, num_slots, D, LABELS, BLOCK,
        )  # fmt: skip
        tl.store(product_ptr + row + column, (grad - unit * along) * inverse, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def rows_through_norm_kernel(
    grad_ptr,  # [S, D] fp32, in and out
    w_ptr,  # [L, D] fp32
    rows_ptr,  # [S] int64, or anything with HAS_ROWS = False
    inverse_ptr,  # [S] fp32
    square_ptr,  # [S] fp32 out
    num_rows,
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, inside, source = slots(rows_ptr, num_rows, HAS_ROWS, ROWS)
    row, w_row = slot[:, None] * D, source[:, None] * D
    inverse = tl.load(inverse_ptr + slot, mask=inside, other=0.0)[:, None]
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = columns(start, inside, D, BLOCK)
        unit = tl.load(w_ptr + w_row + column, mask=mask, other=0.0) * inverse
        products += unit * tl.load(grad_ptr + row + column, mask=mask, other=0.0)
    along = tl.sum(products, axis=1)[:, None]
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = columns(start, inside, D, BLOCK)
        unit = tl.load(w_ptr + w_row + column, mask=mask, other=0.0) * inverse
        grad = (tl.load(grad_ptr + row + column, mask=mask, other=0.0) - unit * along) * inverse
        tl.store(grad_ptr + row + column, grad, mask=mask)
        squares += grad * grad
    tl.store(square_ptr + slot, tl.sum(squares, axis=1), mask=inside)


def finish_x_(
    product_bD: Tensor,
    coefficient_b: Tensor,
    pull_bl: Tensor,
    cos_bl: Tensor,
    x_bD: Tensor,
    inverse_x_b: Tensor,
    w_LD: Tensor,
    inverse_w_S: Tensor,
    row_bl: Tensor,
    slot_bl: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Turn E w into the gradient of x, this shard's part of it, in place; returned.

    product_bD      fp32 contiguous, E w with unit rows w
    coefficient_b   fp32, see `row_epilogue`
    pull_bl         fp32, d loss / d target cosine; 0 where the label is another rank's. cos_bl fp32: that cosine
    x_bD, w_LD      fp32 contiguous, any length; inverse_x_b, inverse_w_S fp32: 1 / length, 0 of a zero row
    row_bl          int64, the row of w_LD; slot_bl int64, the index of inverse_w_S. Looked at where the pull is not 0
    tile            None: `tile_of(D)`

    Per element 8 + 4 l bytes are read (of labels of this rank) and 4 written. Linear: parts of several shards may be added.
    Bitwise repeatable, no host synchronisation, not seen by autograd. ValueError for what cannot be used.
    """
    check_matrix("product", product_bD, (torch.float32,))
    samples, width = product_bD.shape
    inverse_x, inverse_w = check_pulls(
        product_bD, samples, inverse_w_S.numel(), pull_bl, cos_bl, x_bD, inverse_x_b, w_LD, inverse_w_S, row_bl
    )
    check_matrix("slot", slot_bl, (torch.int64,), tuple(pull_bl.shape), product_bD)
    coefficient = check_column("coefficient", coefficient_b, samples, torch.float32, product_bD)
    launch(
        finish_x_kernel, samples, tile or tile_of(width),
        product_bD, coefficient, pull_bl, cos_bl, x_bD, inverse_x, w_LD, inverse_w, row_bl, slot_bl,
        samples, len(w_LD), len(inverse_w), D=width, LABELS=pull_bl.shape[1],
    )  # fmt: skip
    return product_bD


def rows_through_norm_(
    grad_SD: Tensor, w_LD: Tensor, rows_S: Tensor | None, inverse_S: Tensor, *, tile: Tile | None = None
) -> Tensor:
    """Turn the gradient of unit rows into that of w[rows], in place. Returned: its squared length per row, fp32 [S].

    grad_SD     fp32 contiguous, with respect to w[rows] / |w[rows]|
    w_LD        fp32 contiguous; rows_S int64, each in [0, L), which is not checked; None: all rows
    inverse_S   1 / |w[rows]|, fp32, 0 of a zero row, whose gradient becomes 0
    tile        None: `tile_of(D)`

    8 bytes are read and 4 written per element. Bitwise repeatable, no host synchronisation, not seen by autograd.
    ValueError for what cannot be used.
    """
    check_matrix("w", w_LD, (torch.float32,))
    num_rows, width = check_rows(rows_S, len(w_LD), w_LD), w_LD.shape[1]
    check_matrix("grad", grad_SD, (torch.float32,), (num_rows, width), w_LD)
    inverse = check_column("inverse", inverse_S, num_rows, torch.float32, w_LD)
    square = torch.empty(num_rows, dtype=torch.float32, device=w_LD.device)
    launch(
        rows_through_norm_kernel, num_rows, tile or tile_of(width),
        grad_SD, w_LD, w_LD if rows_S is None else rows_S, inverse, square, num_rows,
        D=width, HAS_ROWS=rows_S is not None,
    )  # fmt: skip
    return square
