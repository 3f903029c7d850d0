"""The memory bound of k-means: bytes that a run holds, and the number of rows to read at once.

Legend: n rows, K clusters, D width.
"""

from __future__ import annotations

import math

import torch

from megacid.errors import UserError
from megacid.offline.cluster.seeding import num_draws, sample_rows, seed_count
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import chosen_backend, search_bytes, tile_rows

_FAISS_TILES = 4
_READ_BYTES = 8  # per value while rows are read: at most fp32, gathered from several files
_BLOCK_TILES = 64  # per read; larger reads are not faster


def pass_rows(settings: KMeansSettings, dim: int, device: torch.device) -> int:
    """Rows of one tile of a pass over all rows. Larger with faiss, whose threads compete with torch's for the cores
    after every search: larger tiles mean fewer switches."""
    by_faiss = device.type == "cpu" and chosen_backend(settings.backend, device, dim) == "faiss"
    return tile_rows(device) * (_FAISS_TILES if by_faiss else 1)


def spare_bytes(n: int, dim: int, settings: KMeansSettings, device: torch.device, extra_bytes: int = 0) -> int:
    """Bytes that `memory_gb` leaves for rows.

    Args:
        n: Rows of this rank.
        extra_bytes: Further bytes that the run holds throughout.

    Raises:
        UserError: Less than one tile of rows fits.
    """
    tile, k = pass_rows(settings, dim, device), settings.k
    # Centroids in fp32 twice (faiss frees its index before a new one is built), sums in fp64 twice (local and reduced),
    # and the previous labels.
    fixed = k * dim * (4 + 4 + 8 + 8) + 4 * n + extra_bytes
    # The search; a tile of rows in fp32; and of one part of it the fp16 rows, fp32 before and after normalisation, on
    # the grid, and fp64.
    fixed += search_bytes(k, tile, device) + tile * dim * 4 + tile_rows(device) * dim * 28
    spare, minimum = int(settings.memory_gb * 1e9) - fixed, tile * dim * _READ_BYTES
    if spare < minimum:
        need = (fixed + minimum) / 1e9
        raise UserError(
            f"memory bound is {settings.memory_gb:g} GB, {k} clusters of width {dim} need {need:.3g} GB: raise "
            "--memory-gb or make fewer clusters"
        )
    return spare


def block_rows(n: int, dim: int, settings: KMeansSettings, device: torch.device, extra_bytes: int = 0) -> int:
    """Rows to read at once under `memory_gb`, a multiple of `pass_rows`. Arguments and errors as in `spare_bytes`."""
    tile = pass_rows(settings, dim, device)
    tiles = spare_bytes(n, dim, settings, device, extra_bytes) // (tile * dim * _READ_BYTES)
    return min(tiles, _BLOCK_TILES, max(n // tile, 1)) * tile


def check_seeding_memory(n: int, dim: int, settings: KMeansSettings) -> None:
    """UserError when k-means++ needs more than `memory_gb` for its sample (as read and in fp32) and for the distances
    of the sample to the candidates. n: all rows."""
    if settings.init != "k-means++" and settings.method == "flat":
        return
    # Hierarchical: for a cell of twice the average size; the coarse level checks itself.
    k = settings.k if settings.method == "flat" else 2 * math.isqrt(settings.k)
    need = (seed_count(k) * dim * 12 + sample_rows(n, k, dim) * (dim * 8 + 12 * num_draws(k) + 32)) / 1e9
    if need > settings.memory_gb:
        remedy = "raise --memory-gb" + (" or give --init random" if settings.method == "flat" else "")
        raise UserError(
            f"memory bound is {settings.memory_gb:g} GB, k-means++ for {k} clusters of width {dim} needs {need:.3g} GB:"
            f" {remedy}"
        )
