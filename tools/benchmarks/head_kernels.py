"""The kernels of the head alone, on a GPU, each in the unit of its bottleneck: GB/s of bytes that must move, or
TFLOP/s.

Legend: C classes, D width, b samples of a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.classifier_providers import SCALE
from benchmarks.head_peers import Case
from benchmarks.kernel_bounds import Work
from benchmarks.suite import Row
from megacid.errors import UserError

_CHECKED_ROWS = 64


class Kernel(NamedTuple):
    run: Callable[[], Any]
    work: Work


def kernels(case: Case) -> dict[str, Kernel]:
    """The kernels by name: unit rows, exponentials fused (with and without a matrix) and in place, the nearest row, and
    the backward of labels and norms. The suite machine-code calls them without memory behind the tensors."""
    from megacid_kernels.fused import exponentials, exponentials_, nearest, unit_rows
    from megacid_kernels.fused.row_statistics import pitched

    x, w = case.x.detach()[: case.chunk].contiguous(), case.w.detach()
    half = (torch.float16, torch.bfloat16)
    (x16, inverse_x), (w16, inverse_w) = (unit_rows(rows, dtypes=half)[::2] for rows in (x, w))
    slot = case.target[: len(x), None].contiguous()
    arguments: dict[str, Any] = {"slot_bl": slot, "own_bl": torch.ones_like(slot, dtype=torch.bool)}
    arguments |= {"scale": SCALE, "shift": _shift(case)}
    cos = pitched(len(x), len(w), torch.float16, x.device)
    logits = (len(x), len(w))
    count, factors = math.prod(logits), 2 * (x.numel() + w.numel())
    products = Work(logits, factors, flop=2 * count * x.shape[1])
    written = products.bytes + 2 * count
    return {
        "unit_rows": Kernel(functools.partial(unit_rows, w, dtypes=half), Work(_cells(w), 8 * w.numel())),
        "exponentials": Kernel(
            functools.partial(exponentials, x16, w16, **arguments),
            products._replace(bytes=written, exponentials=count),
        ),
        "exponentials, no matrix": Kernel(
            functools.partial(exponentials, x16, w16, store=False, **arguments), products._replace(exponentials=count)
        ),
        "product by cuBLAS": Kernel(functools.partial(torch.mm, x16, w16.T, out=cos), products._replace(bytes=written)),
        # From the second call on it reads its own output; the time does not depend on the values.
        "exponentials in place": Kernel(
            functools.partial(exponentials_, cos, **arguments), Work(logits, 4 * count, exponentials=count)
        ),
        "nearest": Kernel(functools.partial(nearest, x16, w16), products),
        **_backward_kernels(x, inverse_x, w, inverse_w, slot),
    }


def _backward_kernels(x: Tensor, inverse_x: Tensor, w: Tensor, inverse_w: Tensor, slot: Tensor) -> dict[str, Kernel]:
    from megacid_kernels.fused import add_labels_, finish_x_, label_order, rows_through_norm_

    grad_x, grad_w = torch.zeros_like(x), torch.zeros_like(w)
    coefficient = torch.full_like(inverse_x, 0.5)  # keeps repeated calls in place bounded
    order = label_order(slot, torch.ones_like(slot, dtype=torch.bool))
    one, zero = coefficient[:, None] * 2, coefficient[:, None] * 0
    return {
        "finish_x_": Kernel(
            functools.partial(finish_x_, grad_x, coefficient, one, zero, x, inverse_x, w, None, inverse_w, slot),
            Work(_cells(x), 16 * x.numel()),
        ),
        "add_labels_": Kernel(
            functools.partial(add_labels_, grad_w, order, zero, zero, x, inverse_x, w, None, inverse_w),
            Work(_cells(x), 16 * x.numel()),  # of distinct labels
        ),
        "rows_through_norm_": Kernel(
            functools.partial(rows_through_norm_, grad_w, w, None, inverse_w), Work(_cells(w), 12 * w.numel())
        ),
    }


def _cells(rows: Tensor) -> tuple[int, int]:
    return len(rows), rows.shape[1]


def _shift(case: Case) -> float:
    return max(0.0, SCALE + math.log(len(case.w)) - 80.0)


def check_sums(case: Case, by_name: dict[str, Kernel]) -> None:
    """Raises UserError unless the row sums of both ways of making the exponentials agree with float64."""
    by_name["product by cuBLAS"].run()  # the cosines that "exponentials in place" reads
    # Error of a logit: 2^-12 of a cosine stored in fp16, plus four sigma of rounded factors.
    max_error = SCALE * (2.0**-12 + 4 * 0.58 * 2.0**-11 / case.shape.width**0.5)
    exact = _exact_sums(case, _shift(case))
    for name in ("exponentials", "exponentials in place"):
        error = measure.relative_error(by_name[name].run().sums[:_CHECKED_ROWS], exact)
        if not error < max_error:
            raise UserError(
                f"row sums of {name} at {case.shape} are off by {error:.1e}, expected < {max_error:.1e}: "
                "no speed is printed; run the tests in tests/kernels"
            )


def _exact_sums(case: Case, shift: float) -> Tensor:
    """[64] sums of exp(SCALE cos - shift) over the negatives."""
    x = torch.nn.functional.normalize(case.x.detach()[: min(_CHECKED_ROWS, case.chunk)].double())
    sums = x.new_zeros(len(x))
    for start in range(0, len(case.w), 1 << 18):
        w = torch.nn.functional.normalize(case.w.detach()[start : start + (1 << 18)].double())
        sums += (SCALE * x @ w.T - shift).exp_().sum(1)
    own = torch.nn.functional.normalize(case.w.detach()[case.target[: len(x)]].double())
    return sums - (SCALE * (x * own).sum(1) - shift).exp()


def measure_kernels(case: Case, timer: measure.Timer, rounds: int) -> list[Row]:
    common: Row = {"block": "kernels", "shape": case.shape.option}
    try:
        by_name = kernels(case)
        check_sums(case, by_name)
    except (ImportError, torch.OutOfMemoryError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        return [common | {"provider": "all", "skipped": (str(error).splitlines() or ["out of memory"])[0][:120]}]
    runs = {name: kernel.run for name, kernel in by_name.items()}
    repeats = {name: measure.repeats_for(timer(run, 2)[1]) for name, run in runs.items()}
    rows = []
    for name, seconds in measure.take_turns(runs, timer, rounds, repeats).items():
        median, work = measure.quantiles(seconds)[1], by_name[name].work
        row: Row = common | {"provider": name, "seconds": seconds}
        row |= {"tflops": work.flop / median / 1e12} if work.flop else {"gb_per_s": work.bytes / median / 1e9}
        rows.append(row)
    return rows


COLUMNS: dict[str, Callable[[Row], str]] = {
    "kernel": lambda row: str(row["provider"]),
    "ms p50 [p20, p80]:": lambda row: measure.format_ms(row["seconds"]),
    "TFLOP/s:": lambda row: measure.format_value(row.get("tflops"), ",.0f"),
    "GB/s:": lambda row: measure.format_value(row.get("gb_per_s"), ",.0f"),
}
