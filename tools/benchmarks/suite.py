"""What a suite of tools/bench.py is, and what all suites share: options, the machine's description, bars, comparison.

A suite is a module (one module may serve several names; `args.suite` and `report["suite"]` say which):

    HELP: str                                        what is measured, in a line or two
    add_arguments(parser: ArgumentParser) -> None    its own options; the shared ones are there already, and their
                                                     defaults are changed by parser.set_defaults
    run(args: Namespace) -> dict[str, Any]           measures, prints its table as it goes, returns `report(args, rows)`
    check(report: dict[str, Any]) -> list[Bar]       the bars, met or not; works on a report read from a file, too

Rows are flat: a float, or a list of floats (repeats), was measured; everything else (str, int, bool) names the row, so
that two reports can be compared. A row that could not be measured says why under "skipped".
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

from megacid.errors import UserError
from megacid.storage.metadata import machine

Report = dict[str, Any]
Row = dict[str, Any]
GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
ABOUT_FILES = ("json", "compare", "check", "threads", "clock")  # the last two are in "machine", too
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy")  # whose versions decide times on a GPU


@dataclass(frozen=True)
class Bar:
    """A stated limit and what was measured; None: it was not, which does not pass."""

    what: str
    value: float | None
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        if self.value is None or math.isnan(self.value):
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        found = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"{self.what}: {found}, expected {'>=' if self.at_least else '<='} {self.limit:g}: {'met' if self.met else 'MISSED'}"


class Suite(Protocol):
    """The members of a suite's module; see above."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> Report: ...

    def check(self, report: Report) -> list[Bar]: ...


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write everything measured")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print ratios to an older --json file")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar of the suite is missed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of this process alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """Seconds of the clock that --clock asks for."""
    return time.perf_counter if args.clock == "wall" else time.process_time


def gpu_facts() -> dict[str, str]:
    """What nvidia-smi says of torch's current GPU; empty where there is no such program."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(GPU_FIELDS, (word.strip() for word in done.stdout.strip().split(","))))


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the times were measured on; clocks, temperature and power are those at the moment of the call."""
    where = machine() | {"threads": args.threads, "clock": args.clock, "torch": torch.__version__}
    if args.device == "cuda":
        where |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} | gpu_facts()
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                where[name] = importlib.metadata.version(name)
    return where


def report(args: argparse.Namespace, rows: list[Row]) -> Report:
    """What `run` returns and --json writes."""
    given = {name: _plain(value) for name, value in vars(args).items()}
    return {"suite": args.suite, "machine": describe_machine(args), "arguments": given, "results": rows}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (int, float, type(None))) else str(value)


def figures(rows: list[Row]) -> dict[str, float]:
    """{"name of the row: name of the figure": value} of everything measured; a list of repeats counts by its median."""
    found = {}
    for row in rows:
        if "skipped" in row:
            continue
        name = ", ".join(f"{key} {value}" for key, value in row.items() if not _measured(value) and value is not None)
        for key, value in row.items():
            if _measured(value):
                found[f"{name}: {key}"] = statistics.median(value) if isinstance(value, list) else value
    return found


def _measured(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, list) and bool(value) and isinstance(value[0], float))


def read_report(path: Path, suite: str) -> Report:
    """A file written by --json; UserError when it is something else or of another suite."""
    try:
        old = json.loads(path.read_text())
        found, *_ = old["suite"], old["machine"].items(), old["arguments"].items(), figures(old["results"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a result of this tool ({error!r}): pass a file written by --json") from error
    if found != suite:
        raise UserError(f"{path} is of suite {found}, expected {suite}: compare equal suites")
    return dict(old)


def print_comparison(new: Report, old: Report) -> None:
    """A line per figure that both have, and what differs between the machines and the options."""
    for key, value in new["machine"].items():
        if old["machine"].get(key) != value:
            print(f"compare: {key} was {old['machine'].get(key)}, is {value}: times do not compare, ratios may")
    for key, value in new["arguments"].items():
        if key not in ABOUT_FILES and old["arguments"].get(key) != value:
            print(f"compare: --{key.replace('_', '-')} was {old['arguments'].get(key)}, is {value}")
    before, after = figures(old["results"]), figures(new["results"])
    print("\n| against the older file | old | new | new/old |\n|---|---:|---:|---:|")
    for name in (name for name in after if name in before):
        ratio = f"{after[name] / before[name]:.3f}" if before[name] else "-"
        print(f"| {name} | {before[name]:.5g} | {after[name]:.5g} | {ratio} |")
    for what, names in (("new", after.keys() - before.keys()), ("no more", before.keys() - after.keys())):
        if names:
            print(f"compare: {what}: {'; '.join(sorted(names))}")


def print_bars(bars: list[Bar]) -> bool:
    """Print a line per bar; whether all are met."""
    for bar in bars:
        print(f"check: {bar}")
    return all(bar.met for bar in bars)
