"""Image semantic balance: inside every cluster, link near pairs and keep one sample per group.

Legend: n samples with an embedding (in order of the embedding partitions), m samples of one cluster, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from megacid.distributed.collectives import broadcast_json, gather_plain, rank, world_size
from megacid.errors import UserError
from megacid.offline import across, linking
from megacid.offline.assign import Assigner, Metric, prepare
from megacid.offline.files import PartialResults
from megacid.offline.linking import Link, UnitRows, check_unit, keep_mask, owners, panel_rows
from megacid.offline.rows import Rows
from megacid.offline.stopping import together
from megacid.probes import probe

log = logging.getLogger(__name__)
Group = dist.ProcessGroup | None
Tick = Callable[[int], None]
Keep = Literal["nearest", "farthest", "random", "caption"]
_FARTHEST = 2.0  # no two unit vectors are farther apart
_RESOLUTION = 1e-5  # the search stops when its interval is this narrow
PART_PAIRS = 1 << 28  # pairs of samples in one partial result: seconds to minutes of work


@dataclass(frozen=True)
class BalanceSettings:
    """What decides which samples stay. Exactly one of `threshold` (distance) and `target_keep` (share of samples)."""

    threshold: float | None = None
    target_keep: float | None = None
    link: Link = "components"
    keep: Keep = "nearest"
    cap: int | None = None  # at most so many kept samples per cluster
    across: int = 0  # every sample is also compared with so many clusters that come next to it
    seed: int = 0
    search_rows: int = 200_000  # the threshold is searched on whole clusters with about so many samples
    block: int = 1024

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.target_keep is None):
            raise UserError("give exactly one of --threshold and --target-keep")
        if self.threshold is not None and not 0 <= self.threshold <= _FARTHEST:
            raise UserError(f"threshold is {self.threshold}, wanted a distance of unit vectors, 0 to 2")
        if self.target_keep is not None and not 0 < self.target_keep <= 1:
            raise UserError(f"target keep is {self.target_keep}, wanted a share above 0 and at most 1")
        if self.link not in ("components", "greedy"):
            raise UserError(f"link is {self.link!r}, wanted components or greedy")
        if self.keep not in ("nearest", "farthest", "random", "caption"):
            raise UserError(f"keep is {self.keep!r}, wanted nearest, farthest, random or caption")
        if self.cap is not None and self.cap < 1:
            raise UserError(f"cap is {self.cap}, wanted at least 1 sample per cluster")
        if self.across < 0:
            raise UserError(
                f"across is {self.across}, wanted 0 (inside clusters only) or a number of neighbouring clusters"
            )
        if self.search_rows < 1 or self.block < 1:
            raise UserError(f"search rows is {self.search_rows} and block {self.block}, wanted at least 1 each")


@dataclass(frozen=True)
class Clusters:
    """Samples sorted by cluster, inside a cluster by preference. `order`: int64 [n] row numbers; cluster c is order[starts[c]:starts[c+1]].
    `priority`: [n] by row number, smaller is preferred."""

    order: np.ndarray
    starts: np.ndarray
    priority: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts)


@dataclass(frozen=True)
class Decision:
    """keep: bool [n]; owner: int64 [n], the row kept for each row's group (before the cap); both by embedding row."""

    keep: np.ndarray
    owner: np.ndarray
    threshold: float
    curve: list[tuple[float, float]]  # (threshold, share kept) visited by the search
    searched_rows: int  # 0 when the threshold was given
    removed_across: int = 0  # kept by the first pass, not by the second


def preference(
    keep: Keep,
    score: np.ndarray,
    seed: int,
    image: Rows,
    text: Rows | None,
    block: int = 65536,
    tick: Tick = lambda rows: None,
) -> np.ndarray:
    """float32 [n]: smaller is kept first. UserError naming a row of the captions that is not finite or zero."""
    if keep == "nearest":
        return -score.astype(np.float32)
    if keep == "farthest":
        return score.astype(np.float32)
    if keep == "random":
        return np.random.default_rng([seed, 3]).permutation(len(score)).astype(np.float64)
    assert text is not None
    out = np.empty(len(score), np.float32)
    for low in range(0, len(score), block):
        high = min(low + block, len(score))
        v, t = (prepare(rows.read(low, high), "cosine", torch.device("cpu")) for rows in (image, text))
        for x_BD, rows in ((v, image), (t, text)):
            check_unit(x_BD, rows, np.arange(low, high))
        tick(0)
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
    tick: Tick,
) -> np.ndarray:
    """Owners of one cluster as positions inside it, int64 [m]."""
    members = clusters.order[clusters.starts[cluster] : clusters.starts[cluster + 1]]
    if len(members) < 2 or threshold <= 0:
        return np.arange(len(members), dtype=np.int64)
    panel = panel_rows(image.dim, settings.block)
    unit = UnitRows(image, members, device)
    # Small clusters, which are most of them, are held whole.
    x_MD = unit[:] if len(members) <= panel else unit
    return owners(x_MD, threshold, settings.link, settings.block, tick, panel)


def search_threshold(
    image: Rows,
    clusters: Clusters,
    settings: BalanceSettings,
    device: torch.device,
    work: PartialResults | None = None,
    tick: Tick = lambda rows: None,
) -> tuple[float, list[tuple[float, float]], int]:
    """(threshold whose share kept is nearest to the target, the visited curve, samples used) by bisection on whole clusters.

    Clusters are drawn by the seed until they hold `search_rows` samples; when that is all of them the share is exact.
    work: holds the points visited so far, which are not worked out again. tick: called with 0 for every cluster.
    """
    target = settings.target_keep
    assert target is not None
    chosen, count = [], 0
    for cluster in np.random.default_rng([settings.seed, 4]).permutation(len(clusters.sizes)):
        if count >= settings.search_rows:
            break
        if clusters.sizes[cluster]:
            chosen.append(int(cluster))
            count += int(clusters.sizes[cluster])
    if not count:
        raise UserError("no sample has a cluster: run tools/cluster.py again")

    # JSON keeps every bit of a float.
    visited: dict[float, int] = {float(at): int(kept) for at, kept in (work.json("search") if work else None) or []}

    def share(threshold: float) -> float:
        if threshold not in visited:
            kept = 0
            for c in chosen:
                tick(0)
                kept += int(keep_mask(_link(image, clusters, c, threshold, settings, device, tick), settings.cap).sum())
            visited[threshold] = kept
            if work:
                work.save_json("search", list(visited.items()))
            probe("balance:search", step=len(visited))
        return visited[threshold] / count

    low, high = 0.0, _FARTHEST
    curve = [(low, share(low)), (high, share(high))]
    # More is kept at `low`, less at `high`; ties (equal distances) can make the target unreachable.
    while high - low > _RESOLUTION and min(abs(kept - target) for _, kept in curve) * count >= 0.5:
        middle = (low + high) / 2
        kept = share(middle)
        curve.append((middle, kept))
        low, high = (middle, high) if kept > target else (low, middle)
    best = min(curve, key=lambda point: (abs(point[1] - target), point[0]))
    return best[0], sorted(curve), count


def decide(
    image: Rows,
    clusters: Clusters,
    settings: BalanceSettings,
    *,
    device: torch.device | str = "cpu",
    group: Group = None,
    work: PartialResults | None = None,
    tick: Tick = lambda rows: None,
    centroids: np.ndarray | None = None,
    metric: Metric = "cosine",
) -> Decision:
    """Link and choose in every cluster; clusters are split over the ranks and every rank gets the whole decision.

    centroids: float32 [k, D], for `settings.across`; metric: the one the labels were made with.
    work: holds the points of the search and the links of parts of the clusters; what is there is not done again.
    tick: called with rows done (also 0); when it raises Stopped, all ranks stop.
    """
    device = torch.device(device)
    curve: list[tuple[float, float]] = []
    threshold, searched = settings.threshold, 0
    if threshold is None:
        with together(group):
            # One rank decides: two devices may round a product differently.
            found = search_threshold(image, clusters, settings, device, work, tick) if rank(group) == 0 else None
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
    first, last = _my_parts(bounds, sizes**2, group)
    base = int(clusters.starts[bounds[first]])
    mine = np.empty(int(clusters.starts[bounds[last]]) - base, np.int64)
    with together(group):
        for part in range(first, last):
            low, high = int(bounds[part]), int(bounds[part + 1])
            local = _link_part(image, clusters, low, high, threshold, settings, device, work, tick)
            begin = int(clusters.starts[low])
            for cluster in range(low, high):
                start, stop = int(clusters.starts[cluster]), int(clusters.starts[cluster + 1])
                mine[start - base : stop - base] = clusters.order[start:stop][local[start - begin : stop - begin]]
    # A sample without a cluster cannot be compared with anything and stays.
    owner = np.arange(image.num_rows)
    owner[clusters.order[clusters.starts[0] :]] = _gathered(mine, device, group)
    before = int((owner == np.arange(len(owner))).sum())
    if settings.across and threshold > 0:
        if centroids is None:
            raise UserError(f"across is {settings.across} but there are no centroids: run tools/cluster.py again")
        links = _links_across(image, clusters, owner, threshold, settings, centroids, metric, device, group, work, tick)
        owner = across.joined(owner, links, clusters.priority, settings.link)
    removed = before - int((owner == np.arange(len(owner))).sum())
    return Decision(_kept(clusters, owner, settings.cap), owner, threshold, curve, searched, removed)


def _kept(clusters: Clusters, owner: np.ndarray, cap: int | None) -> np.ndarray:
    """bool [n]: rows that are their own owner, of every cluster at most the `cap` most preferred."""
    keep = owner == np.arange(len(owner))
    if cap is not None:
        for start, stop in zip(clusters.starts[:-1].tolist(), clusters.starts[1:].tolist()):
            if stop - start > cap:
                members = clusters.order[start:stop]
                own = keep[members]
                keep[members] = own & (np.cumsum(own) <= cap)
    return keep


def _links_across(
    image: Rows,
    clusters: Clusters,
    owner: np.ndarray,
    threshold: float,
    settings: BalanceSettings,
    centroids: np.ndarray,
    metric: Metric,
    device: torch.device,
    group: Group,
    work: PartialResults | None,
    tick: Tick,
) -> np.ndarray:
    """int64 [E, 2]: links between groups of neighbouring clusters, the same on every rank. owner: of the first pass."""
    rows = clusters.order[clusters.starts[0] :]
    if settings.link == "greedy":
        rows = rows[owner[rows] == rows]  # what the first pass removed is gone
    label = np.full(image.num_rows, -1, np.int32)
    label[clusters.order[clusters.starts[0] :]] = np.repeat(
        np.arange(len(clusters.sizes), dtype=np.int32), clusters.sizes
    )
    assigner = Assigner(prepare(centroids, metric, device), metric, device)
    chunks = -(-len(rows) // across.LIST_ROWS)
    parts = [np.empty((0, 2), np.int64)]
    with together(group):
        for chunk in range(rank(group) * chunks // world_size(group), (rank(group) + 1) * chunks // world_size(group)):
            parts.append(
                across.listed(image, rows, label[rows], assigner, settings.across, threshold, chunk, work, tick)
            )
    pairs = across.match_lists(_gathered(np.concatenate(parts), device, group), label, len(centroids))
    left, right = (side.astype(np.float64) for side in pairs.sizes)
    log.info(
        "%d pairs of neighbouring clusters, %d samples at their borders, %.3g flop",
        len(pairs),
        len(pairs.rows),
        2 * (left @ right) * image.dim,
    )
    panel = panel_rows(image.dim, settings.block, linking.PANEL_BYTES // 4)
    # A part is as large as its work, or as the rows that are held for it.
    cost = np.maximum(left * right, (left + right) / panel * PART_PAIRS)
    bounds = part_bounds(cost)
    first, last = _my_parts(bounds, cost, group)
    parts = [np.empty((0, 2), np.int64)]
    with together(group):
        for part in range(first, last):
            low, high = int(bounds[part]), int(bounds[part + 1])
            parts.append(
                across.link_pairs(
                    image, pairs, low, high, owner, threshold, settings.link, settings.block, panel, device, work, tick
                )
            )
    return _gathered(np.concatenate(parts), device, group)


def _my_parts(bounds: np.ndarray, cost: np.ndarray, group: Group) -> tuple[int, int]:
    """(first, last) of this rank's parts: about the same cost on every rank. cost: of each piece that `bounds` counts."""
    total = np.concatenate([[0.0], np.cumsum(cost + 1)])[bounds]
    cuts = np.searchsorted(total, np.linspace(0, total[-1], world_size(group) + 1))
    cuts[0], cuts[-1] = 0, len(bounds) - 1
    return int(cuts[rank(group)]), int(cuts[rank(group) + 1])


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
    tick: Tick,
) -> np.ndarray:
    """Owners of the clusters [low, high) as positions inside each, int64, one after another; kept in `work`."""
    begin, end = int(clusters.starts[low]), int(clusters.starts[high])
    name = f"links-{low}-{high}"
    before = work.array(name, (end - begin,), "i") if work else None
    if before is not None:
        tick(end - begin)
        return before
    local = np.empty(end - begin, np.int64)
    for cluster in range(low, high):
        start, stop = int(clusters.starts[cluster]), int(clusters.starts[cluster + 1])
        probe("balance:cluster", step=cluster)
        local[start - begin : stop - begin] = _link(image, clusters, cluster, threshold, settings, device, tick)
        tick(stop - start)
    if work:
        work.save_array(name, local)
    probe("balance:part", step=low)
    tick(0)
    return local


def _gathered(part: np.ndarray, device: torch.device, group: Group) -> np.ndarray:
    return gather_plain(torch.from_numpy(part).to(device), group).cpu().numpy()
