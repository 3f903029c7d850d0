"""Initial centroids: rows drawn at random, or greedy k-means++ on a sample.

k-means++ draws each next row with a probability proportional to its squared distance to the nearest row drawn so far
(Arthur and Vassilvitskii, SODA 2007); the greedy form draws a few candidates per step and keeps the one that leaves the
smallest total distance. It runs on a sample of rows for somewhat more than k centroids, because some fall on outliers;
the nearest pairs are then merged (`merging.py`). Every rank draws the same rows from the seed and computes everything
alone with the same shapes, so the result does not depend on the number of ranks. Nothing is saved: a restart before the
first iteration repeats it.

Legend: n rows, K centroids, D width, B rows of the sample, L candidates of one step.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megacid.distributed.stopping import Progress, no_progress
from megacid.offline.cluster.merging import NEIGHBOURS, merge_nearest
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import Assigner, Metric, pad_rows, prepare, tile_rows
from megacid.offline.random_streams import RandomStream
from megacid.offline.rows import Rows

_SAMPLE_VALUES = 1 << 25


def sample_rows(n: int, k: int, dim: int) -> int:
    """Rows in the sample of k-means++ for k centroids: 32 per centroid, if they fit into 128 MiB in fp32."""
    return min(n, max(min(32 * k, _SAMPLE_VALUES // dim), 4 * k, 4096))


def num_draws(count: int) -> int:
    """Candidates that one step of greedy k-means++ for `count` centroids compares."""
    return 2 + int(math.log(count))


def _sample_numbers(n: int, sample: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng([seed, RandomStream.SEEDING_SAMPLE]).choice(n, sample, replace=False))


def seed_count(k: int) -> int:
    """Centroids to draw before the nearest are merged to k: some fall on rows that belong to no cluster."""
    return k + 2 * math.isqrt(k) + k // 16


def plus_plus(
    rows: Rows, count: int, sample: int, seed: int, metric: Metric, device: torch.device, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy k-means++.

    A shorter sequence is not the beginning of a longer one: the number of candidates follows from `count`.

    Args:
        count: Centroids to choose.
        sample: Rows to draw from, themselves drawn by the seed.
        progress: Called with 0 for every step.

    Returns:
        Row numbers int64 [count], and float64 [count] the summed squared distance of the rows to the nearest of the
        first 1, 2, ... chosen rows, measured on the sample and scaled to all n rows.
    """
    n = rows.num_rows
    rng = np.random.default_rng([seed, RandomStream.INITIAL_CENTROIDS])
    drawn = _sample_numbers(n, sample, seed)
    read = rows.take(drawn)
    x_BD = torch.empty(read.shape, device=device)
    for low in range(0, sample, 4096):
        x_BD[low : low + 4096] = prepare(read[low : low + 4096], metric, device)
    del read
    square_B = x_BD.pow(2).sum(1)
    nearest_B = torch.full_like(square_B, math.inf)
    candidates = num_draws(count)
    chosen, left = np.empty(count, np.int64), np.empty(count, np.float64)
    cumulative: np.ndarray | None = None
    for step in range(count):
        progress(0)
        if cumulative is None:
            draw_L = rng.integers(sample, size=1)
        else:
            # With fewer distinct rows than centroids the last draws repeat rows; empty clusters are split later.
            at = rng.random(candidates) * cumulative[-1]
            draw_L = np.minimum(np.searchsorted(cumulative, at, side="right"), sample - 1)
        place_L = torch.from_numpy(draw_L).to(device)
        new_LB = torch.addmm(square_B, x_BD[place_L], x_BD.T, alpha=-2).add_(square_B[place_L, None]).clamp_min_(0)
        new_LB[torch.arange(len(draw_L)), place_L] = 0
        torch.minimum(new_LB, nearest_B, out=new_LB)
        best = int(new_LB.sum(1, dtype=torch.float64).argmin())
        nearest_B = new_LB[best]
        cumulative = nearest_B.cpu().numpy().cumsum(dtype=np.float64)
        chosen[step], left[step] = drawn[draw_L[best]], cumulative[-1] * (n / sample)
    return chosen, left


def initial_centroids(
    rows: Rows, settings: KMeansSettings, device: torch.device, progress: Progress = no_progress
) -> Tensor:
    """Initial centroids fp32 [K, D], the same on every rank; unit rows for the cosine."""
    n, k = rows.num_rows, settings.k
    if settings.init == "random":
        rng = np.random.default_rng([settings.seed, RandomStream.INITIAL_CENTROIDS])
        return prepare(rows.take(np.sort(rng.choice(n, k, replace=False))), settings.metric, torch.device("cpu"))
    count, sample = min(n, seed_count(k)), sample_rows(n, k, rows.dim)
    chosen, _ = plus_plus(rows, count, sample, settings.seed, settings.metric, device, progress)
    centroids_KD = prepare(rows.take(chosen), settings.metric, torch.device("cpu"))
    assigner = Assigner(centroids_KD, settings.metric, device, settings.backend)
    weight_K = _weights(rows, assigner, _sample_numbers(n, sample, settings.seed), progress)

    def neighbours(centroids_KD: Tensor) -> Tensor:
        assigner = Assigner(centroids_KD, settings.metric, device, settings.backend)
        labels = [
            assigner.tile(x_TD.to(device), min(NEIGHBOURS + 1, len(centroids_KD)))[1].cpu()
            for x_TD in centroids_KD.split(tile_rows(device))
        ]
        progress(0)
        return torch.cat(labels)

    return merge_nearest(centroids_KD, weight_K, k, settings.metric, neighbours)


def _weights(rows: Rows, assigner: Assigner, drawn: np.ndarray, progress: Progress) -> Tensor:
    """The weights for `merge_nearest`, float64 [K], from the rows `drawn`."""
    tile, cosine = tile_rows(assigner.device), assigner.metric == "cosine"
    weight_K = torch.zeros(len(assigner.centroids_KD), dtype=torch.float64)
    for low in range(0, len(drawn), tile):
        x_TD = prepare(rows.take(drawn[low : low + tile]), assigner.metric, assigner.device)
        value_TL, label_TL = (padded[: len(x_TD)].cpu() for padded in assigner.tile(pad_rows(x_TD, tile)))
        value_T = value_TL[:, 0].double() if cosine else torch.ones(len(x_TD), dtype=torch.float64)
        weight_K.index_add_(0, label_TL[:, 0], value_T)
        progress(0)
    return weight_K.clamp_min(0)
