"""How many launches the head needs on a GPU: for small shards the host's time for them is the time of a step.

Without a GPU counted in Triton's interpreter, see `interpreter.py`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import assert_holds_in_the_interpreter, on_devices
from launch_counter import counted_launches

from megacid import PartialFC, RowAdamW, RowSGD
from megacid_kernels import (
    LossSpec,
    Margin,
    Weights,
    discrimination_with_gradients,
    linear_margin_cross_entropy,
    linear_margin_discrimination,
)
from megacid_kernels.fused import INTERPRET

BATCH, CLASSES, WIDTH = 24, 150, 48
ALL_TERMS = Weights(0.4, 0.6, 1.0, 2.0)

if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__)


def inputs(device: str, sampled: bool) -> dict[str, Any]:
    g = torch.Generator().manual_seed(7)
    rows = torch.arange(0, CLASSES, 2) if sampled else None
    x, teacher = (torch.randn(BATCH, WIDTH, generator=g).to(device) for _ in range(2))
    w = torch.randn(CLASSES if rows is None else len(rows), WIDTH, generator=g).to(device)
    target = (2 * torch.randint(-1, CLASSES // 2, (BATCH,), generator=g)).clamp_min(-1).to(device)
    return {"x": x, "w": w, "target": target, "teacher": teacher, "rows": None if rows is None else rows.to(device)}


def documented(what: str) -> int:
    """The launches that docs/kernels.md states."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {what} |")]
    return int(row.split("|")[2])


def assert_at_most(limit: int, launches: Counter[str]) -> None:
    total = launches.total()
    assert total <= limit, f"{total} launches, expected <= {limit}: {launches.most_common()}"
    assert launches["exponentials_kernel"] and launches["product_fp32"] and launches["rows_through_norm_kernel"]


@on_devices
@pytest.mark.parametrize("sampled", [False, True])
def test_a_cross_entropy_and_its_gradients_are_at_most_25_launches(
    sampled: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(device, sampled)
    x, w = (given[name].requires_grad_() for name in ("x", "w"))
    with counted_launches(monkeypatch) as launches:
        loss = linear_margin_cross_entropy(
            x, w, given["target"], rows=given["rows"], num_classes=CLASSES, margin=Margin.arcface(0.3), impl="triton"
        )
        loss.backward()
    assert_at_most(25, launches)
    assert launches.total() == documented("cross entropy") or not INTERPRET
    assert launches["target_cosines_kernel"] == 1 and x.grad is not None and w.grad is not None


@on_devices
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("temperature", "what"), [(1.0, "temperature 1"), (2.0, "another temperature")])
def test_three_terms_and_their_gradients_are_at_most_45_launches(
    temperature: float, what: str, sampled: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temperature other than 1 makes the most matrices. Through autograd, and without it."""
    given = inputs(device, sampled)
    x, w = (given[name].requires_grad_() for name in ("x", "w"))
    weights = dataclasses.replace(ALL_TERMS, temperature=temperature)
    spec = LossSpec(CLASSES, margin=Margin.arcface(0.3), weights=weights, impl="triton")
    options = {name: given[name] for name in ("rows", "teacher")}
    with counted_launches(monkeypatch) as launches:
        linear_margin_discrimination(x, w, given["target"], spec, **options).loss.backward()
    assert_at_most(45, launches)
    assert launches.total() == documented(f"three terms, {what}") or not INTERPRET
    with counted_launches(monkeypatch) as launches:
        discrimination_with_gradients(x.detach(), w.detach(), given["target"], spec, **options)
    assert_at_most(42, launches)


@on_devices
def test_a_further_chunk_repeats_the_work_of_a_chunk_only(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(device, False)
    totals = []
    for chunks in (2, 3):
        spec = LossSpec(CLASSES, impl="triton", memory_budget_bytes=2 * CLASSES * BATCH // chunks)
        with counted_launches(monkeypatch) as launches:
            discrimination_with_gradients(given["x"], given["w"], given["target"], spec)
        assert launches["exponentials_kernel"] == chunks
        totals.append(launches.total())
    assert totals[1] - totals[0] <= 20, totals


@on_devices
@pytest.mark.parametrize(
    ("static_shapes", "what"), [(False, "a sampled step"), (True, "a sampled step, static shapes")]
)
def test_a_whole_sampled_step_has_few_launches(
    static_shapes: bool, what: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchange of labels, rows, loss, both gradients, AdamW. Copies between host and device are not counted."""
    given = inputs(device, False)
    head = PartialFC(CLASSES, WIDTH, sample_rate=0.5, impl="triton", static_shapes=static_shapes, device=device)
    optimizer, x = RowAdamW(head), given["x"].requires_grad_()
    for _ in range(2):  # the first makes room for the labels
        with counted_launches(monkeypatch) as launches:
            head(x, given["target"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_at_most(60, launches)
    assert launches["merge_rows_kernel"] and launches["adamw_rows_kernel"]
    assert launches.total() == documented(what) or not INTERPRET


@on_devices
@pytest.mark.parametrize("optimizer", [RowAdamW, RowSGD])
def test_a_training_step_passes_three_times_over_the_gradient_of_the_rows(
    optimizer: type[RowAdamW | RowSGD], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[S, D] is the largest matrix of a step: the product writes it, the backward of the norm multiplies by the
    gradient of the loss and measures the length for clipping, the update reads it. Labels touch their rows alone."""
    given, what = inputs(device, False), ["product_fp32", "add_labels_kernel", "rows_through_norm_kernel"]
    head = PartialFC(CLASSES, WIDTH, sample_rate=0.5, impl="triton", device=device)
    rows, x = optimizer(head), given["x"].requires_grad_()
    head(x, given["target"])
    used = int(head.metrics()["sampled"])
    with counted_launches(monkeypatch, (used, WIDTH)) as passes:
        (3 * head(x, given["target"])).backward()
        norm = head.grad_norm_sq()
        rows.step(grad_scale=norm.clamp(max=0.5))
    update = "adamw_rows_kernel" if optimizer is RowAdamW else "sgd_rows_kernel"
    assert passes == dict.fromkeys([*what, update], 1) and len(head.row_grad()[0]) == used < CLASSES
