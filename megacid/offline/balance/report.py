"""Statistics of report.json: samples kept and removed, sizes of groups and clusters, planted copies found.

Legend: n samples with an embedding, k clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megacid.distributed.stopping import Progress
from megacid.offline.balance.deduplicate import Decision
from megacid.offline.balance.inputs import SampleLocations
from megacid.offline.cluster.lloyd import imbalance_factor


def power_histogram(sizes: np.ndarray) -> dict[str, int]:
    """Counts by size in powers of two: "1", "2-3", "4-7", ...; zeros as "0"."""
    out = {}
    if (sizes == 0).any():
        out["0"] = int((sizes == 0).sum())
    for power in range(int(sizes.max(initial=0)).bit_length()):
        low, high = 1 << power, (2 << power) - 1
        count = int(((sizes >= low) & (sizes <= high)).sum())
        if count:
            out[str(low) if low == high else f"{low}-{high}"] = count
    return out


def size_statistics(sizes: np.ndarray) -> dict[str, Any]:
    """Largest, median, imbalance factor and histogram of cluster sizes (int64 [k])."""
    return {
        "imbalance": imbalance_factor(sizes) if sizes.any() else None,
        "largest": int(sizes.max(initial=0)),
        "median": float(np.median(sizes)) if len(sizes) else 0.0,
        "empty": int((sizes == 0).sum()),
        "histogram": power_histogram(sizes),
    }


def cluster_sizes(label: np.ndarray, keep: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [k] each: samples of every cluster before and after. label: int [n], -1 for none; keep: bool [n]."""
    has = label >= 0
    return np.bincount(label[has], minlength=k), np.bincount(label[has & keep], minlength=k)


def decision_report(decision: Decision, label: np.ndarray, k: int, target_keep: float | None) -> dict[str, Any]:
    """The fields of report.json that need no look at the samples. label: int [n], -1 for none."""
    before, after = cluster_sizes(label, decision.keep, k)
    kept, total = int(decision.keep.sum()), len(decision.keep)
    linked_kept = decision.representative == np.arange(total)
    curve = decision.curve or [(0.0, 1.0), (decision.threshold, kept / total)]
    return {
        "total": total,
        "kept": kept,
        "share_kept": kept / total,
        "share_removed": 1 - kept / total,
        "removed_by_links": int((~linked_kept).sum()),
        "removed_across_clusters": decision.removed_across_clusters,
        "removed_by_cap": int((linked_kept & ~decision.keep).sum()),
        "threshold": decision.threshold,
        "cosine": 1 - decision.threshold**2 / 2,
        "target_keep": target_keep,
        "threshold_curve": [{"threshold": t, "share_kept": s} for t, s in curve],
        "searched_samples": decision.searched_rows,
        "group_sizes": power_histogram(np.unique(decision.representative, return_counts=True)[1]),
        "cluster_sizes_before": size_statistics(before),
        "cluster_sizes_after": size_statistics(after),
    }


def planted_reports(origin: np.ndarray, decision: Decision, label: np.ndarray) -> dict[str, Any]:
    """How well planted copies were found, in all and, if there was a second pass, by the first one before the cap."""
    reports = {"planted_copies": planted_report(origin, decision.keep, decision.representative, label)}
    first = decision.first_pass
    if first is not decision.representative:
        reports["planted_copies_inside_clusters"] = planted_report(origin, first == np.arange(len(first)), first, label)
    return reports


def origins(locations: SampleLocations, progress: Progress) -> np.ndarray:
    """int64 [n]: a number per planted group; a sample without `origin` is a group of its own."""
    number: dict[str, int] = {}
    samples = locations.read_json(np.arange(len(locations.row)), progress)
    names = (str(fields.get("origin", key)) for key, fields in samples)
    return np.array([number.setdefault(name, len(number)) for name in names], np.int64)


def planted_report(
    origin: np.ndarray, keep: np.ndarray, representative: np.ndarray, label: np.ndarray
) -> dict[str, Any]:
    """How well planted copies were found.

    Args:
        origin: int64 [n], the planted group of each sample; an original and its copies share one.
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


def subset_array(uids: list[str]) -> np.ndarray:
    """Uids of 32 hexadecimal digits as DataComp's sorted 'u8,u8' array. Raises ValueError for other uids."""
    bad = next((uid for uid in uids if len(uid) != 32), None)
    if bad is not None:
        raise ValueError(f"uid {bad!r} has {len(bad)} characters, expected 32 hexadecimal digits")
    halves = np.frombuffer(bytes.fromhex("".join(uids)), ">u8").astype("u8")
    return np.sort(halves.view(np.dtype("u8,u8")))
