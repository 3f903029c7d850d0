#!/usr/bin/env python3
"""Measure the classifier against the published partial-FC scheme in plain PyTorch, on the CPU or one GPU.

    tools/bench.py --suite head                     forward and backward over all of 131,072 classes
    tools/bench.py --suite step --check             a training step with AdamW over 1,000,000 classes, a tenth sampled
    tools/bench.py --suite scale --json scale.json  the step from 10^4 to 10^7 classes at 8192 sampled rows

First loss and gradients of all providers must agree with float64. In head and step the providers take turns in one
process and speed is the median of paired ratios; in scale each has its own process. Extra memory is the peak of one
iteration above weights, moments and inputs, always in its own process.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from torch import Tensor

from megacid import Margin, PartialFC, RowAdamW
from megacid.checkpoint.store import machine, write_json_atomic
from megacid.errors import UserError, run_tool
from megacid_kernels.baselines import EagerPartialFC
from megacid_kernels.reference import discrimination_reference

MARGIN, SCALE, SEED = 0.3, 64.0, 0
# Small, so that the timed steps all see about the same geometry.
LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-5, (0.9, 0.98), 0.05
WARM_UP = 2
PROVIDERS = {
    "eager": "published partial-FC scheme, torch.optim.AdamW",
    "eager-tuned": "the same without one-hot matrix, scale in place, fused AdamW",
    "megacid": "PartialFC, RowAdamW",
}
# (least speed-up over eager, most extra memory as a share of eager's)
BARS: dict[str, tuple[float, float | None]] = {"head": (1.5, 1 / 3), "step": (4.0, None)}
# glibc keeps freed blocks below a threshold that grows with use: the warm-up's blocks would hide the peak.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


@dataclass(frozen=True)
class Shape:
    classes: int
    width: int
    batch: int
    rate: float

    @classmethod
    def parse(cls, text: str) -> "Shape":
        try:
            classes, width, batch, rate = text.split(",")
            shape = cls(int(classes), int(width), int(batch), float(rate))
            if min(shape.classes, shape.width, shape.batch) < 1 or not 0 < shape.rate <= 1:
                raise ValueError
        except ValueError:
            wish = "wanted classes,width,batch,rate (numbers above 0, rate at most 1): 131072,256,256,1"
            raise UserError(f"shape is {text!r}, {wish}") from None
        return shape

    @property
    def rows(self) -> int:
        return self.classes if self.rate == 1 else min(self.classes, max(round(self.rate * self.classes), self.batch))

    def __str__(self) -> str:
        return f"{self.classes:,} x {self.width}, batch {self.batch}, {self.rows:,} rows"


SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
SUITES = {
    "head": ("forward and backward", [Shape(131_072, 256, 256, 1.0)]),
    "step": ("sampling, forward, backward, AdamW", [Shape(1_000_000, 256, 256, 0.1)]),
    "scale": ("a step at a fixed number of sampled rows", [Shape(size, 64, 256, 8192 / size) for size in SIZES]),
}


class Provider:
    """One classifier, its optimizer (or none) and one batch."""

    def __init__(self, name: str, shape: Shape, weight: Tensor, device: torch.device, *, train: bool):
        self.head: EagerPartialFC | PartialFC
        self.optimizer: torch.optim.AdamW | RowAdamW | None = None
        options: dict[str, Any] = {"sample_rate": shape.rate, "scale": SCALE, "init": weight, "device": device}
        adam: dict[str, Any] = {"lr": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
        if name == "megacid":
            self.head = PartialFC(shape.classes, shape.width, margin=Margin.cosface(MARGIN), seed=SEED, **options)
            if train:
                self.optimizer = RowAdamW(self.head, **adam)
                # Zeroed memory is only there once it is written; a row's first update must not look like extra memory.
                for state in self.optimizer.state_rows().values():
                    state.zero_()
        else:
            tuned = name == "eager-tuned"
            self.head = EagerPartialFC(shape.classes, shape.width, margin=MARGIN, tuned=tuned, **options)
            if train:
                self.optimizer = torch.optim.AdamW(self.head.parameters(), fused=tuned or None, **adam)
        generator = torch.Generator().manual_seed(SEED + 1)
        self.target = torch.randint(shape.classes, (shape.batch,), generator=generator)
        # Cosine 0.6 to the own class, chance level to the others: the geometry of a classifier in training.
        noise = torch.randn(shape.batch, shape.width, generator=generator) / shape.width**0.5
        emb = 0.6 * torch.nn.functional.normalize(weight[self.target].float()) + 0.8 * noise
        self.emb, self.target = emb.to(device).requires_grad_(), self.target.to(device)

    def backward(self, step: int) -> Tensor:
        if isinstance(self.head, PartialFC):
            self.head.set_step(step)
        loss: Tensor = self.head(self.emb, self.target)
        loss.backward()
        return loss.detach()

    def row_grad(self) -> tuple[Tensor, Tensor]:
        """(class ids [S] that were used, their gradient [S, D])"""
        if isinstance(self.head, PartialFC):
            return self.head.row_grad()
        assert self.head.weight.grad is not None
        rows = self.head.weight.grad.any(1).nonzero()[:, 0]
        return rows, self.head.weight.grad[rows]

    def run(self, step: int) -> Tensor:
        """What is measured. Gradients are dropped at the end, as a loop does before its next backward."""
        loss = self.backward(step)
        if self.optimizer is not None:
            self.optimizer.step()
        self.head.zero_grad()
        self.emb.grad = None
        return loss


def class_rows(shape: Shape) -> Tensor:
    return torch.randn(shape.classes, shape.width, generator=torch.Generator().manual_seed(SEED)).mul_(0.01)


def gate(names: list[str], device: torch.device) -> None:
    """UserError unless loss and gradients, with and without sampling, are those of float64 autograd on the rows used."""
    for name, rate in itertools.product(names, (1.0, 0.5)):
        shape = Shape(1000, 48, 60, rate)
        weight = class_rows(shape)
        got = Provider(name, shape, weight, device, train=False)
        loss, (rows, row_grad) = got.backward(0), got.row_grad()
        x, w = (t.detach().cpu().double().requires_grad_() for t in (got.emb, weight[rows.cpu()]))
        slot = torch.searchsorted(rows.cpu(), got.target.cpu())
        want, _ = discrimination_reference(x, w, slot, margin=Margin.cosface(MARGIN), scale=SCALE)
        want.backward()
        values, exacts = (loss, got.emb.grad, row_grad), (want.detach(), x.grad, w.grad)
        for what, value, exact in zip(("loss", "embedding gradient", "weight gradient"), values, exacts):
            error = float((value.double().cpu() - exact).norm() / exact.norm())  # type: ignore[union-attr]
            if not error < 1e-4 or len(rows) < 0.98 * shape.rows:
                off = f"the {what} of {name} on {len(rows)} rows differs from float64 by {error:.1e} of its norm"
                raise UserError(f"{off}, wanted < 1e-4 on at least {shape.rows} rows: run the tests in tests/kernels")


def take_turns(names: list[str], shape: Shape, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of every repeat by provider."""
    weight = class_rows(shape)
    runs = {name: Provider(name, shape, weight, device, train=args.suite != "head") for name in names}
    del weight
    seconds: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, float] = {}
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for step in range(WARM_UP + args.repeats):
        for name, provider in runs.items():
            wait()
            start = clock()
            loss = provider.run(step)
            wait()
            if step >= WARM_UP:
                seconds[name].append(clock() - start)
            first.setdefault(name, float(loss))
    most = 1e-4 if shape.rate == 1 else 0.5  # sampled: each drew its own rows
    if not all(abs(one - other) <= most * other for one in first.values() for other in first.values()):
        raise UserError(f"the providers' losses are {first}, wanted the same number: no speed is printed")
    return seconds


def quantiles(values: list[float]) -> list[float]:
    """20 %, 50 %, 80 %"""
    return [float(q) for q in torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8]))]


def proc_bytes(path: str, key: str) -> int:
    """An entry in kB of /proc/meminfo or /proc/self/status."""
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise UserError(f"{path} has no {key}, wanted Linux's memory statistics: measure on Linux")


def peak_extra_bytes(iterate: Callable[[], object], device: torch.device) -> int:
    """The most memory in use during iterate() above what is in use before it. On a CPU set RETURN_FREED at the start
    of the process, and call iterate() once before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        iterate()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise UserError(f"the peak cannot be reset ({error}), wanted /proc/self/clear_refs: use Linux") from error
    before = proc_bytes("/proc/self/status", "VmRSS")
    iterate()
    return max(0, proc_bytes("/proc/self/status", "VmHWM") - before)


def needed_bytes(name: str, shape: Shape, train: bool) -> int:
    """An estimate from above: weight, moments and copies while it is built or its gradients are made."""
    copies = 6 if train and name != "megacid" else 3
    return 4 * (copies * shape.classes * shape.width + shape.rows * (6 * shape.width + 5 * shape.batch))


def child(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a process of its own answers to --child "time,NAME" or "memory,NAME"."""
    what, _, name = args.child.partition(",")
    shape = args.shapes[0]
    if what == "time":
        return {"seconds": take_turns([name], shape, args, device)[name]}
    provider = Provider(name, shape, class_rows(shape), device, train=args.suite != "head")
    provider.run(0)
    return {"peak_extra_bytes": peak_extra_bytes(lambda: provider.run(1), device)}


def ask_child(what: str, name: str, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    text = f"{shape.classes},{shape.width},{shape.batch},{shape.rate!r}"
    options = {"--suite": args.suite, "--shapes": text, "--repeats": args.repeats, "--threads": args.threads}
    options |= {"--device": args.device, "--clock": args.clock, "--child": f"{what},{name}"}
    command = [sys.executable, __file__, *(str(word) for pair in options.items() for word in pair)]
    environment = {**os.environ, **(RETURN_FREED if what == "memory" else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message; killed for want of memory?"])[-1]
        return {"skipped": f"exit {done.returncode}: {last}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(shape: Shape, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """{"shape", "providers": {name: {"seconds", "peak_extra_bytes"} or {"skipped"}}} of one shape."""
    cpu = device.type == "cpu"
    taken, free = 0, 0.9 * (proc_bytes("/proc/meminfo", "MemAvailable") if cpu else torch.cuda.mem_get_info(device)[0])
    found: dict[str, dict[str, Any]] = {name: {} for name in args.providers}
    # The tuned variant comes last: it is left out where memory is short.
    for name in sorted(found, key=("megacid", "eager", "eager-tuned").index):
        needed = needed_bytes(name, shape, args.suite != "head") + taken
        if needed > free:
            found[name] = {"skipped": f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"}
        elif args.suite != "scale":
            taken = needed
    names = [name for name in found if not found[name]]
    if args.suite == "scale":
        for name in names:
            found[name] = ask_child("time", name, shape, args)
    else:
        found |= {name: {"seconds": seconds} for name, seconds in take_turns(names, shape, args, device).items()}
        gc.collect()
    for name in names:
        if "seconds" in found[name]:
            found[name] |= ask_child("memory", name, shape, args)
    return {"shape": asdict(shape), "providers": found}


def against(mine: dict[str, Any], other: dict[str, Any]) -> tuple[float | None, float | None]:
    """(other's time / mine, my extra memory / other's) of two measurements; None where one was not measured."""
    speed = memory = None
    if "seconds" in mine and "seconds" in other:
        speed = statistics.median(o / m for o, m in zip(other["seconds"], mine["seconds"]))
    if "peak_extra_bytes" in mine and other.get("peak_extra_bytes"):
        memory = mine["peak_extra_bytes"] / other["peak_extra_bytes"]
    return speed, memory


def said(value: float | None, unit: str = "x") -> str:
    return "-" if value is None else f"{value:,.2f}{unit}"


def print_table(results: list[dict[str, Any]], names: list[str]) -> None:
    """A row per provider and shape; the last column compares with the first shape of the same provider."""
    print("\n| provider | shape | ms p50 [p20, p80] | speed | extra MiB | of eager's | time, extra to first |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, result in itertools.product(names, results):
        values, first, row = result["providers"][name], results[0]["providers"][name], [name, Shape(**result["shape"])]
        if "seconds" in values:
            p20, p50, p80 = (1e3 * value for value in quantiles(values["seconds"]))
            speed, share = against(values, result["providers"]["eager"])
            row += [f"{p50:,.1f} [{p20:,.1f}, {p80:,.1f}]", said(speed)]
            row += [f"{values['peak_extra_bytes'] / 2**20:,.1f}" if "peak_extra_bytes" in values else "-", said(share)]
            row.append(f"{said(against(first, values)[0])}, {said(against(values, first)[1])}")
        if "skipped" in values:
            row.append(f"not measured: {values['skipped']}")
        print(f"| {' | '.join(map(str, row))} |")


def check(results: list[dict[str, Any]], suite: str) -> bool:
    """Print a line per bar and shape; whether all are met."""
    good = True
    for result in results:
        measured = against(result["providers"]["megacid"], result["providers"]["eager"])
        for what, value, bar, sign in zip(
            ("speed over eager", "extra memory of eager's"), measured, BARS[suite], (1, -1)
        ):
            if bar is not None:
                met = value is not None and sign * value >= sign * bar
                wanted = f"wanted {'>=' if sign > 0 else '<='} {bar:.2f}x: {'met' if met else 'MISSED'}"
                print(f"check: {Shape(**result['shape'])}: {what} {said(value)}, {wanted}")
                good = good and met
    return good


def read_report(path: Path, suite: str) -> dict[str, Any]:
    try:
        old = json.loads(path.read_text())
        found, _ = old["suite"], (old["machine"], [(each["shape"], each["providers"]) for each in old["results"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of this tool ({error!r}): pass a file written by --json") from error
    if found != suite:
        raise UserError(f"{path} is of suite {found}, wanted {suite}: compare equal suites")
    return dict(old)


def print_comparison(new: dict[str, Any], old: dict[str, Any]) -> None:
    for key, value in new["machine"].items():
        if old["machine"].get(key) != value:
            print(f"compare: {key} was {old['machine'].get(key)}, is {value}: times do not compare, speeds may")
    print("\n| against the older file | time new/old | extra memory new/old | speed over eager old, new |")
    print("|---|---:|---:|---:|")
    older = {Shape(**each["shape"]): each["providers"] for each in old["results"]}
    for result in new["results"]:
        before = older.get(Shape(**result["shape"]), {})
        for name, values in result["providers"].items():
            was = before.get(name, {})
            speeds = against(was, before.get("eager", {}))[0], against(values, result["providers"]["eager"])[0]
            clock, memory = said(against(was, values)[0]), said(against(values, was)[1])
            row = (f"{name}, {Shape(**result['shape'])}", clock, memory, ", ".join(map(said, speeds)))
            print(f"| {' | '.join(row)} |")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, choices=tuple(SUITES))
    parser.add_argument("--shapes", nargs="+", metavar="C,D,B,r", help="classes, width, batch, rate")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    parser.add_argument("--repeats", type=int, default=7, help="timed iterations of each provider (default 7)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time, where others compute too"
    )
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write everything measured")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print ratios to an older --json file")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar of the suite is missed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (("repeats", 5), ("threads", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}, wanted at least {least}: leave it out for the default")
    if args.check and args.suite not in BARS:
        raise UserError(f"--check has no bar for the suite {args.suite}, wanted {' or '.join(BARS)}: leave it out")
    args.providers = [name for name in PROVIDERS if args.suite != "scale" or name != "eager-tuned"]
    args.shapes = [Shape.parse(text) for text in args.shapes] if args.shapes else SUITES[args.suite][1]
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.child:
        print(json.dumps(child(args, device)))
        return 0
    old = read_report(args.compare, args.suite) if args.compare else None
    gate(args.providers, device)
    where = machine() | {"threads": args.threads, "clock": args.clock, "torch": torch.__version__}
    where |= {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    print(f"{args.suite}: {SUITES[args.suite][0]}; fp32, {args.repeats} repeats")
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print("agree with float64: " + "; ".join(f"{name} ({PROVIDERS[name]})" for name in args.providers))
    results = [measure(shape, args, device) for shape in args.shapes]
    print_table(results, args.providers)
    report = {"suite": args.suite, "machine": where, "results": results}
    if args.json:
        write_json_atomic(args.json, report)
    if old is not None:
        print_comparison(report, old)
    return 0 if not args.check or check(results, args.suite) else 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
