"""Epilogues of the two gradient products, each one pass in place: row scale, labels' terms, backward of the norm.

Legend: b samples, l labels per sample, D width, L rows of the weight in memory, S rows of this step.

    g_x = coefficient E w + sum over labels of grad_cos (w_y - cos x)        d loss / d x = (g_x - u (u . g_x)) / |x|

with unit rows u; the gradient of w goes through its norm in the same way. Of a label's row only the part tangential to
x is added: where cos is close to +-1 and the margin's derivative is large, the rest would not cancel afterwards.

`finish_x_kernel`: one program per `tile.rows` samples. Reads the product, x and the rows of this rank's labels (8 + 4 l
bytes per element), writes 4.
`rows_through_norm_kernel`: one program per `tile.rows` of the S rows. Reads the gradient and w (8 bytes per element),
writes 4 and the squared length of each row's gradient. It also multiplies by the gradient of the loss, so that takes no
pass of its own.

Each row is one program's; sums over D are in the order of the columns. Rows wider than 4096 are read twice.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

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
    check_column,
    check_label_terms,
    check_matrix,
    check_rows,
    launch,
    program_slots,
    tile_of,
)


@triton.jit
def _with_labels(
    total,
    unit,
    w_ptr,
    inverse_w_ptr,
    grad_cos_ptr,
    cos_ptr,
    rows_ptr,
    slot_ptr,
    sample,
    inside,
    column,
    num_slots,
    D: tl.constexpr,
    LABELS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total + sum over labels of grad_cos (w_y - cos unit), [ROWS, BLOCK]. Unrolled: the compiler then merges the loads
    of two calls. A row is read where grad_cos is not 0; NaN is not 0, and its index may be invalid."""
    for label in tl.static_range(LABELS):
        at = sample * LABELS + label
        grad_cos = tl.load(grad_cos_ptr + at, mask=inside, other=0.0)
        cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
        slot = tl.load(slot_ptr + at, mask=inside, other=-1)
        valid = (grad_cos != 0.0) & (slot >= 0) & (slot < num_slots)
        row = slot
        if HAS_ROWS:
            row = tl.load(rows_ptr + slot, mask=valid, other=0)
        inverse = tl.load(inverse_w_ptr + slot, mask=valid, other=0.0)
        mask = valid[:, None]
        if D % BLOCK != 0:
            mask = mask & (column < D)
        w = tl.load(w_ptr + row[:, None] * D + column, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        total += grad_cos[:, None] * (w - cos[:, None] * unit)
    return total


@triton.jit
def _combined(
    product_ptr, coefficient_ptr, second_ptr, second_coefficient_ptr, third_ptr, third_coefficient_ptr, sample, inside,
    at, mask, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """The sum of the products, each times its coefficient."""
    coefficient = tl.load(coefficient_ptr + sample, mask=inside, other=0.0)[:, None]
    total = tl.load(product_ptr + at, mask=mask, other=0.0) * coefficient
    if PRODUCTS > 1:
        coefficient = tl.load(second_coefficient_ptr + sample, mask=inside, other=0.0)[:, None]
        total += tl.load(second_ptr + at, mask=mask, other=0.0) * coefficient
    if PRODUCTS > 2:
        coefficient = tl.load(third_coefficient_ptr + sample, mask=inside, other=0.0)[:, None]
        total += tl.load(third_ptr + at, mask=mask, other=0.0) * coefficient
    return total


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def finish_x_kernel(
    product_ptr,  # [b, D] fp32, in; the gradient, out
    coefficient_ptr,  # [b] fp32
    second_ptr,  # [b, D] fp32, unused unless PRODUCTS > 1, as its coefficient
    second_coefficient_ptr,  # [b] fp32
    third_ptr,  # [b, D] fp32, unused unless PRODUCTS > 2, as its coefficient
    third_coefficient_ptr,  # [b] fp32
    grad_cos_ptr,  # [b, l] fp32
    cos_ptr,  # [b, l] fp32
    x_ptr,  # [b, D] fp32
    inverse_x_ptr,  # [b] fp32
    w_ptr,  # [L, D] fp32, fp16 or bf16
    rows_ptr,  # [S] int64, or anything with HAS_ROWS = False
    inverse_w_ptr,  # [S] fp32
    slot_ptr,  # [b, l] int64
    num_rows,
    num_slots,
    D: tl.constexpr,
    LABELS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, inside, _source = program_slots(product_ptr, num_rows, False, ROWS)
    row = sample[:, None] * D
    inverse = tl.load(inverse_x_ptr + sample, mask=inside, other=0.0)[:, None]
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, inside, D, BLOCK)
        unit = tl.load(x_ptr + row + column, mask=mask, other=0.0) * inverse
        grad = _combined(
            product_ptr, coefficient_ptr, second_ptr, second_coefficient_ptr, third_ptr, third_coefficient_ptr, sample,
            inside, row + column, mask, PRODUCTS,
        )  # fmt: skip
        grad = _with_labels(
            grad, unit, w_ptr, inverse_w_ptr, grad_cos_ptr, cos_ptr, rows_ptr, slot_ptr, sample, inside,
            column, num_slots, D, LABELS, HAS_ROWS, BLOCK,
        )  # fmt: skip
        products += unit * grad
    along = tl.sum(products, axis=1)[:, None]
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, inside, D, BLOCK)
        unit = tl.load(x_ptr + row + column, mask=mask, other=0.0) * inverse
        grad = _combined(
            product_ptr, coefficient_ptr, second_ptr, second_coefficient_ptr, third_ptr, third_coefficient_ptr, sample,
            inside, row + column, mask, PRODUCTS,
        )  # fmt: skip
        grad = _with_labels(
            grad, unit, w_ptr, inverse_w_ptr, grad_cos_ptr, cos_ptr, rows_ptr, slot_ptr, sample, inside,
            column, num_slots, D, LABELS, HAS_ROWS, BLOCK,
        )  # fmt: skip
        tl.store(product_ptr + row + column, (grad - unit * along) * inverse, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def rows_through_norm_kernel(
    grad_ptr,  # [S, D] fp32
    w_ptr,  # [L, D] fp32, fp16 or bf16
    rows_ptr,  # [S] int64, or anything with HAS_ROWS = False
    inverse_ptr,  # [S] fp32
    factor_ptr,  # [1] fp32, unused unless HAS_FACTOR
    out_ptr,  # [S, D] fp32, fp16 or bf16 out; may be grad_ptr
    square_ptr,  # [S] fp32 out
    num_rows,
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, inside, source = program_slots(rows_ptr, num_rows, HAS_ROWS, ROWS)
    row, w_row = slot[:, None] * D, source[:, None] * D
    inverse = tl.load(inverse_ptr + slot, mask=inside, other=0.0)[:, None]
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, inside, D, BLOCK)
        unit = tl.load(w_ptr + w_row + column, mask=mask, other=0.0).to(tl.float32) * inverse
        products += unit * tl.load(grad_ptr + row + column, mask=mask, other=0.0)
    along = tl.sum(products, axis=1)[:, None]
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, inside, D, BLOCK)
        unit = tl.load(w_ptr + w_row + column, mask=mask, other=0.0).to(tl.float32) * inverse
        grad = (tl.load(grad_ptr + row + column, mask=mask, other=0.0) - unit * along) * inverse
        if HAS_FACTOR:
            grad *= tl.load(factor_ptr)
        tl.store(out_ptr + row + column, cast(grad, out_ptr.dtype.element_ty, INTERPRET), mask=mask)
        squares += grad * grad
    tl.store(square_ptr + slot, tl.sum(squares, axis=1), mask=inside)


def finish_x_(
    product_bD: Tensor,
    coefficient_b: Tensor,
    grad_cos_bl: Tensor,
    cos_bl: Tensor,
    x_bD: Tensor,
    inverse_x_b: Tensor,
    w_LD: Tensor,
    rows_S: Tensor | None,
    inverse_w_S: Tensor,
    slot_bl: Tensor,
    *,
    more: Sequence[tuple[Tensor, Tensor]] = (),
    tile: Tile | None = None,
) -> Tensor:
    """Turn the product E w into this shard's part of the gradient of x, in place. Linear: add the parts of the shards.

    Args:
        product_bD: fp32, contiguous; E w with unit rows w. Overwritten.
        coefficient_b: fp32, see `row_epilogue`.
        grad_cos_bl: fp32, d loss / d target cosine; 0 where the label is on another rank.
        cos_bl: fp32, the target cosine.
        x_bD, w_LD: contiguous, rows of any length; x is fp32, w also fp16 or bf16.
        rows_S: int64, the row of w_LD of each slot; None: all rows, S = L.
        inverse_x_b, inverse_w_S: fp32, 1 / length; 0 for a zero row.
        slot_bl: int64, the label's index into the S rows; read where grad_cos is not 0.
        more: at most two further pairs of a product and its coefficient, which are added.
        tile: None: `tile_of(D)`.

    Returns:
        product_bD.
    """
    check_matrix("product", product_bD, (torch.float32,))
    samples, width = product_bD.shape
    inverse_x, inverse_w = check_label_terms(
        product_bD, samples, inverse_w_S.numel(), grad_cos_bl, cos_bl, x_bD, inverse_x_b, w_LD, rows_S, inverse_w_S
    )
    check_matrix("slot", slot_bl, (torch.int64,), tuple(grad_cos_bl.shape), product_bD)
    pairs: list[Tensor] = []
    for product, coefficient in ((product_bD, coefficient_b), *more):
        check_matrix("product", product, (torch.float32,), (samples, width), product_bD)
        pairs += [product, check_column("coefficient", coefficient, samples, torch.float32, product_bD)]
    launch(
        finish_x_kernel, samples, tile or tile_of(width),
        *pairs, *pairs[:2] * (2 - len(more)), grad_cos_bl, cos_bl, x_bD, inverse_x, w_LD,
        w_LD if rows_S is None else rows_S, inverse_w, slot_bl, samples, len(inverse_w),
        D=width, LABELS=grad_cos_bl.shape[1], HAS_ROWS=rows_S is not None, PRODUCTS=1 + len(more),
    )  # fmt: skip
    return product_bD


def rows_through_norm_(
    grad_SD: Tensor,
    w_LD: Tensor,
    rows_S: Tensor | None,
    inverse_S: Tensor,
    *,
    factor: Tensor | None = None,
    out_SD: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Turn the gradient of the unit rows into that of w[rows], in place or into `out_SD`.

    Args:
        grad_SD: fp32, contiguous, with respect to w[rows] / |w[rows]|. Overwritten without `out_SD`.
        w_LD: fp32, fp16 or bf16, contiguous.
        rows_S: int64, each in [0, L); None: all rows, S = L.
        inverse_S: fp32, 1 / |w[rows]|; 0 for a zero row, whose gradient becomes 0.
        factor: one fp32 number on the device, multiplies the result.
        out_SD: fp32, fp16 or bf16, contiguous; rounded once.
        tile: None: `tile_of(D)`.

    Returns:
        The squared length of every row of the result before it is rounded, fp32 [S].
    """
    check_matrix("w", w_LD, ROW_DTYPES)
    num_rows, width = check_rows(rows_S, len(w_LD), w_LD), w_LD.shape[1]
    check_matrix("grad", grad_SD, (torch.float32,), (num_rows, width), w_LD)
    out = grad_SD if out_SD is None else out_SD
    check_matrix("out", out, ROW_DTYPES, (num_rows, width), w_LD)
    inverse = check_column("inverse", inverse_S, num_rows, torch.float32, w_LD)
    if factor is not None:
        factor = check_column("factor", factor.reshape(-1), 1, torch.float32, w_LD)
    square = torch.empty(num_rows, dtype=torch.float32, device=w_LD.device)
    launch(
        rows_through_norm_kernel, num_rows, tile or tile_of(width),
        grad_SD, w_LD, w_LD if rows_S is None else rows_S, inverse, square if factor is None else factor, out, square,
        num_rows, D=width, HAS_ROWS=rows_S is not None, HAS_FACTOR=factor is not None, INTERPRET=INTERPRET,
    )  # fmt: skip
    return square
