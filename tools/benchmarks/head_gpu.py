"""Suite head on a GPU: the head in each schedule, cuBLAS's products, eager schemes and other packages' kernels.

Before a provider is timed its loss and gradients are compared with float64 on a sample. An inaccurate provider of ours
ends the benchmark; a peer's errors are printed. "of cuBLAS" is the time of the products alone over the provider's time.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import head_kernels, measure
from benchmarks.classifier_providers import MARGIN, SCALE, SEED, Shape
from benchmarks.float64_reference import Exact, exact_on_sample, sample_of
from benchmarks.head_megacid import OURS, allowed_error, allowed_loss_error
from benchmarks.head_peers import PEERS, Call, Case, Provider
from benchmarks.suite import Limit, Report, Row, make_report, print_table
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
    """The absolute error of the loss and the relative errors of the gradients on the sample."""
    errors = {"loss_error": abs(float(outputs[0].double() - exact.loss.to(outputs[0].device)))}
    if call.products > 2:
        grad_x, grad_w = outputs[1][exact.rows], outputs[2][exact.classes]
        errors |= {"dx_error": measure.relative_error(grad_x, exact.grad_x)}
        errors |= {"dw_error": measure.relative_error(grad_w, exact.grad_w)}
    return errors


def excess_errors(name: str, case: Case, errors: dict[str, float]) -> str:
    """The errors that rounding does not explain, as text; "" without any."""
    limits = {"loss_error": allowed_loss_error(name, case.shape.width)}
    limits |= {"dx_error": allowed_error(name), "dw_error": allowed_error(name)}
    return " and ".join(
        f"{what} {value:.1e} (expected <= {limits[what]:.1e})"
        for what, value in errors.items()
        if not value <= limits[what]
    )


class References:
    """Lazy float64 results on the sample, for the raw rows and for the folded 16-bit rows."""

    def __init__(self, case: Case):
        self.case = case
        self._exact: dict[bool, Exact] = {}
        self.sample = sample_of(case.target, case.shape.classes, _SAMPLE, SEED)

    def of(self, call: Call) -> Exact:
        assert call.inputs is not None
        x, w = call.inputs
        folded = x.dtype == torch.bfloat16
        if folded not in self._exact:
            scale, margin = (1.0 if folded else SCALE), self.case.margin
            self._exact[folded] = exact_on_sample(
                x, w, self.case.target, *self.sample, scale=scale, margin=margin, normalise=not folded
            )
        return self._exact[folded]


class Attempt(NamedTuple):
    row: Row  # all but the time, or the reason under "skipped"
    call: Call | None = None
    seconds: float = 0.0  # of one call


def attempt(name: str, case: Case, references: References, timer: measure.Timer) -> Attempt:
    """Run the provider a few times for everything but its time. Raises UserError if one of ours is inaccurate."""
    row: Row = {"block": case.block, "provider": name, "shape": case.shape.option}
    try:
        call = PROVIDERS[name].make(case)
        outputs = call.run()
        errors = errors_of(call, outputs, references.of(call)) if call.inputs is not None else {}
        excess = excess_errors(name, case, errors)
        if excess and name in OURS:
            raise UserError(
                f"{excess} of {name} at {case.shape}, block {case.block}: no speed is printed; "
                "run the tests in tests/kernels"
            )
        first = measure.digest(outputs)
        del outputs
        seconds = timer(call.run, 1)[0]
        if seconds > _SLOW_S:
            return Attempt(row | {"skipped": f"one call takes {seconds:.1f} s"})
        row |= {"mode": "fwd+bwd" if call.products > 2 else "fwd"} | errors
        row |= {"accurate": float(not excess)} if errors else {}
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
    except Exception as error:  # peers and their compilers may raise anything
        text = (str(error).strip().splitlines() or [""])[0]
        return Attempt(row | {"skipped": f"fails: {type(error).__name__}: {text}"[:120]})
    finally:
        gc.collect()
        if case.x.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_case(case: Case, names: list[str], timer: measure.Timer, rounds: int = ROUNDS) -> list[Row]:
    """A row per provider."""
    references = References(case)
    attempts = {name: attempt(name, case, references, timer) for name in names if case.block in PROVIDERS[name].blocks}
    calls = {name: one.call for name, one in attempts.items() if one.call}
    del references
    repeats = {name: measure.repeats_for(attempts[name].seconds) for name in calls}
    seconds = measure.take_turns({name: call.run for name, call in calls.items()}, timer, rounds, repeats)
    flop = math.prod((case.shape.batch, case.shape.classes, case.shape.width))
    rows = [one.row for one in attempts.values()]
    for name, call in calls.items():
        rate = call.products * flop / measure.quantiles(seconds[name])[1]
        attempts[name].row.update(seconds=seconds[name], tflops=rate / 1e12)
    for row in rows:
        products = {"fwd+bwd": "cublas-3gemm", "fwd": "cublas-1gemm"}.get(row.get("mode", ""))
        share = measure.ratio(
            next((measure.median(r) for r in rows if r["provider"] == products), None), measure.median(row)
        )
        row |= {} if share is None else {"cublas_fraction": share}
    return rows


def run(args: argparse.Namespace, shapes: list[Shape]) -> Report:
    if any(shape.rate != 1 for shape in shapes):
        raise UserError(
            "--shapes has a rate below 1, but suite head on a GPU takes all rows: pass classes,width,batch,1"
        )
    for name in args.providers:
        if name not in PROVIDERS:
            raise UserError(f"--providers has {name!r}, expected some of {', '.join(PROVIDERS)}")
    timer, device = measure.timer_of(args), torch.device(args.device)
    rows: list[Row] = []
    for shape in shapes:
        for case in cases(shape, args.geometry, int(args.budget_gib * 2**30), device):
            case_rows = measure_case(case, args.providers, timer)
            about = "CosFace 0.3, raw rows" if case.margin else "no margin; peers get normalised bf16 rows"
            print(f"\n{case.shape}: {about}; chunks of {case.chunk} samples")
            print_table(case_rows, COLUMNS)
            if case.block == "margin" and set(OURS) <= set(args.providers):
                kernel_rows = head_kernels.measure_kernels(case, timer, ROUNDS)
                print_table(kernel_rows, head_kernels.COLUMNS)
                case_rows += kernel_rows
            rows += case_rows
            del case
            gc.collect()
    return make_report(args, rows)


def errors_text(row: Row) -> str:
    errors = ", ".join(f"{row[key]:.1e}" for key in ("loss_error", "dx_error", "dw_error") if key in row)
    return (errors or "-") + ("" if row.get("accurate", 1.0) else " (above rounding)")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "provider": lambda row: str(row["provider"]),
    "mode": lambda row: str(row.get("mode", "")),
    "ms p50 [p20, p80]:": lambda row: measure.format_ms(row["seconds"]),
    "TFLOP/s:": lambda row: f"{row['tflops']:,.0f}",
    "of cuBLAS:": lambda row: measure.format_value(row.get("cublas_fraction"), ".1%"),
    "extra MiB:": lambda row: f"{row['peak_extra_bytes'] / 2**20:,.0f}",
    "loss, dX, dW errors:": errors_text,
    "same bits:": lambda row: "yes" if row["same_bits"] else "no",
    "host waits:": lambda row: measure.format_value(row.get("host_syncs"), ".0f"),
}


# ---- limits --------------------------------------------------------------------------------------------------------

STORED_GRADIENT = ("megacid-fused", "megacid-in-place")
EAGER = ("eager", "eager-sync-free")
EAGER_COMPARED = [Shape(131_072, 512, 4096), Shape(131_072, 768, 8192)]
EAGER_OUT_OF_MEMORY = [Shape(1 << 20, 768, 16_384), Shape(10_000_000, 512, 4096)]
PEER_FAMILIES = {
    "torch-lce": ("torch-lce", "torch-lce-tuned"),
    "liger": ("liger", "liger-tuned"),
    "cce": ("cce", "cce-unfiltered"),
}
MIN_CLASSES_OF_PEERS = 131_072


def check(report: Report) -> list[Limit]:
    """The limits at the shapes that were run. The faster way of making the exponentials counts as our time."""
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for row in report["results"]:
        by_case.setdefault((row["shape"], row["block"]), {})[row["provider"]] = row
    budget = int(report["arguments"]["budget_gib"] * 2**30)
    limits: list[Limit] = []
    for (option, block), rows in by_case.items():
        limits += _limits_of(Shape.parse(option), block, rows, budget)
    return limits


def _fastest(rows: dict[str, Row], names: tuple[str, ...]) -> Row:
    """The fastest measured row; {} if none was measured."""
    measured = [rows[name] for name in names if rows.get(name, {}).get("seconds")]
    return min(measured, key=lambda row: measure.quantiles(row["seconds"])[1], default={})


def _limits_of(shape: Shape, block: str, rows: dict[str, Row], budget: int) -> list[Limit]:
    ours, where = _fastest(rows, STORED_GRADIENT), f"{shape}, {block}"
    time = measure.median(ours)
    limits = []
    if block == "margin":
        over = measure.ratio(time, measure.median(rows.get("cublas-3gemm", {})))
        bound = 1.10 if shape.width >= 768 else 1.20
        limits.append(Limit(f"{where}: time over that of three cuBLAS products", over, bound, at_least=False))
        matrix = min(2 * shape.batch * shape.classes, budget) + 4 * shape.classes * shape.width
        extra = measure.ratio(ours.get("peak_extra_bytes"), float(matrix))
        limits.append(Limit(f"{where}: extra memory over 2bC + 4CD", extra, 1.05, at_least=False))
        if shape in EAGER_COMPARED:
            speed = measure.ratio(measure.median(_fastest(rows, EAGER)), time)
            limits.append(Limit(f"{where}: speed over the eager scheme", speed, 5.0, at_least=True))
        if shape in EAGER_OUT_OF_MEMORY:
            limits.append(Limit(f"{where}: runs", float(time is not None), 1.0, at_least=True))
        if shape.classes >= 10_000_000:
            gib = measure.ratio(rows.get("megacid-loss-only", {}).get("peak_extra_bytes"), float(2**30))
            limits.append(Limit(f"{where}: GiB of the loss alone", gib, 1.0, at_least=False))
    elif block == "plain" and shape.classes >= MIN_CLASSES_OF_PEERS:
        for family, names in PEER_FAMILIES.items():
            peer = _fastest(rows, names)
            reasons = [rows[n]["skipped"] for n in names if n in rows and "skipped" in rows[n]]
            if peer or not reasons or any(reason.startswith("not installed") for reason in reasons):
                speed = measure.ratio(measure.median(peer), time)
                limits.append(Limit(f"{where}: speed over {family}", speed, 1.0, at_least=True))
    return limits
