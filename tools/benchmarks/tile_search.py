"""Search for the fastest tiles of the products on a GPU, for tools/tune.py.

Legend: b samples, S rows of w, D width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import measure
from benchmarks.suite import Row
from megacid_kernels.fused.exponentials import exponentials
from megacid_kernels.fused.exponentials_inplace import exponentials_
from megacid_kernels.fused.nearest import nearest
from megacid_kernels.fused.product import ProductTile
from megacid_kernels.fused.row_statistics import pitched
from megacid_kernels.fused.tuning import Tiles

Kernel = Literal["forward", "nearest"]
KERNELS: tuple[Kernel, ...] = ("forward", "nearest")
# Shared memory per block, for --list; when measuring, the GPU is queried.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
SHARED_BYTES |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), 99 << 10)
_MAX_ACCUMULATORS = 128  # per thread, of 255 registers: addresses, masks and the epilogue need the rest
_GROUPS, _REGROUPED = (4, 8, 16, 32, 64), 3  # the groups that are tried for the fastest tiles, and for how many of them
_SCALE, _SEED = 64.0, 0
_ROUNDS = 3
_SUM_TOLERANCE = 1e-3  # tiles differ in the order of their sums


def candidates(kernel: Kernel, itemsize: int) -> list[ProductTile]:
    """The tiles worth measuring; some do not fit some GPUs, see `excess`. `exponentials` revisits w after 8 row tiles,
    while it is still in L2; `nearest` goes through all rows first. fp32 halves columns and depth."""
    columns, depths = ((128, 256), (32, 64)) if itemsize == 2 else ((64, 128), (16, 32))
    sizes = itertools.product((64, 128), columns, depths, (4, 8), (2, 3, 4))
    tiles = [ProductTile(*size, group=8 if kernel == "forward" else 64) for size in sizes]
    if kernel == "nearest":
        return tiles
    # With descriptors the tile that fills the registers of its warps: smaller ones read their factors more often.
    full = [tile for tile in tiles if itemsize == 2 and _accumulators(tile) == _MAX_ACCUMULATORS]
    return tiles + [replace(tile, descriptors=True) for tile in full]


def other_groups(tile: ProductTile) -> list[ProductTile]:
    """The tile in other orders of the programs, which change what stays in L2 and not the result."""
    return [replace(tile, group=group) for group in _GROUPS if group != tile.group]


def _accumulators(tile: ProductTile) -> int:
    """fp32 sums per thread."""
    return tile.rows * tile.columns // (32 * tile.warps)


def excess(tile: ProductTile, itemsize: int, shared_bytes: int) -> str:
    """Why the tile is too large for `shared_bytes` of shared memory or for the registers; "" if it fits."""
    shared = tile.stages * (tile.rows + tile.columns) * tile.depth * itemsize
    if tile.descriptors:  # and half of the tile on its way to memory
        shared += tile.rows * tile.columns // 2 * itemsize
    if shared > shared_bytes:
        return f"{shared / 1024:.0f} KiB of shared memory, {shared_bytes / 1024:.0f} KiB available"
    accumulators = _accumulators(tile)
    if accumulators > _MAX_ACCUMULATORS:
        return f"{accumulators} accumulators per thread, at most {_MAX_ACCUMULATORS} leave room in the registers"
    return ""


class Case(NamedTuple):
    x: Tensor  # [b, D] unit rows
    w: Tensor  # [S, D] unit rows
    slot: Tensor  # [b, 1] int64
    own: Tensor  # [b, 1] bool

    @classmethod
    def random(cls, samples: int, classes: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
        generator = torch.Generator(device).manual_seed(_SEED)
        x, w = (F.normalize(torch.randn(n, width, generator=generator, device=device)) for n in (samples, classes))
        slot = torch.randint(classes, (samples, 1), generator=generator, device=device)
        return cls(x.to(dtype), w.to(dtype), slot, torch.ones_like(slot, dtype=torch.bool))


def forward(case: Case, tile: ProductTile | None) -> Tensor:
    """Row sums of `exponentials`; its matrix is dropped."""
    return exponentials(*case, scale=_SCALE, shift=0.0, tile=tile).sums


def search(case: Case, tile: ProductTile | None) -> Tensor:
    return nearest(case.x, case.w, tile=tile)[0]


def in_place(case: Case) -> Tensor:
    """The same sums over a cuBLAS product. Its cosines have the operands' dtype; bf16 is too coarse for them."""
    x, w, slot, own = case
    cos = pitched(len(x), len(w), x.dtype, x.device)
    torch.mm(x, w.T, out=cos)
    return exponentials_(cos, slot, own, scale=_SCALE, shift=0.0).sums


RUNS: dict[Kernel, Callable[[Case, ProductTile | None], Tensor]] = {"forward": forward, "nearest": search}


def fitting(kernel: Kernel, dtype: torch.dtype, shared_bytes: int, *, descriptors: bool) -> list[ProductTile]:
    """The candidates that fit; `descriptors`: whether the GPU has them (sm_90 and later)."""
    return [
        tile
        for tile in candidates(kernel, dtype.itemsize)
        if not excess(tile, dtype.itemsize, shared_bytes) and (descriptors or not tile.descriptors)
    ]


def tune(case: Case, tiles: dict[Kernel, list[ProductTile]], timer: measure.Timer) -> tuple[Tiles, list[Row]]:
    """(the fastest of `tiles` for every kernel, a row per candidate). A tile that does not compile, or whose sums
    differ from those of the table's tile, is skipped with the reason in its row."""
    x = case.x
    flop = 2e-12 * len(x) * len(case.w) * x.shape[1]
    rows: list[Row] = []
    best: dict[Kernel, tuple[float, ProductTile]] = {}
    for kernel in KERNELS:
        expected = RUNS[kernel](case, None)
        runs: dict[str, Callable[[], object]] = {}
        for tile in tiles[kernel]:
            run = functools.partial(RUNS[kernel], case, tile)
            reason = _failure(run, expected)
            if reason:
                rows.append({"kernel": kernel, "tile": tile_name(tile), "skipped": reason})
            else:
                runs[tile_name(tile)] = run
        timed = _times(runs, timer)
        if not timed:
            raise ValueError(
                f"none of {len(tiles[kernel])} tiles of {kernel} runs: {rows[-1]['skipped'] if rows else 'none fits'}"
            )
        by_name = {tile_name(tile): tile for tile in tiles[kernel]}
        fastest = sorted(timed, key=lambda name: measure.quantiles(timed[name])[1])[:_REGROUPED]
        groups = {tile_name(tile): tile for name in fastest for tile in other_groups(by_name[name])}
        by_name |= groups
        timed |= _times({name: functools.partial(RUNS[kernel], case, tile) for name, tile in groups.items()}, timer)
        for name, seconds in timed.items():
            rows.append(_row(kernel, name, seconds, flop))
        name = min(timed, key=lambda name: measure.quantiles(timed[name])[1])
        best[kernel] = (measure.quantiles(timed[name])[1], by_name[name])
    matrix: Any = "fused"
    if x.dtype != torch.bfloat16:
        seconds = _times({"in-place": functools.partial(in_place, case)}, timer)["in-place"]
        rows.append(_row("in-place", "", seconds, flop))
        matrix = "in-place" if measure.quantiles(seconds)[1] < best["forward"][0] else "fused"
    return Tiles(best["forward"][1], best["nearest"][1], matrix), rows


def _row(kernel: str, tile: str, seconds: list[float], flop: float) -> Row:
    return {"kernel": kernel, "tile": tile, "seconds": seconds, "tflops": flop / measure.quantiles(seconds)[1]}


def tile_name(tile: ProductTile) -> str:
    name = f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps, {tile.stages} stages, group {tile.group}"
    return name + (", descriptors" if tile.descriptors else "")


def _failure(run: Callable[[], Tensor], expected: Tensor) -> str:
    try:
        error = measure.relative_error(run(), expected)
    except Exception as failure:  # a compiler may raise anything, and one tile must not end the search
        return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"[:120]
    return "" if error < _SUM_TOLERANCE else f"its result is off by {error:.1e}"


def _times(runs: dict[str, Callable[[], object]], timer: measure.Timer) -> dict[str, list[float]]:
    repeats = {name: measure.repeats_for(timer(run, 2)[1]) for name, run in runs.items()}
    return measure.take_turns(runs, timer, _ROUNDS, repeats)
