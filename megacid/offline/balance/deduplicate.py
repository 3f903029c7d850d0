"""Image semantic balance: which samples are kept, and which of them represents each of the others.

Inside every cluster, near pairs are linked and one sample per group is kept (`linking`); the threshold is given, or
searched for a target share (`threshold_search`); a second pass links groups of neighbouring clusters (`cross_cluster`);
each group may then be represented by its medoid (`medoids`).

Legend: n samples with an embedding, in order of the embedding partitions.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megacid.distributed.consensus import broadcast_json
from megacid.distributed.stopping import Progress
from megacid.offline.balance.context import BalanceContext
from megacid.offline.balance.cross_cluster import find_candidates, link_neighbors
from megacid.offline.balance.medoids import represent_by_medoids
from megacid.offline.balance.threshold_search import (
    MAX_PASSES,
    SHARE_TOLERANCE,
    Curve,
    explain_share,
    next_threshold,
    search_threshold,
)
from megacid.offline.balance.within_cluster import link_clusters
from megacid.offline.row_numbers import is_own

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """The samples kept, by embedding row."""

    keep: np.ndarray  # bool [n]
    representative: np.ndarray  # int [n], the row kept for each row's group, before the cap
    threshold: float  # Euclidean distance below which pairs were linked
    curve: Curve  # points visited by the search; empty when the threshold was given
    searched_rows: int  # samples the threshold was searched on, 0 when it was given
    # int [n], representatives after the first pass, before medoids; `representative` itself without a second pass.
    first_pass: np.ndarray

    @property
    def removed_across_clusters(self) -> int:
        """Number of samples that the first pass kept and the second one removed."""
        return int(is_own(self.first_pass).sum() - is_own(self.representative).sum())


def decide(context: BalanceContext) -> Decision:
    """Links samples and chooses those to keep. A collective: ranks share the work and all return the whole decision.

    Finished parts are kept in `context.partial` and are not computed again.
    """
    settings, clusters = context.settings, context.clusters
    threshold, curve, searched = settings.threshold, [], 0
    if threshold is None:
        with context.stop_together():
            # Only one rank searches: two devices may round a product differently.
            result = search_threshold(context) if context.ranks.rank == 0 else None
        threshold, points, searched = broadcast_json(result, context.group)
        curve = [(float(at), float(kept)) for at, kept in points]
        log.info("threshold %.5f found on %d of %d samples", threshold, searched, context.rows.num_rows)
    sizes = clusters.sizes.astype(np.float64)
    flop = (sizes**2).sum() * context.rows.dim
    log.info("%d clusters, the largest has %d samples, at most %.3g flop", len(sizes), sizes.max(initial=0), flop)
    if settings.target_keep is None:
        decision = _link(context, threshold, curve, searched)
    else:
        decision, context = _link_to_target(context, threshold, curve, searched)
    # Without a cap the medoids do not change the share kept, so those of the chosen pass suffice.
    return _with_medoids(context, decision) if settings.keep == "medoid" and settings.cap is None else decision


def _link_to_target(
    context: BalanceContext, threshold: float, curve: Curve, searched: int
) -> tuple[Decision, BalanceContext]:
    """Repeats the passes over all samples until the share kept is the target, or as near as it gets. A collective.

    Returns the decision of the best pass, and the context of that pass.
    """
    target = context.settings.target_keep
    assert target is not None
    tolerance = max(SHARE_TOLERANCE, 0.5 / max(context.rows.num_rows, 1))
    passes: Curve = []
    contexts: list[BalanceContext] = []
    following: float | None = threshold
    decision: Decision | None = None
    while following is not None and len(passes) < MAX_PASSES:
        decision = None  # two decisions are too many for the memory
        decision = _link(context, following, curve, searched)
        passes.append((following, float(decision.keep.mean())))
        contexts.append(context)
        if abs(passes[-1][1] - target) <= tolerance:
            break
        if searched == context.rows.num_rows:  # the search has tried all thresholds on all samples
            break
        log.info("threshold %.5f keeps %.2f %% of all samples, the target is %.2f %%: searching on", following,
                 100 * passes[-1][1], 100 * target)  # fmt: skip
        following = next_threshold(target, passes, curve)
        # The name of a pass is in those of its partial results; the progress counts the rows of the first pass only.
        context = replace(context, prefix=f"pass-{len(passes)}-", progress=partial(_poll, context.progress))
    gaps = [abs(kept - target) for _, kept in passes]
    best = gaps.index(min(gaps))
    if gaps[best] > tolerance and context.ranks.rank == 0:
        log.warning("%s", explain_share(target, passes if len(passes) > 1 else curve))
    if best < len(passes) - 1:  # its partial results are kept
        decision = None
        again = replace(contexts[best], progress=partial(_poll, context.progress))
        decision = _link(again, passes[best][0], curve, searched)
    assert decision is not None
    return decision, contexts[best]


def _poll(progress: Progress, rows: int) -> None:
    progress(0)


def _link(context: BalanceContext, threshold: float, curve: Curve, searched: int) -> Decision:
    """The passes over all samples at one threshold. A collective."""
    settings, clusters = context.settings, context.clusters
    first_pass = representative = link_clusters(context, threshold)
    if context.assigner is not None and threshold > 0:
        # The second pass of greedy keep compares only samples that the first one kept.
        first = representative if settings.link == "greedy" else None
        with context.stop_together():
            found = [find_candidates(context, clusters.rows, threshold, first)]
        representative = link_neighbors(context, representative, threshold, found.pop())  # which frees the entries
    keep = clusters.keep_mask(representative, settings.cap)
    decision = Decision(keep, representative, threshold, curve, searched, first_pass)
    return _with_medoids(context, decision) if settings.keep == "medoid" and settings.cap is not None else decision


def _with_medoids(context: BalanceContext, decision: Decision) -> Decision:
    """The decision with each group represented by its medoid. A collective."""
    representative = represent_by_medoids(context, decision.representative)
    merged = decision.first_pass is not decision.representative
    return replace(
        decision,
        keep=context.clusters.keep_mask(representative, context.settings.cap),
        representative=representative,
        first_pass=decision.first_pass if merged else representative,
    )
