"""The labels' part of the gradient of w: a sparse sum into the sampled rows, in an order that is always the same.

Legend: b samples, l labels per sample, n = b l, D width, L rows of the weight in memory, S rows of this step.

Labels are sorted by slot, stably. The program of the first entry of a slot adds all entries of it, one after the other;
the other programs end at once. So no two write one row, nobody needs to know how many classes there are, and the sum of a
class has the order of the samples.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import Tile, check_column, check_matrix, check_pulls, columns, launch, tile_of


class LabelOrder(NamedTuple):
    """Labels by slot, see `label_order`."""

    slot: Tensor  # [n] int64 ascending; 2^62 for labels of other ranks
    entry: Tensor  # [n] int64, which of the [b, l] it was


def tile_of_row(width: int) -> Tile:
    """One row, eight elements or more per thread: most classes have one label, and its program is short."""
    block = tile_of(width).block
    return Tile(1, block, min(4, max(1, block // 256)))


def label_order(slot_bl: Tensor, own_bl: Tensor) -> LabelOrder:
    """Sorted once per chunk, for the student's and the teacher's sum. No host synchronisation."""
    found = torch.sort(slot_bl.masked_fill(~own_bl, 1 << 62).reshape(-1), stable=True)
    return LabelOrder(found.values, found.indices)


@triton.jit(do_not_specialize=["num_entries", "num_slots"])
def add_labels_kernel(
    grad_ptr,  # [S, D] fp32, in and out
    order_slot_ptr,  # [n] int64
    order_entry_ptr,  # [n] int64
    pull_ptr,  # [b, l] fp32
    cos_ptr,  # [b, l] fp32
    x_ptr,  # [b, D] fp32
    inverse_x_ptr,  # [b] fp32
    w_ptr,  # [L, D] fp32
    inverse_w_ptr,  # [S] fp32
    row_ptr,  # [b, l] int64
    num_entries,
    num_slots,
    D: tl.constexpr,
    LABELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0)
    slot = tl.load(order_slot_ptr + first)
    before = tl.load(order_slot_ptr + first - 1, mask=first > 0, other=-1)
    if (slot != before) & (slot < num_slots):
        row = tl.load(row_ptr + tl.load(order_entry_ptr + first))
        inverse_w = tl.load(inverse_w_ptr + slot)
        inside = tl.full((ROWS,), 1, tl.int1)
        for start in range(0, D, BLOCK):
            column, mask = columns(start, inside, D, BLOCK)
            unit = tl.load(w_ptr + row * D + column, mask=mask, other=0.0) * inverse_w
            total = tl.load(grad_ptr + slot * D + column, mask=mask, other=0.0)
            at = first
            here = slot
            while here == slot:
                entry = tl.load(order_entry_ptr + at)
                sample = entry // LABELS
                pull = tl.load(pull_ptr + entry)
                cos = tl.load(cos_ptr + entry)
                x = tl.load(x_ptr + sample * D + column, mask=mask, other=0.0) * tl.load(inverse_x_ptr + sample)
                total += pull * (x - cos * unit)
                at += 1
                here = tl.load(order_slot_ptr + at, mask=at < num_entries, other=-1)
            tl.store(grad_ptr + slot * D + column, total, mask=mask)


def add_labels_(
    grad_SD: Tensor,
    order: LabelOrder,
    pull_bl: Tensor,
    cos_bl: Tensor,
    x_bD: Tensor,
    inverse_x_b: Tensor,
    w_LD: Tensor,
    inverse_w_S: Tensor,
    row_bl: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """grad[slot] += pull (x / |x| - cos w / |w|) for every label of this rank, in place; returned.

    grad_SD      fp32 contiguous, with respect to the unit rows
    order        `label_order(slot, own)`
    pull_bl      fp32, d loss / d target cosine; cos_bl fp32: that cosine. Tangential to w, as in `finish_x_` to x
    x_bD, w_LD   fp32 contiguous, any length; inverse_x_b, inverse_w_S fp32: 1 / length, 0 of a zero row
    row_bl       int64, the row of w_LD of each label of this rank
    tile         None: `tile_of_row(D)`

    Per element of a label 4 bytes are read, per element of a class with labels 8 more, and 4 written. Bitwise repeatable,
    no host synchronisation, not seen by autograd. ValueError for what cannot be used.
    """
    check_matrix("grad", grad_SD, (torch.float32,))
    num_slots, width = grad_SD.shape
    samples, labels = len(x_bD), pull_bl.shape[-1]
    inverse_x, inverse_w = check_pulls(
        grad_SD, samples, num_slots, pull_bl, cos_bl, x_bD, inverse_x_b, w_LD, inverse_w_S, row_bl
    )
    for name, index in (("order.slot", order.slot), ("order.entry", order.entry)):
        check_column(name, index, samples * labels, torch.int64, grad_SD)
    launch(
        add_labels_kernel, samples * labels, tile or tile_of_row(width),
        grad_SD, *order, pull_bl, cos_bl, x_bD, inverse_x, w_LD, inverse_w, row_bl, samples * labels, num_slots,
        D=width, LABELS=labels,
    )  # fmt: skip
    return grad_SD
