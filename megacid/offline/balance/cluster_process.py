"""One cluster before and after the balance: its projection, links and groups, as Figure 2 (c) shows them.

Legend: n samples with an embedding, k clusters, M samples of one cluster, E links.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megacid.errors import UserError
from megacid.offline.balance.linking import UnitRows, near_pairs
from megacid.offline.balance.report import count_labels
from megacid.offline.row_numbers import members_of
from megacid.offline.rows import Rows

MOST_SHOWN = 500  # samples of a cluster that is drawn; all their pairs are computed


@dataclass(frozen=True)
class ClusterProcess:
    """One cluster before and after."""

    cluster: int
    rows: np.ndarray  # int64 [M]
    place: np.ndarray  # float [M, 2], the first two principal components
    links: np.ndarray  # int64 [E, 2], places in `rows` of pairs nearer than the threshold
    component: np.ndarray  # int64 [M], numbered by size from 0 (the largest); -1 for a sample alone
    kept: np.ndarray  # bool [M]
    explained: float  # share of the variance in the two components


def choose_cluster(label: np.ndarray, representative: np.ndarray, k: int) -> int | None:
    """The cluster to show: of median size among those with at least two groups and at most MOST_SHOWN samples.

    Args:
        label: int [n], -1 for none.
        representative: int64 [n].

    Returns:
        Its number, the smaller one of equal sizes; None when there is no such cluster.
    """
    linked = members_of(representative, 0, len(representative))
    linked = linked[label[linked] >= 0]
    # A group that spans clusters counts in those of its removed samples.
    pairs = np.unique(label[linked].astype(np.int64) * len(representative) + representative[linked])
    groups = np.bincount(pairs // len(representative), minlength=k)
    sizes = count_labels(label, k)
    fit = np.flatnonzero((groups >= 2) & (sizes <= MOST_SHOWN))
    if not len(fit):
        return None
    return int(fit[np.argsort(sizes[fit], kind="stable")][(len(fit) - 1) // 2])


def cluster_process(
    image: Rows, label: np.ndarray, representative: np.ndarray, keep: np.ndarray, threshold: float, cluster: int
) -> ClusterProcess:
    """Computes what is shown of a cluster. label: int [n]; representative: int64 [n]; keep: bool [n].

    Raises:
        UserError: the cluster is empty or has more than MOST_SHOWN samples.
    """
    rows = np.flatnonzero(label == cluster)
    if not 0 < len(rows) <= MOST_SHOWN:
        raise UserError(
            f"cluster {cluster} has {len(rows):,} samples, expected 1 to {MOST_SHOWN} to be drawn: choose another with "
            "--cluster"
        )
    x_MD = UnitRows(image, rows, torch.device("cpu"))[:]
    a, b = near_pairs(x_MD, x_MD, threshold)
    a, b = a[b > a], b[b > a]
    values = x_MD.double().numpy()
    values -= values.mean(0)
    u, s, _ = np.linalg.svd(values, full_matrices=False)
    place = np.zeros((len(rows), 2))
    place[:, : min(2, len(s))] = (u * s)[:, :2]
    # The sign of a component is arbitrary; the largest coordinate is made positive.
    place *= np.where(place[np.abs(place).argmax(0), [0, 1]] < 0, -1, 1)
    total = float((s**2).sum())
    groups, inverse, sizes = np.unique(representative[rows], return_inverse=True, return_counts=True)
    number = np.empty(len(groups), np.int64)
    number[np.lexsort((groups, -sizes))] = np.arange(len(groups))
    number[sizes == 1] = -1
    explained = float((s[:2] ** 2).sum()) / total if total else 1.0
    return ClusterProcess(cluster, rows, place, np.stack([a, b], axis=1), number[inverse], keep[rows], explained)


def layout(shown: ClusterProcess) -> tuple[np.ndarray, float]:
    """Places for the images of a cluster in the unit square.

    Each component is stretched to the whole square, so only directions and the order along the axes are meaningful.

    Returns:
        Centres, float [M, 2], and the side of an image.
    """
    side = 0.5 / max(np.sqrt(len(shown.rows)), 3)  # a quarter of the area, so links are visible between images
    stretched = (shown.place - shown.place.min(0)) / np.maximum(np.ptp(shown.place, axis=0), 1e-9)
    return spread_overlaps(side / 2 + (1 - side) * stretched, 1.4 * side), side


def spread_overlaps(place: np.ndarray, side: float, rounds: int = 300) -> np.ndarray:
    """Moves points inside the unit square as little as needed until squares around them hardly overlap.

    Args:
        place: float [M, 2].
        side: of the squares.

    Returns:
        float [M, 2].
    """
    place = np.array(place, float)
    # Copies lie on one point; a small spiral gives each a direction to move in.
    turn = np.arange(len(place)) * np.pi * (3 - np.sqrt(5))
    place += 0.01 * side * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    for _ in range(rounds):
        gap_MM2 = place[:, None] - place[None]
        overlap_MM2 = side - np.abs(gap_MM2)
        touching = (overlap_MM2 > 0).all(axis=2) & ~np.eye(len(place), dtype=bool)
        if not touching.any():
            break
        # Each of a pair moves half of the overlap, along the axis where that is smaller.
        shorter = overlap_MM2.argmin(axis=2)
        step = np.where(touching, np.take_along_axis(overlap_MM2, shorter[..., None], 2)[..., 0], 0) / 2
        sign = np.sign(np.take_along_axis(gap_MM2, shorter[..., None], 2)[..., 0])
        for axis in (0, 1):
            place[:, axis] += 0.5 * (step * sign * (shorter == axis)).sum(1)
        place = place.clip(side / 2, 1 - side / 2)
    return place
