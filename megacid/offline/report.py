"""What redundancy removal did: sizes, groups, and how many planted copies it found.

Legend: n samples with an embedding, k clusters.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np

from megacid.data.decode import BadSample
from megacid.data.index import ShardIndex, ShardReader

log = logging.getLogger(__name__)


def read_json(reader: ShardReader, shard: int, row: int) -> dict[str, Any]:
    """The json member of a sample; {} when it has none or an unreadable one."""
    try:
        value = json.loads(reader.read(shard, row, "json"))
    except (BadSample, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def has_field(index: ShardIndex, field: str) -> bool:
    """Whether the first sample's json carries `field` (a whole folder is made by one tool)."""
    reader = ShardReader(index)
    shard = int(np.flatnonzero(index.sizes)[0])
    try:
        return field in read_json(reader, shard, 0)
    finally:
        reader.close()


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


def size_facts(sizes: np.ndarray) -> dict[str, Any]:
    """Largest, median and histogram of cluster sizes (int64 [k])."""
    return {
        "largest": int(sizes.max(initial=0)),
        "median": float(np.median(sizes)) if len(sizes) else 0.0,
        "empty": int((sizes == 0).sum()),
        "histogram": power_histogram(sizes),
    }


def planted_report(origin: np.ndarray, keep: np.ndarray, owner: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """How well planted copies were found.

    origin: int64 [n], number of the planted group of each sample (an original and its copies share one); keep, owner, label: [n].

    removal_recall: share of groups with copies of which at most one member is kept.
    copies_removed: of the members beyond one per group, the share that was removed.
    linking_recall: share of pairs inside planted groups that ended in one linked group (before the cap).
    same_cluster: share of those pairs inside one cluster: no linking inside clusters can reach more.
    linking_precision: share of linked pairs (removed sample, the one kept for it) that belong to one planted group.
    removal_precision: share of removed samples that were beyond one per planted group.
    """
    groups = np.unique(origin, return_inverse=True)[1]
    members, kept = np.bincount(groups), np.bincount(groups, weights=keep).astype(np.int64)
    copied = members > 1
    removable = int((members - 1)[copied].sum())
    removed_right = int((members - np.maximum(kept, 1))[copied].sum())
    removed = int((~keep).sum())
    linked = owner != np.arange(len(owner))
    pairs = int((members * (members - 1) // 2).sum())
    return {
        "groups": int(copied.sum()),
        "copies": removable,
        "removal_recall": _share(int((kept <= 1)[copied].sum()), int(copied.sum())),
        "copies_removed": _share(removed_right, removable),
        "linking_recall": _share(_pairs_within(groups, owner), pairs),
        "same_cluster": _share(_pairs_within(groups, label), pairs),
        "linking_precision": _share(int((groups[linked] == groups[owner[linked]]).sum()), int(linked.sum())),
        "removal_precision": _share(removed_right, removed),
    }


def _pairs_within(a: np.ndarray, b: np.ndarray) -> int:
    """Pairs of samples that agree in both."""
    _, counts = np.unique(np.stack([a, b]), axis=1, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def subset_array(uids: list[str]) -> np.ndarray:
    """Hex uids (32 digits) as DataComp's sorted 'u8,u8' array. Raises ValueError for something else."""
    bad = next((uid for uid in uids if len(uid) != 32), None)
    if bad is not None:
        raise ValueError(f"uid {bad!r} has {len(bad)} characters, wanted 32 hexadecimal digits")
    halves = np.frombuffer(bytes.fromhex("".join(uids)), ">u8").astype("u8")
    return np.sort(halves.view(np.dtype("u8,u8")))
