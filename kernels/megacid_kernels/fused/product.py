"""The matrix product inside `exponentials` and `nearest`: a tile of x . w in registers.

Legend: b rows of x, S rows of w, D width. A program makes tiles of [ROWS, BLOCK] dot products, DEPTH columns per
iteration. The sum over D is in the order of the iterations, so its bits depend on DEPTH.

The factors are read through pointers, or through tensor descriptors (sm_90 and later): the tensor memory accelerator
then copies whole tiles, computes the addresses and fills what lies outside with zeros, which saves the registers and
the instructions of a thread's own copies. A descriptor needs rows of a multiple of 16 bytes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megacid_kernels.fused.launch import Tile, check_matrix

PRODUCT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WARPS_AT_ONCE = 8  # on a multiprocessor, with 255 registers per thread


@dataclass(frozen=True)
class ProductTile:
    """Tile of a product: `rows` rows of x times `columns` rows of w, `depth` of the width per iteration.

    The loop is pipelined in `stages` by `warps` warps. `group` row tiles run before the next columns, so what they read
    of w stays in the L2 cache. All but `stages` and `group` are powers of two; `rows`, `columns` and `depth` are at
    least 16, the smallest product of a tensor core. `descriptors`: read through tensor descriptors, on sm_90 or later,
    where the rows allow it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    descriptors: bool = False

    def __post_init__(self):
        for name in ("rows", "columns", "depth"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name} of a tile is {value}, expected a power of two >= 16")
        for name in ("stages", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a tile is {getattr(self, name)}, expected at least 1")
        _ = self.launch_tile  # checks the warps

    @property
    def launch_tile(self) -> Tile:
        return Tile(self.rows, self.columns, self.warps)

    def factors(self, x_bD: Tensor, w_SD: Tensor) -> tuple[bool, Any, Any]:
        """(whether they are tensor descriptors, x, w) as a kernel takes them."""
        if not (self.descriptors and _fits_descriptor(x_bD) and _fits_descriptor(w_SD)):
            return False, x_bD, w_SD
        x, w = ((x_bD, self.rows), (w_SD, self.columns))
        return True, *(TensorDescriptor.from_tensor(rows, [length, self.depth]) for rows, length in (x, w))

    def programs(self, tiles: int, device: torch.device) -> int:
        """Programs for `tiles` tiles with descriptors: as many as run at once, each of which makes several tiles."""
        resident = max(1, _WARPS_AT_ONCE // self.warps)
        return min(tiles, resident * _multiprocessors(device))

    def with_room_for_masks(self) -> "ProductTile":
        """Half the columns: a mask next to the products would not fit the registers."""
        return replace(self, columns=max(16, self.columns // 2))

    @property
    def constants(self) -> dict[str, int]:
        """The constants of a product's kernel that are not in the `launch_tile`."""
        return {"DEPTH": self.depth, "GROUP": self.group, "num_stages": self.stages}


def _fits_descriptor(rows: Tensor) -> bool:
    """Whether the tensor memory accelerator can read these rows: their length and their start in units of 16 bytes."""
    return len(rows) > 0 and rows.shape[1] * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def position_of(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a tile by its number: GROUP row tiles with all column tiles, then the next GROUP."""
    per_group = GROUP * column_tiles
    first = tile // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % per_group
    return first + within % height, within // height


@triton.jit
def product(
    x_ptr,  # [b, D] fp16, bf16 or fp32
    w_ptr,  # [S, D] same dtype
    x_row,  # [ROWS] int64
    w_row,  # [BLOCK] int64
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x[x_row] . w[w_row], fp32 [ROWS, BLOCK]. Rows are int64 and must exist: the caller clamps them and masks the
    result, because masks here would cost registers in every iteration. D is constexpr, see `launch.block_columns`."""
    depth = tl.arange(0, DEPTH)
    x_at = x_ptr + x_row[:, None] * D + depth[None, :]
    w_at = w_ptr + w_row[None, :] * D + depth[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, DEPTH):
        if D % DEPTH == 0:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            inside = depth < D - start
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None], other=0.0)
        if INTERPRET:  # its tl.dot multiplies the bit patterns of bf16
            total += tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(x, w, total, input_precision=PRECISION)
        x_at += DEPTH
        w_at += DEPTH
    return total


@triton.jit
def product_of_descriptors(
    x,  # descriptor of [b, D] fp16, bf16 or fp32 in blocks [ROWS, DEPTH]
    w,  # descriptor of [S, D], same dtype, in blocks [BLOCK, DEPTH]
    row,
    column,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x[row :] . w[column :], fp32 [ROWS, BLOCK]; 0 for rows that do not exist."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, DEPTH):
        x_part = x.load([row, start])
        w_part = w.load([column, start])
        if INTERPRET:
            total += tl.dot(x_part.to(tl.float32), w_part.to(tl.float32).T, input_precision="ieee")
        else:
            total = tl.dot(x_part, w_part.T, total, input_precision=PRECISION)
    return total


def check_factors(x_bD: Tensor, w_SD: Tensor, w_name: str = "w") -> None:
    """Raises ValueError unless both are contiguous, of one width, device and dtype of `PRODUCT_DTYPES`."""
    check_matrix("x", x_bD, PRODUCT_DTYPES)
    check_matrix(w_name, w_SD, (x_bD.dtype,), (len(w_SD), x_bD.shape[1]), x_bD)
