"""Estimates work, time and memory of a clustering before it starts, from the measured rates of the device.

`tools/bench.py --suite cluster-stages` compares the estimate of every stage with what it takes.

Legend: n rows, K clusters, C coarse clusters, D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from megacid.distributed.stopping import no_progress
from megacid.offline.cluster.accumulate import Accumulator
from megacid.offline.cluster.fine_level import EXTRA_STEPS
from megacid.offline.cluster.memory import READ_BYTES, block_rows, candidate_bytes, check_memory, least_bytes
from megacid.offline.cluster.merging import BLOCK_BYTES as MERGING_BLOCK_BYTES
from megacid.offline.cluster.merging import NEIGHBOURS
from megacid.offline.cluster.seeding import (
    BATCHED_STEPS,
    SEEDING_ITERATIONS,
    num_draws,
    plus_plus,
    sample_rows,
    seed_count,
    seeding_bytes,
)
from megacid.offline.cluster.state import KMeansSettings, cell_count, coarse_rows, num_candidates
from megacid.offline.nearest import Assigner, prepare, tile_rows
from megacid.offline.rows import ArrayRows, find_invalid_row

Clock = Callable[[], float]
_MAX_CENTROIDS = 16384  # in the timed tiles
_TIMED_S, _TIMED_TILES = 0.1, 16
_FEW_CENTROIDS, _SELECTED_ROWS, _SEEDED_ROWS = 16, 16, 2048  # of the timed searches and of k-means++
# Measured on an AMD EPYC: gathering a row from the page cache, reading the key and writing the labels of a sample,
# merging a centroid, and writing to a disk.
_TAKE_S, _LABEL_S, _MERGE_S, _WRITE_BYTES_S = 1e-6, 6e-6, 1e-5, 5e8


def assignment_flop(settings: KMeansSettings, n: int, dim: int) -> tuple[float, float]:
    """(FLOP of the fit, FLOP of labelling all n rows): 2 D per comparison of a row with a centroid."""
    k, trained = settings.k, min(settings.train_sample or n, n)
    compared = float(k * settings.iterations)  # centroids a training row is compared with
    if settings.method == "hierarchical":
        cells = cell_count(k)
        near = min(settings.refine_cells or cells, cells)
        compared = cells + k / cells * (settings.iterations + near * settings.refine)
    return 2.0 * dim * trained * compared, 2.0 * dim * n * k


def measured_rate(settings: KMeansSettings, dim: int, device: torch.device, clock: Clock = time.perf_counter) -> float:
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

    return 2.0 * dim * len(x_TD) * count / _seconds(tile, clock, _TIMED_S)


@dataclass(frozen=True)
class Rates:
    """Seconds on this rank: of a comparison of a row with a centroid (`compare` for the nearest, `compare_top` for
    several, `select` for the candidates of a cell, `draw` for a candidate of k-means++), and of a row that is checked
    (`check`), or prepared, searched and summed (`row`, without its comparisons)."""

    compare: float
    compare_top: float
    select: float
    draw: float
    check: float
    row: float


@dataclass(frozen=True)
class StageEstimate:
    """seconds: of the slowest rank. bytes: peak of a rank, without the libraries and mapped files."""

    stage: str
    seconds: float
    bytes: int


def measure_rates(settings: KMeansSettings, dim: int, device: torch.device, clock: Clock = time.perf_counter) -> Rates:
    """Rates on random rows, measured in a fraction of a second. clock: Its seconds are counted."""
    tile, k = tile_rows(device), min(settings.k, _MAX_CENTROIDS)
    generator = np.random.default_rng(0)
    block = generator.standard_normal((_TIMED_TILES * tile, dim), np.float32)
    block = (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)
    centroids_KD = torch.nn.functional.normalize(torch.randn(k, dim, generator=torch.Generator().manual_seed(0)), dim=1)
    assigner = Assigner(centroids_KD, settings.metric, device, settings.backend)
    total = Accumulator(replace(settings, k=k), dim, device, 1.0)
    label_T = torch.from_numpy(generator.integers(k, size=tile)).to(device)
    x_TD = prepare(block[:tile], settings.metric, device)

    def check() -> None:
        find_invalid_row(np.asarray(block[:tile], np.float32), allow_zero=False, unit=True)

    def visit() -> None:
        # Several tiles, since a single one would stay in the processor's cache.
        for at in range(0, len(block), tile):
            x_TD = prepare(block[at : at + tile], settings.metric, device)
            few.tile(x_TD)[1].cpu()
            total.add(x_TD, label_T, x_TD[:, 0])
        total.flat[-1].item()

    few = Assigner(centroids_KD[:_FEW_CENTROIDS], settings.metric, device, settings.backend)

    def row_s(assigner: Assigner, top: int = 1, rows: int = tile) -> float:
        return _seconds(lambda: assigner.tile(x_TD[:rows], top)[1].cpu(), clock) / rows

    few_s, many_s = row_s(few), row_s(assigner)
    compare = (many_s - few_s) / (k - _FEW_CENTROIDS) if k > _FEW_CENTROIDS else 0.0
    compare = max(compare, many_s / k / 4)
    steps = seed_count(settings.k) if settings.method == "flat" else _cell_steps(settings.k)
    steps = min(steps, BATCHED_STEPS)
    sample = ArrayRows(np.resize(block, (_SEEDED_ROWS, dim)))

    def seed() -> None:
        comparisons = steps * num_draws(steps) * _SEEDED_ROWS
        plus_plus(sample, steps, _SEEDED_ROWS, comparisons, 0, settings.metric, device, no_progress)

    return Rates(
        compare=compare,
        compare_top=row_s(assigner, min(NEIGHBOURS + 1, k)) / k,
        # More than half of the timed centroids would be a search of nearly all.
        select=row_s(assigner, min(num_candidates(settings), k // 2) or 1, _SELECTED_ROWS) / k,
        draw=_seconds(seed, clock) / (steps * num_draws(steps) * _SEEDED_ROWS),
        check=_seconds(check, clock) / tile,
        row=_seconds(visit, clock) / len(block),
    )


def _cell_steps(k: int) -> int:
    """Steps of k-means++ in a cell of average size."""
    return math.ceil(1.5 * seed_count(k) / cell_count(k)) + EXTRA_STEPS


def _seconds(call: Callable[[], object], clock: Clock, at_least: float = _TIMED_S / 4) -> float:
    """Seconds of one call: the mean of several in `at_least` seconds, after a first one that is not counted."""
    call()
    calls, began = 0, clock()
    while (spent := clock() - began) < at_least or calls == 0:
        call()
        calls += 1
    return spent / calls


def estimate_stages(
    settings: KMeansSettings, n: int, dim: int, world: int, device: torch.device, rates: Rates, top: int = 1
) -> list[StageEstimate]:
    """Time and memory of every stage, in their order. The rows are assumed in the page cache, the cells of one size.

    Args:
        n: All rows. The training rows are `settings.train_sample`, if that is less.
        top: Labels per sample.

    Raises:
        UserError: The memory bound is too small.
    """
    k, trained = settings.k, min(settings.train_sample or n, n)
    if trained < n:  # a sample is read row by row
        rates = replace(rates, row=rates.row + _TAKE_S)
    check_memory(trained, dim, settings, world, device)
    part, least = math.ceil(trained / world), least_bytes(trained, dim, settings, world, device)
    extra = candidate_bytes(settings, device) if settings.method == "hierarchical" else 0
    reads = block_rows(part, dim, settings, device, extra) * dim * READ_BYTES
    stages = [StageEstimate("check", part * rates.check, reads)]
    if settings.method == "flat":
        if settings.init == "k-means++":
            stages.append(StageEstimate("seeding", _seeding_s(trained, k, dim, rates), seeding_bytes(trained, k, dim)))
        stages.append(StageEstimate("iterations", settings.iterations * part * (k * rates.compare + rates.row),
                                    least["the iterations over"] + reads))  # fmt: skip
    else:
        stages += _levels(settings, trained, dim, world, device, rates, least, reads)
    compare = rates.compare if top == 1 else rates.compare_top
    labels = math.ceil(n / world) * (k * compare + rates.check + rates.row + _LABEL_S)
    stages.append(StageEstimate("labels", labels, least["the labels of"]))
    return [*stages, StageEstimate("writing", k * dim * 4 / _WRITE_BYTES_S, k * (4 * dim + 24))]


def _seeding_s(n: int, k: int, dim: int, rates: Rates, *, merged: bool = True) -> float:
    """Seconds of k-means++ for k centroids, and of weighing and merging."""
    count, sample = min(n, seed_count(k)) if merged else k, sample_rows(n, k, dim)
    draws = count * num_draws(count)
    if count >= BATCHED_STEPS:
        draws = min(draws, SEEDING_ITERATIONS * n * k // sample)
    seconds = draws * sample * rates.draw
    return seconds + (sample * count * rates.compare + count * count * rates.compare_top if merged else 0.0)


def _levels(
    settings: KMeansSettings,
    n: int,
    dim: int,
    world: int,
    device: torch.device,
    rates: Rates,
    least: dict[str, int],
    reads: int,
) -> list[StageEstimate]:
    """The stages of two levels between the check and the labels."""
    k, cells, part = settings.k, cell_count(settings.k), math.ceil(n / world)
    sample, count = min(n, coarse_rows(k)), min(n, seed_count(k))
    seeding = _seeding_s(sample, cells, dim, rates) if settings.init == "k-means++" else 0.0
    take = _TAKE_S if sample < n else 0.0
    iterations = settings.iterations * sample / world * (cells * rates.compare + rates.row + take)
    cell_n, cell_k = max(n // cells, 1), count / cells
    steps = min(cell_n, _cell_steps(k))
    drawn = math.ceil(cells / world) * _seeding_s(cell_n, steps, dim, rates, merged=False)
    near = num_candidates(settings) or k
    candidates = cells * k * (rates.select + rates.compare)
    merging = count * (near * rates.compare_top + _MERGE_S) + candidates
    refining = part * (near * rates.compare + rates.row + _TAKE_S) + candidates
    stages = [
        StageEstimate("coarse clusters", sample * rates.check + seeding + iterations,
                      least["the coarse level of"] + reads),
        StageEstimate("cells", part * (cells * rates.compare + rates.row), reads + cells * dim * 8),
        StageEstimate("cell seeding", drawn, least["k-means++ in the cells of"]),
        StageEstimate("fine level", settings.iterations * part * (cell_k * rates.compare + rates.row),
                      least["the fine level of"] + 12 * cell_n * dim),
        StageEstimate("merging", merging, least["merging for"] + MERGING_BLOCK_BYTES),
    ]  # fmt: skip
    if settings.refine:
        stages.append(StageEstimate("refining", settings.refine * refining, least["the iterations over"] + reads))
    return stages


def describe_stages(stages: list[StageEstimate]) -> str:
    """A line for the user with time and memory of every stage."""
    parts = [f"{one.stage} {_duration(one.seconds)}, {one.bytes / 1e9:.2g} GB" for one in stages]
    return f"estimate of a rank, about {_duration(sum(one.seconds for one in stages))}: {'; '.join(parts)}"


def describe_cost(settings: KMeansSettings, n: int, dim: int, world: int, device: torch.device, top: int = 1) -> str:
    """Three lines for the user: sizes, distance computation, and the estimate by stage."""
    k, trained = settings.k, min(settings.train_sample or n, n)
    fit, labels = assignment_flop(settings, n, dim)
    rate = measured_rate(settings, dim, device) * world
    return (
        f"{n:,} rows of width {dim}, {k:,} clusters ({settings.method}), training on {trained:,} rows "
        f"({trained / max(k, 1):.1f} per cluster)\n"
        f"about {_duration((fit + labels) / rate)} of distance computation on {world} rank{'s' if world > 1 else ''} "
        f"({fit + labels:.3g} FLOP, {labels:.3g} of them for the labels; {rate / 1e9:.3g} GFLOP/s); centroids "
        f"{k * dim * 4 / 1e9:.3g} GB, memory bound {settings.memory_gb:g} GB per rank\n"
        + describe_stages(estimate_stages(settings, n, dim, world, device, measure_rates(settings, dim, device), top))
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
