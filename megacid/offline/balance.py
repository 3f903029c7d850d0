"""Image semantic balance: inside every cluster, link near pairs and keep one sample per group.

Legend: n samples with an embedding (in order of the embedding partitions), m samples of one cluster, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from megacid.checkpoint.store import read_meta
from megacid.distributed.collectives import broadcast_json, gather_plain, rank, world_size
from megacid.errors import UserError
from megacid.offline.assign import prepare
from megacid.offline.files import PartialResults
from megacid.offline.linking import Link, keep_mask, owners
from megacid.offline.rows import EmbeddingRows, Rows
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
        if self.search_rows < 1 or self.block < 1:
            raise UserError(f"search rows is {self.search_rows} and block {self.block}, wanted at least 1 each")


@dataclass(frozen=True)
class Clusters:
    """Samples sorted by cluster, inside a cluster by preference. `order`: int64 [n] row numbers; cluster c is order[starts[c]:starts[c+1]]."""

    order: np.ndarray
    starts: np.ndarray

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


def read_labels(clusters: Path, rows: EmbeddingRows) -> tuple[np.ndarray, np.ndarray, int]:
    """(label int32 [n], score float16 [n], k) of a cluster folder, joined by key. UserError when they do not belong together."""
    meta = read_meta(clusters, expect="cluster")
    if meta["shards_digest"] != rows.meta["shards_digest"]:
        raise UserError(
            f"{clusters} was made from other shards than {rows.directory}: run tools/cluster.py on {rows.directory}"
        )
    for name in ("model", "weights", "precision"):
        if meta.get(name) != rows.meta.get(name):
            raise UserError(
                f"{clusters} was made from embeddings of another teacher ({name} {meta.get(name)!r}) than "
                f"{rows.directory} ({rows.meta.get(name)!r}): run tools/cluster.py on {rows.directory}"
            )
    k = int(meta["k"])
    label, score = np.full(rows.num_rows, -1, np.int32), np.zeros(rows.num_rows, np.float16)
    for partition, stem in enumerate(rows.stems):
        path = clusters / "labels" / f"{stem}.parquet"
        try:
            table = pq.read_table(path, columns=["key", "label", "score"])
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read ({error}): run tools/cluster.py again") from None
        keys, have = rows.keys(partition), table["key"].to_pylist()
        where = slice(int(rows.starts[partition]), int(rows.starts[partition + 1]))
        stored = table["label"].to_numpy()
        if stored.size and (stored.min() < -1 or stored.max() >= k):
            raise UserError(
                f"{path} holds labels {stored.min()} .. {stored.max()}, wanted -1 .. {k - 1} as meta.json says: run "
                "tools/cluster.py again"
            )
        if keys == have:
            label[where], score[where] = stored, table["score"].to_numpy()
            continue
        row_of = {key: row for row, key in enumerate(have)}
        at = np.array([row_of.get(key, -1) for key in keys], np.int64)
        if (at < 0).any():
            raise UserError(
                f"{path} has no label for {int((at < 0).sum())} embedded samples: run tools/cluster.py on {rows.directory} again"
            )
        label[where], score[where] = stored[at], table["score"].to_numpy()[at]
    return label, score, k


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
            _check_unit(x_BD, rows, np.arange(low, high))
        tick(0)
        out[low:high] = -(v * t).sum(1).numpy()
    return out


def group_by_cluster(label: np.ndarray, priority: np.ndarray, k: int) -> Clusters:
    """Sort samples by cluster and preference; equal preference: earlier rows first. Samples without a label (-1) are in no cluster."""
    order = np.lexsort((priority, label))
    starts = np.searchsorted(label[order], np.arange(k + 1))
    return Clusters(order.astype(np.int64), starts.astype(np.int64))


def _check_unit(x_BD: torch.Tensor, rows: Rows, numbers: np.ndarray) -> None:
    """UserError when a normalised row has no length: it was zero, NaN or infinite. numbers: int64 [B], its place in `rows`."""
    bad = ~(x_BD.norm(dim=1) > 0.5)
    if bad.any():
        raise UserError(
            f"{rows.name(int(numbers[int(bad.nonzero()[0])]))} is zero or holds NaN or infinity, wanted a unit vector: "
            "embed that shard again"
        )


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
    x_MD = prepare(image.take(members), "cosine", device)
    _check_unit(x_MD, image, members)
    return owners(x_MD, threshold, settings.link, settings.block, tick)


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
) -> Decision:
    """Link and choose in every cluster; clusters are split over the ranks and every rank gets the whole decision.

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
    bounds = part_bounds(sizes)
    cost = np.concatenate([[0.0], np.cumsum(sizes**2 + 1)])[bounds]
    cuts = np.searchsorted(cost, np.linspace(0, cost[-1], world_size(group) + 1))
    cuts[0], cuts[-1] = 0, len(bounds) - 1
    first, last = int(cuts[rank(group)]), int(cuts[rank(group) + 1])
    base = int(clusters.starts[bounds[first]])
    owner = np.empty(int(clusters.starts[bounds[last]]) - base, np.int64)
    keep = np.empty(len(owner), bool)
    with together(group):
        for part in range(first, last):
            low, high = int(bounds[part]), int(bounds[part + 1])
            local = _link_part(image, clusters, low, high, threshold, settings, device, work, tick)
            begin = int(clusters.starts[low])
            for cluster in range(low, high):
                start, stop = int(clusters.starts[cluster]), int(clusters.starts[cluster + 1])
                inside = local[start - begin : stop - begin]
                keep[start - base : stop - base] = keep_mask(inside, settings.cap)
                owner[start - base : stop - base] = clusters.order[start:stop][inside]
    all_owner = _gathered(owner, device, group)
    all_keep = _gathered(keep.astype(np.uint8), device, group).astype(bool)
    inside = clusters.order[clusters.starts[0] :]
    # A sample without a cluster cannot be compared with anything and stays.
    by_row = Decision(np.ones(image.num_rows, bool), np.arange(image.num_rows), threshold, curve, searched)
    by_row.keep[inside], by_row.owner[inside] = all_keep, all_owner
    return by_row


def part_bounds(sizes: np.ndarray) -> np.ndarray:
    """int64 [parts + 1]: first cluster of every part, of about PART_PAIRS pairs or one larger cluster each. The same for
    every number of ranks. sizes: [k]."""
    cost = np.cumsum(np.asarray(sizes, np.float64) ** 2 + 1)
    marks = np.arange(PART_PAIRS, cost[-1], PART_PAIRS, dtype=np.float64) if len(cost) else np.empty(0)
    return np.unique(np.concatenate([[0], np.searchsorted(cost, marks), [len(cost)]])).astype(np.int64)


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
