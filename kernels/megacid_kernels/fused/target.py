"""Cosine and sine between every sample and its labels, from rows read in place; and the margin.

Legend: b samples, l labels per sample, D width, L rows of the weight in memory, S rows of this step.

The margin depends on digits that 16-bit rows do not have, and on the sine. sqrt(1 - c^2) has no digits left where c is
close to +-1; |x - w| |x + w| / 2 of unit vectors keeps all of them.

Grid: one program per `tile.rows` (sample, label) pairs, which reads both rows (8 bytes per element) and writes two or
three fp32 numbers per pair. Rows are read only for labels of this rank. Sums over D are in the order of the columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import (
    Tile,
    block_columns,
    check_class_rows,
    check_column,
    check_matrix,
    launch,
    tile_of,
)


@triton.jit
def _with_margin(
    cos, sin, m2, m3, cos_m2, sin_m2, last, sin_floor, ANGLE: tl.constexpr, EASY: tl.constexpr, EXACT: tl.constexpr
):
    """psi and d psi / d cos of `margin.Margin` with m1 = 1, [ROWS]. last: the cosine up to which theta + m2 <= pi."""
    psi = cos
    dpsi = tl.full(cos.shape, 1.0, tl.float32)
    if ANGLE:
        psi = cos * cos_m2 - sin * sin_m2
        slope = cos_m2 + sin_m2 * cos / tl.maximum(sin, sin_floor)
        if EASY:
            applies = cos > 0.0
            psi = tl.where(applies, psi, cos)
        else:
            applies = cos > last
            psi = tl.where(applies, psi, cos - m2 * sin_m2)
        if EXACT:
            dpsi = tl.where(applies, slope, dpsi)
    return psi - m3, dpsi


@triton.jit(do_not_specialize=["num_pairs"])
def target_cosines_kernel(
    x_ptr,  # [b, D] fp32
    inverse_x_ptr,  # [b] fp32
    w_ptr,  # [L, D] fp32, fp16 or bf16
    rows_ptr,  # [S] int64, or anything with HAS_ROWS = False
    inverse_w_ptr,  # [S] fp32
    slot_ptr,  # [b, l] int64
    own_ptr,  # [b, l] uint8
    cos_ptr,  # [b, l] fp32 out
    second_ptr,  # [b, l] fp32 out: psi with MARGIN, else the sine
    dpsi_ptr,  # [b, l] fp32 out, unused unless MARGIN
    num_pairs,  # b * l
    m2,
    m3,
    cos_m2,
    sin_m2,
    last,
    sin_floor,
    D: tl.constexpr,
    LABELS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    MARGIN: tl.constexpr,
    ANGLE: tl.constexpr,
    EASY: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = pair < num_pairs
    sample = pair // LABELS
    own = tl.load(own_ptr + pair, mask=inside, other=0) != 0
    slot = tl.load(slot_ptr + pair, mask=own, other=0)
    row = slot
    if HAS_ROWS:
        row = tl.load(rows_ptr + slot, mask=own, other=0)
    inverse_x = tl.load(inverse_x_ptr + sample, mask=own, other=0.0)[:, None]
    inverse_w = tl.load(inverse_w_ptr + slot, mask=own, other=0.0)[:, None]
    x_row, w_row = sample[:, None] * D, row[:, None] * D
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    differences = tl.zeros((ROWS, BLOCK), tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, own, D, BLOCK)
        x = tl.load(x_ptr + x_row + column, mask=mask, other=0.0) * inverse_x
        w = tl.load(w_ptr + w_row + column, mask=mask, other=0.0).to(tl.float32) * inverse_w
        products += x * w
        differences += (x - w) * (x - w)
        sums += (x + w) * (x + w)
    apart = tl.sum(differences, axis=1)
    along = tl.sum(sums, axis=1)
    cos = tl.sum(products, axis=1)
    sin = tl.sqrt_rn(apart) * tl.sqrt_rn(along) * 0.5
    # apart + along is 4 for unit rows, 2 if one of them is zero, 0 if both are: the sine at cosine 0.
    sin = tl.where(own & (apart + along < 3.0), 1.0, sin)
    tl.store(cos_ptr + pair, cos, mask=inside)
    if MARGIN:
        psi, dpsi = _with_margin(cos, sin, m2, m3, cos_m2, sin_m2, last, sin_floor, ANGLE, EASY, EXACT)
        tl.store(second_ptr + pair, tl.where(own, psi, 0.0), mask=inside)
        tl.store(dpsi_ptr + pair, tl.where(own, dpsi, 0.0), mask=inside)
    else:
        tl.store(second_ptr + pair, sin, mask=inside)


def target_cosines(
    x_bD: Tensor,
    inverse_x_b: Tensor,
    w_LD: Tensor,
    rows_S: Tensor | None,
    inverse_w_S: Tensor,
    slot_bl: Tensor,
    own_bl: Tensor,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle between every sample and each of its labels.

    Args:
        x_bD, w_LD: contiguous, rows of any length; x is fp32, w also fp16 or bf16.
        rows_S: int64, the row of w_LD of each slot; None: all rows, S = L.
        inverse_x_b, inverse_w_S: fp32, 1 / length of the rows of x and of the S rows of this step; 0 for a zero row.
        slot_bl: int64, the label's index into the S rows; read where own_bl only.
        own_bl: bool, whether the label's class is on this rank.
        tile: None: `tile_of(D)`.

    Returns:
        (cos, sin), fp32 [b, l], 0 where not own_bl; 0 and 1 where a row is zero. Neither is clipped: |cos| may exceed 1
        by a rounding error.
    """
    cos, sin = (torch.empty(slot_bl.shape, device=x_bD.device) for _ in range(2))
    outputs, constants = (cos, sin, sin), {"MARGIN": False, "ANGLE": False, "EASY": False, "EXACT": False}
    _launch(x_bD, inverse_x_b, w_LD, rows_S, inverse_w_S, slot_bl, own_bl, outputs, (0.0, 0.0), 0.0, constants, tile)
    return cos, sin


def target_margins(
    x_bD: Tensor,
    inverse_x_b: Tensor,
    w_LD: Tensor,
    rows_S: Tensor | None,
    inverse_w_S: Tensor,
    slot_bl: Tensor,
    own_bl: Tensor,
    *,
    m2: float,
    m3: float,
    easy_margin: bool,
    exact: bool,
    sin_floor: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(cos, psi, d psi / d cos), fp32 [b, l], 0 where not own_bl; psi = cos(theta + m2) - m3 as `margin.Margin` says.

    exact: False: d psi / d cos is 1. sin_floor: the smallest sine by which a derivative is divided. The other arguments
    are those of `target_cosines`.
    """
    cos, psi, dpsi = (torch.empty(slot_bl.shape, device=x_bD.device) for _ in range(3))
    angle = m2 != 0
    constants = {"MARGIN": True, "ANGLE": angle, "EASY": angle and easy_margin, "EXACT": angle and exact}
    _launch(
        x_bD, inverse_x_b, w_LD, rows_S, inverse_w_S, slot_bl, own_bl, (cos, psi, dpsi), (m2, m3), sin_floor,
        constants, tile,
    )  # fmt: skip
    return cos, psi, dpsi


def _launch(
    x_bD: Tensor,
    inverse_x_b: Tensor,
    w_LD: Tensor,
    rows_S: Tensor | None,
    inverse_w_S: Tensor,
    slot_bl: Tensor,
    own_bl: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    margin: tuple[float, float],
    sin_floor: float,
    constants: dict[str, Any],
    tile: Tile | None,
) -> None:
    check_matrix("x", x_bD, (torch.float32,))
    width, shape = x_bD.shape[1], (len(x_bD), slot_bl.shape[-1])
    inverse_w = check_class_rows(w_LD, rows_S, inverse_w_S, inverse_w_S.numel(), x_bD)
    inverse_x = check_column("inverse_x", inverse_x_b, len(x_bD), torch.float32, x_bD)
    check_matrix("slot", slot_bl, (torch.int64,), shape, x_bD)
    check_matrix("own", own_bl, (torch.bool,), shape, x_bD)
    m2, m3 = margin
    launch(
        target_cosines_kernel, slot_bl.numel(), tile or tile_of(width),
        x_bD, inverse_x, w_LD, w_LD if rows_S is None else rows_S, inverse_w, slot_bl, own_bl.view(torch.uint8),
        *outputs, slot_bl.numel(), float(m2), float(m3), math.cos(m2), math.sin(m2), math.cos(math.pi - m2), sin_floor,
        D=width, LABELS=shape[1], HAS_ROWS=rows_S is not None, **constants,
    )  # fmt: skip
