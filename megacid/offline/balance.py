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
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from megacid.checkpoint.store import read_meta
from megacid.distributed.collectives import broadcast_json, fail_together, gather_plain, rank, world_size
from megacid.errors import UserError
from megacid.offline.assign import prepare
from megacid.offline.linking import Link, keep_mask, owners
from megacid.offline.rows import EmbeddingRows, Rows

log = logging.getLogger(__name__)
Group = dist.ProcessGroup | None
Keep = Literal["nearest", "farthest", "random", "caption"]
_FARTHEST = 2.0  # no two unit vectors are farther apart
_RESOLUTION = 1e-5  # the search stops when its interval is this narrow


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
    label, score = np.full(rows.num_rows, -1, np.int32), np.zeros(rows.num_rows, np.float16)
    for partition, stem in enumerate(rows.stems):
        path = clusters / "labels" / f"{stem}.parquet"
        try:
            table = pq.read_table(path, columns=["key", "label", "score"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}): run tools/cluster.py again") from None
        keys, have = rows.keys(partition), table["key"].to_pylist()
        where = slice(int(rows.starts[partition]), int(rows.starts[partition + 1]))
        if keys == have:
            label[where], score[where] = table["label"].to_numpy(), table["score"].to_numpy()
            continue
        row_of = {key: row for row, key in enumerate(have)}
        at = np.array([row_of.get(key, -1) for key in keys], np.int64)
        if (at < 0).any():
            raise UserError(
                f"{path} has no label for {int((at < 0).sum())} embedded samples: run tools/cluster.py on {rows.directory} again"
            )
        label[where], score[where] = table["label"].to_numpy()[at], table["score"].to_numpy()[at]
    return label, score, int(meta["k"])


def preference(
    keep: Keep, score: np.ndarray, seed: int, image: Rows, text: Rows | None, block: int = 65536
) -> np.ndarray:
    """float32 [n]: smaller is kept first."""
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
        out[low:high] = -(v * t).sum(1).numpy()
    return out


def group_by_cluster(label: np.ndarray, priority: np.ndarray, k: int) -> Clusters:
    """Sort samples by cluster and preference; equal preference: earlier rows first. Samples without a label (-1) are in no cluster."""
    order = np.lexsort((priority, label))
    starts = np.searchsorted(label[order], np.arange(k + 1))
    return Clusters(order.astype(np.int64), starts.astype(np.int64))


def _link(
    image: Rows, clusters: Clusters, cluster: int, threshold: float, settings: BalanceSettings, device: torch.device
) -> np.ndarray:
    """Owners of one cluster as positions inside it, int64 [m]."""
    members = clusters.order[clusters.starts[cluster] : clusters.starts[cluster + 1]]
    if len(members) < 2 or threshold <= 0:
        return np.arange(len(members), dtype=np.int64)
    return owners(prepare(image.take(members), "cosine", device), threshold, settings.link, settings.block)


def search_threshold(
    image: Rows, clusters: Clusters, settings: BalanceSettings, device: torch.device
) -> tuple[float, list[tuple[float, float]], int]:
    """(threshold whose share kept is nearest to the target, the visited curve, samples used) by bisection on whole clusters.

    Clusters are drawn by the seed until they hold `search_rows` samples; when that is all of them the share is exact.
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

    def share(threshold: float) -> float:
        kept = sum(
            int(keep_mask(_link(image, clusters, c, threshold, settings, device), settings.cap).sum()) for c in chosen
        )
        return kept / count

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
    tick: Callable[[int], None] = lambda rows: None,
) -> Decision:
    """Link and choose in every cluster; clusters are split over the ranks and every rank gets the whole decision."""
    device = torch.device(device)
    curve: list[tuple[float, float]] = []
    threshold, searched = settings.threshold, 0
    if threshold is None:
        with fail_together(group):
            # One rank decides: two devices may round a product differently.
            found = search_threshold(image, clusters, settings, device) if rank(group) == 0 else None
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
    cost = np.concatenate([[0.0], np.cumsum(sizes**2 + 1)])
    cuts = np.searchsorted(cost, np.linspace(0, cost[-1], world_size(group) + 1))
    cuts[0], cuts[-1] = 0, len(clusters.sizes)
    first, last = int(cuts[rank(group)]), int(cuts[rank(group) + 1])
    base = int(clusters.starts[first])
    owner = np.empty(int(clusters.starts[last]) - base, np.int64)
    keep = np.empty(len(owner), bool)
    with fail_together(group):
        for cluster in range(first, last):
            start, stop = int(clusters.starts[cluster]), int(clusters.starts[cluster + 1])
            local = _link(image, clusters, cluster, threshold, settings, device)
            keep[start - base : stop - base] = keep_mask(local, settings.cap)
            owner[start - base : stop - base] = clusters.order[start:stop][local]
            tick(stop - start)
    all_owner = _gathered(owner, device, group)
    all_keep = _gathered(keep.astype(np.uint8), device, group).astype(bool)
    inside = clusters.order[clusters.starts[0] :]
    # A sample without a cluster cannot be compared with anything and stays.
    by_row = Decision(np.ones(image.num_rows, bool), np.arange(image.num_rows), threshold, curve, searched)
    by_row.keep[inside], by_row.owner[inside] = all_keep, all_owner
    return by_row


def _gathered(part: np.ndarray, device: torch.device, group: Group) -> np.ndarray:
    return gather_plain(torch.from_numpy(part).to(device), group).cpu().numpy()
