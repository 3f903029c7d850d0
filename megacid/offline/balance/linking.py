"""Duplicate groups of one cluster: links pairs of samples below a distance and chooses a representative per group.

Components: the groups are the connected components of the links, found by union-find; blocks whose rows are already
in one component are skipped. Greedy keep: samples are visited in order of preference; one is kept unless it is linked
to a sample that was kept before, which then becomes its representative. SemDeDup (Abbas et al., 2023): a sample is
removed when it is linked to any preferred one, kept or removed; its representative is found along such links. For the
same links, components keep a subset of what SemDeDup keeps, and SemDeDup a subset of what greedy keep keeps.

The M x M matrix of distances is never materialised, only B x B blocks. A cluster that is larger than a panel is not
held in memory either: two panels of rows are, and panels are read again when they are needed. `representative[i]` is
the row kept for row i; a kept row is its own representative, and precedes the rows that it represents.

Legend: M, N samples in order of preference (row 0 is kept first), B rows of a block, P rows of a panel, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megacid.distributed.stopping import Progress, no_progress
from megacid.errors import UserError
from megacid.offline.nearest import prepare
from megacid.offline.rows import Rows

Link = Literal["components", "greedy", "semdedup"]
ROUNDING = 1e-5  # of a product of two unit vectors in fp32
_EXACT_PAIRS = 4096  # distances computed at once: their rows take some 30 MB
PANEL_BYTES = 1 << 29  # memory of two panels, including the copies made while one is read


def near_pairs(x_BD: Tensor, y_ND: Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, int64 each, of the pairs of unit vectors nearer than `threshold`, in row-major order.

    |x - y| < t is x . y > 1 - t^2 / 2, but a rounded product cannot tell distances near 0 apart: pairs within its
    rounding of the bound are decided by |x - y|^2.
    """
    cos_BN, bound = x_BD @ y_ND.T, 1.0 - threshold * threshold / 2.0
    at = np.flatnonzero((cos_BN > bound - ROUNDING).cpu().numpy())  # faster than nonzero of a matrix
    rows = at // len(y_ND)
    columns = at - rows * len(y_ND)
    cos = cos_BN.view(-1)[torch.from_numpy(at).to(cos_BN.device)].cpu().numpy()
    near = cos > bound + ROUNDING
    unsure = np.flatnonzero(~near)
    if len(unsure):
        near[unsure] = _squared_distances(x_BD, y_ND, rows[unsure], columns[unsure]) < threshold * threshold
    return rows[near], columns[near]


def _squared_distances(x_BD: Tensor, y_ND: Tensor, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """|x - y|^2 of pairs of rows, float64 [pairs], of the rows normalised in float64."""
    # Every pair of many copies of one image is in question: each pair of different rows is computed once.
    x_number, x_first = _distinct(x_BD, rows)
    y_number, y_first = _distinct(y_ND, columns)
    pair, place = np.unique(x_number * len(y_first) + y_number, return_inverse=True)
    a, b = x_first[pair // len(y_first)], y_first[pair % len(y_first)]
    out = np.empty(len(pair))
    for low in range(0, len(pair), _EXACT_PAIRS):
        part = slice(low, low + _EXACT_PAIRS)
        x, y = (
            torch.nn.functional.normalize(side[torch.from_numpy(which[part]).to(side.device)].double(), dim=1)
            for side, which in ((x_BD, a), (y_ND, b))
        )
        out[part] = (x - y).pow(2).sum(1).cpu().numpy()
    return out[place]


def _distinct(x_BD: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of the distinct row, int64 [pairs]; a row of each number, int64) of some rows that may be bit-equal."""
    which, place = np.unique(rows, return_inverse=True)
    values = x_BD[torch.from_numpy(which).to(x_BD.device)].cpu().numpy()
    _, first, number = np.unique(
        values.view(np.dtype((np.void, values.strides[0])))[:, 0], return_index=True, return_inverse=True
    )
    return number[place], which[first]


def panel_rows(dim: int, block: int, budget: int | None = None) -> int:
    """Rows of a panel: whole blocks, at least one; two panels need at most `budget` bytes (None: PANEL_BYTES)."""
    # Both are held in fp32 (8 bytes); the second is read twice in fp16 (4) or fp32 and normalised into a new array (8).
    rows = (PANEL_BYTES if budget is None else budget) // (20 * dim)
    # A product rounds differently when its shape changes, so the end of a panel must not cut a block.
    return max(rows // block, 1) * block


@dataclass(frozen=True)
class LinkOptions:
    """How pairs are linked."""

    threshold: float  # Euclidean distance of unit vectors; pairs strictly below it are linked
    link: Link = "components"
    block: int = 1024  # rows of one block of products
    panel: int | None = None  # rows in memory at once, twice; a multiple of `block`; None: all
    progress: Progress = no_progress  # called with 0 before every row of blocks

    def near(self, x_BD: Tensor, y_ND: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns, int64 each, of the linked pairs of two blocks, in row-major order."""
        return near_pairs(x_BD, y_ND, self.threshold)


class UnitRows:
    """Normalised rows of some samples, read from the files on access. numbers: int64 [M], places in `rows`."""

    def __init__(self, rows: Rows, numbers: np.ndarray, device: torch.device) -> None:
        self.rows, self.numbers, self.device = rows, numbers, device

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: slice | np.ndarray) -> Tensor:
        """fp32 [B, D] on the device. Raises UserError naming a row that is zero or holds NaN or infinity."""
        numbers = self.numbers[which]
        x_BD = prepare(self.rows.take(numbers), "cosine", self.device)
        check_unit(x_BD, self.rows, numbers)
        return x_BD

    def part(self, start: int, stop: int) -> UnitRows:
        """Rows [start, stop), without reading them."""
        return UnitRows(self.rows, self.numbers[start:stop], self.device)


def check_unit(x_BD: Tensor, rows: Rows, numbers: np.ndarray) -> None:
    """Raises UserError when a normalised row has no length: it was zero, NaN or infinite. numbers: int64 [B]."""
    bad = ~(x_BD.norm(dim=1) > 0.5)
    if bad.any():
        raise UserError(
            f"{rows.name(int(numbers[int(bad.nonzero()[0])]))} is zero or holds NaN or infinity, expected a unit "
            "vector: delete that file and run tools/embed.py again"
        )


def representatives(x_MD: Tensor | UnitRows, options: LinkOptions) -> np.ndarray:
    """The representative of every row, int64 [M]. x_MD: fp32 unit rows in order of preference."""
    if options.threshold <= 0 or len(x_MD) < 2:
        return np.arange(len(x_MD), dtype=np.int64)
    if len(x_MD) <= (options.panel or 0):
        x_MD = x_MD[:]  # most clusters are smaller than a panel and are read once
    return (_components if options.link == "components" else _greedy)(x_MD, options)


def find(parent: np.ndarray, nodes: np.ndarray | slice) -> np.ndarray:
    """The roots of some nodes, int64 [B]; sets their parents to them (pointer jumping, all nodes at once)."""
    root = parent[nodes]
    while not np.array_equal(above := parent[root], root):
        root = above
    parent[nodes] = root
    return root


def union(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Merges the sets of all pairs (a, b). The smaller root wins, so a root is the most preferred row of its set."""
    while len(a):
        root_a, root_b = find(parent, a), find(parent, b)
        different = root_a != root_b
        low, high = np.minimum(root_a[different], root_b[different]), np.maximum(root_a[different], root_b[different])
        np.minimum.at(parent, high, low)
        a, b = low, high  # where several links wrote to one root, only one was applied


def union_near(
    x_MD: Tensor,
    y_ND: Tensor,
    parent: np.ndarray,
    x_node: np.ndarray,
    y_node: np.ndarray,
    options: LinkOptions,
    *,
    same: bool = False,
) -> None:
    """Merges the nodes of all linked pairs of x_MD and y_ND in `parent`.

    Args:
        x_node, y_node: int64 [M] and [N], the nodes of the rows.
        same: x_MD and y_ND are the same rows, so each pair of blocks is computed once.
    """
    block = options.block
    for i in range(0, len(x_MD), block):
        options.progress(0)
        for j in range(i if same else 0, len(y_ND), block):
            left, right = find(parent, x_node[i : i + block]), find(parent, y_node[j : j + block])
            # One component already: a cluster of a million copies costs one row of blocks, not all of them.
            if (left == left[0]).all() and (right == left[0]).all():
                continue
            a, b = options.near(x_MD[i : i + block], y_ND[j : j + block])
            different = left[a] != right[b]
            union(parent, left[a[different]], right[b[different]])


def _components(x_MD: Tensor | UnitRows, options: LinkOptions) -> np.ndarray:
    m, panel = len(x_MD), options.panel or len(x_MD)
    parent, node = np.arange(m, dtype=np.int64), np.arange(m, dtype=np.int64)
    for p in range(0, m, panel):
        left: Tensor | None = None
        for q in range(p, m, panel):
            x_node, y_node = node[p : p + panel], node[q : q + panel]
            root = find(parent, x_node)
            if (root == root[0]).all() and (find(parent, y_node) == root[0]).all():
                continue  # without reading them
            if left is None:
                left = x_MD[p : p + panel]
            right = left if q == p else x_MD[q : q + panel]
            union_near(left, right, parent, x_node, y_node, options, same=q == p)
            del right  # before the next one is made
    return find(parent, node)


def _greedy(x_MD: Tensor | UnitRows, options: LinkOptions) -> np.ndarray:
    """Greedy keep and SemDeDup's rule, which differ in the earlier rows that count: kept ones, or all."""
    m, panel, block = len(x_MD), options.panel or len(x_MD), options.block
    representative = np.arange(m, dtype=np.int64)

    def counting(rows: np.ndarray) -> np.ndarray:
        return rows if options.link == "semdedup" else rows[representative[rows] == rows]

    for p in range(0, m, panel):
        x_PD = x_MD[p : p + panel]
        # Rows of earlier panels come first, so a row follows the first near row that counts, as if rows came singly.
        for q in range(0, p, panel):
            earlier = counting(np.arange(q, q + panel))
            y_ND = x_MD[earlier]
            for i in range(0, len(x_PD), block):
                options.progress(0)
                _follow(representative, x_PD[i : i + block], p + i, y_ND, earlier, options)
            del y_ND
        before = np.empty(0, np.int64)
        for i in range(0, len(x_PD), block):
            options.progress(0)
            x_BD, first = x_PD[i : i + block], p + i
            rows = np.arange(first, first + len(x_BD))
            for j in range(0, len(before), block):
                earlier = before[j : j + block]
                at = torch.from_numpy(earlier - p).to(x_PD.device)
                _follow(representative, x_BD, first, x_PD[at], earlier, options)
            _greedy_block(representative, x_BD, first, options)
            before = np.concatenate([before, counting(rows)])
    return find(representative, np.arange(m))


def _greedy_block(representative: np.ndarray, x_BD: Tensor, first: int, options: LinkOptions) -> None:
    """The choice among the rows first, first + 1, ... of one block that are still their own representative."""
    a, b = options.near(x_BD, x_BD)
    later = b > a
    a, b = a[later], b[later]
    starts = np.searchsorted(a, np.arange(len(x_BD) + 1))
    for r in np.unique(a):
        if options.link == "semdedup" or representative[first + r] == first + r:
            follow = first + b[starts[r] : starts[r + 1]]
            follow = follow[representative[follow] == follow]
            representative[follow] = first + r


def _follow(
    representative: np.ndarray, x_BD: Tensor, first: int, y_ND: Tensor, earlier: np.ndarray, options: LinkOptions
) -> None:
    """Rows first, first + 1, ... (x_BD) that are still their own follow the first near row of `earlier` (y_ND)."""
    own = np.arange(first, first + len(x_BD))
    for j in range(0, len(earlier), options.block):
        if not (representative[own] == own).any():
            return
        a, b = options.near(x_BD, y_ND[j : j + options.block])
        row, at = np.unique(a, return_index=True)  # the first hit of each row has the smallest column
        free = representative[first + row] == first + row
        representative[first + row[free]] = earlier[j + b[at[free]]]
