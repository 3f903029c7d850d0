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
import torch

from megacid.distributed.consensus import broadcast_json
from megacid.distributed.stopping import Progress, no_progress
from megacid.offline.balance.context import BalanceContext, Keep
from megacid.offline.balance.cross_cluster import find_candidates, link_neighbors
from megacid.offline.balance.linking import check_unit
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
from megacid.offline.nearest import prepare
from megacid.offline.random_streams import RandomStream
from megacid.offline.rows import Rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """The samples kept, by embedding row."""

    keep: np.ndarray  # bool [n]
    representative: np.ndarray  # int64 [n], the row kept for each row's group, before the cap
    threshold: float  # Euclidean distance below which pairs were linked
    curve: Curve  # points visited by the search; empty when the threshold was given
    searched_rows: int  # samples the threshold was searched on, 0 when it was given
    # int64 [n], representatives after the first pass, before medoids; `representative` itself without a second pass.
    first_pass: np.ndarray

    @property
    def removed_across_clusters(self) -> int:
        """Number of samples that the first pass kept and the second one removed."""
        number = np.arange(len(self.representative))
        return int((self.first_pass == number).sum() - (self.representative == number).sum())


def preference(
    keep: Keep, score: np.ndarray, seed: int, image: Rows, text: Rows | None, progress: Progress = no_progress
) -> np.ndarray:
    """The order in which samples are preferred, float [n]: smaller is kept first.

    Args:
        score: [n], similarity to the centroid.
        text: caption embeddings, for keep="caption".

    Raises:
        UserError: naming an embedding that is zero or not finite.
    """
    if keep in ("nearest", "medoid"):  # with medoids this is the order of the cap alone
        return -score.astype(np.float32)
    if keep == "farthest":
        return score.astype(np.float32)
    if keep == "random":
        return np.random.default_rng([seed, RandomStream.KEEP_ORDER]).permutation(len(score)).astype(np.float64)
    assert text is not None
    out, block = np.empty(len(score), np.float32), 65536
    for low in range(0, len(score), block):
        high = min(low + block, len(score))
        v, t = (prepare(rows.read(low, high), "cosine", torch.device("cpu")) for rows in (image, text))
        for x_BD, rows in ((v, image), (t, text)):
            check_unit(x_BD, rows, np.arange(low, high))
        progress(0)
        out[low:high] = -(v * t).sum(1).numpy()
    return out


def decide(context: BalanceContext) -> Decision:
    """Links samples and chooses those to keep. A collective: ranks share the work and all return the whole decision.

    Finished parts are kept in `context.partial` and are not computed again.
    """
    settings, clusters = context.settings, context.clusters
    threshold, curve, searched = settings.threshold, [], 0
    if threshold is None:
        with context.stop_together():
            # Only one rank searches: two devices may round a product differently.
            result = search_threshold(context) if context.rank == 0 else None
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
    best: tuple[Decision, BalanceContext] | None = None
    following: float | None = threshold
    while following is not None and len(passes) < MAX_PASSES:
        decision = _link(context, following, curve, searched)
        passes.append((following, float(decision.keep.mean())))
        if best is None or abs(passes[-1][1] - target) < abs(float(best[0].keep.mean()) - target):
            best = decision, context
        if abs(passes[-1][1] - target) <= tolerance:
            return best
        if searched == context.rows.num_rows:  # the search has tried all thresholds on all samples
            break
        log.info("threshold %.5f keeps %.2f %% of all samples, the target is %.2f %%: searching on", following,
                 100 * passes[-1][1], 100 * target)  # fmt: skip
        following = next_threshold(target, passes, curve)
        # The name of a pass is in those of its partial results; the progress counts the rows of the first pass only.
        context = replace(context, prefix=f"pass-{len(passes)}-", progress=partial(_poll, context.progress))
    assert best is not None
    if context.rank == 0:
        log.warning("%s", explain_share(target, passes if len(passes) > 1 else curve))
    return best


def _poll(progress: Progress, rows: int) -> None:
    progress(0)


def _link(context: BalanceContext, threshold: float, curve: Curve, searched: int) -> Decision:
    """The passes over all samples at one threshold. A collective."""
    settings, clusters = context.settings, context.clusters
    first_pass = representative = link_clusters(context, threshold)
    if context.assigner is not None and threshold > 0:
        rows = clusters.rows
        if settings.link == "greedy":
            rows = rows[representative[rows] == rows]  # the second pass compares only samples that the first one kept
        with context.stop_together():
            candidates = find_candidates(context, rows, threshold)
        representative = link_neighbors(context, representative, threshold, context.gather(candidates))
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
