"""Hashes of ids, as `megacid.classifier.sampling.hash_ids` makes them of PyTorch's operators, in one launch.

Legend: S rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import Tile, check_column, check_rows, launch

HASH_TILE = Tile(rows=256, block=1, warps=4)


@triton.jit
def _mix(x):
    # The finaliser of splitmix64. Its logical shifts are arithmetic ones with the sign bits masked off.
    x = x ^ ((x >> 30) & 0x3FFFFFFFF)
    x = x * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = x ^ ((x >> 27) & 0x1FFFFFFFFF)
    x = x * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def hashed(ids, key):
    """Uniform in [0, 2^62) per int64 id."""
    return _mix(_mix(ids * -7046029254386353131 + key)) & 0x3FFFFFFFFFFFFFFF  # 0x9E3779B97F4A7C15


@triton.jit(do_not_specialize=["num_rows", "class_start", "row_key", "update_key"])
def rounding_keys_kernel(
    rows_ptr,  # [S] int64
    updates_ptr,  # [S] int32
    keys_ptr,  # [S] int32 out
    num_rows,
    class_start,
    row_key,
    update_key,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < num_rows
    ids = tl.load(rows_ptr + at, mask=inside, other=0) + class_start
    updates = tl.load(updates_ptr + at, mask=inside, other=0).to(tl.int64)
    key = hashed(hashed(ids, row_key.to(tl.int64)) + updates, update_key.to(tl.int64))
    tl.store(keys_ptr + at, (key & 0x7FFFFFFF).to(tl.int32), mask=inside)


def rounding_row_keys(rows_S: Tensor, updates_S: Tensor, class_start: int, keys: tuple[int, int]) -> Tensor:
    """int32 [S, 1]: the row keys of `megacid.classifier.row_state.rounding_keys`.

    Args:
        rows_S: int64 local ids.
        updates_S: int32 update counts.
        class_start: global id of the first local row.
        keys: of the two hashes, signed, 64 bits.
    """
    count = check_rows(rows_S, 0, rows_S)
    check_column("updates", updates_S, count, torch.int32, rows_S)
    result = torch.empty(count, 1, dtype=torch.int32, device=rows_S.device)
    launch(rounding_keys_kernel, count, HASH_TILE, rows_S, updates_S, result, count, class_start, *keys)
    return result
