"""Which samples of one cluster are the same thing: links below a distance, and who stays for each group.

Legend: m samples of a cluster in order of preference (row 0 is the one to keep first), B rows of a block, P rows of a
panel, D width.

The m x m matrix of a cluster is never made: only B x B blocks of it. A large cluster is not even held: two panels of its
rows are, and are read again when their turn comes. `representative[i]` is the row that is kept for row i; a row that is its own
representative is kept. Representatives always have a smaller number than what they stand for.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megacid.distributed.stopping import Progress, no_progress
from megacid.errors import UserError
from megacid.offline.nearest import prepare
from megacid.offline.rows import Rows

Link = Literal["components", "greedy"]
BLOCK = 1024
PANEL_BYTES = 1 << 29  # of two panels while one of them is made


def cosine_bound(threshold: float) -> float:
    """Unit vectors are nearer than `threshold` exactly when their cosine is above this."""
    return 1.0 - threshold * threshold / 2.0


def panel_rows(dim: int, block: int, budget: int | None = None) -> int:
    """Rows of a panel so that two of them need at most `budget` bytes (None: PANEL_BYTES); whole blocks, at least one."""
    # Both are held in fp32 (8 bytes); the second is read twice in fp16 (4) or fp32 and normalised into a new array (8).
    rows = (PANEL_BYTES if budget is None else budget) // (20 * dim)
    # A product rounds differently when its shape changes: where panels end must not change the blocks.
    return max(rows // block, 1) * block


class UnitRows:
    """The normalised rows of some samples, read from the files when they are asked for.

    numbers: int64 [m], places in `rows`.
    """

    def __init__(self, rows: Rows, numbers: np.ndarray, device: torch.device) -> None:
        self.rows, self.numbers, self.device = rows, numbers, device

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: slice | np.ndarray) -> Tensor:
        """fp32 [B, D] on the device. UserError naming a row that is zero or holds NaN or infinity."""
        numbers = self.numbers[which]
        x_BD = prepare(self.rows.take(numbers), "cosine", self.device)
        check_unit(x_BD, self.rows, numbers)
        return x_BD


def check_unit(x_BD: Tensor, rows: Rows, numbers: np.ndarray) -> None:
    """UserError when a normalised row has no length: it was zero, NaN or infinite. numbers: int64 [B], its place in `rows`."""
    bad = ~(x_BD.norm(dim=1) > 0.5)
    if bad.any():
        raise UserError(
            f"{rows.name(int(numbers[int(bad.nonzero()[0])]))} is zero or holds NaN or infinity, expected a unit vector: "
            "delete that file and run tools/embed.py again"
        )


def representatives(
    x_MD: Tensor | UnitRows,
    threshold: float,
    link: Link,
    block: int = BLOCK,
    progress: Progress = no_progress,
    panel: int | None = None,
) -> np.ndarray:
    """int64 [m]. x_MD: unit rows fp32, in order of preference. threshold: Euclidean distance, links are strictly below it.
    panel: rows held at once, twice; whole blocks; None: all. progress: called with 0 before every row of blocks; it may raise.

    "components": connected components of the links; "greedy": a row stays unless it is near a row that was already kept.
    """
    m = len(x_MD)
    if threshold <= 0 or m < 2:
        return np.arange(m, dtype=np.int64)
    return (_components if link == "components" else _greedy)(
        x_MD, cosine_bound(threshold), block, progress, panel or m
    )


def find(parent: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
    """int64 [B]: the roots of these rows, which are made their parents (pointer jumping)."""
    found = parent[rows]
    while True:
        grand = parent[found]
        if np.array_equal(grand, found):
            parent[rows] = found
            return found
        found = grand


def union(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Union of all pairs (a, b) at once; the smaller root wins, so the root is the component's most preferred row."""
    while len(a):
        root_a, root_b = find(parent, a), find(parent, b)
        different = root_a != root_b
        low, high = np.minimum(root_a[different], root_b[different]), np.maximum(root_a[different], root_b[different])
        np.minimum.at(parent, high, low)
        a, b = low, high


def _near(x_BD: Tensor, y_BD: Tensor, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a block whose cosine is above the bound: rows and columns, int64 each, in order."""
    near = (x_BD @ y_BD.T > bound).cpu().numpy()
    at = np.flatnonzero(near)
    rows = at // near.shape[1]
    return rows, at - rows * near.shape[1]


def union_near(
    x_MD: Tensor,
    y_ND: Tensor,
    parent: np.ndarray,
    x_node: np.ndarray,
    y_node: np.ndarray,
    bound: float,
    block: int,
    progress: Progress = no_progress,
    *,
    same: bool = False,
) -> None:
    """Unite the nodes of all near pairs of x_MD and y_ND in `parent`. x_node: int64 [m], y_node: int64 [n].

    same: both are the same rows; each pair of blocks is taken once.
    """
    for i in range(0, len(x_MD), block):
        progress(0)
        for j in range(i if same else 0, len(y_ND), block):
            left, right = find(parent, x_node[i : i + block]), find(parent, y_node[j : j + block])
            # One component already: a cluster of a million copies costs one row of blocks, not all of them.
            if (left == left[0]).all() and (right == left[0]).all():
                continue
            a, b = _near(x_MD[i : i + block], y_ND[j : j + block], bound)
            different = left[a] != right[b]
            union(parent, left[a[different]], right[b[different]])


def _components(x_MD: Tensor | UnitRows, bound: float, block: int, progress: Progress, panel: int) -> np.ndarray:
    m = len(x_MD)
    parent, node = np.arange(m, dtype=np.int64), np.arange(m, dtype=np.int64)
    for p in range(0, m, panel):
        left: Tensor | None = None
        for q in range(p, m, panel):
            mine, other = node[p : p + panel], node[q : q + panel]
            root = find(parent, mine)
            if (root == root[0]).all() and (find(parent, other) == root[0]).all():
                continue  # without reading them
            if left is None:
                left = x_MD[p : p + panel]
            right = left if q == p else x_MD[q : q + panel]
            union_near(left, right, parent, mine, other, bound, block, progress, same=q == p)
            del right  # before the next one is made
    return find(parent, node)


def _greedy(x_MD: Tensor | UnitRows, bound: float, block: int, progress: Progress, panel: int) -> np.ndarray:
    m = len(x_MD)
    representative = np.arange(m, dtype=np.int64)
    for p in range(0, m, panel):
        x_PD = x_MD[p : p + panel]
        # Kept rows of earlier panels come first: the first that is near stands for a row, as if rows came one at a time.
        for q in range(0, p, panel):
            kept = q + np.flatnonzero(representative[q : q + panel] == np.arange(q, q + panel))
            k_KD = x_MD[kept]
            for i in range(0, len(x_PD), block):
                progress(0)
                _follow(representative, x_PD[i : i + block], p + i, k_KD, kept, bound, block)
            del k_KD
        kept = np.empty(0, np.int64)
        for i in range(0, len(x_PD), block):
            progress(0)
            x_BD, first = x_PD[i : i + block], p + i
            rows = np.arange(first, first + len(x_BD))
            for j in range(0, len(kept), block):
                stayed = kept[j : j + block]
                at = torch.from_numpy(stayed - p).to(x_PD.device)
                _follow(representative, x_BD, first, x_PD[at], stayed, bound, block)
            a, b = _near(x_BD, x_BD, bound)
            later = b > a
            a, b = a[later], b[later]
            starts = np.searchsorted(a, np.arange(len(x_BD) + 1))
            for r in np.unique(a):
                if representative[first + r] == first + r:
                    follow = first + b[starts[r] : starts[r + 1]]
                    follow = follow[representative[follow] == follow]
                    representative[follow] = first + r
            kept = np.concatenate([kept, rows[representative[rows] == rows]])
    return representative


def _follow(
    representative: np.ndarray, x_BD: Tensor, first: int, k_KD: Tensor, kept: np.ndarray, bound: float, block: int
) -> None:
    """Rows first, first + 1, ... (x_BD) that are still their own follow the first of the kept rows (k_KD) that is near."""
    for j in range(0, len(kept), block):
        a, b = _near(x_BD, k_KD[j : j + block], bound)
        row, at = np.unique(a, return_index=True)  # the first hit of each row has the smallest column
        free = representative[first + row] == first + row
        representative[first + row[free]] = kept[j + b[at[free]]]


def keep_mask(representative: np.ndarray, cap: int | None) -> np.ndarray:
    """bool [m]: rows that are their own representative, at most `cap` of them (the most preferred)."""
    keep = representative == np.arange(len(representative))
    if cap is not None:
        keep &= np.cumsum(keep) <= cap
    return keep
