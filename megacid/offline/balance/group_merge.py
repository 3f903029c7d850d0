"""Merges the groups of the first pass that links across clusters connect. Each rank keeps the links that it found.

Components: union-find over all rows, on every rank; the links of all ranks pass through it in pieces. Greedy keep: the
ranks decide in rounds over the linked rows, of which each has a flag that is reduced over the ranks.

Legend: n samples with an embedding, E links of this rank, T rows that have a link on any rank.
"""

from __future__ import annotations

import numpy as np

from megacid.distributed.array_exchange import Ranks
from megacid.offline.balance.linking import Link, find
from megacid.offline.row_numbers import row_blocks


def merge_groups(
    representative: np.ndarray, links: np.ndarray, priority: np.ndarray, link: Link, ranks: Ranks
) -> np.ndarray:
    """Merges the groups of the first pass that are linked. A collective.

    Args:
        representative: int [n], of the first pass.
        links: int [E, 2], those of this rank, between rows that are their own representative.
        priority: [n], smaller is preferred, ties by row.

    Returns:
        int [n], the representative of every row.
    """
    out = representative.copy()
    if link == "components":
        for _, piece in ranks.pieces(links):
            unite(out, piece[:, 0], piece[:, 1], priority)
    else:
        _merge_greedy(out, links, priority, ranks)
    # A sample removed in the first pass follows its representative.
    for block in row_blocks(0, len(out)):
        find(out, block)
    return out


def is_preferred(priority: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether each row of `a` is preferred to that of `b`, bool [E]."""
    first, second = priority[a], priority[b]
    return (first < second) | ((first == second) & (a < b))


def unite(parent: np.ndarray, a: np.ndarray, b: np.ndarray, priority: np.ndarray) -> None:
    """Merges the sets of all pairs (a, b). The root of a set is its most preferred row."""
    while len(a):
        a, b = find(parent, a), find(parent, b)
        different = a != b
        a, b = a[different], b[different]
        preferred = is_preferred(priority, a, b)
        a, b = np.where(preferred, a, b), np.where(preferred, b, a)
        parent[b] = a  # of several links to one root, one is applied; the next round applies the others


def _merge_greedy(out: np.ndarray, links: np.ndarray, priority: np.ndarray, ranks: Ranks) -> None:
    """Points every removed row of `out` to the most preferred kept row linked to it."""
    preferred = is_preferred(priority, links[:, 0], links[:, 1])
    low, high = np.where(preferred, links[:, 0], links[:, 1]), np.where(preferred, links[:, 1], links[:, 0])
    linked = np.zeros(len(out), bool)
    linked[low] = linked[high] = True
    ranks.any(linked)
    rows = np.flatnonzero(linked).astype(out.dtype)
    del linked
    kept = greedy_keep(len(rows), np.searchsorted(rows, low), np.searchsorted(rows, high), ranks)
    kept_low = kept[np.searchsorted(rows, low)]
    low, high = low[kept_low], high[kept_low]
    order = np.lexsort((low, priority[low], high))
    low, high = low[order], high[order]
    first = np.flatnonzero(np.diff(high, prepend=-1))
    for _, piece in ranks.pieces(np.stack([low[first], high[first]], axis=1)):
        new, row = piece[:, 0], piece[:, 1]
        better = (out[row] == row) | is_preferred(priority, new, out[row])
        out[row[better]] = new[better]


def greedy_keep(count: int, low: np.ndarray, high: np.ndarray, ranks: Ranks) -> np.ndarray:
    """Greedy keep in parallel rounds: the places that are kept, bool [count]. A collective.

    Args:
        count: places that have a link on any rank.
        low, high: int [E], the preferred place of each link of this rank and the other one.
    """
    kept, removed = np.zeros(count, bool), np.zeros(count, bool)
    while not (kept | removed).all():
        removed[high[kept[low]]] = True
        ranks.any(removed)
        # Keep places without an undecided place before them: at least the first undecided one in every round.
        waits = np.zeros(count, bool)
        waits[high[~(kept | removed)[low]]] = True
        ranks.any(waits)
        kept |= ~waits & ~removed
    return kept
