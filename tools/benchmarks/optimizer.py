"""Suite optimizer: a step on the sampled rows compared with a dense optimizer over all rows, in bytes per second.

Legend: L classes, D width, S sampled rows.

rows        RowAdamW or RowSGD, as the trainer calls it
rows-decay  the same with lazy = "decay"
kernel      the fused Triton kernel alone (GPU only)
dense       torch.optim, fused, over all L rows with a dense gradient
dense-S     the same over a matrix of S rows: the cost of the bytes alone, without sampling

GB/s counts what a step must read and write: of S rows, or of all L for dense. "of copy" divides it by the rate of a
copy of the weights on the same device. The first step of every provider is compared with float64 before any is timed.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.classifier_providers import SCALE, SEED, Shape, class_rows, implementation
from benchmarks.suite import Limit, Report, Row, gpu_code, make_report, of_gpu_code, print_table
from megacid import PartialFC, RowAdamW, RowSGD
from megacid.classifier.row_optimizer import Lazy
from megacid.classifier.row_state import rounding_keys
from megacid.errors import UserError

HELP = "row-sparse AdamW and SGD compared with dense optimizers: time, bytes per second, fraction of a device copy"
SHAPES = {"cpu": [Shape(100_000, 256, 256, rate) for rate in (0.1, 1.0)], "cuda": [Shape(1_000_000, 512, 4096, 0.1)]}
LR, BETAS, EPS, DECAY, MOMENTUM = 1e-3, (0.9, 0.98), 1e-8, 0.05, 0.9
MIN_COPY_FRACTION = 0.8
ROUNDS = 3
# bytes read and written per element: weight, gradient, moments
BYTES = {("adamw", "fp32"): 28, ("adamw", "bf16"): 20, ("sgd", "fp32"): 20, ("sgd", "bf16"): 16}
_MAX_ERROR = 1e-4  # of the change of the weights, besides the rounding of the weights themselves


class Step(NamedTuple):
    run: Callable[[], object]
    rows: Callable[[], Tensor]  # the weights [S, D] of the sampled rows
    elements: int


class Case:
    """Weights, sampled rows and their gradient from a real backward: the common start of all providers."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.weight = shape, class_rows(shape)
        self.device = device
        head = self.head()
        self.rows, grad = head.row_grad()
        self.grad = grad.clone()

    def head(self) -> PartialFC:
        """A classifier after its first backward; the same rows and gradient each time."""
        shape = self.shape
        options: dict[str, Any] = {"sample_rate": shape.rate, "scale": SCALE, "seed": SEED, "device": self.device}
        head = PartialFC(shape.classes, shape.width, init=self.weight, impl=implementation(), **options)
        head.set_step(0)
        generator = torch.Generator().manual_seed(SEED)
        target = torch.randint(shape.classes, (shape.batch,), generator=generator)
        emb = torch.randn(shape.batch, shape.width, generator=generator).to(self.device).requires_grad_()
        head(emb, target.to(self.device)).backward()
        return head


def rows_step(case: Case, kind: str, moments: Any, *, lazy: Lazy = "none") -> Step:
    head = case.head()
    optimizer: RowAdamW | RowSGD
    if kind == "adamw":
        optimizer = RowAdamW(head, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, moments=moments, lazy=lazy)
    else:
        optimizer = RowSGD(head, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, moments=moments, lazy=lazy)
    return Step(optimizer.step, lambda: head.weight[case.rows], case.grad.numel())


def kernel_step(case: Case, kind: str, moments: str) -> Step:
    from megacid_kernels.fused import AdamWFactors, SGDFactors, adamw_rows_, sgd_rows_

    if not gpu_code(case.device):
        raise ValueError("needs a GPU")
    weight, rows = case.weight.to(case.device, copy=True), case.rows
    dtype = torch.bfloat16 if moments == "bf16" else torch.float32
    state = [torch.zeros_like(weight, dtype=dtype) for _ in range(2 if kind == "adamw" else 1)]
    count = torch.ones(len(rows), dtype=torch.int32, device=case.device)
    keys = rounding_keys(rows, count, weight.shape[1], seed=SEED) if moments == "bf16" else None
    common: dict[str, Any] = {"rows_S": rows, "keys": keys}
    column = torch.ones(len(rows), device=case.device)
    # The corrections of the first step serve every step: the time does not depend on them.
    correct1, correct2 = 1 - BETAS[0], math.sqrt(1 - BETAS[1])
    adamw = AdamWFactors(*BETAS, 1 - LR * DECAY, column * (LR * correct2 / correct1), column * (EPS * correct2))
    sgd = SGDFactors(MOMENTUM, 1.0)

    def run() -> None:
        if kind == "adamw":
            adamw_rows_(weight, state[0], state[1], case.grad, adamw, betas=BETAS, **common)
        else:
            sgd_rows_(weight, state[0], case.grad, sgd, lr=LR, weight_decay=DECAY, **common)

    return Step(run, lambda: weight[rows], case.grad.numel())


def dense_step(case: Case, kind: str, moments: str, *, of_all: bool) -> Step:
    assert moments == "fp32"
    whole = case.weight.to(case.device, copy=True)
    weight = (whole if of_all else whole[case.rows]).requires_grad_()
    weight.grad = torch.zeros_like(weight).index_copy_(0, case.rows, case.grad) if of_all else case.grad
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        optimizer = torch.optim.AdamW([weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    else:
        optimizer = torch.optim.SGD([weight], lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=True)
    return Step(optimizer.step, lambda: weight.detach()[case.rows] if of_all else weight.detach(), weight.numel())


class Provider(NamedTuple):
    make: Callable[[Case, str, str], Step]
    moments: tuple[str, ...] = ("fp32",)


PROVIDERS = {
    "rows": Provider(rows_step, ("fp32", "bf16")),
    "rows-decay": Provider(functools.partial(rows_step, lazy="decay")),
    "kernel": Provider(kernel_step, ("fp32", "bf16")),
    "dense": Provider(functools.partial(dense_step, of_all=True)),
    "dense-S": Provider(functools.partial(dense_step, of_all=False)),
}


def check_accuracy(name: str, case: Case, kind: str, step: Step) -> None:
    """Make the first step. Raises UserError unless it agrees with float64; the moments' dtype does not affect it
    yet."""
    before, grad = step.rows().double(), case.grad.double()
    step.run()
    if kind == "adamw":
        want = -LR * DECAY * before - LR * grad / (grad.abs() + EPS)
    else:
        want = -LR * (grad + DECAY * before)
    error = measure.relative_error(step.rows().double() - before, want)
    most = _MAX_ERROR + 2.0**-24 * float(before.norm() / want.norm())
    if not error < most:
        raise UserError(
            f"the first {kind} step of {name} at {case.shape} differs from float64 by {error:.1e} of its length, "
            f"expected < {most:.1e}: no speed is printed; run the tests in tests/kernels"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", nargs="+", metavar="C,D,B,r", help="classes,width,batch,sampling rate of every case"
    )


def run(args: argparse.Namespace) -> Report:
    device, timer = torch.device(args.device), measure.timer_of(args)
    shapes = [Shape.parse(text) for text in args.shapes] if args.shapes else SHAPES[args.device]
    rows: list[Row] = []
    for shape in shapes:
        case = Case(shape, device)
        for kind in ("adamw", "sgd"):
            rows += measure_steps(case, kind, timer)
    print_table(rows, COLUMNS)
    return make_report(args, rows)


def measure_steps(case: Case, kind: str, timer: measure.Timer) -> list[Row]:
    steps: dict[str, Step] = {}
    rows: dict[str, Row] = {}
    for name, moments in ((name, moments) for name, provider in PROVIDERS.items() for moments in provider.moments):
        key = f"{name}, {moments}"
        rows[key] = {"shape": case.shape.option, "optimizer": kind, "moments": moments, "provider": name}
        try:
            step = PROVIDERS[name].make(case, kind, moments)
            check_accuracy(name, case, kind, step)
            steps[key] = step
        except UserError:
            raise
        except (ValueError, ImportError, torch.OutOfMemoryError) as error:
            rows[key]["skipped"] = str(error).splitlines()[0][:120]
    source = case.weight.to(case.device)
    target = torch.empty_like(source)
    runs = {key: step.run for key, step in steps.items()} | {"copy": lambda: target.copy_(source)}
    repeats = {key: measure.repeats_for(timer(run, 2)[1]) for key, run in runs.items()}
    seconds = measure.take_turns(runs, timer, ROUNDS, repeats)
    median = {key: measure.quantiles(values)[1] for key, values in seconds.items()}
    copied = 8 * source.numel() / median["copy"]
    for key, step in steps.items():
        rate = BYTES[kind, rows[key]["moments"]] * step.elements / median[key]
        rows[key] |= {"seconds": seconds[key], "gb_per_s": rate / 1e9, "copy_fraction": rate / copied}
        if "dense, fp32" in median:
            rows[key]["speed_over_dense"] = median["dense, fp32"] / median[key]
    return list(rows.values())


COLUMNS: dict[str, Callable[[Row], str]] = {
    "shape": lambda row: str(Shape.parse(row["shape"])),
    "optimizer, moments": lambda row: f"{row['optimizer']}, {row['moments']}",
    "provider": lambda row: str(row["provider"]),
    "ms p50 [p20, p80]:": lambda row: measure.format_ms(row["seconds"]),
    "GB/s:": lambda row: f"{row['gb_per_s']:,.1f}",
    "of copy:": lambda row: f"{row['copy_fraction']:.1%}",
    "speed over dense:": lambda row: measure.format_value(row.get("speed_over_dense"), unit="x"),
}


def check(report: Report) -> list[Limit]:
    """The copy fraction of AdamW on sampled rows on a GPU; no limit on a CPU."""
    if not of_gpu_code(report):
        return []
    limits = []
    for row in report["results"]:
        if row["provider"] == "kernel" and row["optimizer"] == "adamw":
            what = f"{Shape.parse(row['shape'])}: AdamW of rows, {row['moments']} moments, fraction of a copy's rate"
            limits.append(Limit(what, row.get("copy_fraction"), MIN_COPY_FRACTION, at_least=True))
    return limits
