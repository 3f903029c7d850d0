"""The medoid of every duplicate group: its sample nearest to the mean of the group's unit rows.

It is also the sample whose squared distances to the others have the least sum: sum_j |x_i - x_j|^2 = m |x_i - mean|^2 +
a constant. Means and distances are in float64 and blocks do not depend on the number of ranks, so neither do the bits.
Of equally near samples the first row is the medoid. Both samples of a pair are equally near, so pairs are not read.

Legend: n samples, m rows of some groups, G groups, B rows of a block, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megacid.failpoints import failpoint
from megacid.offline.balance.context import BalanceContext
from megacid.offline.balance.linking import UnitRows
from megacid.offline.row_numbers import removed_rows

_BLOCK_ROWS = 4096  # rows in float64 at once; with their means they take 0.1 GB at D = 1280
_PART_ROWS = 8192  # rows in one partial result, which may have twice as many, or one larger group and as many more
_RANGES = 1 << 20  # ranges of representatives, about, of which a part has one or more; each is of one cluster
_TIE = 1e-12  # squared distances this near to each other differ by rounding alone


def represent_by_medoids(context: BalanceContext, representative: np.ndarray) -> np.ndarray:
    """The representatives int [n] of the same groups, each the medoid of its group. A collective.

    A rank has the groups whose representatives are in a range, by cluster and row. It changes none of the others.

    Args:
        representative: int [n], a row of its group for every row; that row is its own.

    Raises:
        UserError: naming an embedding that is zero or not finite.
    """
    out = representative.copy()
    with context.stop_together():
        moved = _represent_share(context, representative)
    for _, piece in context.ranks.pieces(moved):
        out[piece[:, 0]] = piece[:, 1]
    return out


def _represent_share(context: BalanceContext, representative: np.ndarray) -> np.ndarray:
    """(row, medoid of its group) of all rows of this rank's groups, [m, 2] in the type of `representative`."""
    label, n = context.clusters.label, len(representative)
    count = max(min(_RANGES, n) // len(context.clusters.sizes), 1)  # of every cluster

    def ranges_of(rows: np.ndarray) -> np.ndarray:
        # Groups are read by the cluster of their representative, as rows may lie on disk.
        return label[rows].astype(np.int64) * count + rows.astype(np.int64) * count // n

    removed = np.zeros(len(context.clusters.sizes) * count, np.int64)
    for _, own in removed_rows(representative):
        removed += np.bincount(ranges_of(own), minlength=len(removed))
    parts = context.parts(removed / _PART_ROWS * context.part_pairs)
    if not parts:
        return np.empty((0, 2), representative.dtype)
    mine = [np.empty(0, representative.dtype)]
    for rows, own in removed_rows(representative):
        number = ranges_of(own)
        mine.append(rows[(number >= parts[0][0]) & (number < parts[-1][1])].astype(representative.dtype))
    rows = np.concatenate(mine)
    rows = np.concatenate([rows, np.unique(representative[rows])])
    rows = rows[np.lexsort((rows, representative[rows], label[representative[rows]]))]
    group = representative[rows]
    starts = np.flatnonzero(np.diff(group, prepend=-1, append=-1))
    sizes, first, medoid = np.diff(starts), ranges_of(group[starts[:-1]]), rows[starts[:-1]]
    for low, high in parts:
        inside = slice(*np.searchsorted(first, [low, high]).tolist())
        read = inside.start + np.flatnonzero(sizes[inside] > 2)
        if not len(read):
            continue
        name = f"medoids-by-cluster-{count}-{low}-{high}"
        part = context.load(name, (len(read),))
        if part is None:
            part = _medoids(context, [rows[starts[at] : starts[at + 1]] for at in read])
            context.save(name, part)
            failpoint("balance:medoids", step=low)
        medoid[read] = part
    return np.stack([rows, np.repeat(medoid, sizes)], axis=1)


def _medoids(context: BalanceContext, groups: list[np.ndarray]) -> np.ndarray:
    """The medoid of each group, int [G]. groups: int, rows ascending, none empty."""
    rows, sizes = np.concatenate(groups), np.array([len(group) for group in groups])
    group = np.repeat(np.arange(len(groups)), sizes)
    unit: UnitRows | Tensor = UnitRows(context.rows, rows, torch.device("cpu"))
    if len(rows) <= 2 * _PART_ROWS:
        unit = unit[:]  # a larger group is read in blocks, twice
    blocks = [slice(low, low + _BLOCK_ROWS) for low in range(0, len(rows), _BLOCK_ROWS)]
    mean_GD = np.zeros((len(groups), context.rows.dim))
    for block in blocks:
        context.progress(0)
        first = np.flatnonzero(np.diff(group[block], prepend=-1))
        mean_GD[group[block][first]] += np.add.reduceat(unit[block].double().numpy(), first, axis=0)
    mean_GD /= sizes[:, None]
    distance = np.empty(len(rows))
    for block in blocks:
        context.progress(0)
        distance[block] = ((unit[block].double().numpy() - mean_GD[group[block]]) ** 2).sum(1)
    least = np.minimum.reduceat(distance, np.cumsum(sizes) - sizes)
    near = np.flatnonzero(distance <= least[group] + _TIE)
    return rows[near[np.unique(group[near], return_index=True)[1]]]
