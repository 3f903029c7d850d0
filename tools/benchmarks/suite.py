"""The interface of a suite of tools/bench.py, and what the suites share: options, machine, limits, comparison.

A suite is a module (one module may serve several suites; `args.suite` and `report["suite"]` tell which):

    HELP: str                                        what is measured, in a line or two
    add_arguments(parser: ArgumentParser) -> None    adds its own options to the shared ones, whose defaults
                                                     parser.set_defaults may change
    run(args: Namespace) -> dict[str, Any]           measures, prints its table, returns `make_report(args, rows)`
    check(report: dict[str, Any]) -> list[Limit]     the limits, met or not; also for a report read from a file

Rows are flat: floats and lists of floats (repeats) are measured; everything else (str, int, bool) names the row, which
is how two reports are compared. "skipped" says why a row could not be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from argtypes import positive
from megacid.errors import UserError
from megacid.storage.metadata import machine

Report = dict[str, Any]
Row = dict[str, Any]
GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
NOT_COMPARED = ("json", "compare", "check", "threads", "clock")  # options; the last two are in "machine" as well
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy")  # their versions affect times on a GPU


@dataclass(frozen=True)
class Limit:
    """A stated bound and the measured value; None: not measured, which does not meet it."""

    what: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        if self.value is None or math.isnan(self.value):
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        bound = f"{'>=' if self.at_least else '<='} {self.bound:g}"
        return f"{self.what}: {value}, expected {bound}: {'met' if self.met else 'MISSED'}"


class Suite(Protocol):
    """A suite's module, see above."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> Report: ...

    def check(self, report: Report) -> list[Limit]: ...


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write all measurements to this file")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print the ratios to an earlier --json file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit of the suite is not met")
    parser.add_argument(
        "--threads", type=positive, default=os.cpu_count() or 1, help="CPU threads (default: all cores)"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="wall time, or CPU time of this process"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is a GPU",
    )


def check_k(k: int, rows: int) -> None:
    """UserError when there are more clusters than rows."""
    if k > rows:
        raise UserError(f"--k is {k:,} for {rows:,} rows, expected at most one cluster per row: lower --k")


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1). Suites then run their GPU code, to
    test it at small shapes: their times mean nothing."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def gpu_code(device: torch.device) -> bool:
    """Whether the kernels run on `device`: it is a GPU, or they are interpreted."""
    return device.type == "cuda" or interpreted()


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """The clock that --clock selects, in seconds."""
    return time.perf_counter if args.clock == "wall" else time.process_time


def gpu_info() -> dict[str, str]:
    """nvidia-smi's fields of torch's current GPU; empty without nvidia-smi."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(GPU_FIELDS, (word.strip() for word in done.stdout.strip().split(","))))


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """The machine that is measured; clocks, temperature and power are those at the time of the call."""
    description = machine() | {"threads": args.threads, "clock": args.clock, "torch": torch.__version__}
    if interpreted():
        description["interpreted"] = True
    if args.device == "cuda":
        description |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} | gpu_info()
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                description[name] = importlib.metadata.version(name)
    return description


def parse_sizes(text: str, names: str, example: str) -> list[int]:
    """The positive integers of a shape such as `example`. Raises UserError unless there is one for each of `names`."""
    words = text.split(",")
    if len(words) != len(names.split(",")) or not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"shape is {text!r}, expected {names} (numbers above 0), for example {example}")
    return [int(word) for word in words]


def make_report(args: argparse.Namespace, rows: list[Row]) -> Report:
    """The report that `run` returns and --json writes."""
    arguments = {name: _plain(value) for name, value in vars(args).items()}
    return {"suite": args.suite, "machine": describe_machine(args), "arguments": arguments, "results": rows}


def of_gpu_code(report: Report) -> bool:
    """Whether the report is of a GPU, or of its code in the interpreter."""
    return report["arguments"]["device"] == "cuda" or report.get("machine", {}).get("interpreted", False)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (int, float, type(None))) else str(value)


def figures(rows: list[Row]) -> dict[str, float]:
    """{"name of the row: name of the figure": value} of all measurements; the median of a list of repeats."""
    values = {}
    for row in rows:
        if "skipped" in row:
            continue
        name = ", ".join(f"{key} {value}" for key, value in row.items() if not _measured(value) and value is not None)
        for key, value in row.items():
            if _measured(value):
                values[f"{name}: {key}"] = statistics.median(value) if isinstance(value, list) else value
    return values


def _measured(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, list) and bool(value) and isinstance(value[0], float))


def read_report(path: Path, suite: str) -> Report:
    """Read a file written by --json. Raises UserError if it is something else or of another suite."""
    try:
        old = json.loads(path.read_text())
        old_suite, *_ = old["suite"], old["machine"].items(), old["arguments"].items(), figures(old["results"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a result of this tool ({error!r}): pass a file written by --json") from error
    if old_suite != suite:
        raise UserError(f"{path} is of suite {old_suite}, expected {suite}: pass a file of the same suite")
    return dict(old)


def print_comparison(new: Report, old: Report) -> None:
    """Print the ratio of every figure that both reports have, and how machines and options differ."""
    for key, value in new["machine"].items():
        if old["machine"].get(key) != value:
            print(f"compare: {key} was {old['machine'].get(key)}, is {value}: times are not comparable, ratios may be")
    for key, value in new["arguments"].items():
        if key not in NOT_COMPARED and old["arguments"].get(key) != value:
            print(f"compare: --{key.replace('_', '-')} was {old['arguments'].get(key)}, is {value}")
    before, after = figures(old["results"]), figures(new["results"])
    print("\n| compared with the earlier file | old | new | new/old |\n|---|---:|---:|---:|")
    for name in (name for name in after if name in before):
        ratio = f"{after[name] / before[name]:.3f}" if before[name] else "-"
        print(f"| {name} | {before[name]:.5g} | {after[name]:.5g} | {ratio} |")
    for what, names in (("new", after.keys() - before.keys()), ("removed", before.keys() - after.keys())):
        if names:
            print(f"compare: {what}: {'; '.join(sorted(names))}")


def print_table(rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> None:
    """Print rows as a Markdown table.

    Args:
        columns: the cell of a row by header. Headers that end in ":" are measurements: right-aligned, and left
            out of a row that has "skipped", whose first one gives the reason.
    """
    print(f"\n| {' | '.join(header.rstrip(':') for header in columns)} |")
    print(f"|{'|'.join('---:' if header.endswith(':') else '---' for header in columns)}|")
    for row in rows:
        reason = [f"skipped: {row['skipped']}"] if "skipped" in row else []
        cells = []
        for header, cell in columns.items():
            measured = header.endswith(":")
            cells.append(cell(row) if not (measured and "skipped" in row) else reason.pop() if reason else "")
        print(f"| {' | '.join(cells)} |", flush=True)


def print_limits(limits: list[Limit]) -> bool:
    """Print a line per limit; True if all are met."""
    for limit in limits:
        print(f"check: {limit}")
    return all(limit.met for limit in limits)
