"""The labels' part of the gradient of w: a sparse sum into the sampled rows, in a fixed order.

Legend: b samples, l labels per sample, n = b l entries, D width, L rows of the weight in memory, S rows of this step.

Entries are sorted by slot, stably. Grid: one program per entry; the program of a slot's first entry adds all entries of
that slot one after the other, the others return at once. No two programs write one row, and the terms of a class are
added in the order of the samples. Per element of an entry 4 bytes are read; per element of a class with labels 8 more
are read and 4 written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import (
    Tile,
    block_columns,
    check_column,
    check_label_terms,
    check_matrix,
    launch,
    tile_of,
)

_OWN = 1 << 62
_OFFSET = tl.constexpr(_OWN)


class LabelOrder(NamedTuple):
    """Entries sorted by slot, see `label_order`."""

    key: Tensor  # [n] int64 ascending: slot - 2^62 of the labels of this rank, then those of other ranks, >= 0
    entry: Tensor  # [n] int64, index into the flattened [b, l]


def tile_of_row(width: int) -> Tile:
    """One row, at least eight elements per thread: most classes have one label, whose program is short."""
    block = tile_of(width).block
    return Tile(1, block, min(4, max(1, block // 256)))


def label_order(slot_bl: Tensor, own_bl: Tensor) -> LabelOrder:
    """The order in which `add_labels_` adds: sort once per chunk, use it for the student's and the teacher's sum."""
    return LabelOrder(*torch.sort(torch.add(slot_bl, own_bl, alpha=-_OWN).view(-1), stable=True))


@triton.jit(do_not_specialize=["num_entries", "num_slots"])
def add_labels_kernel(
    grad_ptr,  # [S, D] fp32, in and out
    order_key_ptr,  # [n] int64
    order_entry_ptr,  # [n] int64
    grad_cos_ptr,  # [b, l] fp32
    cos_ptr,  # [b, l] fp32
    x_ptr,  # [b, D] fp32
    inverse_x_ptr,  # [b] fp32
    w_ptr,  # [L, D] fp32, fp16 or bf16
    rows_ptr,  # [S] int64, or anything with HAS_ROWS = False
    inverse_w_ptr,  # [S] fp32
    num_entries,
    num_slots,
    D: tl.constexpr,
    LABELS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0)
    key = tl.load(order_key_ptr + first)
    before = tl.load(order_key_ptr + first - 1, mask=first > 0, other=0)  # no label of this rank has the key 0
    slot = key + _OFFSET
    if (key != before) & (slot < num_slots):
        row = slot
        if HAS_ROWS:
            row = tl.load(rows_ptr + slot)
        inverse_w = tl.load(inverse_w_ptr + slot)
        inside = tl.full((ROWS,), 1, tl.int1)
        for start in range(0, D, BLOCK):
            column, mask = block_columns(start, inside, D, BLOCK)
            unit = tl.load(w_ptr + row * D + column, mask=mask, other=0.0).to(tl.float32) * inverse_w
            total = tl.load(grad_ptr + slot * D + column, mask=mask, other=0.0)
            position = first
            next_key = key
            while next_key == key:
                entry = tl.load(order_entry_ptr + position)
                sample = entry // LABELS
                grad_cos = tl.load(grad_cos_ptr + entry)
                cos = tl.load(cos_ptr + entry)
                x = tl.load(x_ptr + sample * D + column, mask=mask, other=0.0) * tl.load(inverse_x_ptr + sample)
                total += grad_cos * (x - cos * unit)
                position += 1
                next_key = tl.load(order_key_ptr + position, mask=position < num_entries, other=0)
            tl.store(grad_ptr + slot * D + column, total, mask=mask)


def add_labels_(
    grad_SD: Tensor,
    order: LabelOrder,
    grad_cos_bl: Tensor,
    cos_bl: Tensor,
    x_bD: Tensor,
    inverse_x_b: Tensor,
    w_LD: Tensor,
    rows_S: Tensor | None,
    inverse_w_S: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """grad[slot] += grad_cos (x / |x| - cos w / |w|) for every label of this rank, in place.

    Args:
        grad_SD: fp32, contiguous, with respect to the unit rows. Added to.
        order: `label_order(slot, own)`.
        grad_cos_bl, cos_bl: fp32, d loss / d target cosine, and that cosine.
        x_bD, w_LD: contiguous, rows of any length; x is fp32, w also fp16 or bf16.
        rows_S: int64, the row of w_LD of each slot; None: all rows, S = L.
        inverse_x_b, inverse_w_S: fp32, 1 / length; 0 for a zero row.
        tile: None: `tile_of_row(D)`.

    Returns:
        grad_SD.
    """
    check_matrix("grad", grad_SD, (torch.float32,))
    num_slots, width = grad_SD.shape
    samples, labels = len(x_bD), grad_cos_bl.shape[-1]
    inverse_x, inverse_w = check_label_terms(
        grad_SD, samples, num_slots, grad_cos_bl, cos_bl, x_bD, inverse_x_b, w_LD, rows_S, inverse_w_S
    )
    for name, index in (("order.key", order.key), ("order.entry", order.entry)):
        check_column(name, index, samples * labels, torch.int64, grad_SD)
    launch(
        add_labels_kernel, samples * labels, tile or tile_of_row(width),
        grad_SD, *order, grad_cos_bl, cos_bl, x_bD, inverse_x, w_LD, w_LD if rows_S is None else rows_S, inverse_w,
        samples * labels, num_slots, D=width, LABELS=labels, HAS_ROWS=rows_S is not None,
    )  # fmt: skip
    return grad_SD
