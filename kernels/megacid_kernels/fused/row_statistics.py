"""What both ways to the matrix of exponentials share: which entries count, the row statistics, and their sum.

Legend: b samples, S rows of w on this rank, l labels per sample, T tiles of columns.

With cosines c_j of a sample, z_j = scale c_j (+ bias_j) and a fixed shift:

    E_j = exp(z_j - shift);  0 where j is one of the sample's labels or taken out by the filter

Every tile of columns leaves its row sums in [T, b]; one more kernel adds them in the order of T. So there are no atomics,
and the bits depend on the width of a tile alone: not on the number of samples, nor on when a program ran.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import Tile, check_column, check_matrix, launch

LOG2E = math.log2(math.e)
_PITCH = 16  # columns: rows of 16-bit numbers start at multiples of 32 bytes, and Triton knows it of their stride
REDUCTION_TILE = Tile(rows=32, block=64, warps=4)


class Exponentials(NamedTuple):
    """What the negatives of every sample are."""

    matrix: Tensor | None  # [b, S] exp(z - shift), rows `pitch(S)` apart; see who made it for its dtype
    sums: Tensor  # [b] fp32, of the fp32 exponentials
    largest: Tensor | None  # [b] fp32, largest z / scale of a negative that counts, -inf without any
    removed: Tensor  # [b] int64, negatives that the filter took out; 0 without a threshold
    hidden: Tensor | None  # [b, S] bool, which they are; None without a threshold


def pitch(columns: int) -> int:
    """Distance of the rows of a [b, S] matrix in elements such that all of them can be moved 128 bits at a time."""
    return triton.cdiv(columns, _PITCH) * _PITCH


def pitched(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty [rows, columns] whose rows are `pitch(columns)` apart."""
    return torch.empty(rows, pitch(columns), dtype=dtype, device=device)[:, :columns]


@triton.jit
def _label(slot_ptr, own_ptr, sample, inside, label, LABELS: tl.constexpr):
    """Slot of this label of every sample, [ROWS]; -1 where another rank owns it."""
    own = tl.load(own_ptr + sample * LABELS + label, mask=inside, other=0) != 0
    return tl.load(slot_ptr + sample * LABELS + label, mask=own, other=-1)


@triton.jit
def count_labels(slot_ptr, own_ptr, sample, inside, first, last, LABELS: tl.constexpr):
    """How many labels of these samples are in columns `first` to `last`. Where classes are many hardly any tile holds one,
    and its comparisons, twice as much work as its exponentials, can be left out. Asked before a tile is made: the answer
    then is there in time."""
    hits = 0
    for label in range(LABELS):
        slot = _label(slot_ptr, own_ptr, sample, inside, label, LABELS)
        hits += tl.sum(((slot >= first) & (slot < last)).to(tl.int32), axis=0)
    return hits


@triton.jit
def without_labels(cos, slot_ptr, own_ptr, sample, inside, column, LABELS: tl.constexpr):
    """cos [ROWS, BLOCK] with -inf at each sample's own labels."""
    for label in range(LABELS):
        slot = _label(slot_ptr, own_ptr, sample, inside, label, LABELS).to(tl.int32)
        cos = tl.where(column == slot[:, None], float("-inf"), cos)
    return cos


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def reduce_tiles_kernel(
    sums_part_ptr,  # [T, b] fp32
    largest_part_ptr,  # [T, b] fp32, or anything with LARGEST = False
    removed_part_ptr,  # [T, b] int32, or anything with FILTER = False
    sums_ptr,  # [b] fp32 out
    largest_ptr,  # [b] fp32 out, or anything with LARGEST = False
    removed_ptr,  # [b] int64 out, or anything with FILTER = False
    num_tiles,
    num_rows,
    scale_log2,
    shift_log2,
    LARGEST: tl.constexpr,
    FILTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :]
    tile = tl.arange(0, BLOCK)[:, None]
    sums = tl.zeros((BLOCK, ROWS), tl.float32)
    largest = tl.full((BLOCK, ROWS), float("-inf"), tl.float32)
    removed = tl.zeros((BLOCK, ROWS), tl.int32)
    start = 0
    while start < num_tiles:  # not `range`: older interpreters cannot take a bound that they read from an argument
        at = (start + tile).to(tl.int64) * num_rows + row
        mask = (start + tile < num_tiles) & (row < num_rows)
        sums += tl.load(sums_part_ptr + at, mask=mask, other=0.0)
        if LARGEST:
            largest = tl.maximum(largest, tl.load(largest_part_ptr + at, mask=mask, other=float("-inf")))
        if FILTER:
            removed += tl.load(removed_part_ptr + at, mask=mask, other=0)
        start += BLOCK
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(sums_ptr + out, tl.sum(sums, axis=0), mask=out < num_rows)
    if LARGEST:
        found = tl.max(largest, axis=0)
        if HAS_BIAS:  # the tiles hold exponents of two then
            found = (found + shift_log2) / scale_log2
        tl.store(largest_ptr + out, found, mask=out < num_rows)
    if FILTER:
        tl.store(removed_ptr + out, tl.sum(removed, axis=0).to(tl.int64), mask=out < num_rows)


@dataclass(frozen=True)
class NegativeMask:
    """What of a row counts and what is to be found out: the checked arguments that both ways have."""

    scale: float
    shift: float
    labels: int
    slot: Tensor  # [b, l] int64
    own: Tensor  # [b, l] uint8
    bias: Tensor | None
    threshold: float | None
    given: Tensor | None  # [b, S] uint8, hidden by whoever calls
    largest: bool

    @property
    def scale_log2(self) -> float:
        return self.scale * LOG2E

    @property
    def shift_log2(self) -> float:
        return self.shift * LOG2E

    @property
    def constants(self) -> dict[str, bool | int]:
        return {
            "LABELS": self.labels,
            "HAS_BIAS": self.bias is not None,
            "FILTER": self.threshold is not None,
            "HAS_HIDDEN": self.given is not None,
            "LARGEST": self.largest,
        }

    def result(self, matrix: Tensor | None, samples: int, columns: int, like: Tensor) -> Exponentials:
        """With row statistics as they are of no column at all."""
        return Exponentials(
            matrix,
            torch.zeros(samples, device=like.device),
            torch.full((samples,), -torch.inf, device=like.device) if self.largest else None,
            torch.zeros(samples, dtype=torch.int64, device=like.device),
            pitched(samples, columns, torch.bool, like.device) if self.threshold is not None else None,
        )

    def parts(self, tiles: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where tiles leave the sums, the largest and the number of removed: [T, b]. Of what is not wanted, anything."""
        sums = torch.empty(tiles, samples, device=self.slot.device)
        largest = torch.empty_like(sums) if self.largest else sums
        return sums, largest, torch.empty_like(sums, dtype=torch.int32) if self.threshold is not None else sums

    def reduce(self, parts: tuple[Tensor, Tensor, Tensor], result: Exponentials, rows: slice) -> None:
        """Over tiles, into these rows of the result."""
        tiles, samples = parts[0].shape
        largest = result.sums if result.largest is None else result.largest
        launch(
            reduce_tiles_kernel, samples, REDUCTION_TILE,
            *parts, result.sums[rows], largest[rows], result.removed[rows], tiles, samples, self.scale_log2, self.shift_log2,
            LARGEST=self.largest, FILTER=self.threshold is not None, HAS_BIAS=self.bias is not None,
        )  # fmt: skip


def counting(
    like: Tensor,
    shape: tuple[int, int],
    slot_bl: Tensor,
    own_bl: Tensor,
    *,
    scale: float,
    shift: float,
    bias_S: Tensor | None,
    threshold: float | None,
    hidden_bS: Tensor | None,
    largest: bool,
) -> NegativeMask:
    """Checked; shape = (b, S). ValueError for what cannot be used."""
    samples, columns = shape
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}, expected a finite number > 0 such as 64")
    if not math.isfinite(shift):
        raise ValueError(f"shift is {shift}, expected a finite number: `LossSpec.shift` says which")
    if threshold is not None and hidden_bS is not None:
        raise ValueError("threshold and hidden are both given, expected one: hidden is what a threshold gave before")
    check_matrix("slot", slot_bl, (torch.int64,), (samples, slot_bl.shape[-1]), like)
    check_matrix("own", own_bl, (torch.bool,), tuple(slot_bl.shape), like)
    bias = check_column("bias", bias_S, columns, torch.float32, like) if bias_S is not None else None
    if hidden_bS is not None:
        check_pitched("hidden", hidden_bS, (torch.bool,), shape, like)
        # Rows are read up to their stride: masks then are of whole words.
        if hidden_bS.storage_offset() + samples * hidden_bS.stride(0) > hidden_bS.untyped_storage().nbytes():
            raise ValueError(
                f"hidden has strides {hidden_bS.stride()} and ends in its last row, expected it as it was given"
            )
    return NegativeMask(
        scale,
        shift,
        slot_bl.shape[1],
        slot_bl,
        own_bl.view(torch.uint8),
        bias,
        threshold,
        hidden_bS.view(torch.uint8) if hidden_bS is not None else None,
        largest,
    )


def check_pitched(
    name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int] | None, like: Tensor
) -> None:
    """ValueError unless x is a matrix of one of `dtypes` whose rows do not overlap and have no holes."""
    if x.ndim != 2 or (shape is not None and tuple(x.shape) != shape):
        raise ValueError(f"{name} is {list(x.shape)}, expected {'[b, S]' if shape is None else list(shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}, expected {' or '.join(map(str, dtypes))}")
    if x.numel() and (x.stride(1) != 1 or (len(x) > 1 and x.stride(0) < x.shape[1])):
        raise ValueError(f"{name} has strides {x.stride()} for shape {list(x.shape)}, expected one row after the other")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device} like the other tensors")
