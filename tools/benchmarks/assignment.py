"""Suite assignment: the nearest of many centroids, the work of k-means: our kernel, blocked PyTorch, faiss, cuBLAS.

Legend: b rows, K centroids, D width.

"of cuBLAS" is the time of the fp16 product alone, in blocks of centroids that overwrite each other, over the time of
the provider. Labels are compared with float64 on a sample of rows by the similarity that a wrong label loses.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from argtypes import positive
from benchmarks import measure
from benchmarks.suite import Limit, Report, Row, make_report, of_gpu_code, parse_sizes, print_table
from megacid.errors import UserError
from megacid.offline.nearest import Assigner

HELP = "the nearest centroid of every row: TFLOP/s, wrong labels, and on a GPU the projected hours for LAION225M"
MIN_CUBLAS_FRACTION, MIN_SPEED_OVER_FAISS = 0.75, 1.0
GPU_SHAPES = ["65536,1048576,768", "65536,65536,768", "65536,1048576,1280"]
CPU_SHAPES = ["8192,4096,256"]
# The run that the hours are projected for.
LAION_ROWS, LAION_CENTROIDS, ITERATIONS, GPUS = 225e6, 1e6, 20, 8
_BLOCK = 65536  # centroids per product where it is made in blocks
_SAMPLE, _REPEATS, _ROUNDS = 256, 7, 3
_TIE = 1e-6  # similarities closer than this are a tie

Find = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Data:
    """Unit rows: fp32, and the same in fp16 as embeddings are stored."""

    x_bD: Tensor
    c_KD: Tensor

    @functools.cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        return self.x_bD.half(), self.c_KD.half()


def make_data(shape: str, device: torch.device) -> Data:
    """Rows scattered around some of the centroids. Raises UserError for an invalid shape."""
    b, k, dim = parse_sizes(shape, "rows,centroids,width", CPU_SHAPES[0])
    generator = torch.Generator(device).manual_seed(0)
    c_KD = F.normalize(torch.randn(k, dim, generator=generator, device=device))
    near = c_KD[torch.randint(k, (b,), generator=generator, device=device)]
    noise = F.normalize(torch.randn(b, dim, generator=generator, device=device))
    return Data(F.normalize(near + 1.5 * noise), c_KD)


def product_alone(data: Data) -> Find:
    x, c = data.halves
    if x.device.type == "cpu":
        x, c = data.x_bD, data.c_KD  # not every CPU has a fast 16-bit product
    out = x.new_empty(len(x), min(_BLOCK, len(c)))

    def run() -> tuple[Tensor, Tensor]:
        for low in range(0, len(c), _BLOCK):
            part = c[low : low + _BLOCK]
            torch.mm(x, part.T, out=out[:, : len(part)])
        return out[:1, :1], out[:1, :1]

    return run


def fused(data: Data, dtype: torch.dtype) -> Find:
    from megacid_kernels.fused.nearest import nearest

    x, c = data.x_bD.to(dtype), data.c_KD.to(dtype)
    return lambda: nearest(x, c)


def blocks(data: Data) -> Find:
    assigner = Assigner(data.c_KD, "cosine", data.x_bD.device, "torch")
    rows = 8192 if data.x_bD.is_cuda else 1024

    def run() -> tuple[Tensor, Tensor]:
        tiles = [assigner.tile(part) for part in data.x_bD.split(rows)]
        return torch.cat([value[:, 0] for value, _ in tiles]), torch.cat([label[:, 0] for _, label in tiles])

    return run


def by_faiss(data: Data) -> Find:
    import faiss

    index: Any = faiss.IndexFlatIP(data.c_KD.shape[1])
    if data.x_bD.is_cuda:
        if faiss.get_num_gpus() == 0:
            raise ImportError("this faiss is a CPU build")
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(data.c_KD.cpu().numpy())
    x = data.x_bD.cpu().numpy()

    def run() -> tuple[Tensor, Tensor]:
        value, label = index.search(x, 1)
        return torch.from_numpy(value)[:, 0], torch.from_numpy(label)[:, 0]

    return run


PROVIDERS: dict[str, Callable[[Data], Find]] = {
    "cublas": product_alone,
    "megacid-fp16": functools.partial(fused, dtype=torch.float16),
    "megacid-bf16": functools.partial(fused, dtype=torch.bfloat16),
    "megacid-torch": blocks,
    "faiss": by_faiss,
}


def lost_similarity(data: Data, label_b: Tensor) -> tuple[float, float]:
    """(fraction of a sample of rows with a wrong label, the largest similarity that one of them loses), in float64."""
    rows = torch.linspace(0, len(data.x_bD) - 1, min(_SAMPLE, len(data.x_bD)), device=data.x_bD.device).long()
    x = data.x_bD[rows].double()
    best = torch.full((len(rows),), -math.inf, dtype=torch.float64, device=x.device)
    for part in data.c_KD.split(_BLOCK):
        best = torch.maximum(best, (x @ part.double().T).amax(1))
    chosen = data.c_KD[label_b.to(rows.device)[rows]].double()
    gap = best - torch.linalg.vecdot(x, chosen)
    return float((gap > _TIE).double().mean()), float(gap.amax())


def attempt(name: str, data: Data) -> tuple[Row, Find | None]:
    row: Row = {"provider": name}
    try:
        find = PROVIDERS[name](data)
        value, label = find()
        if name != "cublas":
            wrong, lost = lost_similarity(data, label)
            row |= {"wrong_fraction": wrong, "lost_similarity": lost}
            first = measure.digest((value, label))
            row["same_bits"] = float(measure.digest(find()) == first)
        row["peak_extra_bytes"] = float(measure.peak_extra_bytes(find, data.x_bD.device))
        return row, find
    except ImportError as error:
        return row | {"skipped": f"not installed: {error}"}, None
    except torch.OutOfMemoryError:
        return row | {"skipped": "out of memory"}, None
    except ValueError as error:
        return row | {"skipped": f"unsupported: {error}"}, None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", metavar="b,K,D", help="rows,centroids,width of every case")
    parser.add_argument(
        "--repeats", type=positive, default=_REPEATS, help="timed calls in each of three rounds (default 7)"
    )


def run(args: argparse.Namespace) -> Report:
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, expected at least 1")
    device = torch.device(args.device)
    timer = measure.timer_of(args)
    rows: list[Row] = []
    for shape in args.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES):
        data = make_data(shape, device)
        attempts = {name: attempt(name, data) for name in PROVIDERS}
        calls = {name: find for name, (_, find) in attempts.items() if find is not None}
        seconds = measure.take_turns(calls, timer, _ROUNDS, args.repeats)
        flop = 2.0 * len(data.x_bD) * data.c_KD.numel()
        for name, (row, find) in attempts.items():
            row["shape"] = shape
            if find is not None:
                p50 = measure.quantiles(seconds[name])[1]
                row |= {"seconds": seconds[name], "tflops": 1e-12 * flop / p50}
                row["cublas_fraction"] = measure.quantiles(seconds["cublas"])[1] / p50
                laion = 2.0 * LAION_ROWS * LAION_CENTROIDS * data.c_KD.shape[1] * ITERATIONS
                row["laion_hours"] = laion / (flop / p50) / GPUS / 3600
            rows.append(row)
        print_shape(shape, rows[-len(attempts) :], device)
        del data, attempts, calls
        gc.collect()
    return make_report(args, rows)


def print_shape(shape: str, rows: list[Row], device: torch.device) -> None:
    print(f"\n{shape} (rows, centroids, width)")
    columns: dict[str, Callable[[Row], str]] = {
        "provider": lambda row: str(row["provider"]),
        "ms p50 [p20, p80]:": lambda row: measure.format_ms(row["seconds"]),
        "TFLOP/s:": lambda row: f"{row['tflops']:,.3g}",
        "of cuBLAS:": lambda row: f"{row['cublas_fraction']:.1%}",
        "extra MiB:": lambda row: f"{row['peak_extra_bytes'] / 2**20:,.0f}",
        "wrong labels:": lambda row: measure.format_value(row.get("wrong_fraction"), ".2%"),
        "similarity lost:": lambda row: measure.format_value(row.get("lost_similarity"), ".1e"),
        "same bits:": lambda row: {1.0: "yes", 0.0: "no"}.get(row.get("same_bits", -1.0), "-"),
    }
    if device.type == "cuda":
        data = f"{LAION_ROWS / 1e6:.0f}M x {LAION_CENTROIDS / 1e6:.0f}M"
        columns[f"{GPUS} GPUs: hours of {ITERATIONS} iterations over {data}:"] = lambda row: f"{row['laion_hours']:.2f}"
    print_table(rows, columns)


def check(report: Report) -> list[Limit]:
    """The limits of the fused kernel on a GPU at shapes with a million centroids; none on a CPU."""
    limits: list[Limit] = []
    if not of_gpu_code(report):
        return limits
    for shape in dict.fromkeys(row["shape"] for row in report["results"]):
        rows = {row["provider"]: row for row in report["results"] if row["shape"] == shape}
        if int(shape.split(",")[1]) < LAION_CENTROIDS:
            continue
        ours, faiss = rows.get("megacid-fp16", {}), rows.get("faiss", {})
        limits.append(
            Limit(
                f"{shape}: fraction of cuBLAS's rate", ours.get("cublas_fraction"), MIN_CUBLAS_FRACTION, at_least=True
            )
        )
        speed = measure.ratio(measure.median(faiss), measure.median(ours))
        limits.append(Limit(f"{shape}: speed over faiss", speed, MIN_SPEED_OVER_FAISS, at_least=True))
    return limits
