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
from benchmarks.suite import Row
from megacid.errors import UserError

_CHECKED_ROWS = 64


class Kernel(NamedTuple):
    run: Callable[[], object]
    bytes: int = 0  # read and written
    flop: int = 0


def kernels(case: Case) -> dict[str, Kernel]:
    """The kernels by name: unit rows, exponentials fused (with and without a matrix) and in place, backward of the
    norm. Raises UserError unless the row sums agree with float64."""
    from megacid_kernels.fused import exponentials, exponentials_, rows_through_norm_, unit_rows
    from megacid_kernels.fused.row_statistics import pitched

    x, w = case.x.detach()[: case.chunk].contiguous(), case.w.detach()
    shift = max(0.0, SCALE + math.log(len(w)) - 80.0)
    half = (torch.float16, torch.bfloat16)
    x16, w16 = unit_rows(x, dtypes=half)[0], unit_rows(w, dtypes=half)[0]
    inverse = unit_rows(w, dtypes=half)[-1]
    slot = case.target[: len(x), None].contiguous()
    arguments: dict[str, Any] = {"slot_bl": slot, "own_bl": torch.ones_like(slot, dtype=torch.bool)}
    arguments |= {"scale": SCALE, "shift": shift}
    cos = pitched(len(x), len(w), torch.float16, x.device)
    torch.mm(x16, w16.T, out=cos)
    # Error of a logit: 2^-12 of a cosine stored in fp16, plus four sigma of rounded factors.
    max_error = SCALE * (2.0**-12 + 4 * 0.58 * 2.0**-11 / x.shape[1] ** 0.5)
    for sums in (exponentials(x16, w16, **arguments).sums, exponentials_(cos, **arguments).sums):
        error = measure.relative_error(sums[:_CHECKED_ROWS], _exact_sums(case, shift))
        if not error < max_error:
            raise UserError(
                f"row sums of exponentials at {case.shape} are off by {error:.1e}, expected < {max_error:.1e}: "
                "no speed is printed; run the tests in tests/kernels"
            )
    elements, logits = w.numel(), len(x) * len(w)
    products = 2 * logits * x.shape[1]
    return {
        "unit_rows": Kernel(functools.partial(unit_rows, w, dtypes=half), bytes=8 * elements),
        "exponentials": Kernel(functools.partial(exponentials, x16, w16, **arguments), flop=products),
        "exponentials, no matrix": Kernel(
            functools.partial(exponentials, x16, w16, store=False, **arguments), flop=products
        ),
        "product by cuBLAS": Kernel(functools.partial(torch.mm, x16, w16.T, out=cos), flop=products),
        # From the second call on it reads its own output; the time does not depend on the values.
        "exponentials in place": Kernel(functools.partial(exponentials_, cos, **arguments), bytes=4 * logits),
        "rows_through_norm_": Kernel(
            functools.partial(rows_through_norm_, torch.zeros_like(w), w, None, inverse), bytes=12 * elements
        ),
    }


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
    except (ImportError, torch.OutOfMemoryError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        return [common | {"provider": "all", "skipped": (str(error).splitlines() or ["out of memory"])[0][:120]}]
    runs = {name: kernel.run for name, kernel in by_name.items()}
    repeats = {name: measure.repeats_for(timer(run, 2)[1]) for name, run in runs.items()}
    rows = []
    for name, seconds in measure.take_turns(runs, timer, rounds, repeats).items():
        median, kernel = measure.quantiles(seconds)[1], by_name[name]
        row: Row = common | {"provider": name, "seconds": seconds}
        row |= {"gb_per_s": kernel.bytes / median / 1e9} if kernel.bytes else {"tflops": kernel.flop / median / 1e12}
        rows.append(row)
    return rows


COLUMNS: dict[str, Callable[[Row], str]] = {
    "kernel": lambda row: str(row["provider"]),
    "ms p50 [p20, p80]:": lambda row: measure.format_ms(row["seconds"]),
    "TFLOP/s:": lambda row: measure.format_value(row.get("tflops"), ",.0f"),
    "GB/s:": lambda row: measure.format_value(row.get("gb_per_s"), ",.0f"),
}
