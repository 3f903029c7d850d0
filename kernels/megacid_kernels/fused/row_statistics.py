"""Shared by both kernels that make exponentials: which entries count, the row statistics, and their reduction.

Legend: b samples, S rows of w on this rank, l labels per sample, T column tiles.

With cosines c_j of a sample, z_j = scale c_j (+ bias_j) and a fixed shift:

    E_j = exp(z_j - shift);  0 where j is one of the sample's labels, is hidden by the caller or removed by the filter

Every column tile writes the statistics of its rows into partials [T, b]; `reduce_tiles_kernel` (one program per 32
samples and 1024 tiles) reduces them to [T / 1024, b], and again until one is left. There are no atomics, and the bits
depend on the width of a tile only: not on the number of samples, nor on the order in which programs run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import Tile, block_columns, check_column, check_matrix, launch, tile_of

LOG2E = math.log2(math.e)
# Columns: 16-bit rows then start at multiples of 32 bytes, and Triton sees that of their stride. cuBLAS is much
# slower where the number of rows or columns is no multiple of 8.
_PITCH = 16
REDUCTION_TILE = Tile(rows=32, block=64, warps=4)
REDUCED_TILES = 1024  # by one program: ten million classes give enough programs for a GPU


class Exponentials(NamedTuple):
    """Exponentials of the negatives and their row statistics."""

    matrix: Tensor | None  # [b, S] exp(z - shift), rows `pitch(S)` apart; fp32, or bf16 from 16-bit inputs
    sums: Tensor  # [b] fp32, sums of the exponentials before they are rounded to the matrix's dtype
    largest: Tensor | None  # [b] fp32, largest z / scale of a negative that counts, -inf without any
    removed: Tensor | None  # [b] int64, how many negatives the filter removed; None without a threshold
    hidden: Tensor | None  # [b, S] bool, which negatives it removed; None without a threshold


def pitch(columns: int) -> int:
    """Row stride, in elements, at which every row of `columns` can be moved 128 bits at a time."""
    return triton.cdiv(columns, _PITCH) * _PITCH


def pitched(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty [rows, columns] whose rows are `pitch(columns)` apart."""
    return torch.empty(rows, pitch(columns), dtype=dtype, device=device)[:, :columns]


def with_padding(matrix_bS: Tensor) -> Tensor:
    """A `pitched` matrix with the columns up to its pitch."""
    return matrix_bS.as_strided((len(matrix_bS), pitch(matrix_bS.shape[1])), matrix_bS.stride())


@triton.jit
def _label(slot_ptr, own_ptr, sample, inside, label, LABELS: tl.constexpr):
    """Slot of this label of every sample, [ROWS]; -1 where its class is on another rank."""
    own = tl.load(own_ptr + sample * LABELS + label, mask=inside, other=0) != 0
    return tl.load(slot_ptr + sample * LABELS + label, mask=own, other=-1)


@triton.jit
def count_labels(slot_ptr, own_ptr, sample, inside, first, last, LABELS: tl.constexpr):
    """How many labels of these samples lie in columns `first` to `last`. With many classes hardly any tile holds one,
    and the comparisons, twice the work of the exponentials, can be skipped. Call it before the product:
    the loads overlap."""
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
    sums_partial_ptr,  # [T, b] fp32
    largest_partial_ptr,  # [T, b] fp32, unused unless LARGEST
    removed_partial_ptr,  # [T, b] int32, unused unless FILTER
    sums_ptr,  # [T / TILES, b] fp32 out
    largest_ptr,  # [T / TILES, b] fp32 out, unused unless LARGEST
    removed_ptr,  # [T / TILES, b] int32 out, int64 if LAST, unused unless FILTER
    num_tiles,
    num_rows,
    scale_log2,
    shift_log2,
    LARGEST: tl.constexpr,
    FILTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LAST: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_blocks = tl.cdiv(num_rows, ROWS)
    part = tl.program_id(0) // row_blocks
    one = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    row = one[None, :]
    tile = tl.arange(0, BLOCK)[:, None]
    sums = tl.zeros((BLOCK, ROWS), tl.float32)
    largest = tl.full((BLOCK, ROWS), float("-inf"), tl.float32)
    removed = tl.zeros((BLOCK, ROWS), tl.int32)
    start = part * TILES
    stop = tl.minimum(start + TILES, num_tiles)
    while start < stop:  # not `range`: older interpreters accept no runtime bound
        at = (start + tile).to(tl.int64) * num_rows + row
        mask = (start + tile < stop) & (row < num_rows)
        sums += tl.load(sums_partial_ptr + at, mask=mask, other=0.0)
        if LARGEST:
            largest = tl.maximum(largest, tl.load(largest_partial_ptr + at, mask=mask, other=float("-inf")))
        if FILTER:
            removed += tl.load(removed_partial_ptr + at, mask=mask, other=0)
        start += BLOCK
    out = part.to(tl.int64) * num_rows + one
    tl.store(sums_ptr + out, tl.sum(sums, axis=0), mask=one < num_rows)
    if LARGEST:
        largest_row = tl.max(largest, axis=0)
        if HAS_BIAS and LAST:  # the partials are exponents of two, not cosines
            largest_row = (largest_row + shift_log2) / scale_log2
        tl.store(largest_ptr + out, largest_row, mask=one < num_rows)
    if FILTER:
        count = tl.sum(removed, axis=0).to(removed_ptr.dtype.element_ty)
        tl.store(removed_ptr + out, count, mask=one < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def difference_along_kernel(
    a_ptr,  # [b, D] fp32, as the next two
    b_ptr,
    c_ptr,
    out_ptr,  # [b] fp32 out
    num_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, inside, D, BLOCK)
        at = row[:, None] * D + column
        difference = tl.load(a_ptr + at, mask=mask, other=0.0) - tl.load(b_ptr + at, mask=mask, other=0.0)
        total += difference * tl.load(c_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + row, tl.sum(total, axis=1), mask=inside)


def difference_along(a_bD: Tensor, b_bD: Tensor, c_bD: Tensor, *, tile: Tile | None = None) -> Tensor:
    """(a - b) . c of every row, fp32 [b]; all fp32 [b, D], contiguous. tile: None: `tile_of(D)`."""
    shape = (len(a_bD), a_bD.shape[-1])
    for name, x in (("a", a_bD), ("b", b_bD), ("c", c_bD)):
        check_matrix(name, x, (torch.float32,), shape, a_bD)
    out = torch.empty(shape[0], device=a_bD.device)
    launch(difference_along_kernel, shape[0], tile or tile_of(shape[1]), a_bD, b_bD, c_bD, out, shape[0], D=shape[1])
    return out


@dataclass(frozen=True)
class ExponentialsSpec:
    """The checked arguments that `exponentials` and `exponentials_` share."""

    scale: float
    shift: float
    labels: int
    slot: Tensor  # [b, l] int64
    own: Tensor  # [b, l] uint8
    bias: Tensor | None
    threshold: float | None
    hidden: Tensor | None  # [b, S] uint8, negatives that the caller hides
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
            "HAS_HIDDEN": self.hidden is not None,
            "LARGEST": self.largest,
        }

    def result(self, matrix: Tensor | None, samples: int, columns: int, like: Tensor) -> Exponentials:
        """Exponentials whose row statistics `reduce` fills; without columns, those of none."""

        def rows(fill: float, dtype: torch.dtype = torch.float32) -> Tensor:
            empty = torch.empty(samples, dtype=dtype, device=like.device)
            return empty if columns else empty.fill_(fill)

        return Exponentials(
            matrix,
            rows(0),
            rows(-math.inf) if self.largest else None,
            rows(0, torch.int64) if self.threshold is not None else None,
            pitched(samples, columns, torch.bool, like.device) if self.threshold is not None else None,
        )

    def partials(self, tiles: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Empty [T, b] of sums, of the largest, of the number removed; the sums again where the spec needs no such."""
        sums = torch.empty(tiles, samples, device=self.slot.device)
        largest = torch.empty_like(sums) if self.largest else sums
        return sums, largest, torch.empty_like(sums, dtype=torch.int32) if self.threshold is not None else sums

    def reduce(self, partials: tuple[Tensor, Tensor, Tensor], result: Exponentials, rows: slice) -> None:
        """Reduce the partials over the tiles into these rows of the result."""
        tiles, samples = partials[0].shape
        while tiles > REDUCED_TILES:
            fewer = self.partials(triton.cdiv(tiles, REDUCED_TILES), samples)
            self._reduce(partials, fewer, last=False)
            partials, tiles = fewer, len(fewer[0])
        sums, largest, removed = (
            result.sums if x is None else x for x in (result.sums, result.largest, result.removed)
        )
        self._reduce(partials, (sums[rows], largest[rows], removed[rows]), last=True)

    def _reduce(self, partials: tuple[Tensor, Tensor, Tensor], out: tuple[Tensor, Tensor, Tensor], last: bool) -> None:
        tiles, samples = partials[0].shape
        row_blocks, parts = triton.cdiv(samples, REDUCTION_TILE.rows), triton.cdiv(tiles, REDUCED_TILES)
        launch(
            reduce_tiles_kernel, row_blocks * parts * REDUCTION_TILE.rows, REDUCTION_TILE,
            *partials, *out, tiles, samples, self.scale_log2, self.shift_log2,
            LARGEST=self.largest, FILTER=self.threshold is not None, HAS_BIAS=self.bias is not None, LAST=last,
            TILES=REDUCED_TILES,
        )  # fmt: skip


def exponentials_spec(
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
) -> ExponentialsSpec:
    """Check the arguments for a matrix of `shape` = (b, S). Raises ValueError."""
    samples, columns = shape
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}, expected a finite number > 0 such as 64")
    if not math.isfinite(shift):
        raise ValueError(f"shift is {shift}, expected a finite number such as `LossSpec.shift()`")
    if threshold is not None and hidden_bS is not None:
        raise ValueError(
            "threshold and hidden are both given, expected one: hidden is the result of an earlier threshold"
        )
    check_matrix("slot", slot_bl, (torch.int64,), (samples, slot_bl.shape[-1]), like)
    check_matrix("own", own_bl, (torch.bool,), tuple(slot_bl.shape), like)
    bias = check_column("bias", bias_S, columns, torch.float32, like) if bias_S is not None else None
    if hidden_bS is not None:
        check_pitched("hidden", hidden_bS, (torch.bool,), shape, like)
        # Kernels read rows up to their stride, which keeps masks to whole words.
        if hidden_bS.storage_offset() + samples * hidden_bS.stride(0) > hidden_bS.untyped_storage().nbytes():
            raise ValueError(
                f"hidden has strides {hidden_bS.stride()} and ends in its last row, expected the `hidden` of a result"
            )
    return ExponentialsSpec(
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
    """Raises ValueError unless x is a matrix of one of `dtypes` with contiguous rows that do not overlap."""
    if x.ndim != 2 or (shape is not None and tuple(x.shape) != shape):
        raise ValueError(f"{name} is {list(x.shape)}, expected {'[b, S]' if shape is None else list(shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}, expected {' or '.join(map(str, dtypes))}")
    if x.numel() and (x.stride(1) != 1 or (len(x) > 1 and x.stride(0) < x.shape[1])):
        raise ValueError(f"{name} has strides {x.stride()} for shape {list(x.shape)}, expected contiguous rows")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device} like the other tensors")
