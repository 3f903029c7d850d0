"""Suite machine-code: the kernels of the head as the compiler makes them for a GPU that need not be present.

The kernels are those that suite head measures, and the optimizer's, called as there. A row has the resources of one
kernel, its mix of instructions, and lower bounds of its time, the longest of which is the predicted time. If docs/bench
holds a measurement of the same kernel and shape by suite head on the GPU of the prediction, it follows.

A call may launch several kernels: the first does the work and is the one described; the measured time is of the call.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import torch

from argtypes import positive
from benchmarks import head_gpu, head_kernels, measure
from benchmarks.absent_gpu import Launch, absent_gpu
from benchmarks.classifier_providers import BETAS, MARGIN, Shape
from benchmarks.head_kernels import Kernel
from benchmarks.head_peers import Case
from benchmarks.kernel_bounds import (
    H100_SHEET_BYTES_PER_S,
    H100_SHEET_FLOP_PER_S,
    MULTIPROCESSORS,
    RATES,
    Work,
    bounds,
    predicted,
    programs_by,
)
from benchmarks.sass import MachineCode, disassemble
from benchmarks.suite import Limit, Report, Row, make_report, print_table, read_report
from checkout import ROOT

HELP = "the kernels' machine code and the time that it predicts, without a GPU"
_BUDGET_GIB = 20.0  # suite head's default
_PARTS = ("before", "after")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(device="cpu")
    parser.add_argument(
        "--widths", type=positive, nargs="+", default=[512, 768, 1024], metavar="D", help="default 512 768 1024"
    )
    parser.add_argument(
        "--architecture", choices=tuple(MULTIPROCESSORS), default="sm_90", help="of the GPU (default sm_90)"
    )


def shape_of(width: int) -> Shape:
    """The first shape of suite head that has this width."""
    return next((shape for shape in head_gpu.SHAPES if shape.width == width), Shape(131_072, width, 4096))


def case_of(shape: Shape) -> Case:
    """Tensors without memory, see `absent_gpu`."""
    x, w = (torch.empty(n, shape.width, device="cuda") for n in (shape.batch, shape.classes))
    target = torch.empty(shape.batch, dtype=torch.int64, device="cuda")
    return Case(shape, MARGIN, x, w, target, int(_BUDGET_GIB * 2**30))


def kernels(case: Case) -> dict[str, Kernel]:
    return head_kernels.kernels(case) | {"adamw_rows_": optimizer_kernel(case.w)}


def optimizer_kernel(w: torch.Tensor) -> Kernel:
    """A step of AdamW on as many rows as w has, with fp32 moments."""
    from megacid_kernels.fused import AdamWFactors, adamw_rows_

    rows, each = torch.empty(len(w), dtype=torch.int64, device=w.device), w[:, 0].contiguous()
    factors = AdamWFactors(*BETAS, 1.0, each, each)
    run = functools.partial(adamw_rows_, w, w, w, w, factors, betas=BETAS, rows_S=rows, grad_scale=each[:1])
    return Kernel(run, Work((len(w), w.shape[1]), 28 * w.numel()))


def run(args: argparse.Namespace) -> Report:
    times = {} if args.architecture not in RATES else measured(ROOT / "docs" / "bench", RATES[args.architecture].gpu)
    rows: list[Row] = []
    with absent_gpu(args.architecture) as launches:
        for shape in map(shape_of, args.widths):
            case = case_of(shape)
            for name, kernel in kernels(case).items():
                launches.clear()
                kernel.run()
                if launches:  # cuBLAS's product launches no kernel of ours
                    row: Row = {"provider": name, "shape": shape.option, "architecture": args.architecture}
                    row["samples"] = float(case.chunk)
                    row |= described(launches[0], kernel.work, args.architecture)
                    rows.append(row | compared(row, times.get((name, shape.option))))
    print_table(rows, RESOURCES)
    print("\nInstructions up to the last matrix instruction / after it. Loads, stores and copies: count x bits.")
    print_table(rows, INSTRUCTIONS)
    if args.architecture in RATES:
        print(f"\n{assumptions(args.architecture)}")
        print_table(rows, TIMES)
    report = make_report(args, rows)
    report["machine"]["triton"] = importlib.metadata.version("triton")
    return report


def described(launch: Launch, work: Work, architecture: str) -> Row:
    """The figures of one kernel."""
    compiled, tile = launch.compile(), (launch.constants["ROWS"], launch.constants["BLOCK"])
    code, warps, shared = disassemble(compiled.asm["cubin"]), compiled.metadata.num_warps, compiled.metadata.shared
    fitting = programs_by(code.registers, shared, warps, MULTIPROCESSORS[architecture])
    figures = {
        "tile_rows": tile[0],
        "tile_columns": tile[1],
        "warps": warps,
        "registers": code.registers,
        "spilled_bytes": code.spilled_bytes,
        "shared_bytes": shared,
        "flop": work.flop,
        **{f"programs_by_{name}": count for name, count in fitting.items()},
        **instructions(code),
    }
    row: Row = {name: float(value) for name, value in figures.items()}
    if architecture in RATES:
        row |= {f"{name}_s": s for name, s in bounds(work, code, tile, warps, RATES[architecture]).items()}
        row["predicted_s"] = max(bounds_of(row).values())
    return row


def instructions(code: MachineCode) -> dict[str, int]:
    """Counts by part and kind."""
    return {f"{part}_{kind}": count for part in _PARTS for kind, count in sorted(getattr(code, part).items())}


def bounds_of(row: Row) -> dict[str, float]:
    return {name: row[f"{name}_s"] for name in ("matrix", "memory", "exponentials", "issue_slots")}


def compared(row: Row, seconds: float | None) -> Row:
    """The measured time and its ratio to the predicted one; nothing without either."""
    if seconds is None or "predicted_s" not in row:
        return {}
    return {"measured_s": seconds, "measured_over_predicted": seconds / row["predicted_s"]}


def measured(folder: Path, gpu: str) -> dict[tuple[str, str], float]:
    """Median seconds by kernel and shape from the reports of suite head that were measured on such a GPU. Reports with
    another memory budget are left out: their chunks may differ."""
    seconds = {}
    for path in sorted(folder.glob("head-*.json")):
        report = read_report(path, "head")
        if gpu in report["machine"].get("gpu", "") and report["arguments"].get("budget_gib") == _BUDGET_GIB:
            for row in report["results"]:
                if row.get("block") == "kernels" and row.get("seconds"):
                    seconds[row["provider"], row["shape"]] = measure.quantiles(row["seconds"])[1]
    return seconds


def assumptions(architecture: str) -> str:
    rates = RATES[architecture]
    return (
        f"Bounds in ms for one {rates.gpu}, the longest of which is predicted. Rates: {rates.flop_per_s / 1e12:.0f} "
        f"TFLOP/s and {rates.bytes_per_s / 1e12:g} TB/s, as measured (data sheet {H100_SHEET_FLOP_PER_S / 1e12:.0f} "
        f"and {H100_SHEET_BYTES_PER_S / 1e12:g}), {rates.special_per_s:.2e} exponentials and "
        f"{rates.warp_instructions_per_s:.2e} warp instructions per second."
    )


# ---- tables ---------------------------------------------------------------------------------------------------------


def residency(row: Row) -> str:
    """ "2 (registers, shared memory)" """
    fitting = {key.removeprefix("programs_by_"): n for key, n in row.items() if key.startswith("programs_by_")}
    fewest = min(fitting.values())
    return f"{fewest:.0f} ({', '.join(name.replace('_', ' ') for name, n in fitting.items() if n == fewest)})"


def mix(row: Row, part: str, *kinds: str) -> str:
    """ "8x128 2x32" of kinds with a width, else the count; "-" for none."""
    counts = {key: n for key, n in row.items() if any(key.startswith(f"{part}_{kind}") for kind in kinds)}
    by_width = {key.rpartition("_")[2]: n for key, n in counts.items()}
    if not all(width.isdecimal() for width in by_width):
        return f"{sum(counts.values()):.0f}"
    widest_first = sorted(by_width.items(), key=lambda item: -int(item[0]))
    return " ".join(f"{count:.0f}x{width}" for width, count in widest_first) or "-"


def _both(*kinds: str) -> Callable[[Row], str]:
    return lambda row: " / ".join(mix(row, part, *kinds) for part in _PARTS)


def _ms(key: str) -> Callable[[Row], str]:
    return lambda row: measure.format_value(1e3 * row[key] if key in row else None, ".3f")


_NAME: dict[str, Callable[[Row], str]] = {
    "kernel": lambda row: str(row["provider"]),
    "classes x width, samples": lambda row: (
        f"{Shape.parse(row['shape']).classes:,} x {Shape.parse(row['shape']).width}, {row['samples']:,.0f}"
    ),
}
RESOURCES = _NAME | {
    "tile": lambda row: f"{row['tile_rows']:.0f} x {row['tile_columns']:.0f}, {row['warps']:.0f} warps",
    "registers:": lambda row: f"{row['registers']:.0f}",
    "spilled bytes:": lambda row: f"{row['spilled_bytes']:.0f}",
    "shared KiB:": lambda row: f"{row['shared_bytes'] / 1024:.1f}",
    "programs per multiprocessor (limited by)": residency,
}
INSTRUCTIONS = _NAME | {
    "instructions:": _both("total"),
    "matrix:": lambda row: f"{row.get('before_matrix', 0.0):.0f}",
    "exponentials:": _both("exponential"),
    "global loads:": _both("global_load"),
    "copies to shared:": _both("global_to_shared_copy"),
    "global stores:": _both("global_store"),
    "tensor copies:": _both("tensor_load", "tensor_store"),
    "shared loads:": _both("shared_load"),
    "shared stores:": _both("shared_store"),
    "barriers:": _both("barrier"),
}
TIMES = _NAME | {
    "matrix:": _ms("matrix_s"),
    "memory:": _ms("memory_s"),
    "exponentials:": _ms("exponentials_s"),
    "issue slots:": _ms("issue_slots_s"),
    "predicted:": _ms("predicted_s"),
    "bound": lambda row: predicted(bounds_of(row))[1].replace("_", " "),
    "measured:": _ms("measured_s"),
    "measured / predicted:": lambda row: measure.format_value(row.get("measured_over_predicted"), ".2f"),
}


def check(report: Report) -> list[Limit]:
    """No kernel spills registers, and products run on the tensor cores."""
    rows = report["results"]
    spilled = max(row["spilled_bytes"] for row in rows)
    products = min(row.get("before_matrix", 0.0) for row in rows if row["flop"])
    return [
        Limit("spilled bytes of a thread, most of any kernel", spilled, 0, at_least=False),
        Limit("matrix instructions of a product, fewest of any kernel", products, 1, at_least=True),
    ]
