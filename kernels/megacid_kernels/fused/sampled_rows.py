"""The class rows of a sampled step: a shard's drawn classes and labels of the batch, merged without a sort.

Legend: n sorted labels of the global batch, C classes of all shards, S rows of this shard.

The draw takes one class from each stratum of the rotated classes by a hash of the stratum's number (see `Strata`), so
numbers alone tell which class a stratum draws and whether a class is drawn. The place of a row in the sorted result is
then the sum of two counts: drawn classes before it, by arithmetic, and other labels before it, by a prefix sum.

`count_labels_kernel`: one program per 256 labels. `merge_rows_kernel`: one program per 256 drawn classes and labels; a
drawn class searches the sorted labels.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.hashing import hashed
from megacid_kernels.fused.launch import Tile, first_not_less, launch

SAMPLED_TILE = Tile(rows=256, block=1, warps=4)
_DRAW = ["num_classes", "num_strata", "offset", "key"]


class Strata(NamedTuple):
    """A draw of one class from each of `num_strata` strata, on the classes [start, stop) of a shard.

    Class c has the position (c - offset) % num_classes. Stratum i has the positions from low = i * C // num_strata to
    (i + 1) * C // num_strata, and draws the position low + hash % size.
    """

    num_classes: int
    num_strata: int
    offset: int
    key: int  # signed, 64 bits
    start: int
    stop: int
    low: range  # strata whose drawn class is in the shard and below the offset: these classes have the last positions
    high: range  # and those whose drawn class is not below the offset

    @property
    def drawn(self) -> int:
        """Classes of the shard that the draw takes."""
        return len(self.low) + len(self.high)


@triton.jit
def _drawn_position(stratum, num_classes, num_strata, key):
    low = stratum * num_classes // num_strata
    size = (stratum + 1) * num_classes // num_strata - low
    return low + hashed(stratum, key) % size


@triton.jit
def _place_of(label, num_classes, num_strata, offset, key):
    """(stratum of a class, its position, the position that the stratum draws)"""
    position = label - offset
    position = tl.where(position < 0, position + num_classes, position)
    stratum = ((position + 1) * num_strata - 1) // num_classes
    return stratum, position, _drawn_position(stratum, num_classes, num_strata, key)


@triton.jit(do_not_specialize=["num_labels", "start", "stop", *_DRAW])
def count_labels_kernel(
    labels_ptr,  # [n] int64, sorted
    flags_ptr,  # [2, n + 1] uint8 out: behind a zero, whether a label is the first of equal ones, and is not drawn
    num_labels,
    start,
    stop,
    num_classes,
    num_strata,
    offset,
    key,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_classes, num_strata = num_classes.to(tl.int64), num_strata.to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < num_labels
    label = tl.load(labels_ptr + at, mask=inside, other=-1)
    previous = tl.load(labels_ptr + at - 1, mask=inside & (at > 0), other=-1)
    first = inside & (label >= 0) & (label != previous)
    here = first & (label >= start) & (label < stop)
    safe = tl.where(here, label, start)
    _, position, drawn = _place_of(safe, num_classes, num_strata, offset, key.to(tl.int64))
    tl.store(flags_ptr + 1 + at, first.to(tl.uint8), mask=inside)
    tl.store(flags_ptr + num_labels + 2 + at, (here & (drawn != position)).to(tl.uint8), mask=inside)
    tl.store(flags_ptr + at, tl.zeros((ROWS,), tl.uint8), mask=at == 0)
    tl.store(flags_ptr + num_labels + 1 + at, tl.zeros((ROWS,), tl.uint8), mask=at == 0)


@triton.jit(do_not_specialize=["num_labels", "start", "low_first", "num_low", "high_first", "num_drawn", *_DRAW])
def merge_rows_kernel(
    labels_ptr,  # [n] int64, sorted
    before_ptr,  # [n + 1] int64: labels of this shard that are not drawn, before each label and in all
    rows_ptr,  # [S] int64 out
    positive_ptr,  # [S] uint8 out
    num_labels,
    start,
    low_first,
    num_low,
    high_first,
    num_drawn,
    num_classes,
    num_strata,
    offset,
    key,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_classes, num_strata, key = num_classes.to(tl.int64), num_strata.to(tl.int64), key.to(tl.int64)
    item = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)

    # A drawn class stands behind the drawn classes before it and the other labels before it.
    is_drawn = item < num_drawn
    stratum = tl.where(item < num_low, low_first + item, high_first + item - num_low)
    stratum = tl.where(is_drawn, stratum, 0)
    drawn_class = (_drawn_position(stratum, num_classes, num_strata, key) + offset) % num_classes
    slot = first_not_less(labels_ptr, num_labels, drawn_class, is_drawn, ROWS)
    is_label = is_drawn & (slot < num_labels)
    is_label = is_label & (tl.load(labels_ptr + slot, mask=is_label, other=-1) == drawn_class)
    place = item + tl.load(before_ptr + slot, mask=is_drawn, other=0)
    tl.store(rows_ptr + place, drawn_class - start, mask=is_drawn)
    tl.store(positive_ptr + place, is_label.to(tl.uint8), mask=is_drawn)

    # Another label stands behind the other labels before it and the drawn classes before it.
    at = item - num_drawn
    inside = (at >= 0) & (at < num_labels)
    others = tl.load(before_ptr + at, mask=inside, other=0)
    is_other = inside & (tl.load(before_ptr + at + 1, mask=inside, other=0) > others)
    label = tl.load(labels_ptr + at, mask=is_other, other=0)
    label = tl.where(is_other, label, start)
    stratum, position, drawn = _place_of(label, num_classes, num_strata, offset, key)
    earlier = tl.where(label < offset, stratum - low_first, num_low + stratum - high_first)
    place = others + earlier + (drawn < position).to(tl.int64)
    tl.store(rows_ptr + place, label - start, mask=is_other)
    tl.store(positive_ptr + place, tl.full((ROWS,), 1, tl.uint8), mask=is_other)


def count_labels(labels_n: Tensor, strata: Strata) -> Tensor:
    """int64 [2, n + 1]: distinct labels before each label and in all; those of the shard that are not drawn.

    Args:
        labels_n: int64, sorted global class ids, negative for no label. Ids out of range are counted as distinct
            labels and belong to no shard.
    """
    flags = torch.empty(2, len(labels_n) + 1, dtype=torch.uint8, device=labels_n.device)
    # Without labels there are zeros to write as well.
    launch(
        count_labels_kernel, max(1, len(labels_n)), SAMPLED_TILE, labels_n, flags, len(labels_n), strata.start,
        strata.stop, *strata[:4],
    )  # fmt: skip
    return flags.cumsum(1)


def merge_rows_(rows: Tensor, positive: Tensor, labels_n: Tensor, not_drawn_before: Tensor, strata: Strata) -> None:
    """Write the shard's drawn classes and labels as local ids, sorted and unique, and which of them are labels.

    Args:
        rows: int64, at least [S] with S = strata.drawn + not_drawn_before[-1]; the rest stays as it is.
        positive: bool [S].
        labels_n: as in `count_labels`.
        not_drawn_before: int64 [n + 1], the second row of `count_labels`.
    """
    launch(
        merge_rows_kernel, strata.drawn + len(labels_n), SAMPLED_TILE, labels_n, not_drawn_before, rows,
        positive.view(torch.uint8), len(labels_n), strata.start, strata.low.start, len(strata.low), strata.high.start,
        strata.drawn, *strata[:4],
    )  # fmt: skip
