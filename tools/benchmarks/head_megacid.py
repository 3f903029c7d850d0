"""Providers of the suite head on a GPU: our own head in each of its schedules."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.classifier_providers import SCALE
from benchmarks.head_peers import BOTH, Call, Case, Provider, loss_and_gradients
from megacid_kernels import linear_margin_cross_entropy
from megacid_kernels.margin import Margin

MatrixBy = Literal["fused", "in-place"]


@functools.cache
def _table_of(matrix: MatrixBy, device: torch.device, width: int) -> str:
    """Path of a kernel table with the usual tiles of this device and width and the given `matrix`."""
    from megacid_kernels.fused.tuning import architecture_of, as_json, tiles_for

    table = {
        (architecture_of(device), str(dtype).removeprefix("torch."), width): replace(
            tiles_for(device, dtype, width), matrix=matrix
        )
        for dtype in (torch.float16, torch.bfloat16)
    }
    with tempfile.NamedTemporaryFile("w", prefix="kernel-table-", suffix=".json", delete=False) as file:
        file.write(as_json(table))
    atexit.register(os.unlink, file.name)
    return file.name


@contextlib.contextmanager
def force_matrix(matrix: MatrixBy, device: torch.device, width: int) -> Iterator[None]:
    """Make the exponentials in this way inside the context, whatever the table says."""
    from megacid_kernels.fused.tuning import TABLE_VARIABLE

    path, before = _table_of(matrix, device, width), os.environ.get(TABLE_VARIABLE)
    os.environ[TABLE_VARIABLE] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[TABLE_VARIABLE]
        else:
            os.environ[TABLE_VARIABLE] = before


def _loss(case: Case, x: Tensor, w: Tensor, options: dict[str, Any]) -> Tensor:
    return linear_margin_cross_entropy(
        x, w, case.target, margin=Margin.cosface(case.margin) if case.margin else None, scale=SCALE,
        memory_budget_bytes=case.budget_bytes, **options,
    )  # fmt: skip


def training(case: Case, *, matrix: MatrixBy | None = None, **options: Any) -> Call:
    call = loss_and_gradients(lambda x, w: _loss(case, x, w, options), case.x, case.w)
    if matrix is None:
        return call

    def run() -> tuple[Tensor, ...]:
        with force_matrix(matrix, case.x.device, case.shape.width):
            return call.run()

    return call._replace(run=run)


def loss_only(case: Case, **options: Any) -> Call:
    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (_loss(case, case.x, case.w, options),)

    return Call(run, (case.x, case.w), products=2)


def _provider(make: Any, about: str, **options: Any) -> Provider:
    return Provider(functools.partial(make, **options), BOTH, about)


_TRITON_STORED = {"impl": "triton", "weight_grad": "stored"}
OURS = {
    "megacid-fused": _provider(training, "stored gradient, fused exponentials", matrix="fused", **_TRITON_STORED),
    "megacid-in-place": _provider(training, "the same over a cuBLAS product", matrix="in-place", **_TRITON_STORED),
    "megacid-recomputed": _provider(training, "least memory", impl="triton", weight_grad="recomputed"),
    "megacid-loss-only": _provider(loss_only, "no gradients", impl="triton"),
    "megacid-torch": _provider(training, "stored gradient in PyTorch, fp32", impl="torch", weight_grad="stored"),
}
# Largest relative errors of the gradients on the sample. The factors of the first product are rounded to fp16 by our
# kernels and to bf16 by peers. A larger error of ours ends the benchmark.
_FP32_ERROR, _FP16_ERROR, _BF16_ERROR = 5e-6, 2.5e-3, 5e-3
_FP32_LOSS_ERROR = 5e-5


def allowed_error(name: str) -> float:
    if name == "megacid-torch":
        return _FP32_ERROR
    return _FP16_ERROR if name in OURS else _BF16_ERROR


def allowed_loss_error(name: str, width: int) -> float:
    """Eight sigma of a logit of rounded unit rows, 0.58 scale u / sqrt(D) each, plus 2^-11 scale for cosines in
    fp16."""
    if name == "megacid-torch":
        return _FP32_LOSS_ERROR
    rounded = 8 * 0.58 * SCALE * 2.0 ** (-11 if name in OURS else -8) / width**0.5
    return rounded + (SCALE * 2.0**-11 if name == "megacid-in-place" else 0.0)
