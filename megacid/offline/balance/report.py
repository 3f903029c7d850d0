"""Statistics of report.json: samples kept and removed, sizes of groups and clusters, planted copies found.

Legend: n samples with an embedding, k clusters.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from megacid.distributed.array_exchange import ALONE, Ranks
from megacid.distributed.parallel import shard_range
from megacid.distributed.stopping import Progress
from megacid.offline.balance.deduplicate import Decision
from megacid.offline.balance.inputs import SampleLocations
from megacid.offline.cluster.lloyd import imbalance_factor
from megacid.offline.row_numbers import row_blocks


def count_powers(sizes: np.ndarray) -> np.ndarray:
    """int64 [64]: sizes (int [m]) by their number of binary digits; those of 0 come first."""
    counts = np.zeros(64, np.int64)
    for block in row_blocks(0, len(sizes)):
        counts += np.bincount(np.frexp(sizes[block].astype(np.float64))[1], minlength=64)
    return counts


def describe_powers(counts: np.ndarray) -> dict[str, int]:
    """Counts by size in powers of two: "1", "2-3", "4-7", ...; zeros as "0". counts: see `count_powers`."""
    names = ["0", "1", *(f"{1 << power}-{(2 << power) - 1}" for power in range(1, 63))]
    return {name: count for name, count in zip(names, counts.tolist()) if count}


def power_histogram(sizes: np.ndarray) -> dict[str, int]:
    """Counts of sizes (int [m]); see `describe_powers`."""
    return describe_powers(count_powers(sizes))


def size_statistics(sizes: np.ndarray) -> dict[str, Any]:
    """Largest, median, imbalance factor and histogram of cluster sizes (int64 [k])."""
    return {
        "imbalance": imbalance_factor(sizes) if sizes.any() else None,
        "largest": int(sizes.max(initial=0)),
        "median": float(np.median(sizes)) if len(sizes) else 0.0,
        "empty": int((sizes == 0).sum()),
        "histogram": power_histogram(sizes),
    }


def count_labels(label: np.ndarray, k: int) -> np.ndarray:
    """int64 [k]: samples of every cluster. label: int [n], -1 for none."""
    sizes = np.zeros(k + 1, np.int64)
    for block in row_blocks(0, len(label)):
        np.add.at(sizes, label[block], 1)  # -1 is the last one
    return sizes[:k]


def cluster_sizes(label: np.ndarray, keep: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [k] each: samples of every cluster before and after. label: int [n], -1 for none; keep: bool [n]."""
    return count_labels(label, k), count_labels(label[keep], k)


def decision_report(
    decision: Decision, label: np.ndarray, k: int, target_keep: float | None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """The fields of report.json that need no look at the samples. A collective: each rank counts a share of the rows.

    label: int [n], -1 for none.
    """
    total = len(decision.keep)
    share = shard_range(total, ranks.rank, ranks.world)
    facts, powers, before, after = (ranks.sum(counts) for counts in _count_share(decision, label, k, *share))
    kept, linked_kept, kept_of_linked, first_kept = facts.tolist()
    curve = decision.curve or [(0.0, 1.0), (decision.threshold, kept / total)]
    return {
        "total": total,
        "kept": kept,
        "share_kept": kept / total,
        "share_removed": 1 - kept / total,
        "removed_by_links": total - linked_kept,
        "removed_across_clusters": first_kept - linked_kept,
        "removed_by_cap": linked_kept - kept_of_linked,
        "threshold": decision.threshold,
        "cosine": 1 - decision.threshold**2 / 2,
        "target_keep": target_keep,
        "threshold_curve": [{"threshold": t, "share_kept": s} for t, s in curve],
        "searched_samples": decision.searched_rows,
        "group_sizes": describe_powers(powers),
        "cluster_sizes_before": size_statistics(before),
        "cluster_sizes_after": size_statistics(after),
    }


def _count_share(decision: Decision, label: np.ndarray, k: int, low: int, high: int) -> list[np.ndarray]:
    """Counts of the rows [low, high), int64: kept, own representatives, both, own ones of the first pass; sizes of the
    groups that they represent, as `count_powers`; cluster sizes before and after."""
    keep, representative = decision.keep, decision.representative
    facts, group_sizes = np.zeros(4, np.int64), np.zeros(high - low, np.int32)
    for block in row_blocks(low, high):
        own = np.arange(block.start, block.stop)
        linked, first = representative[block] == own, decision.first_pass[block] == own
        facts += [np.count_nonzero(flags) for flags in (keep[block], linked, linked & keep[block], first)]
    for block in row_blocks(0, len(representative)):
        group = representative[block]
        np.add.at(group_sizes, group[(group >= low) & (group < high)] - low, 1)
    powers = count_powers(group_sizes)
    powers[0] = 0  # of rows that represent none
    return [facts, powers, *cluster_sizes(label[low:high], keep[low:high], k)]


def planted_reports(origin: np.ndarray, decision: Decision, label: np.ndarray) -> dict[str, Any]:
    """How well planted copies were found, in all and, if there was a second pass, by the first one before the cap."""
    reports = {"planted_copies": planted_report(origin, decision.keep, decision.representative, label)}
    first = decision.first_pass
    if first is not decision.representative:
        reports["planted_copies_inside_clusters"] = planted_report(origin, first == np.arange(len(first)), first, label)
    return reports


def origins(locations: SampleLocations, rows: range, progress: Progress) -> np.ndarray:
    """int64 [m]: a digest of the planted group of some rows; a sample without `origin` is a group of its own."""
    names = (str(fields.get("origin", key)) for key, fields in locations.read_json(rows, progress))
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), np.int64)


def planted_report(
    origin: np.ndarray, keep: np.ndarray, representative: np.ndarray, label: np.ndarray
) -> dict[str, Any]:
    """How well planted copies were found.

    Args:
        origin: int64 [n], a number of each sample's planted group; an original and its copies share one.
        keep, representative, label: [n].

    Returns:
        removal_recall: share of groups with copies of which at most one member is kept.
        copies_removed: share of the members beyond one per group that was removed.
        linking_recall: share of pairs inside planted groups that are in one linked group (before the cap).
        same_cluster: share of those pairs inside one cluster, an upper bound of linking_recall without a second pass.
        linking_precision: share of pairs (removed sample, representative) inside one planted group.
        removal_precision: share of removed samples that were beyond one per planted group.
    """
    groups = np.unique(origin, return_inverse=True)[1]
    members, kept = np.bincount(groups), np.bincount(groups, weights=keep).astype(np.int64)
    copied = members > 1
    removable = int((members - 1)[copied].sum())
    removed_right = int((members - np.maximum(kept, 1))[copied].sum())
    removed = int((~keep).sum())
    linked = representative != np.arange(len(representative))
    pairs = int((members * (members - 1) // 2).sum())
    return {
        "groups": int(copied.sum()),
        "copies": removable,
        "removal_recall": _share(int((kept <= 1)[copied].sum()), int(copied.sum())),
        "copies_removed": _share(removed_right, removable),
        "linking_recall": _share(_pairs_within(groups, representative), pairs),
        "same_cluster": _share(_pairs_within(groups, label), pairs),
        "linking_precision": _share(int((groups[linked] == groups[representative[linked]]).sum()), int(linked.sum())),
        "removal_precision": _share(removed_right, removed),
    }


def _pairs_within(a: np.ndarray, b: np.ndarray) -> int:
    """Pairs of samples that agree in both."""
    _, counts = np.unique(np.stack([a, b]), axis=1, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
