"""Cosine and sine between every sample and its labels, from fp32 rows read in place.

Legend: b samples, l labels per sample, D width, L rows of the weight in memory, S rows of this step.

The margin depends on digits that 16-bit rows do not have, and on the sine. sqrt(1 - c^2) has no digits left where c is
close to +-1; |x - w| |x + w| / 2 of unit vectors keeps all of them.

Grid: one program per `tile.rows` (sample, label) pairs, which reads both rows (8 bytes per element) and writes two fp32
numbers per pair. Rows are read only for labels of this rank. Sums over D are in the order of the columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import Tile, block_columns, check_column, check_matrix, launch, tile_of


@triton.jit(do_not_specialize=["num_pairs"])
def target_cosines_kernel(
    x_ptr,  # [b, D] fp32
    inverse_x_ptr,  # [b] fp32
    w_ptr,  # [L, D] fp32
    inverse_w_ptr,  # [S] fp32
    row_ptr,  # [b, l] int64
    slot_ptr,  # [b, l] int64
    own_ptr,  # [b, l] uint8
    cos_ptr,  # [b, l] fp32 out
    sin_ptr,  # [b, l] fp32 out
    num_pairs,  # b * l
    D: tl.constexpr,
    LABELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = pair < num_pairs
    sample = pair // LABELS
    own = tl.load(own_ptr + pair, mask=inside, other=0) != 0
    row = tl.load(row_ptr + pair, mask=own, other=0)
    slot = tl.load(slot_ptr + pair, mask=own, other=0)
    inverse_x = tl.load(inverse_x_ptr + sample, mask=own, other=0.0)[:, None]
    inverse_w = tl.load(inverse_w_ptr + slot, mask=own, other=0.0)[:, None]
    x_row, w_row = sample[:, None] * D, row[:, None] * D
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    differences = tl.zeros((ROWS, BLOCK), tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, own, D, BLOCK)
        x = tl.load(x_ptr + x_row + column, mask=mask, other=0.0) * inverse_x
        w = tl.load(w_ptr + w_row + column, mask=mask, other=0.0) * inverse_w
        products += x * w
        differences += (x - w) * (x - w)
        sums += (x + w) * (x + w)
    apart = tl.sum(differences, axis=1)
    along = tl.sum(sums, axis=1)
    sin = tl.sqrt_rn(apart) * tl.sqrt_rn(along) * 0.5
    # apart + along is 4 for unit rows, 2 if one of them is zero, 0 if both are: the sine at cosine 0.
    sin = tl.where(own & (apart + along < 3.0), 1.0, sin)
    tl.store(cos_ptr + pair, tl.sum(products, axis=1), mask=inside)
    tl.store(sin_ptr + pair, sin, mask=inside)


def target_cosines(
    x_bD: Tensor,
    inverse_x_b: Tensor,
    w_LD: Tensor,
    inverse_w_S: Tensor,
    row_bl: Tensor,
    slot_bl: Tensor,
    own_bl: Tensor,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle between every sample and each of its labels.

    Args:
        x_bD, w_LD: fp32, contiguous, rows of any length.
        inverse_x_b, inverse_w_S: fp32, 1 / length of the rows of x and of the S rows of this step; 0 for a zero row.
        row_bl: int64, the label's row of w_LD; read where own_bl only.
        slot_bl: int64, the label's index into inverse_w_S; read where own_bl only.
        own_bl: bool, whether the label's class is on this rank.
        tile: None: `tile_of(D)`.

    Returns:
        (cos, sin), fp32 [b, l], 0 where not own_bl; 0 and 1 where a row is zero. Neither is clipped: |cos| may exceed 1
        by a rounding error.
    """
    check_matrix("x", x_bD, (torch.float32,))
    width, shape = x_bD.shape[1], (len(x_bD), slot_bl.shape[-1])
    check_matrix("w", w_LD, (torch.float32,), (len(w_LD), width), x_bD)
    inverse_x = check_column("inverse_x", inverse_x_b, len(x_bD), torch.float32, x_bD)
    inverse_w = check_column("inverse_w", inverse_w_S, inverse_w_S.numel(), torch.float32, x_bD)
    for name, index in (("row", row_bl), ("slot", slot_bl)):
        check_matrix(name, index, (torch.int64,), shape, x_bD)
    check_matrix("own", own_bl, (torch.bool,), shape, x_bD)
    cos, sin = (torch.empty(shape, dtype=torch.float32, device=x_bD.device) for _ in range(2))
    launch(
        target_cosines_kernel, cos.numel(), tile or tile_of(width),
        x_bD, inverse_x, w_LD, inverse_w, row_bl, slot_bl, own_bl.view(torch.uint8), cos, sin, cos.numel(),
        D=width, LABELS=shape[1],
    )  # fmt: skip
    return cos, sin
