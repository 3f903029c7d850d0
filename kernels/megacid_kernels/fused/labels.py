"""Where the classes of a batch's labels are, and what each sample weighs in the loss.

Legend: G gathered batch, l labels per sample, S rows of w on this rank.

`locate_kernel`: one program per 256 samples, which searches the sorted rows for each label. `share_kernel`: one program
per 1024 samples; each counts the labelled samples of the whole batch, 4 bytes per sample, in one order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import Tile, check_matrix, check_rows, first_not_less, launch
from megacid_kernels.targets import BatchLabels, Labels

LOCATE_TILE = Tile(rows=256, block=1, warps=4)
SHARE_TILE = Tile(rows=1024, block=1024, warps=4)


@triton.jit(do_not_specialize=["num_samples", "num_rows", "class_start"])
def locate_kernel(
    target_ptr,  # [G, l] int64
    rows_ptr,  # [S] int64, sorted, or anything with HAS_ROWS = False
    own_ptr,  # [G, l] uint8 out
    slot_ptr,  # [G, l] int64 out
    present_ptr,  # [G, l] uint8 out
    num_labels_ptr,  # [G] fp32 out
    owned_ptr,  # [G] fp32 out
    num_samples,
    num_rows,
    class_start,
    LABELS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = sample < num_samples
    count = tl.zeros((ROWS,), tl.float32)
    owned = tl.zeros((ROWS,), tl.float32)
    for label in range(LABELS):
        at = sample * LABELS + label
        target = tl.load(target_ptr + at, mask=inside, other=-1)
        present = target >= 0
        local = target - class_start
        slot = local
        if HAS_ROWS:
            slot = first_not_less(rows_ptr, num_rows, local, inside, ROWS)
            held = slot < num_rows
            own = present & held & (tl.load(rows_ptr + slot, mask=held, other=-1) == local)
        else:
            own = present & (slot >= 0) & (slot < num_rows)
        count += present.to(tl.float32)
        owned += own.to(tl.float32)
        tl.store(own_ptr + at, own.to(tl.uint8), mask=inside)
        tl.store(slot_ptr + at, tl.where(own, slot, 0), mask=inside)
        tl.store(present_ptr + at, present.to(tl.uint8), mask=inside)
    tl.store(num_labels_ptr + sample, count, mask=inside)
    tl.store(owned_ptr + sample, owned, mask=inside)


@triton.jit(do_not_specialize=["num_samples"])
def share_kernel(
    num_labels_ptr,  # [G] fp32
    share_ptr,  # [G] fp32 out
    sample_weight_ptr,  # [1] fp32 out
    num_samples,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if MEAN:
        labelled = tl.zeros((BLOCK,), tl.float32)
        start = 0
        while start < num_samples:  # not `range`: older interpreters accept no runtime bound
            at = start + tl.arange(0, BLOCK)
            labelled += (tl.load(num_labels_ptr + at, mask=at < num_samples, other=0.0) > 0.0).to(tl.float32)
            start += BLOCK
        weight = tl.div_rn(weight, tl.maximum(tl.sum(labelled, axis=0), 1.0) + tl.zeros((ROWS,), tl.float32))
    lane = tl.arange(0, ROWS)
    sample = tl.program_id(0) * ROWS + lane
    inside = sample < num_samples
    has_label = tl.load(num_labels_ptr + sample, mask=inside, other=0.0) > 0.0
    tl.store(share_ptr + sample, tl.where(has_label, weight, 0.0), mask=inside)
    tl.store(sample_weight_ptr + sample, weight, mask=sample == 0)


def locate_labels(
    target_Gl: Tensor, rows_S: Tensor | None, num_rows: int, class_start: int, *, mean: bool
) -> BatchLabels:
    """Find the labels among this rank's rows; the slot of a label that is not own is 0.

    Args:
        target_Gl: int64, contiguous, global class ids, -1 for no label; no class twice in one sample.
        rows_S: int64, sorted: row j is class class_start + rows[j]; None: rows 0 .. num_rows - 1.
        mean: whether the labelled samples share a weight of 1; False: each weighs 1.
    """
    check_matrix("target", target_Gl, (torch.int64,))
    num_rows = check_rows(rows_S, num_rows, target_Gl)
    samples, device = len(target_Gl), target_Gl.device
    own, present = (torch.empty(target_Gl.shape, dtype=torch.bool, device=device) for _ in range(2))
    slot = torch.empty_like(target_Gl)
    num_labels, owned, share = torch.empty(3, samples, device=device).unbind()
    sample_weight = torch.empty((), device=device)
    launch(
        locate_kernel, samples, LOCATE_TILE,
        target_Gl, target_Gl if rows_S is None else rows_S, own.view(torch.uint8), slot, present.view(torch.uint8),
        num_labels, owned, samples, num_rows, class_start,
        LABELS=target_Gl.shape[1], HAS_ROWS=rows_S is not None,
    )  # fmt: skip
    # An empty batch has a weight as well.
    launch(share_kernel, max(1, samples), SHARE_TILE, num_labels, share, sample_weight, samples, MEAN=mean)
    return BatchLabels(Labels(own, slot), present, num_labels, owned, share, sample_weight)
