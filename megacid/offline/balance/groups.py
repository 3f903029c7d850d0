"""What the pages and figures of redundancy show: groups of one kind, and how one cluster is thinned out.

Legend: n samples with an embedding, k clusters, m samples of one cluster, E links, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megacid.errors import UserError
from megacid.offline.balance.linking import UnitRows, cosine_bound
from megacid.offline.nearest import prepare
from megacid.offline.rows import Rows

PERCEPTUAL_SHARE = 0.5  # of the threshold: below it, removed samples are called copies of one picture
MOST_SHOWN = 500  # samples of a cluster that is drawn; all their pairs are looked at


@dataclass(frozen=True)
class Group:
    """One group of redundant samples. rows: int64, the kept one first, then the removed ones, nearest first;
    distances: float [len(rows)], to the kept one; size: samples in the whole group; spread: the largest distance in it."""

    rows: np.ndarray
    distances: np.ndarray
    size: int
    spread: float


def representative_distance(image: Rows, representative: np.ndarray, block: int = 16384) -> np.ndarray:
    """Euclidean distance float32 [n] of every sample to the one kept for it; 0 for kept ones, and where representative is -1."""
    out = np.zeros(len(representative), np.float32)
    linked = np.flatnonzero((representative >= 0) & (representative != np.arange(len(representative))))
    for low in range(0, len(linked), block):
        part = linked[low : low + block]
        a, b = (prepare(image.take(which), "cosine", torch.device("cpu")) for which in (part, representative[part]))
        out[part] = (a - b).norm(dim=1).numpy()
    return out


def perceptual_below(threshold: float, given: float | None = None) -> float:
    """The distance that parts the two kinds: `given`, or PERCEPTUAL_SHARE of the threshold. UserError when it is not below it."""
    if given is None:
        return PERCEPTUAL_SHARE * threshold
    if not 0 < given <= threshold:
        raise UserError(
            f"the distance of perceptual redundancy is {given:g}, expected above 0 and at most the threshold of the links, {threshold:g}"
        )
    return given


class Groups:
    """All groups of at least two samples, by spread: the distance of the farthest removed sample to the one that is kept.

    A group is *perceptual* when its spread is below a given distance, else *semantic*.
    """

    def __init__(self, representative: np.ndarray, distance: np.ndarray) -> None:
        """representative: int64 [n], a kept sample is its own; distance: float [n], of each sample to its representative."""
        linked = np.flatnonzero(representative != np.arange(len(representative)))
        self._roots, group = np.unique(representative[linked], return_inverse=True)
        self._distance = distance
        spread = np.zeros(len(self._roots))
        np.maximum.at(spread, group, distance[linked])
        self._members = linked[np.lexsort((distance[linked], group))]
        self._ends = np.cumsum(np.bincount(group, minlength=len(self._roots)))
        self._ranked = np.argsort(spread, kind="stable")
        self.spread = spread[self._ranked]  # ascending

    def __len__(self) -> int:
        return len(self._ranked)

    def at(self, place: int, members: int) -> Group:
        """The group at that place of the order by spread, with at most so many samples: of the removed ones, evenly spaced by distance."""
        number = int(self._ranked[place])
        removed = self._members[self._ends[number - 1] if number else 0 : self._ends[number]]
        shown = removed[np.unique(np.linspace(0, len(removed) - 1, min(members - 1, len(removed))).astype(int))]
        rows = np.concatenate([[self._roots[number]], shown])
        distances = np.concatenate([[0.0], self._distance[shown]])
        return Group(rows, distances, len(removed) + 1, float(self.spread[place]))

    def count_perceptual(self, below: float) -> int:
        return int(np.searchsorted(self.spread, below, side="left"))

    def perceptual(self, below: float, count: int, members: int) -> list[Group]:
        """`count` groups of spread less than `below`, evenly spaced from the tightest to the loosest of them."""
        return self._spaced(0, self.count_perceptual(below), count, members)

    def semantic(self, below: float, count: int, members: int) -> list[Group]:
        """The same of the others, from `below` on."""
        return self._spaced(self.count_perceptual(below), len(self), count, members)

    def near(self, threshold: float, below: float, count: int, members: int) -> list[Group]:
        """The `count` semantic groups whose spread is nearest to the threshold, by spread."""
        first = self.count_perceptual(below)
        gap = np.abs(self.spread[first:] - threshold)
        return [self.at(first + int(g), members) for g in np.sort(np.argsort(gap, kind="stable")[:count])]

    def _spaced(self, low: int, high: int, count: int, members: int) -> list[Group]:
        places = np.unique(np.linspace(low, high - 1, max(min(count, high - low), 0)).astype(int))
        return [self.at(int(place), members) for place in places]


@dataclass(frozen=True)
class Process:
    """One cluster before and after. rows: int64 [m]; place: float [m, 2], its first two principal components;
    links: int64 [E, 2], places in `rows` of pairs nearer than the threshold; component: int64 [m], numbered by size (0 the
    largest, -1 for a sample alone); kept: bool [m]; explained: share of the variance that the two components hold."""

    cluster: int
    rows: np.ndarray
    place: np.ndarray
    links: np.ndarray
    component: np.ndarray
    kept: np.ndarray
    explained: float


def sample_cluster(label: np.ndarray, representative: np.ndarray, k: int) -> int | None:
    """The cluster to show: of those with at least two groups and at most MOST_SHOWN samples, the one of median size (the
    smaller number of equal ones). None when there is none. label: int [n], -1 for none; representative: int64 [n]."""
    linked = np.flatnonzero((representative != np.arange(len(representative))) & (label >= 0))
    # Groups by the cluster of what was removed, so that one across a border counts on its side.
    pairs = np.unique(label[linked].astype(np.int64) * len(representative) + representative[linked])
    groups = np.bincount(pairs // len(representative), minlength=k)
    sizes = np.bincount(label[label >= 0], minlength=k)
    fit = np.flatnonzero((groups >= 2) & (sizes <= MOST_SHOWN))
    if not len(fit):
        return None
    return int(fit[np.argsort(sizes[fit], kind="stable")][(len(fit) - 1) // 2])


def process(
    image: Rows, label: np.ndarray, representative: np.ndarray, keep: np.ndarray, threshold: float, cluster: int
) -> Process:
    """How a cluster is thinned out. UserError when it is empty or has more than MOST_SHOWN samples.

    label: int [n]; representative: int64 [n]; keep: bool [n]; threshold: distance of the links.
    """
    rows = np.flatnonzero(label == cluster)
    if not 0 < len(rows) <= MOST_SHOWN:
        raise UserError(
            f"cluster {cluster} has {len(rows):,} samples, expected 1 to {MOST_SHOWN} to be drawn: choose another with --cluster"
        )
    x_MD = UnitRows(image, rows, torch.device("cpu"))[:]
    near = (x_MD @ x_MD.T > cosine_bound(threshold)).numpy()
    a, b = np.nonzero(np.triu(near, 1))
    values = x_MD.double().numpy()
    values -= values.mean(0)
    u, s, _ = np.linalg.svd(values, full_matrices=False)
    place = np.zeros((len(rows), 2))
    place[:, : min(2, len(s))] = (u * s)[:, :2]
    # The sign of a component is arbitrary; the largest coordinate is made positive.
    place *= np.where(place[np.abs(place).argmax(0), [0, 1]] < 0, -1, 1)
    total = float((s**2).sum())
    found, inverse, sizes = np.unique(representative[rows], return_inverse=True, return_counts=True)
    number = np.empty(len(found), np.int64)
    number[np.lexsort((found, -sizes))] = np.arange(len(found))
    number[sizes == 1] = -1
    explained = float((s[:2] ** 2).sum()) / total if total else 1.0
    return Process(cluster, rows, place, np.stack([a, b], axis=1), number[inverse], keep[rows], explained)


def spread_overlaps(place: np.ndarray, side: float, rounds: int = 300) -> np.ndarray:
    """float [m, 2]: places of the unit square moved inside it, as little as they need, so that squares of that side around
    them hardly overlap."""
    place = np.array(place, float)
    # Copies lie on one point: something has to say which way each goes.
    turn = np.arange(len(place)) * np.pi * (3 - np.sqrt(5))
    place += 0.01 * side * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    for _ in range(rounds):
        gap_MM2 = place[:, None] - place[None]
        overlap_MM2 = side - np.abs(gap_MM2)
        touching = (overlap_MM2 > 0).all(axis=2) & ~np.eye(len(place), dtype=bool)
        if not touching.any():
            break
        # Along the axis where less is to go, and half the way each.
        shorter = overlap_MM2.argmin(axis=2)
        step = np.where(touching, np.take_along_axis(overlap_MM2, shorter[..., None], 2)[..., 0], 0) / 2
        sign = np.sign(np.take_along_axis(gap_MM2, shorter[..., None], 2)[..., 0])
        for axis in (0, 1):
            place[:, axis] += 0.5 * (step * sign * (shorter == axis)).sum(1)
        place = place.clip(side / 2, 1 - side / 2)
    return place
