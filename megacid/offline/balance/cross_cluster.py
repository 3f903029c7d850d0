"""The second pass: links between samples of neighbouring clusters.

Each sample has candidate clusters: the M clusters, other than its own, whose centroids are nearest to it. Two clusters
are compared on those of their samples that have the other one as a candidate. Candidates are chosen per sample, not
per cluster, because in many dimensions a cluster borders on very many others: M = 4 finds pairs that the 100 clusters
nearest to a cluster miss, for the cost of one assignment of all samples.

A candidate that cannot hold a near sample is ruled out. If y lies in cluster b, then c_b is nearer to it than c_a:
(c_a - c_b) . y <= h with h = (|c_a|^2 - |c_b|^2) / 2. So a sample x of cluster a within distance t of y satisfies
(c_a - c_b) . x <= h + |c_a - c_b| t.

Ranks divide the samples for the search of candidates, then the pairs of clusters: entries (row, candidate) are sent to
the rank of their pair, in bins of pairs, so a rank holds about n M / ranks of them and sorts one bin at a time.

The links connect the representatives of the first pass, whose groups are then merged (`group_merge`).

Legend: n samples, k clusters, M candidate clusters of a sample, T rows of a tile, E links, D width.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megacid.failpoints import failpoint
from megacid.offline.balance import linking
from megacid.offline.balance.context import BalanceContext, part_bounds
from megacid.offline.balance.group_merge import merge_groups
from megacid.offline.balance.linking import ROUNDING, LinkOptions, UnitRows, find, union_near
from megacid.offline.nearest import pad_rows, tile_rows
from megacid.offline.row_numbers import row_dtype

log = logging.getLogger(__name__)
_SLACK = 4e-3  # rows were assigned as float16 of nearly length 1, and the products were rounded
_MANY_LINKS = 4096  # of one pair of clusters, from which removing duplicates at once saves memory
CHUNK_ROWS = 1 << 16  # samples in one partial result of the candidates; a multiple of a tile
BIN_ENTRIES, MAX_BINS = 1 << 14, 1 << 12  # about as many entries in a bin of pairs of clusters; bins at most
_SENT_ENTRIES = 1 << 20  # entries that a rank sends at a time


def find_candidates(
    context: BalanceContext, rows: np.ndarray, threshold: float, representative: np.ndarray | None = None
) -> np.ndarray:
    """Candidate clusters of some samples, this rank's share of them.

    Args:
        rows: int [m], row numbers.
        threshold: distance below which samples will be linked.
        representative: int [n]; given, rows that are not their own have no candidates.

    Returns:
        int32 [entries, 2] (int64 from 2^31 rows): (row, candidate cluster).
    """
    ranks, label, chunks = context.ranks, context.clusters.label, -(-len(rows) // CHUNK_ROWS)
    dtype = row_dtype(max(context.rows.num_rows, len(context.clusters.sizes)))
    parts = [np.empty((0, 2), dtype)]
    for chunk in range(ranks.rank * chunks // ranks.world, (ranks.rank + 1) * chunks // ranks.world):
        name, chosen = f"candidates-of-{chunk}", rows[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS]
        entries = context.load(name, (None, 2))
        if entries is None:
            if representative is not None:
                chosen = chosen[representative[chosen] == chosen]
            entries = candidate_clusters(context, chosen, label[chosen], threshold).astype(dtype)
            context.save(name, entries)
            failpoint("balance:candidate_clusters", step=chunk)
        parts.append(entries.astype(dtype))
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
        rows: row numbers; pair p has rows[starts[p]:middles[p]] of cluster a and rows[middles[p]:starts[p+1]] of
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

    @property
    def products(self) -> float:
        """Pairs of samples to compare."""
        left, right = self.sizes
        return float(left.astype(np.float64) @ right)


def match_candidates(entries: np.ndarray, label: np.ndarray, k: int) -> Pairs:
    """Pairs of clusters in which samples of both have the other as a candidate. entries: int [e, 2]; label: [n]."""
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


Binned = tuple[np.ndarray, np.ndarray]  # entries in order of their bins, and where each bin of pairs begins in them


def exchange_entries(context: BalanceContext, entries: np.ndarray) -> list[Binned]:
    """The entries of the pairs that this rank compares. A collective unless the context is `alone`.

    A bin holds a range of pairs and belongs to one rank. Which bin a pair is in does not depend on the number of ranks.

    Args:
        entries: int [entries, 2], this rank's share of those of all samples; see `find_candidates`.
    """
    label, k, ranks = context.clusters.label, len(context.clusters.sizes), context.ranks
    most = context.rows.num_rows * context.settings.neighbor_clusters
    bins = min(max(most // BIN_ENTRIES, 1), MAX_BINS)
    width = -(-k * k // bins)

    def bins_of(rows: np.ndarray) -> np.ndarray:
        own, other = label[rows[:, 0]].astype(np.int64), rows[:, 1].astype(np.int64)
        return (np.minimum(own, other) * k + np.maximum(own, other)) // width

    blocks = (entries[low : low + _SENT_ENTRIES] for low in range(0, len(entries), _SENT_ENTRIES))
    sent = ((block, bins_of(block) % ranks.world) for block in blocks)
    received = []
    for block in ranks.exchange(sent, 2, entries.dtype):
        number = bins_of(block)
        order = np.argsort(number, kind="stable")
        received.append((block[order], np.searchsorted(number[order], np.arange(bins + 1))))
    return received


def match_bins(context: BalanceContext, received: list[Binned]) -> dict[int, Pairs]:
    """The pairs of clusters of each bin that this rank has entries of, matched one bin at a time."""
    label, k = context.clusters.label, len(context.clusters.sizes)
    binned = {}
    for number in range(len(received[0][1]) - 1 if received else 0):
        entries = [block[starts[number] : starts[number + 1]] for block, starts in received]
        if any(map(len, entries)):
            binned[number] = match_candidates(np.concatenate(entries), label, k)
    return binned


def link_neighbors(
    context: BalanceContext, representative: np.ndarray, threshold: float, entries: np.ndarray
) -> np.ndarray:
    """Merges the groups of the first pass that are linked across clusters. A collective unless the context is `alone`.

    Args:
        representative: int [n], of the first pass.
        entries: int [entries, 2], this rank's share of those of all samples; see `find_candidates`.

    Returns:
        int [n], the representatives after both passes.
    """
    if context.settings.link == "greedy":  # samples that the first pass removed no longer count
        entries = entries[representative[entries[:, 0]] == entries[:, 0]]
    received = exchange_entries(context, entries)
    del entries
    failpoint("balance:exchange")
    binned = match_bins(context, received)
    del received
    links = _link_bins(context, binned, representative, threshold)
    del binned
    failpoint("balance:merge")
    return merge_groups(representative, links, context.clusters.priority, context.settings.link, context.ranks)


def _link_bins(
    context: BalanceContext, binned: dict[int, Pairs], representative: np.ndarray, threshold: float
) -> np.ndarray:
    """The links of this rank's pairs, [E, 2] in the type of `representative`. A collective unless `alone`."""
    options = context.link_options(threshold, linking.PANEL_BYTES // 4)
    if not context.alone:
        counts = [[len(pairs), len(pairs.rows), pairs.products] for pairs in binned.values()]
        number, samples, products = context.ranks.sum(np.array(counts, np.float64).reshape(-1, 3).sum(axis=0))
        flop = 2 * products * context.rows.dim
        log.info("%d pairs of neighbouring clusters, %d samples to compare, %.3g flop", number, samples, flop)
    parts = [np.empty((0, 2), representative.dtype)]
    with context.stop_together():
        for number, pairs in binned.items():
            left, right = (side.astype(np.float64) for side in pairs.sizes)
            # A part is as large as its work, or as the rows that are held for it.
            cost = np.maximum(left * right, (left + right) / (options.panel or 1) * context.part_pairs)
            for low, high in itertools.pairwise(part_bounds(cost, context.part_pairs).tolist()):
                name = f"cross-cluster-{number}-{low}-{high}"
                links = context.load(name, (None, 2))
                if links is None:
                    links = _link_pairs(context, pairs, low, high, representative, options)
                    context.save(name, links)
                    failpoint("balance:cross_cluster")
                parts.append(links.astype(representative.dtype))
    return np.concatenate(parts)


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
