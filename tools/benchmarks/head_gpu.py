"""Suite head on a GPU: the head in each schedule, cuBLAS's products, eager schemes and other packages' kernels.

Before a provider is timed its loss and gradients are compared with float64 on a sample. One of ours that is off ends the
bench; a peer's errors are shown. "of cublas" is the time of the products alone over its time.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import head_kernels, measure
from benchmarks.classifier import MARGIN, SCALE, SEED, Shape
from benchmarks.exact import Exact, exact_on_sample, sample_of
from benchmarks.ours import OURS, allowed_error, allowed_loss_error
from benchmarks.peers import PEERS, Call, Case, Provider
from benchmarks.suite import Bar, Report, Row, report
from megacid.errors import UserError

SHAPES = [
    Shape(131_072, 512, 4096),
    Shape(131_072, 768, 8192),
    Shape(1 << 20, 768, 16_384),
    Shape(1 << 20, 1024, 32_768),
    Shape(10_000_000, 512, 4096),
    Shape(125_000, 512, 32_768),  # ten million classes, a tenth sampled, on eight ranks
    Shape(131_016, 640, 8200),
]
Geometry = Literal["trained", "init"]
PROVIDERS: dict[str, Provider] = PEERS | OURS
ROUNDS = 3
_SLOW_S = 5.0
_SAMPLE = 256


def cases(shape: Shape, geometry: Geometry, budget_bytes: int, device: torch.device) -> Iterator[Case]:
    """The blocks "margin" and "plain" of one shape."""
    generator = torch.Generator(device).manual_seed(SEED)
    w = torch.randn(shape.classes, shape.width, generator=generator, device=device).mul_(0.01)
    target = torch.randint(shape.classes, (shape.batch,), generator=generator, device=device)
    noise = F.normalize(torch.randn(shape.batch, shape.width, generator=generator, device=device))
    for margin in (MARGIN, 0.0):
        # "trained": the cosine at which a sample's own class has about half of the probability, for the others are
        # random directions and their exponentials sum to C exp(scale^2 / 2D). What some peers skip depends on it.
        cos = (
            (math.log(shape.classes) + SCALE**2 / (2 * shape.width)) / SCALE + margin if geometry == "trained" else 0.0
        )
        cos = min(cos, 0.95)
        x = cos * F.normalize(w[target]) + math.sqrt(1 - cos * cos) * noise
        yield Case(shape, margin, x.requires_grad_(), w.detach().requires_grad_(), target, budget_bytes)


def errors_of(call: Call, outputs: tuple[Tensor, ...], exact: Exact) -> dict[str, float]:
    """Of the loss, absolute; of the gradients, relative, on the sample."""
    found = {"loss_error": abs(float(outputs[0].double() - exact.loss.to(outputs[0].device)))}
    if call.products > 2:
        grad_x, grad_w = outputs[1][exact.rows], outputs[2][exact.classes]
        found |= {"dx_error": measure.relative_error(grad_x, exact.grad_x)}
        found |= {"dw_error": measure.relative_error(grad_w, exact.grad_w)}
    return found


def missed_gate(name: str, case: Case, found: dict[str, float]) -> str:
    """Which errors are larger than rounding explains, as text; "" if none is."""
    limits = {"loss_error": allowed_loss_error(name, case.shape.width)}
    limits |= {"dx_error": allowed_error(name), "dw_error": allowed_error(name)}
    return " and ".join(
        f"{what} {value:.1e} (expected <= {limits[what]:.1e})"
        for what, value in found.items()
        if not value <= limits[what]
    )


class Exacts:
    """float64 on the sample: of the raw rows, and of the folded 16-bit ones as they are; each made when it is needed."""

    def __init__(self, case: Case):
        self.case = case
        self._found: dict[bool, Exact] = {}
        self.sample = sample_of(case.target, case.shape.classes, _SAMPLE, SEED)

    def of(self, call: Call) -> Exact:
        assert call.inputs is not None
        x, w = call.inputs
        folded = x.dtype == torch.bfloat16
        if folded not in self._found:
            self._found[folded] = exact_on_sample(
                x,
                w,
                self.case.target,
                *self.sample,
                scale=1.0 if folded else SCALE,
                margin=self.case.margin,
                normalise=not folded,
            )
        return self._found[folded]


class Attempt(NamedTuple):
    row: Row  # what is known before the turns, or the reason under "skipped"
    call: Call | None = None
    seconds: float = 0.0  # of one call


def attempt(name: str, case: Case, exacts: Exacts, timer: measure.Timer) -> Attempt:
    """Run the provider a few times for all but its time. UserError where one of ours is off."""
    row: Row = {"block": case.block, "provider": name, "shape": case.shape.option}
    try:
        call = PROVIDERS[name].make(case)
        outputs = call.run()
        errors = errors_of(call, outputs, exacts.of(call)) if call.inputs is not None else {}
        missed = missed_gate(name, case, errors)
        if missed and name in OURS:
            raise UserError(
                f"{missed} of {name} at {case.shape}, block {case.block}: no speed is printed; run the tests in tests/kernels"
            )
        first = measure.digest(outputs)
        del outputs
        seconds = timer(call.run, 1)[0]
        if seconds > _SLOW_S:
            return Attempt(row | {"skipped": f"one call takes {seconds:.1f} s"})
        row |= {"mode": "fwd+bwd" if call.products > 2 else "fwd"} | errors
        row |= {"within_gate": float(not missed)} if errors else {}
        row["same_bits"] = float(measure.digest(call.run()) == first)
        row["peak_extra_bytes"] = float(measure.peak_extra_bytes(call.run, case.x.device))
        waits = measure.host_syncs(call.run)
        row |= {} if waits is None else {"host_syncs": float(waits)}
        return Attempt(row, call, seconds)
    except UserError:
        raise
    except ImportError as error:
        return Attempt(row | {"skipped": f"not installed: {error}"})
    except torch.OutOfMemoryError:
        return Attempt(row | {"skipped": "out of memory"})
    except Exception as error:  # a peer may raise anything; its compiler's errors are no subclass of ours
        text = (str(error).strip().splitlines() or [""])[0]
        return Attempt(row | {"skipped": f"refuses: {type(error).__name__}: {text}"[:120]})
    finally:
        gc.collect()
        if case.x.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_case(case: Case, names: list[str], timer: measure.Timer, rounds: int = ROUNDS) -> list[Row]:
    """A row per provider."""
    exacts = Exacts(case)
    found = {name: attempt(name, case, exacts, timer) for name in names if case.block in PROVIDERS[name].blocks}
    calls = {name: one.call for name, one in found.items() if one.call}
    del exacts
    repeats = {name: measure.repeats_for(found[name].seconds) for name in calls}
    seconds = measure.take_turns({name: call.run for name, call in calls.items()}, timer, rounds, repeats)
    flop = math.prod((case.shape.batch, case.shape.classes, case.shape.width))
    rows = [one.row for one in found.values()]
    for name, call in calls.items():
        rate = call.products * flop / measure.quantiles(seconds[name])[1]
        found[name].row.update(seconds=seconds[name], tflops=rate / 1e12)
    for row in rows:
        products = {"fwd+bwd": "cublas-3gemm", "fwd": "cublas-1gemm"}.get(row.get("mode", ""))
        share = measure.ratio(
            next((measure.median(r) for r in rows if r["provider"] == products), None), measure.median(row)
        )
        row |= {} if share is None else {"of_cublas": share}
    return rows


def run(args: argparse.Namespace, shapes: list[Shape]) -> Report:
    if any(shape.rate != 1 for shape in shapes):
        raise UserError(
            "a rate below 1 is not for the suite head on a GPU, which takes all rows: expected classes,width,batch,1"
        )
    for name in args.providers:
        if name not in PROVIDERS:
            raise UserError(f"--providers has {name!r}, known are {', '.join(PROVIDERS)}")
    timer, device = measure.timer_of(args), torch.device(args.device)
    rows: list[Row] = []
    for shape in shapes:
        for case in cases(shape, args.geometry, int(args.budget_gib * 2**30), device):
            found = measure_case(case, args.providers, timer)
            print_table(case, found)
            if case.block == "margin" and len(args.providers) == len(PROVIDERS):
                of_kernels = head_kernels.measure_kernels(case, timer, ROUNDS)
                head_kernels.print_table(of_kernels)
                found += of_kernels
            rows += found
            del case
            gc.collect()
    return report(args, rows)


def print_table(case: Case, rows: list[Row]) -> None:
    about = "cosface 0.3, raw rows" if case.margin else "no margin; peers get normalised bf16 rows"
    print(f"\n{case.shape}: {about}; chunks of {case.chunk} samples")
    print(
        "| provider | mode | ms p50 [p20, p80] | TFLOP/s | of cublas | extra MiB | loss, dX, dW errors | same bits | host waits |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        if "skipped" in row:
            print(f"| {row['provider']} | | skipped: {row['skipped']} | | | | | | |")
            continue
        errors = ", ".join(f"{row[key]:.1e}" for key in ("loss_error", "dx_error", "dw_error") if key in row)
        errors += "" if row.get("within_gate", 1.0) else " (misses the gate)"
        cells = [row["provider"], row["mode"], measure.said_ms(row["seconds"]), f"{row['tflops']:,.0f}"]
        cells += [measure.said(row.get("of_cublas"), ".1%"), f"{row['peak_extra_bytes'] / 2**20:,.0f}", errors or "-"]
        cells += ["yes" if row["same_bits"] else "no", measure.said(row.get("host_syncs"), ".0f")]
        print(f"| {' | '.join(cells)} |", flush=True)


# ---- bars --------------------------------------------------------------------------------------------------------

ROW_MODE = ("megacid-fused", "megacid-in-place")
EAGER = ("eager", "eager-sync-free")
FIVE_TIMES = [Shape(131_072, 512, 4096), Shape(131_072, 768, 8192)]
EAGER_CANNOT = [Shape(1 << 20, 768, 16_384), Shape(10_000_000, 512, 4096)]
AHEAD_OF = {
    "torch-lce": ("torch-lce", "torch-lce-tuned"),
    "liger": ("liger", "liger-tuned"),
    "cce": ("cce", "cce-unfiltered"),
}
LEAST_CLASSES = 131_072


def check(found: dict[str, Any]) -> list[Bar]:
    """The bars of the shapes that were run. The stored gradient counts by its faster way of making the exponentials."""
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found["results"]:
        by_case.setdefault((row["shape"], row["block"]), {})[row["provider"]] = row
    budget = int(found["arguments"]["budget_gib"] * 2**30)
    bars: list[Bar] = []
    for (option, block), rows in by_case.items():
        bars += _bars_of(Shape.parse(option), block, rows, budget)
    return bars


def _fastest(rows: dict[str, Row], names: tuple[str, ...]) -> Row:
    """Of the measured ones; {} where there is none."""
    measured = [rows[name] for name in names if rows.get(name, {}).get("seconds")]
    return min(measured, key=lambda row: measure.quantiles(row["seconds"])[1], default={})


def _bars_of(shape: Shape, block: str, rows: dict[str, Row], budget: int) -> list[Bar]:
    ours, where = _fastest(rows, ROW_MODE), f"{shape}, {block}"
    time = measure.median(ours)
    bars = []
    if block == "margin":
        over = measure.ratio(time, measure.median(rows.get("cublas-3gemm", {})))
        limit = 1.15 if shape.width >= 768 else 1.25
        bars.append(Bar(f"{where}: time over that of three cuBLAS products", over, limit, at_least=False))
        matrix = min(2 * shape.batch * shape.classes, budget) + 4 * shape.classes * shape.width
        extra = measure.ratio(ours.get("peak_extra_bytes"), float(matrix))
        bars.append(Bar(f"{where}: extra memory over 2bC + 4CD", extra, 1.05, at_least=False))
        if shape in FIVE_TIMES:
            speed = measure.ratio(measure.median(_fastest(rows, EAGER)), time)
            bars.append(Bar(f"{where}: speed over the eager scheme", speed, 5.0, at_least=True))
        if shape in EAGER_CANNOT:
            bars.append(Bar(f"{where}: runs", float(time is not None), 1.0, at_least=True))
        if shape.classes >= 10_000_000:
            gib = measure.ratio(rows.get("megacid-loss-only", {}).get("peak_extra_bytes"), float(2**30))
            bars.append(Bar(f"{where}: GiB of the loss alone", gib, 1.0, at_least=False))
    elif shape.classes >= LEAST_CLASSES:
        for family, names in AHEAD_OF.items():
            peer = _fastest(rows, names)
            ran_out = [rows[n]["skipped"] for n in names if n in rows and "skipped" in rows[n]]
            if peer or not ran_out or any(reason.startswith("not installed") for reason in ran_out):
                speed = measure.ratio(measure.median(peer), time)
                bars.append(Bar(f"{where}: speed over {family}", speed, 1.0, at_least=True))
    return bars
