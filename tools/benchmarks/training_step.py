"""Suites step and scale: a whole training step of the classifier compared with the published partial-FC scheme.

Loss and gradients of all providers are first compared with float64. In step (and head on a CPU) the providers take
turns in one process, and speed is the median of paired ratios; in scale each has its own process. Extra memory is the
peak of one iteration above weights, moments and inputs, always in a separate process. In head on a CPU the provider
3gemm computes the three products of megacid's chunks alone: the least time of any form that stores the gradient. In
step on a GPU megacid-graph is megacid with static shapes, its loss and gradients from a CUDA graph.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from argtypes import positive
from benchmarks.classifier_providers import GRAPH, PRODUCTS, PROVIDERS, Shape, check_accuracy
from benchmarks.classifier_timing import compare, measure_shape
from benchmarks.measure import format_ms, format_value, median
from benchmarks.suite import Limit, Report, Row, make_report, of_gpu_code
from megacid.errors import UserError

HELP = (
    "step: sampling, forward, backward and AdamW over 1,000,000 classes, 10 % sampled; "
    "scale: the step from 10^4 to 10^7 classes with 8192 sampled rows"
)
SHAPES = {
    "head": [Shape(131_072, 256, 256, 1.0)],
    "step": [Shape(1_000_000, 256, 256, 0.1)],
    "scale": [Shape(size, 64, 256, 8192 / size) for size in (10_000, 100_000, 1_000_000, 10_000_000)],
}
# (minimum speed over eager, maximum extra memory over eager's)
LIMITS: dict[str, tuple[float, float | None]] = {"head": (1.5, 1 / 3), "step": (4.0, None)}
# On one H200: seconds of a step with AdamW.
GPU_LIMITS = {Shape(10_000_000, 512, 4096, 0.1): 0.03, Shape(10_000_000, 512, 4096, 1.0): 0.25}
REPEATS, MIN_REPEATS = 7, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", nargs="+", metavar="C,D,B,r", help="classes,width,batch,sampling rate of every case"
    )
    parser.add_argument("--repeats", type=positive, default=REPEATS, help="timed calls of each provider (default 7)")


def shapes_of(args: argparse.Namespace, default: list[Shape]) -> list[Shape]:
    return [Shape.parse(text) for text in args.shapes] if args.shapes else default


def run(args: argparse.Namespace) -> Report:
    if args.check and args.suite not in LIMITS:
        raise UserError(
            f"--check is given, but suite {args.suite} has no limits, expected {' or '.join(LIMITS)}: leave it out"
        )
    if args.repeats < MIN_REPEATS:
        raise UserError(f"--repeats is {args.repeats}, expected at least {MIN_REPEATS}: leave it out for the default")
    shapes = shapes_of(args, SHAPES[args.suite])
    names = [name for name in PROVIDERS if args.suite != "scale" or name != "eager-tuned"]
    check_accuracy(names, torch.device(args.device))
    print("compared with float64: " + "; ".join(f"{name} ({PROVIDERS[name]})" for name in names))
    names += [PRODUCTS] if args.suite == "head" else [GRAPH] if (args.suite, args.device) == ("step", "cuda") else []
    rows = [row for shape in shapes for row in measure_shape(shape, names, args)]
    for row, (speed, memory) in [(row, compare(row, by_shape(rows)[row["shape"]]["eager"])) for row in rows]:
        row |= {} if speed is None else {"speed_over_eager": speed}
        row |= {} if memory is None else {"memory_over_eager": memory}
    print_table(rows)
    for shape, providers in by_shape(rows).items() if args.suite == "head" else ():
        speed, _ = compare(providers["megacid"], providers[PRODUCTS])
        providers["megacid"] |= {} if speed is None else {"speed_over_products": speed}
        print(f"{Shape.parse(shape)}: speed of megacid over {PRODUCTS}: {format_value(speed, unit='x')}")
    return make_report(args, rows)


def by_shape(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """{shape: {provider: row}}"""
    result: dict[str, dict[str, Row]] = {}
    for row in rows:
        result.setdefault(row["shape"], {})[row["provider"]] = row
    return result


def print_table(rows: list[Row]) -> None:
    """Print a row per provider and shape; the last column compares with the provider's first shape."""
    shapes = by_shape(rows)
    print("\n| provider | shape | ms p50 [p20, p80] | speed over eager ", end="")
    print("| extra MiB | over eager's | time, extra over first shape |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, (shape, by_provider) in itertools.product(next(iter(shapes.values())), shapes.items()):
        values, first, cells = by_provider[name], next(iter(shapes.values()))[name], [name, str(Shape.parse(shape))]
        if "seconds" in values:
            speed, share = compare(values, by_provider["eager"])
            cells += [format_ms(values["seconds"]), format_value(speed, unit="x")]
            cells += [f"{values['peak_extra_bytes'] / 2**20:,.1f}" if "peak_extra_bytes" in values else "-"]
            cells += [format_value(share, unit="x")]
            growth = compare(first, values)[0], compare(values, first)[1]
            cells.append(", ".join(format_value(ratio, unit="x") for ratio in growth))
        if "skipped" in values:
            cells.append(f"not measured: {values['skipped']}")
        print(f"| {' | '.join(cells)} |")


def check(report: Report) -> list[Limit]:
    limits = []
    if of_gpu_code(report):
        for shape, rows in by_shape(report["results"]).items():
            most, seconds = GPU_LIMITS.get(Shape.parse(shape)), median(rows["megacid"])
            if most is not None and seconds is not None:  # all rows do not fit every GPU
                limits.append(Limit(f"{Shape.parse(shape)}: seconds of a step", seconds, most, at_least=False))
        return limits
    for shape, rows in by_shape(report["results"]).items():
        speed, memory = compare(rows["megacid"], rows["eager"])
        min_speed, max_memory = LIMITS[report["suite"]]
        limits.append(Limit(f"{Shape.parse(shape)}: speed over eager", speed, min_speed, at_least=True))
        if max_memory is not None:
            limits.append(Limit(f"{Shape.parse(shape)}: extra memory over eager's", memory, max_memory, at_least=False))
    return limits
