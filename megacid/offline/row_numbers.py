"""Row numbers of n samples: in the smallest type, and compared in blocks, so that no int64 [n] is made.

Legend: n samples with an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_ROWS = 1 << 20


def row_dtype(n: int) -> np.dtype:
    """The type of row numbers below n."""
    return np.dtype(np.int32 if n <= 1 << 31 else np.int64)


def all_rows(n: int) -> np.ndarray:
    """0 .. n - 1: every row is its own representative."""
    return np.arange(n, dtype=row_dtype(n))


def row_blocks(low: int, high: int) -> Iterator[slice]:
    """The rows [low, high) in blocks."""
    for start in range(low, high, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, high))


def is_own(representative: np.ndarray) -> np.ndarray:
    """bool [n]: rows that are their own representative (int [n])."""
    own = np.empty(len(representative), bool)
    for block in row_blocks(0, len(own)):
        np.equal(representative[block], np.arange(block.start, block.stop), out=own[block])
    return own


def removed_rows(representative: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows that are not their own representative (int [n]), ascending, int64; their representatives), in blocks."""
    for block in row_blocks(0, len(representative)):
        rows = np.flatnonzero(representative[block] != np.arange(block.start, block.stop)) + block.start
        yield rows, representative[rows]


def members_of(representative: np.ndarray, low: int, high: int) -> np.ndarray:
    """The rows other than itself whose representative (int [n]) is in [low, high), ascending, in `row_dtype`."""
    dtype = row_dtype(len(representative))
    parts = [np.empty(0, dtype)]
    for rows, own in removed_rows(representative):
        parts.append(rows[(own >= low) & (own < high)].astype(dtype))
    return np.concatenate(parts)
