"""The memory bound of k-means: bytes that a run holds, and the number of rows to read at once.

Legend: n rows, K clusters, D width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from megacid.errors import UserError
from megacid.offline.cluster.merging import merging_bytes
from megacid.offline.cluster.seeding import seed_count, seeding_bytes
from megacid.offline.cluster.state import KMeansSettings, cell_count, coarse_rows, num_candidates
from megacid.offline.nearest import TILE_CENTROIDS, chosen_backend, search_bytes, tile_rows

_FAISS_TILES = 4
READ_BYTES = 8  # per value while rows are read: at most fp32, gathered from several files
_BLOCK_TILES = 64  # per read; larger reads are not faster


def pass_rows(settings: KMeansSettings, dim: int, device: torch.device) -> int:
    """Rows of one tile of a pass over all rows. Larger with faiss, whose threads compete with torch's for the cores
    after every search: larger tiles mean fewer switches."""
    by_faiss = device.type == "cpu" and chosen_backend(settings.backend, device, dim) == "faiss"
    return tile_rows(device) * (_FAISS_TILES if by_faiss else 1)


def fixed_bytes(n: int, k: int, dim: int, settings: KMeansSettings, device: torch.device) -> int:
    """Bytes of a pass over n rows of this rank that compares with k centroids, without the rows that are read."""
    tile = pass_rows(settings, dim, device)
    # Centroids in fp32 twice (faiss frees its index before a new one is built), sums in fp64 twice (local and reduced),
    # and the previous labels.
    fixed = k * dim * (4 + 4 + 8 + 8) + 4 * n
    # The search; a tile of rows in fp32; and of one part of it the fp16 rows, fp32 before and after normalisation, on
    # the grid, and fp64.
    return fixed + search_bytes(k, tile, device) + tile * dim * 4 + tile_rows(device) * dim * 28


def candidate_bytes(settings: KMeansSettings, device: torch.device) -> int:
    """Bytes of the candidate lists of the refining iterations, and of the search for them."""
    candidates, cells = num_candidates(settings), cell_count(settings.k)
    if candidates == 0:
        return 8 * settings.k
    searched = min(tile_rows(device), cells) * (2 * candidates * 12 + 4 * min(settings.k, TILE_CENTROIDS))
    return 8 * (cells * candidates + settings.k) + searched


def least_bytes(
    n: int, dim: int, settings: KMeansSettings, world: int, device: torch.device, extra_bytes: int = 0
) -> dict[str, int]:
    """Least bytes of every stage on one rank: reads are one tile of rows.

    Args:
        n: Training rows, of all ranks.
        extra_bytes: Further bytes that the run holds throughout.
    """
    k, tile = settings.k, pass_rows(settings, dim, device)
    rows, read = math.ceil(n / world), tile * dim * READ_BYTES
    iteration = fixed_bytes(rows, k, dim, settings, device) + read
    labels = k * (8 * dim + 24) + search_bytes(k, tile_rows(device), device) + tile_rows(device) * dim * 24
    if settings.method == "flat":
        stages = {"the iterations over": iteration}
        if settings.init == "k-means++":
            stages["k-means++ for"] = seeding_bytes(n, k, dim)
    else:
        # A cell of twice the average size.
        cell_k, cell_n = min(2 * math.isqrt(k) + 1, k), min(2 * n // cell_count(k) + 1, n)
        coarse = replace(settings, k=cell_count(k), method="flat", train_sample=None)
        sample = min(n, coarse_rows(k))
        stages = {
            "the coarse level of": max(least_bytes(sample, dim, coarse, world, device, 8 * sample).values()),
            "k-means++ in the cells of": seeding_bytes(cell_n, cell_k, dim),
            "the fine level of": fixed_bytes(cell_n, cell_k, dim, settings, device) + read,
            "merging for": merging_bytes(min(n, seed_count(k)), dim) + candidate_bytes(settings, device),
        }
        if settings.refine:
            stages["the iterations over"] = iteration + candidate_bytes(settings, device)
    return {stage: need + extra_bytes for stage, need in (stages | {"the labels of": labels}).items()}


def check_memory(
    n: int, dim: int, settings: KMeansSettings, world: int, device: torch.device, extra_bytes: int = 0
) -> None:
    """UserError that names the largest stage if it needs more than `memory_gb`. Arguments as in `least_bytes`."""
    stages = least_bytes(n, dim, settings, world, device, extra_bytes)
    largest = max(stages, key=lambda stage: stages[stage])
    if stages[largest] > settings.memory_gb * 1e9:
        seeding = settings.method == "flat" and largest.startswith("k-means++")
        remedy = "give --init random" if seeding else "make fewer clusters"
        raise _too_little(largest, dim, settings, stages[largest], remedy)


def _too_little(stage: str, dim: int, settings: KMeansSettings, need: int, remedy: str) -> UserError:
    least = _rounded_up(need / 1e9)
    verb = "needs" if stage.startswith(("k-means++", "merging", "the coarse", "the fine")) else "need"
    return UserError(
        f"memory bound is {settings.memory_gb:g} GB, {stage} {settings.k} clusters of width {dim} {verb} {least} GB: "
        f"raise --memory-gb to {least} or more, or {remedy}"
    )


def _rounded_up(value: float) -> str:
    """At least `value`, in three digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    text = f"{math.ceil(value / unit) * unit:.3g}"
    return text if float(text) >= value else f"{(math.ceil(value / unit) + 1) * unit:.3g}"


def spare_bytes(n: int, dim: int, settings: KMeansSettings, device: torch.device, extra_bytes: int = 0) -> int:
    """Bytes that `memory_gb` leaves for rows.

    Args:
        n: Rows of this rank.
        extra_bytes: Further bytes that the run holds throughout.

    Raises:
        UserError: Less than one tile of rows fits.
    """
    fixed = fixed_bytes(n, settings.k, dim, settings, device) + extra_bytes
    spare, minimum = int(settings.memory_gb * 1e9) - fixed, pass_rows(settings, dim, device) * dim * READ_BYTES
    if spare < minimum:
        raise _too_little("the iterations over", dim, settings, fixed + minimum, "make fewer clusters")
    return spare


def block_rows(n: int, dim: int, settings: KMeansSettings, device: torch.device, extra_bytes: int = 0) -> int:
    """Rows to read at once under `memory_gb`, a multiple of `pass_rows`. Arguments and errors as in `spare_bytes`."""
    tile = pass_rows(settings, dim, device)
    tiles = spare_bytes(n, dim, settings, device, extra_bytes) // (tile * dim * READ_BYTES)
    return min(tiles, _BLOCK_TILES, max(n // tile, 1)) * tile
