"""The second pass: links between samples of neighbouring clusters.

Each sample has candidate clusters: the M clusters, other than its own, whose centroids are nearest to it. Two clusters
are compared on those of their samples that have the other one as a candidate. Candidates are chosen per sample, not
per cluster, because in many dimensions a cluster borders on very many others: M = 4 finds pairs that the 100 clusters
nearest to a cluster miss, for the cost of one assignment of all samples.

A candidate that cannot hold a near sample is ruled out. If y lies in cluster b, then c_b is nearer to it than c_a:
(c_a - c_b) . y <= h with h = (|c_a|^2 - |c_b|^2) / 2. So a sample x of cluster a within distance t of y satisfies
(c_a - c_b) . x <= h + |c_a - c_b| t.

The links connect the representatives of the first pass, whose groups are then merged: by union-find (components), or by
greedy keep over all representatives in order of preference.

Legend: n samples, k clusters, M candidate clusters of a sample, T rows of a tile, E links, D width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megacid.failpoints import failpoint
from megacid.offline.balance import linking
from megacid.offline.balance.context import BalanceContext
from megacid.offline.balance.linking import ROUNDING, Link, LinkOptions, UnitRows, find, union, union_near
from megacid.offline.nearest import pad_rows, tile_rows

log = logging.getLogger(__name__)
_SLACK = 4e-3  # rows were assigned as float16 of nearly length 1, and the products were rounded
_MANY_LINKS = 4096  # of one pair of clusters, from which removing duplicates at once saves memory
CHUNK_ROWS = 1 << 16  # samples in one partial result of the candidates; a multiple of a tile


def find_candidates(context: BalanceContext, rows: np.ndarray, threshold: float) -> np.ndarray:
    """Candidate clusters of some samples, this rank's share of them.

    Args:
        rows: int64 [m], row numbers.
        threshold: distance below which samples will be linked.

    Returns:
        int64 [entries, 2]: (row, candidate cluster).
    """
    label, chunks = context.clusters.labels()[rows], -(-len(rows) // CHUNK_ROWS)
    parts = [np.empty((0, 2), np.int64)]
    for chunk in range(context.rank * chunks // context.world, (context.rank + 1) * chunks // context.world):
        name, which = f"candidates-{chunk}", slice(chunk * CHUNK_ROWS, (chunk + 1) * CHUNK_ROWS)
        entries = context.load(name, (None, 2))
        if entries is None:
            entries = candidate_clusters(context, rows[which], label[which], threshold)
            context.save(name, entries)
            failpoint("balance:candidate_clusters", step=chunk)
        parts.append(entries)
    return np.concatenate(parts)


def candidate_clusters(context: BalanceContext, rows: np.ndarray, label: np.ndarray, threshold: float) -> np.ndarray:
    """int64 [entries, 2]: (row, candidate cluster). rows: int64 [m]; label: int [m], the clusters the rows are in."""
    assigner = context.assigner
    assert assigner is not None
    unit = UnitRows(context.rows, rows, assigner.device)
    c_KD, half_K = assigner.centroids_KD, assigner.half_norm_K
    tile, top = tile_rows(assigner.device), min(context.settings.neighbor_clusters + 1, len(c_KD))
    parts = [np.empty((0, 2), np.int64)]
    for low in range(0, len(rows), tile):
        context.progress(0)
        which = slice(low, low + tile)
        x_TD = unit[which]
        own = torch.from_numpy(label[which].astype(np.int64)).to(x_TD.device)
        # Products of one shape, so the candidates do not depend on where chunks end.
        near_TM = assigner.tile(pad_rows(x_TD, tile), top)[1][: len(x_TD)]
        for column in range(top):
            other = near_TM[:, column]
            normal = c_KD[own] - c_KD[other]
            most = half_K[own] - half_K[other] + normal.norm(dim=1) * (threshold + _SLACK) + ROUNDING
            possible = ((normal * x_TD).sum(1) <= most) & (other != own)
            parts.append(np.stack([rows[which][possible.cpu().numpy()], other[possible].cpu().numpy()], axis=1))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Pairs:
    """Pairs of clusters a < b, each with the samples that have the other one as a candidate.

    Attributes:
        rows: int64 row numbers; pair p has rows[starts[p]:middles[p]] of cluster a and rows[middles[p]:starts[p+1]] of
            cluster b, neither of them empty.
    """

    rows: np.ndarray
    starts: np.ndarray
    middles: np.ndarray

    def __len__(self) -> int:
        return len(self.middles)

    @property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples on the two sides of each pair, int64 [pairs] each."""
        return self.middles - self.starts[:-1], self.starts[1:] - self.middles


def match_candidates(entries: np.ndarray, label: np.ndarray, k: int) -> Pairs:
    """Pairs of clusters in which samples of both have the other as a candidate. entries: int64 [e, 2]; label: [n]."""
    row, other = entries[:, 0], entries[:, 1]
    own = label[row].astype(np.int64)
    code = np.minimum(own, other) * k + np.maximum(own, other)
    second = own > other
    order = np.lexsort((row, second, code))
    row, code, second = row[order], code[order], second[order]
    starts = np.flatnonzero(np.diff(code, prepend=-1))
    counts = np.diff(np.append(starts, len(code)))
    right = np.add.reduceat(second.astype(np.int64), starts) if len(starts) else np.empty(0, np.int64)
    both = (right > 0) & (right < counts)
    rows = row[np.repeat(both, counts)]
    ends = np.cumsum(counts[both])
    return Pairs(rows, np.concatenate([[0], ends]).astype(np.int64), (ends - right[both]).astype(np.int64))


def link_neighbors(
    context: BalanceContext, representative: np.ndarray, threshold: float, candidates: np.ndarray
) -> np.ndarray:
    """Merges the groups of the first pass that are linked across clusters. A collective unless the context is `alone`.

    Args:
        representative: int64 [n], of the first pass.
        candidates: int64 [entries, 2], of all samples; see `find_candidates`.

    Returns:
        int64 [n], the representatives after both passes.
    """
    clusters, link = context.clusters, context.settings.link
    if link == "greedy":  # samples that the first pass removed no longer count
        candidates = candidates[representative[candidates[:, 0]] == candidates[:, 0]]
    pairs = match_candidates(candidates, clusters.labels(), len(clusters.sizes))
    left, right = (side.astype(np.float64) for side in pairs.sizes)
    if not context.alone:
        flop = 2 * (left @ right) * context.rows.dim
        log.info(
            "%d pairs of neighbouring clusters, %d samples to compare, %.3g flop", len(pairs), len(pairs.rows), flop
        )
    options = context.link_options(threshold, linking.PANEL_BYTES // 4)
    # A part is as large as its work, or as the rows that are held for it.
    cost = np.maximum(left * right, (left + right) / (options.panel or 1) * context.part_pairs)
    parts = [np.empty((0, 2), np.int64)]
    with context.stop_together():
        for low, high in context.parts(cost):
            name = f"cross-cluster-{low}-{high}"
            links = context.load(name, (None, 2))
            if links is None:
                links = _link_pairs(context, pairs, low, high, representative, options)
                context.save(name, links)
                failpoint("balance:cross_cluster")
            parts.append(links)
    return merge_groups(representative, context.gather(np.concatenate(parts)), clusters.priority, link)


def _link_pairs(
    context: BalanceContext, pairs: Pairs, low: int, high: int, representative: np.ndarray, options: LinkOptions
) -> np.ndarray:
    """Links of the pairs [low, high) of clusters, int64 [E, 2], each once, between representatives of the first pass.

    Components: enough links to merge what is linked; greedy: all of them.
    """
    base = int(pairs.starts[low])
    rows = pairs.rows[base : pairs.starts[high]]
    unit: UnitRows | Tensor = UnitRows(context.rows, rows, context.device)
    # Most pairs are small and are read together; a part of one large pair is read in panels.
    if len(rows) <= 2 * (options.panel or 0):
        unit = unit[:]
    parts = [np.empty((0, 2), np.int64)]
    for pair in range(low, high):
        failpoint("balance:pair", step=pair)
        options.progress(0)
        start, middle, stop = (
            int(at) - base for at in (pairs.starts[pair], pairs.middles[pair], pairs.starts[pair + 1])
        )
        x_node, y_node = representative[rows[start:middle]], representative[rows[middle:stop]]
        if isinstance(unit, Tensor) and max(len(x_node), len(y_node)) <= options.block:
            a, b = options.near(unit[start:middle], unit[middle:stop])
            links = np.stack([x_node[a], y_node[b]], axis=1)
        else:
            x, y = (
                unit[i:j] if isinstance(unit, Tensor) else unit.part(i, j) for i, j in ((start, middle), (middle, stop))
            )
            links = _link_large(x, y, x_node, y_node, options)
        parts.append(np.unique(links, axis=0) if len(links) > _MANY_LINKS else links)
    links = np.concatenate(parts)
    # Two samples of one group that spans the border are one component already.
    return np.unique(links[links[:, 0] != links[:, 1]], axis=0)


def _link_large(
    x: Tensor | UnitRows, y: Tensor | UnitRows, x_node: np.ndarray, y_node: np.ndarray, options: LinkOptions
) -> np.ndarray:
    """The links of one pair of clusters, in panels and blocks: int64 [E, 2], nodes. x_node, y_node: of the rows."""
    node, number = np.unique(np.concatenate([x_node, y_node]), return_inverse=True)
    x_number, y_number = number[: len(x_node)], number[len(x_node) :]
    panel, block = options.panel or max(len(x), len(y)), options.block
    parent = np.arange(len(node), dtype=np.int64)
    parts = [np.empty((0, 2), np.int64)]
    for p in range(0, len(x), panel):
        x_PD, x_place = x[p : p + panel], x_number[p : p + panel]
        for q in range(0, len(y), panel):
            y_PD, y_place = y[q : q + panel], y_number[q : q + panel]
            if options.link == "components":
                union_near(x_PD, y_PD, parent, x_place, y_place, options)
                continue
            for i in range(0, len(x_PD), block):
                options.progress(0)
                for j in range(0, len(y_PD), block):
                    a, b = options.near(x_PD[i : i + block], y_PD[j : j + block])
                    parts.append(np.stack([node[x_place[i + a]], node[y_place[j + b]]], axis=1))
    if options.link == "components":
        root = find(parent, np.arange(len(node)))
        moved = np.flatnonzero(root != np.arange(len(node)))
        parts.append(np.stack([node[root[moved]], node[moved]], axis=1))
    return np.concatenate(parts)


def merge_groups(representative: np.ndarray, links: np.ndarray, priority: np.ndarray, link: Link) -> np.ndarray:
    """Merges the groups of the first pass that are linked.

    Args:
        representative: int64 [n], of the first pass.
        links: int64 [E, 2], between rows that are their own representative.
        priority: [n], smaller is preferred, ties by row.

    Returns:
        int64 [n], the representative of every row.
    """
    if not len(links):
        return representative
    rows = np.unique(links)
    rows = rows[np.argsort(priority[rows], kind="stable")]
    by_number = np.argsort(rows)
    place = by_number[np.searchsorted(rows, links, sorter=by_number)]
    parent = np.arange(len(rows), dtype=np.int64)
    if link == "components":
        union(parent, place[:, 0], place[:, 1])
        parent = find(parent, np.arange(len(rows)))
    else:
        greedy_keep(parent, place.min(axis=1), place.max(axis=1))
    out = representative.copy()
    out[rows] = rows[parent]
    return out[representative]  # a sample removed in the first pass follows its representative


def greedy_keep(parent: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """Greedy keep in parallel rounds; sets the parent of every removed place to the first kept place linked to it.

    Args:
        parent: int64 [places], in order of preference, each its own parent.
        low, high: int64 [E], the preferred place of each link and the other one.
    """
    kept, removed = np.zeros(len(parent), bool), np.zeros(len(parent), bool)
    while not (kept | removed).all():
        removed[high[kept[low]]] = True
        # Keep places without an undecided place before them: at least the first undecided one in every round.
        waits = np.zeros(len(parent), bool)
        waits[high[~(kept | removed)[low]]] = True
        kept |= ~waits & ~removed
    first = np.full(len(parent), len(parent), np.int64)
    by_kept = kept[low]
    np.minimum.at(first, high[by_kept], low[by_kept])
    parent[removed] = first[removed]
