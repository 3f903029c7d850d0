"""Estimates work, time and memory of a clustering before it starts, from the measured rate of the device.

Legend: n rows, K clusters, D width.
"""

from __future__ import annotations

import time

import torch

from megacid.offline.cluster.hierarchical import cell_count
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import Assigner, tile_rows

_MAX_CENTROIDS = 16384  # in the timed tiles
_TIMED_S = 0.1


def assignment_flop(settings: KMeansSettings, n: int, dim: int) -> tuple[float, float]:
    """(FLOP of the fit, FLOP of labelling all n rows): 2 D per comparison of a row with a centroid."""
    k, trained = settings.k, min(settings.train_sample or n, n)
    compared = float(k * settings.iterations)  # centroids a training row is compared with
    if settings.method == "hierarchical":
        cells = cell_count(k)
        near = min(settings.refine_cells or cells, cells)
        compared = cells + k / cells * (settings.iterations + near * settings.refine)
    return 2.0 * dim * trained * compared, 2.0 * dim * n * k


def measured_rate(settings: KMeansSettings, dim: int, device: torch.device) -> float:
    """FLOP/s of the nearest-centroid search on this rank, measured on random rows for a tenth of a second."""
    generator = torch.Generator().manual_seed(0)
    count = min(settings.k, _MAX_CENTROIDS)
    rows, centroids_KD = (
        torch.nn.functional.normalize(torch.randn(number, dim, generator=generator), dim=1)
        for number in (tile_rows(device), count)
    )
    assigner = Assigner(centroids_KD, settings.metric, device, settings.backend)
    x_TD = rows.to(device)

    def tile() -> None:
        # The copy to the host waits for the GPU.
        assigner.tile(x_TD)[1].cpu()

    tile()
    tiles, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < _TIMED_S:
        tile()
        tiles += 1
    return 2.0 * dim * len(x_TD) * count * tiles / spent


def describe_cost(settings: KMeansSettings, n: int, dim: int, world: int, device: torch.device) -> str:
    """Two lines for the user. The time does not include reading and summing rows."""
    k, trained = settings.k, min(settings.train_sample or n, n)
    fit, labels = assignment_flop(settings, n, dim)
    rate = measured_rate(settings, dim, device) * world
    return (
        f"{n:,} rows of width {dim}, {k:,} clusters ({settings.method}), training on {trained:,} rows "
        f"({trained / max(k, 1):.1f} per cluster)\n"
        f"about {_duration((fit + labels) / rate)} of distance computation on {world} rank{'s' if world > 1 else ''} "
        f"({fit + labels:.3g} FLOP, {labels:.3g} of them for the labels; {rate / 1e9:.3g} GFLOP/s); centroids "
        f"{k * dim * 4 / 1e9:.3g} GB, memory bound {settings.memory_gb:g} GB per rank"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
