"""Initial centroids: rows drawn at random, or greedy k-means++ on a sample.

k-means++ draws each next row with a probability proportional to its squared distance to the nearest row drawn so far
(Arthur and Vassilvitskii, SODA 2007); the greedy form draws a few candidates per step and keeps the one that leaves the
smallest total distance. It runs on a sample of rows for somewhat more than k centroids, because some fall on outliers;
the nearest pairs are then merged (`merging.py`). For many centroids the candidates are compared in batches, and at most
as often as rows and centroids in a stated number of iterations. One rank computes everything alone, so the result does
not depend on the number of ranks. Nothing is saved: a restart before the first iteration repeats it.

Legend: n rows, K centroids, D width, B rows of the sample, L candidates of one step, M candidates of a batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megacid.distributed.stopping import Progress, no_progress
from megacid.offline.cluster.merging import NEIGHBOURS, merge_nearest, merging_bytes
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import Assigner, Metric, pad_rows, prepare, tile_rows
from megacid.offline.random_streams import RandomStream
from megacid.offline.rows import Rows

_SAMPLE_VALUES = 1 << 25
BATCHED_STEPS = 256  # from here on candidates are compared in batches; for fewer steps the batches would be small
SEEDING_ITERATIONS = 16  # iterations of Lloyd that compare as often as k-means++ may, from `BATCHED_STEPS` on
_BATCH_VALUES = 1 << 22  # distances of a batch: 16 MiB
_MIN_ACCEPTED = 0.1  # share of the candidates of a batch


def sample_rows(n: int, k: int, dim: int) -> int:
    """Rows in the sample of k-means++ for k centroids: 32 per centroid if they fit into 128 MiB in fp32, at least 4."""
    return min(n, max(min(32 * k, _SAMPLE_VALUES // dim), 4 * k, 4096))


def num_draws(count: int) -> int:
    """Candidates that one step of greedy k-means++ for `count` centroids compares."""
    return 2 + int(math.log(count))


def seeding_bytes(n: int, k: int, dim: int) -> int:
    """Least bytes of k-means++ for k centroids: its sample, the distances to the candidates, and the merging."""
    count, sample = min(n, seed_count(k)), sample_rows(n, k, dim)
    # The sample in fp32 twice (as read, or with its squares), and for each candidate its distances and two steps on.
    need = sample * (8 * dim + 12 * num_draws(count) + 40) + count * dim * 4
    if count >= BATCHED_STEPS:
        need += 4 * max(_BATCH_VALUES, sample)
    return max(need, merging_bytes(count, dim))


def _sample_numbers(n: int, sample: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng([seed, RandomStream.SEEDING_SAMPLE]).choice(n, sample, replace=False))


def seed_count(k: int) -> int:
    """Centroids to draw before the nearest are merged to k: some fall on rows that belong to no cluster."""
    return k + 2 * math.isqrt(k) + k // 16


def plus_plus(
    rows: Rows,
    count: int,
    sample: int,
    comparisons: int,
    seed: int,
    metric: Metric,
    device: torch.device,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy k-means++.

    A shorter sequence is not the beginning of a longer one: the number of candidates follows from `count`.

    Args:
        count: Centroids to choose.
        sample: Rows to draw from, themselves drawn by the seed.
        comparisons: Of a row with a candidate, at most (and at least one candidate for each centroid); applies to
            `BATCHED_STEPS` centroids or more.
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
    if count < BATCHED_STEPS:
        places, left = _one_by_one(x_BD, count, rng, progress)
    else:
        places, left = _in_batches(x_BD, count, comparisons // sample, rng, progress)
    return drawn[places], left * (n / sample)


def _distances(x_BD: Tensor, square_B: Tensor, place_L: Tensor) -> Tensor:
    """Squared distances fp32 [L, B] of all rows to those at `place_L`."""
    new_LB = torch.addmm(square_B, x_BD[place_L], x_BD.T, alpha=-2).add_(square_B[place_L, None]).clamp_min_(0)
    new_LB[torch.arange(len(place_L)), place_L] = 0
    return new_LB


def _draw(cumulative: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places int64 [count], with a probability proportional to the summands of `cumulative`."""
    # With fewer distinct rows than centroids the last draws repeat rows; empty clusters are split later.
    at = rng.random(count) * cumulative[-1]
    return np.minimum(np.searchsorted(cumulative, at, side="right"), len(cumulative) - 1)


def _one_by_one(
    x_BD: Tensor, count: int, rng: np.random.Generator, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """(places int64 [count], summed squared distance float64 [count]); the candidates of every step are drawn anew."""
    square_B = x_BD.pow(2).sum(1)
    nearest_B = torch.full_like(square_B, math.inf)
    candidates = num_draws(count)
    chosen, left = np.empty(count, np.int64), np.empty(count, np.float64)
    cumulative: np.ndarray | None = None
    for step in range(count):
        progress(0)
        draw_L = rng.integers(len(x_BD), size=1) if cumulative is None else _draw(cumulative, candidates, rng)
        new_LB = _distances(x_BD, square_B, torch.from_numpy(draw_L).to(x_BD.device))
        torch.minimum(new_LB, nearest_B, out=new_LB)
        best = int(new_LB.sum(1, dtype=torch.float64).argmin())
        nearest_B = new_LB[best]
        cumulative = nearest_B.cpu().numpy().cumsum(dtype=np.float64)
        chosen[step], left[step] = draw_L[best], cumulative[-1]
    return chosen, left


def _in_batches(
    x_BD: Tensor, count: int, drawable: int, rng: np.random.Generator, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """As `_one_by_one`, with candidates drawn and compared in batches, at most max(drawable, count) of them.

    A candidate was drawn by its distance d to the centroids of that time. It is accepted with the probability
    d' / d for its distance d' now, which makes it a draw by d': the rows are distributed as if drawn one by one. The
    number of candidates per step is that of the greedy form, or as many as are left.
    """
    device, largest = x_BD.device, max(_BATCH_VALUES // len(x_BD), 1)
    buffer = torch.empty(largest * len(x_BD), device=device)  # page faults of a new one cost as much as a pass over it
    square_B1 = x_BD.pow(2).sum(1, keepdim=True)
    row_BE = torch.cat([x_BD, torch.ones_like(square_B1), square_B1], dim=1)
    chosen = [int(rng.integers(len(x_BD)))]
    nearest_B = _distances(x_BD, square_B1[:, 0], torch.tensor(chosen, device=device))[0]
    left = [float(nearest_B.sum(dtype=torch.float64))]
    drawable, accepted = max(drawable, count) - 1, 1.0  # the share of the last batch that was accepted
    while (missing := count - len(chosen)) > 0:
        draws = min(num_draws(count), max(int(accepted * drawable / missing), 1))
        steps = min(len(chosen) // 2 + 1, missing)  # more would make the distances of the draw too old
        # At least one candidate stays for every step that is missing after this batch.
        batch = min(largest, drawable - missing + 1, math.ceil(draws * steps / accepted))
        drawable -= batch
        place_M = torch.from_numpy(_draw(nearest_B.cpu().numpy().cumsum(dtype=np.float64), batch, rng)).to(device)
        # |x|^2 - 2 x . y + |y|^2 as one product.
        candidate_ME = torch.cat([-2 * x_BD[place_M], square_B1[place_M], torch.ones_like(square_B1[place_M])], dim=1)
        new_MB = torch.mm(candidate_ME, row_BE.T, out=buffer[: batch * len(x_BD)].view(batch, -1))
        threshold_M = nearest_B[place_M] * torch.from_numpy(rng.random(batch, np.float32)).to(device)
        at, used = 0, 0
        while len(chosen) < count:
            fresh = (threshold_M[at:] <= nearest_B[place_M[at:]]).nonzero()[:draws, 0] + at
            if used and len(fresh) < draws:
                break
            progress(0)
            new_LB = torch.minimum(new_MB[fresh], nearest_B)
            best = int(new_LB.sum(1, dtype=torch.float64).argmin())
            chosen.append(int(place_M[fresh[best]]))
            nearest_B = new_LB[best].clamp_min(0)
            nearest_B[chosen[-1]] = 0
            left.append(float(nearest_B.sum(dtype=torch.float64)))
            at, used = int(fresh[-1]) + 1, used + len(fresh)
        accepted = max(used / at, _MIN_ACCEPTED)
    return np.array(chosen), np.array(left)


def initial_centroids(
    rows: Rows, settings: KMeansSettings, device: torch.device, progress: Progress = no_progress
) -> Tensor:
    """Initial centroids fp32 [K, D], the same on every rank; unit rows for the cosine."""
    n, k = rows.num_rows, settings.k
    if settings.init == "random":
        rng = np.random.default_rng([settings.seed, RandomStream.INITIAL_CENTROIDS])
        return prepare(rows.take(np.sort(rng.choice(n, k, replace=False))), settings.metric, torch.device("cpu"))
    count, sample = min(n, seed_count(k)), sample_rows(n, k, rows.dim)
    comparisons = SEEDING_ITERATIONS * n * k
    chosen, _ = plus_plus(rows, count, sample, comparisons, settings.seed, settings.metric, device, progress)
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

    return merge_nearest(centroids_KD, weight_K, k, settings.metric, neighbours, settings.memory_gb * 1e9)


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
