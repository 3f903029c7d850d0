"""The second pass: near pairs that fall on both sides of a border between clusters.

Every sample lists the M clusters, its own aside, whose centroids are nearest to it; of two clusters those samples are
multiplied that list the other one. To list them by sample and not by cluster costs one assignment of all samples, and
finds with M = 4 what the 100 clusters nearest to a cluster do not hold: of many dimensions, a cluster has many borders.

A list leaves out what cannot have a near sample: y lies in cluster b because b's centroid is the nearer one,
(c_a - c_b) . y <= h with h = (|c_a|^2 - |c_b|^2) / 2, so that a sample x closer to y than t has
(c_a - c_b) . x <= h + |c_a - c_b| t.

Legend: n samples, k clusters, M clusters on a list, T rows of a tile, E links, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megacid.distributed.stopping import Progress
from megacid.failpoints import failpoint
from megacid.offline.balance.linking import Link, UnitRows, cosine_bound, find, union, union_near
from megacid.offline.nearest import Assigner, pad_rows, tile_rows
from megacid.offline.rows import Rows
from megacid.storage.stage_directory import PartialResults

_SLACK = 4e-3  # rows were assigned as float16 of nearly length 1, and the products were rounded
_ROUNDING = 1e-5  # of a product of two unit vectors in fp32
_MANY = 4096  # links of one pair of clusters that are worth to be looked through for equal ones
LIST_ROWS = 1 << 16  # samples in one partial result of the lists; whole tiles


def candidate_clusters(
    image: Rows,
    rows: np.ndarray,
    label: np.ndarray,
    assigner: Assigner,
    neighbor_clusters: int,
    threshold: float,
    number: int,
    work: PartialResults | None,
    progress: Progress,
) -> np.ndarray:
    """int64 [entries, 2]: (row, cluster it lists) of chunk `number` of these samples, LIST_ROWS of them; kept in `work`.

    rows: int64 [n] row numbers; label: [n] the clusters they are in; neighbor_clusters: M.
    """
    name = f"candidates-{number}"
    before = work.array(name, (None, 2), "i") if work else None
    if before is not None:
        return before
    unit = UnitRows(image, rows, assigner.device)
    c_KD, half_K = assigner.centroids_KD, assigner.half_norm_K
    tile, top = tile_rows(assigner.device), min(neighbor_clusters + 1, len(assigner.centroids_KD))
    parts = [np.empty((0, 2), np.int64)]
    for low in range(number * LIST_ROWS, min((number + 1) * LIST_ROWS, len(rows)), tile):
        progress(0)
        which = slice(low, min(low + tile, len(rows), (number + 1) * LIST_ROWS))
        x_TD = unit[which]
        own = torch.from_numpy(label[which].astype(np.int64)).to(x_TD.device)
        # Products of one shape, so that the lists do not depend on where chunks end.
        near_TM = assigner.tile(pad_rows(x_TD, tile), top)[1][: len(x_TD)]
        for column in range(top):
            other = near_TM[:, column]
            normal = c_KD[own] - c_KD[other]
            most = half_K[own] - half_K[other] + normal.norm(dim=1) * (threshold + _SLACK) + _ROUNDING
            good = ((normal * x_TD).sum(1) <= most) & (other != own)
            parts.append(np.stack([rows[which][good.cpu().numpy()], other[good].cpu().numpy()], axis=1))
    found = np.concatenate(parts)
    if work:
        work.save_array(name, found)
    failpoint("balance:candidate_clusters", step=number)
    return found


@dataclass(frozen=True)
class Pairs:
    """Pairs of clusters a < b and the samples that list the other one.

    `rows`: int64 row numbers; pair p has rows[starts[p]:middles[p]] of its first cluster and rows[middles[p]:starts[p+1]] of
    its second one, none of them empty.
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


def match_lists(entries: np.ndarray, label: np.ndarray, k: int) -> Pairs:
    """The pairs of clusters of which both have samples that list the other. entries: int64 [e, 2]; label: by row number."""
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


def link_pairs(
    image: Rows,
    pairs: Pairs,
    low: int,
    high: int,
    representative: np.ndarray,
    threshold: float,
    link: Link,
    block: int,
    panel: int,
    device: torch.device,
    work: PartialResults | None,
    progress: Progress,
) -> np.ndarray:
    """int64 [E, 2], each once: rows that stand for two groups which are one, of the pairs [low, high); kept in `work`.

    representative: int64 [n], of the first pass. Components: enough links to unite what is linked; greedy: all of them.
    """
    name = f"cross-cluster-{low}-{high}"
    before = work.array(name, (None, 2), "i") if work else None
    if before is not None:
        return before
    bound, base = cosine_bound(threshold), int(pairs.starts[low])
    rows = pairs.rows[base : pairs.starts[high]]
    unit: UnitRows | Tensor = UnitRows(image, rows, device)
    # Most pairs are small and are read together; a part of one large pair is read in panels.
    if len(rows) <= 2 * panel:
        unit = unit[:]
    parts = [np.empty((0, 2), np.int64)]
    for pair in range(low, high):
        failpoint("balance:pair", step=pair)
        progress(0)
        start, middle, stop = (
            int(at) - base for at in (pairs.starts[pair], pairs.middles[pair], pairs.starts[pair + 1])
        )
        x_node, y_node = representative[rows[start:middle]], representative[rows[middle:stop]]
        if isinstance(unit, Tensor) and max(len(x_node), len(y_node)) <= block:
            near = (unit[start:middle] @ unit[middle:stop].T > bound).cpu().numpy()
            a, b = np.nonzero(near)
            found = np.stack([x_node[a], y_node[b]], axis=1)
        else:
            found = _link_large(unit, start, middle, stop, x_node, y_node, bound, link, block, panel, progress)
        if len(found):
            parts.append(np.unique(found, axis=0) if len(found) > _MANY else found)
    links = np.concatenate(parts)
    # One component already: two samples of one group list each other's clusters.
    links = np.unique(links[links[:, 0] != links[:, 1]], axis=0)
    if work:
        work.save_array(name, links)
    failpoint("balance:cross_cluster")
    return links


def _link_large(
    unit: Tensor | UnitRows,
    start: int,
    middle: int,
    stop: int,
    x_node: np.ndarray,
    y_node: np.ndarray,
    bound: float,
    link: Link,
    block: int,
    panel: int,
    progress: Progress,
) -> np.ndarray:
    """The links of one pair of clusters, rows [start, middle) and [middle, stop) of `unit`, in blocks. int64 [E, 2]."""
    node, number = np.unique(np.concatenate([x_node, y_node]), return_inverse=True)
    parent = np.arange(len(node), dtype=np.int64)
    parts = [np.empty((0, 2), np.int64)]
    for p in range(start, middle, panel):
        x_PD = unit[p : min(p + panel, middle)]
        x_number = number[p - start : p - start + len(x_PD)]
        for q in range(middle, stop, panel):
            y_PD = unit[q : min(q + panel, stop)]
            y_number = number[q - start : q - start + len(y_PD)]
            if link == "components":
                union_near(x_PD, y_PD, parent, x_number, y_number, bound, block, progress)
                continue
            for i in range(0, len(x_PD), block):
                progress(0)
                for j in range(0, len(y_PD), block):
                    a, b = np.nonzero((x_PD[i : i + block] @ y_PD[j : j + block].T > bound).cpu().numpy())
                    parts.append(np.stack([node[x_number[i + a]], node[y_number[j + b]]], axis=1))
    if link == "components":
        root = find(parent, np.arange(len(node)))
        moved = np.flatnonzero(root != np.arange(len(node)))
        parts.append(np.stack([node[root[moved]], node[moved]], axis=1))
    return np.concatenate(parts)


def merge_groups(representative: np.ndarray, links: np.ndarray, priority: np.ndarray, link: Link) -> np.ndarray:
    """int64 [n]: who stands for every row once the groups of both passes are one.

    representative: int64 [n] of the first pass; links: int64 [E, 2] between rows that are their own representative; priority: [n], smaller is
    preferred, equal ones by row. Greedy: of the kept rows, in order of preference over all clusters, one stays unless it
    is near one that stays; what it stood for follows it.
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
    return out[representative]  # what was removed in the first pass follows the one it was removed for


def greedy_keep(parent: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """The greedy choice in rounds; fills parent. low, high: int64 [E], the preferred place of each link and the other."""
    stays, follows = np.zeros(len(parent), bool), np.zeros(len(parent), bool)
    while not (stays | follows).all():
        follows[high[stays[low]]] = True
        # Who has no undecided row before it is decided: at least the first undecided one in every round.
        waits = np.zeros(len(parent), bool)
        waits[high[~(stays | follows)[low]]] = True
        stays |= ~waits & ~follows
    first = np.full(len(parent), len(parent), np.int64)
    by_kept = stays[low]
    np.minimum.at(first, high[by_kept], low[by_kept])
    parent[follows] = first[follows]
