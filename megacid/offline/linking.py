"""Which samples of one cluster are the same thing: links below a distance, and who stays for each group.

Legend: m samples of a cluster in order of preference (row 0 is the one to keep first), B rows of a block, D width.

The m x m matrix of a cluster is never made: only B x B blocks of it. `owner[i]` is the row that is kept for row i; a row
that is its own owner is kept. Owners always have a smaller number than what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Link = Literal["components", "greedy"]
Tick = Callable[[int], None]
BLOCK = 1024


def _cosine_bound(threshold: float) -> float:
    """Unit vectors are nearer than `threshold` exactly when their cosine is above this."""
    return 1.0 - threshold * threshold / 2.0


def owners(
    x_MD: Tensor, threshold: float, link: Link, block: int = BLOCK, tick: Tick = lambda rows: None
) -> np.ndarray:
    """int64 [m]. x_MD: unit rows fp32, in order of preference. threshold: Euclidean distance, links are strictly below it.
    tick: called with 0 before every row of blocks; it may raise.

    "components": connected components of the links; "greedy": a row stays unless it is near a row that was already kept.
    """
    if threshold <= 0 or len(x_MD) < 2:
        return np.arange(len(x_MD), dtype=np.int64)
    return (_components if link == "components" else _greedy)(x_MD, _cosine_bound(threshold), block, tick)


def _find(parent: np.ndarray) -> np.ndarray:
    """Point every row at its root (pointer jumping)."""
    while True:
        grand = parent[parent]
        if np.array_equal(grand, parent):
            return parent
        parent = grand


def _unite(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Union of all pairs (a, b) at once; the smaller root wins, so the root is the component's most preferred row."""
    while True:
        root_a, root_b = parent[a], parent[b]
        apart = root_a != root_b
        if not apart.any():
            return parent
        a, b = a[apart], b[apart]
        low, high = np.minimum(root_a[apart], root_b[apart]), np.maximum(root_a[apart], root_b[apart])
        np.minimum.at(parent, high, low)
        parent = _find(parent)


def _components(x_MD: Tensor, bound: float, block: int, tick: Tick) -> np.ndarray:
    m = len(x_MD)
    parent = np.arange(m, dtype=np.int64)
    for i in range(0, m, block):
        tick(0)
        for j in range(i, m, block):
            left, right = parent[i : i + block], parent[j : j + block]
            # One component already: a cluster of a million copies costs one row of blocks, not all of them.
            if (left == left[0]).all() and (right == left[0]).all():
                continue
            near = (x_MD[i : i + block] @ x_MD[j : j + block].T > bound).cpu().numpy()
            near &= left[:, None] != right[None, :]
            a, b = np.nonzero(near)
            if len(a):
                parent = _unite(parent, a + i, b + j)
    return parent


def _greedy(x_MD: Tensor, bound: float, block: int, tick: Tick) -> np.ndarray:
    m = len(x_MD)
    owner = np.arange(m, dtype=np.int64)
    kept = np.empty(0, np.int64)
    for i in range(0, m, block):
        tick(0)
        x_BD = x_MD[i : i + block]
        rows = np.arange(i, i + len(x_BD))
        for j in range(0, len(kept), block):
            stayed = kept[j : j + block]
            near = (x_BD @ x_MD[torch.from_numpy(stayed).to(x_MD.device)].T > bound).cpu().numpy()
            # The first kept row that is near stands for this one, as it would if rows came one at a time.
            hit = near.any(axis=1) & (owner[rows] == rows)
            owner[rows[hit]] = stayed[near[hit].argmax(axis=1)]
        near = (x_BD @ x_BD.T > bound).cpu().numpy()
        for r in range(len(x_BD)):
            if owner[i + r] == i + r:
                follow = np.flatnonzero(near[r, r + 1 :]) + i + r + 1
                follow = follow[owner[follow] == follow]
                owner[follow] = i + r
        kept = np.concatenate([kept, rows[owner[rows] == rows]])
    return owner


def keep_mask(owner: np.ndarray, cap: int | None) -> np.ndarray:
    """bool [m]: rows that are their own owner, at most `cap` of them (the most preferred)."""
    keep = owner == np.arange(len(owner))
    if cap is not None:
        keep &= np.cumsum(keep) <= cap
    return keep
