"""The first pass: duplicate groups inside every cluster."""

from __future__ import annotations

import numpy as np

from megacid.failpoints import failpoint
from megacid.offline.balance.context import BalanceContext
from megacid.offline.balance.linking import LinkOptions, UnitRows, representatives
from megacid.offline.row_numbers import all_rows


def link_cluster(context: BalanceContext, cluster: int, options: LinkOptions) -> np.ndarray:
    """The representatives of one cluster as places in it, int64 [M]."""
    return representatives(UnitRows(context.rows, context.clusters.members(cluster), context.device), options)


def link_clusters(context: BalanceContext, threshold: float) -> np.ndarray:
    """The representative of every row, int [n]; a row without a cluster is its own. A collective."""
    clusters = context.clusters
    mine = [clusters.order[:0]]
    with context.stop_together():
        for low, high in context.parts(clusters.sizes.astype(np.float64) ** 2):
            mine.append(_link_part(context, low, high, threshold))
    representative = all_rows(context.rows.num_rows)
    for place, piece in context.ranks.pieces(np.concatenate(mine)):
        representative[clusters.rows[place : place + len(piece)]] = piece
    return representative


def _link_part(context: BalanceContext, low: int, high: int, threshold: float) -> np.ndarray:
    """The representatives of the rows of the clusters [low, high), in order of `clusters.order`."""
    clusters, name = context.clusters, f"links-{low}-{high}"
    span = clusters.span(low, high)
    local = context.load(name, (span.stop - span.start,))
    if local is not None:
        context.progress(span.stop - span.start)
    else:
        local = np.empty(span.stop - span.start, np.int64)
        options = context.link_options(threshold)
        for cluster in range(low, high):
            failpoint("balance:cluster", step=cluster)
            own = clusters.span(cluster, cluster + 1)
            local[own.start - span.start : own.stop - span.start] = link_cluster(context, cluster, options)
            context.progress(own.stop - own.start)
        context.save(name, local)
        failpoint("balance:part", step=low)
        context.progress(0)
    first = np.repeat(clusters.starts[low:high], clusters.sizes[low:high])  # of the cluster of each row
    return clusters.order[first + local]
