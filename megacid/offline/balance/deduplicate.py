"""Image semantic balance: inside every cluster, link near pairs and keep one sample per group.

Legend: n samples with an embedding (in order of the embedding partitions), m samples of one cluster, D width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from megacid.distributed.collectives import gather_plain, rank, world_size
from megacid.distributed.consensus import broadcast_json
from megacid.distributed.stopping import Progress, no_progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.balance import cross_cluster, linking
from megacid.offline.balance.clusters import Clusters
from megacid.offline.balance.linking import Link, UnitRows, check_unit, keep_mask, panel_rows, representatives
from megacid.offline.balance.threshold_search import FARTHEST, bisect_threshold, sample_clusters
from megacid.offline.nearest import Assigner, Metric, prepare
from megacid.offline.random_streams import RandomStream
from megacid.offline.rows import Rows, SubsetRows
from megacid.storage.stage_directory import PartialResults

log = logging.getLogger(__name__)
Group = dist.ProcessGroup | None
Keep = Literal["nearest", "farthest", "random", "caption"]
PART_PAIRS = 1 << 28  # pairs of samples in one partial result: seconds to minutes of work


@dataclass(frozen=True)
class BalanceSettings:
    """What decides which samples stay. Exactly one of `threshold` (distance) and `target_keep` (share of samples)."""

    threshold: float | None = None
    target_keep: float | None = None
    link: Link = "components"
    keep: Keep = "nearest"
    cap: int | None = None  # at most so many kept samples per cluster
    neighbor_clusters: int = 0  # every sample is also compared with so many clusters that come next to it
    seed: int = 0
    search_rows: int = 200_000  # the threshold is searched on whole clusters with about so many samples
    block: int = 1024

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.target_keep is None):
            raise UserError("give exactly one of --threshold and --target-keep")
        if self.threshold is not None and not 0 <= self.threshold <= FARTHEST:
            raise UserError(f"threshold is {self.threshold}, expected a distance of unit vectors, 0 to 2")
        if self.target_keep is not None and not 0 < self.target_keep <= 1:
            raise UserError(f"target keep is {self.target_keep}, expected a share above 0 and at most 1")
        if self.link not in ("components", "greedy"):
            raise UserError(f"link is {self.link!r}, expected components or greedy")
        if self.keep not in ("nearest", "farthest", "random", "caption"):
            raise UserError(f"keep is {self.keep!r}, expected nearest, farthest, random or caption")
        if self.cap is not None and self.cap < 1:
            raise UserError(f"cap is {self.cap}, expected at least 1 sample per cluster")
        if self.neighbor_clusters < 0:
            raise UserError(
                f"neighbor clusters is {self.neighbor_clusters}, expected 0 (inside clusters only) or a number of neighbouring clusters"
            )
        if self.search_rows < 1 or self.block < 1:
            raise UserError(f"search rows is {self.search_rows} and block {self.block}, expected at least 1 each")


@dataclass(frozen=True)
class Decision:
    """keep: bool [n]; representative: int64 [n], the row kept for each row's group (before the cap); both by embedding row."""

    keep: np.ndarray
    representative: np.ndarray
    threshold: float
    curve: list[tuple[float, float]]  # (threshold, share kept) visited by the search
    searched_rows: int  # 0 when the threshold was given
    first_pass: np.ndarray  # int64 [n], of the first pass; `representative` itself without a second one

    @property
    def removed_across_clusters(self) -> int:
        """Samples kept by the first pass, not by the second."""
        number = np.arange(len(self.representative))
        return int((self.first_pass == number).sum() - (self.representative == number).sum())


def preference(
    keep: Keep,
    score: np.ndarray,
    seed: int,
    image: Rows,
    text: Rows | None,
    block: int = 65536,
    progress: Progress = no_progress,
) -> np.ndarray:
    """float32 [n]: smaller is kept first. UserError naming a row of the captions that is not finite or zero."""
    if keep == "nearest":
        return -score.astype(np.float32)
    if keep == "farthest":
        return score.astype(np.float32)
    if keep == "random":
        return np.random.default_rng([seed, RandomStream.KEEP_ORDER]).permutation(len(score)).astype(np.float64)
    assert text is not None
    out = np.empty(len(score), np.float32)
    for low in range(0, len(score), block):
        high = min(low + block, len(score))
        v, t = (prepare(rows.read(low, high), "cosine", torch.device("cpu")) for rows in (image, text))
        for x_BD, rows in ((v, image), (t, text)):
            check_unit(x_BD, rows, np.arange(low, high))
        progress(0)
        out[low:high] = -(v * t).sum(1).numpy()
    return out


def group_by_cluster(label: np.ndarray, priority: np.ndarray, k: int) -> Clusters:
    """Sort samples by cluster and preference; equal preference: earlier rows first. Samples without a label (-1) are in no cluster."""
    order = np.lexsort((priority, label))
    starts = np.searchsorted(label[order], np.arange(k + 1))
    return Clusters(order.astype(np.int64), starts.astype(np.int64), priority)


def _link(
    image: Rows,
    clusters: Clusters,
    cluster: int,
    threshold: float,
    settings: BalanceSettings,
    device: torch.device,
    progress: Progress,
) -> np.ndarray:
    """Representatives of one cluster as positions inside it, int64 [m]."""
    members = clusters.order[clusters.starts[cluster] : clusters.starts[cluster + 1]]
    if len(members) < 2 or threshold <= 0:
        return np.arange(len(members), dtype=np.int64)
    panel = panel_rows(image.dim, settings.block)
    unit = UnitRows(image, members, device)
    # Small clusters, which are most of them, are held whole.
    x_MD = unit[:] if len(members) <= panel else unit
    return representatives(x_MD, threshold, settings.link, settings.block, progress, panel)


def search_threshold(
    image: Rows,
    clusters: Clusters,
    settings: BalanceSettings,
    device: torch.device,
    work: PartialResults | None = None,
    progress: Progress = no_progress,
    assigner: Assigner | None = None,
) -> tuple[float, list[tuple[float, float]], int]:
    """(threshold whose share kept is nearest to the target, the visited curve, samples used), searched on whole clusters.

    Clusters are drawn by the seed until they hold `search_rows` samples; when that is all of them the share is exact.
    work: holds the points visited so far, which are not worked out again. progress: called with 0 for every cluster.
    assigner: of the centroids, for `settings.neighbor_clusters`.
    """
    assert settings.target_keep is not None
    chosen = sample_clusters(clusters.sizes, settings.search_rows, settings.seed, assigner)
    numbers, part = clusters.of(chosen)
    rows, count = SubsetRows(image, numbers), len(numbers)
    lists = np.empty((0, 2), np.int64)
    if assigner is not None:
        # At the largest threshold a list leaves nothing out, so that it serves all of them.
        lists = _lists(rows, part, np.arange(count), FARTHEST, settings, assigner, (0, 1), None, progress)
    listed_here = np.isin(lists[:, 1], chosen).mean() if len(lists) else 1.0
    # JSON keeps every bit of a float.
    visited: dict[float, float] = {float(at): float(kept) for at, kept in (work.json("search") if work else None) or []}

    def share(threshold: float) -> float:
        if threshold not in visited:
            representative, kept = np.arange(count), 0.0
            for c in chosen:
                progress(0)
                local = _link(rows, part, c, threshold, settings, device, progress)
                members = part.order[part.starts[c] : part.starts[c + 1]]
                representative[members] = members[local]
                kept += int(keep_mask(local, settings.cap).sum())
            if assigner is not None and threshold > 0:
                pairs = _pairs(part, lists, representative, settings)
                links = _links_across(rows, pairs, representative, threshold, settings, device, (0, 1), None, progress)
                both = _kept(
                    part, cross_cluster.merge_groups(representative, links, part.priority, settings.link), settings.cap
                ).sum()
                # What was removed across the borders that lie inside of the sample, for all borders that were listed.
                kept = max(kept - (kept - float(both)) / max(listed_here, 1 / count), 0.0)
            visited[threshold] = kept
            if work:
                work.save_json("search", list(visited.items()))
            failpoint("balance:search", step=len(visited))
        return visited[threshold] / count

    threshold, curve = bisect_threshold(settings.target_keep, count, share)
    return threshold, curve, count


def decide(
    image: Rows,
    clusters: Clusters,
    settings: BalanceSettings,
    *,
    device: torch.device | str = "cpu",
    group: Group = None,
    work: PartialResults | None = None,
    progress: Progress = no_progress,
    centroids: np.ndarray | None = None,
    metric: Metric = "cosine",
) -> Decision:
    """Link and choose in every cluster; clusters are split over the ranks and every rank gets the whole decision.

    centroids: float32 [k, D], for `settings.neighbor_clusters`; metric: the one the labels were made with.
    work: holds the points of the search and the links of parts of the clusters; what is there is not done again.
    progress: called with rows done (also 0); when it raises Stopped, all ranks stop.
    """
    device, me = torch.device(device), (rank(group), world_size(group))
    curve: list[tuple[float, float]] = []
    threshold, searched = settings.threshold, 0
    assigner: Assigner | None = None
    if settings.neighbor_clusters:
        if centroids is None:
            raise UserError(
                f"neighbor clusters is {settings.neighbor_clusters} but there are no centroids: run tools/cluster.py again"
            )
        assigner = Assigner(prepare(centroids, metric, device), metric, device)
    if threshold is None:
        with stop_together(group):
            # One rank decides: two devices may round a product differently.
            found = None
            if me[0] == 0:
                found = search_threshold(image, clusters, settings, device, work, progress, assigner)
        threshold, points, searched = broadcast_json(found, group)
        curve = [(float(at), float(kept)) for at, kept in points]
        log.info("threshold %.5f found on %d of %d samples", threshold, searched, image.num_rows)
    sizes = clusters.sizes.astype(np.float64)
    log.info(
        "%d clusters, the largest has %d samples, at most %.3g flop",
        len(sizes),
        sizes.max(initial=0),
        (sizes**2).sum() * image.dim,
    )
    bounds = part_bounds(sizes**2)
    first, last = _my_parts(bounds, sizes**2, me)
    base = int(clusters.starts[bounds[first]])
    mine = np.empty(int(clusters.starts[bounds[last]]) - base, np.int64)
    with stop_together(group):
        for part in range(first, last):
            low, high = int(bounds[part]), int(bounds[part + 1])
            local = _link_part(image, clusters, low, high, threshold, settings, device, work, progress)
            begin = int(clusters.starts[low])
            for cluster in range(low, high):
                start, stop = int(clusters.starts[cluster]), int(clusters.starts[cluster + 1])
                mine[start - base : stop - base] = clusters.order[start:stop][local[start - begin : stop - begin]]
    # A sample without a cluster cannot be compared with anything and stays.
    representative = np.arange(image.num_rows)
    representative[clusters.order[clusters.starts[0] :]] = _gathered(mine, device, group)
    inside = representative
    if assigner is not None and threshold > 0:
        rows = clusters.order[clusters.starts[0] :]
        if settings.link == "greedy":
            rows = rows[representative[rows] == rows]  # the others need no list
        with stop_together(group):
            lists = _lists(image, clusters, rows, threshold, settings, assigner, me, work, progress)
        pairs = _pairs(clusters, _gathered(lists, device, group), representative, settings)
        left, right = (side.astype(np.float64) for side in pairs.sizes)
        log.info(
            "%d pairs of neighbouring clusters, %d samples at their borders, %.3g flop",
            len(pairs),
            len(pairs.rows),
            2 * (left @ right) * image.dim,
        )
        with stop_together(group):
            links = _links_across(image, pairs, representative, threshold, settings, device, me, work, progress)
        representative = cross_cluster.merge_groups(
            representative, _gathered(links, device, group), clusters.priority, settings.link
        )
    return Decision(_kept(clusters, representative, settings.cap), representative, threshold, curve, searched, inside)


def _kept(clusters: Clusters, representative: np.ndarray, cap: int | None) -> np.ndarray:
    """bool [n]: rows that are their own representative, of every cluster at most the `cap` most preferred."""
    keep = representative == np.arange(len(representative))
    if cap is not None:
        for start, stop in zip(clusters.starts[:-1].tolist(), clusters.starts[1:].tolist()):
            if stop - start > cap:
                members = clusters.order[start:stop]
                own = keep[members]
                keep[members] = own & (np.cumsum(own) <= cap)
    return keep


def _lists(
    image: Rows,
    clusters: Clusters,
    rows: np.ndarray,
    threshold: float,
    settings: BalanceSettings,
    assigner: Assigner,
    me: tuple[int, int],
    work: PartialResults | None,
    progress: Progress,
) -> np.ndarray:
    """int64 [entries, 2]: (row, cluster it lists), of this rank's part of these rows. me: rank, number of ranks."""
    label = clusters.labels(image.num_rows)[rows]
    chunks = -(-len(rows) // cross_cluster.LIST_ROWS)
    parts = [np.empty((0, 2), np.int64)]
    for chunk in range(me[0] * chunks // me[1], (me[0] + 1) * chunks // me[1]):
        parts.append(
            cross_cluster.candidate_clusters(
                image, rows, label, assigner, settings.neighbor_clusters, threshold, chunk, work, progress
            )
        )
    return np.concatenate(parts)


def _pairs(
    clusters: Clusters, lists: np.ndarray, representative: np.ndarray, settings: BalanceSettings
) -> cross_cluster.Pairs:
    """Which samples of which clusters are compared. lists: int64 [entries, 2]; representative: of the first pass."""
    if settings.link == "greedy":
        lists = lists[representative[lists[:, 0]] == lists[:, 0]]  # what the first pass removed is gone
    return cross_cluster.match_lists(lists, clusters.labels(len(representative)), len(clusters.sizes))


def _links_across(
    image: Rows,
    pairs: cross_cluster.Pairs,
    representative: np.ndarray,
    threshold: float,
    settings: BalanceSettings,
    device: torch.device,
    me: tuple[int, int],
    work: PartialResults | None,
    progress: Progress,
) -> np.ndarray:
    """int64 [E, 2]: links between groups of neighbouring clusters, of this rank's part of the pairs. representative: of the first pass."""
    left, right = (side.astype(np.float64) for side in pairs.sizes)
    panel = panel_rows(image.dim, settings.block, linking.PANEL_BYTES // 4)
    # A part is as large as its work, or as the rows that are held for it.
    cost = np.maximum(left * right, (left + right) / panel * PART_PAIRS)
    bounds = part_bounds(cost)
    first, last = _my_parts(bounds, cost, me)
    parts = [np.empty((0, 2), np.int64)]
    for part in range(first, last):
        low, high = int(bounds[part]), int(bounds[part + 1])
        parts.append(
            cross_cluster.link_pairs(
                image,
                pairs,
                low,
                high,
                representative,
                threshold,
                settings.link,
                settings.block,
                panel,
                device,
                work,
                progress,
            )
        )
    return np.concatenate(parts)


def _my_parts(bounds: np.ndarray, cost: np.ndarray, me: tuple[int, int]) -> tuple[int, int]:
    """(first, last) of this rank's parts: about the same cost on every rank. cost: of each piece that `bounds` counts."""
    total = np.concatenate([[0.0], np.cumsum(cost + 1)])[bounds]
    cuts = np.searchsorted(total, np.linspace(0, total[-1], me[1] + 1))
    cuts[0], cuts[-1] = 0, len(bounds) - 1
    return int(cuts[me[0]]), int(cuts[me[0] + 1])


def part_bounds(cost: np.ndarray) -> np.ndarray:
    """int64 [parts + 1]: first piece of every part, of about PART_PAIRS pairs or one larger piece each. The same for every
    number of ranks. cost: [pieces], pairs of samples in each cluster, or in each pair of clusters."""
    total = np.cumsum(np.asarray(cost, np.float64) + 1)
    marks = np.arange(PART_PAIRS, total[-1], PART_PAIRS, dtype=np.float64) if len(total) else np.empty(0)
    return np.unique(np.concatenate([[0], np.searchsorted(total, marks), [len(total)]])).astype(np.int64)


def _link_part(
    image: Rows,
    clusters: Clusters,
    low: int,
    high: int,
    threshold: float,
    settings: BalanceSettings,
    device: torch.device,
    work: PartialResults | None,
    progress: Progress,
) -> np.ndarray:
    """Representatives of the clusters [low, high) as positions inside each, int64, one after another; kept in `work`."""
    begin, end = int(clusters.starts[low]), int(clusters.starts[high])
    name = f"links-{low}-{high}"
    before = work.array(name, (end - begin,), "i") if work else None
    if before is not None:
        progress(end - begin)
        return before
    local = np.empty(end - begin, np.int64)
    for cluster in range(low, high):
        start, stop = int(clusters.starts[cluster]), int(clusters.starts[cluster + 1])
        failpoint("balance:cluster", step=cluster)
        local[start - begin : stop - begin] = _link(image, clusters, cluster, threshold, settings, device, progress)
        progress(stop - start)
    if work:
        work.save_array(name, local)
    failpoint("balance:part", step=low)
    progress(0)
    return local


def _gathered(part: np.ndarray, device: torch.device, group: Group) -> np.ndarray:
    return gather_plain(torch.from_numpy(part).to(device), group).cpu().numpy()
