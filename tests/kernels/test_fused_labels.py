"""The Triton kernels on labels and row statistics against float64 and against plain PyTorch.

Without a GPU in Triton's interpreter, see `interpreter.py`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from interpreter import assert_holds_in_the_interpreter, on_devices
from torch import Tensor

from megacid_kernels import LossSpec, Margin, Weights, discrimination_with_gradients
from megacid_kernels.engines.interface import EngineInputs
from megacid_kernels.engines.triton_engine import TritonEngine
from megacid_kernels.epilogue import epilogue
from megacid_kernels.fused import INTERPRET, finish_x_, locate_labels, target_margins, unit_rows
from megacid_kernels.fused.row_statistics import difference_along
from megacid_kernels.margin import SIN_FLOOR
from megacid_kernels.row_statistics import RowStatistics
from megacid_kernels.targets import BatchLabels, Labels, Target, batch_labels, drop_repeated_labels

if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@on_devices
@pytest.mark.parametrize(("batch", "labels", "rows", "sampled", "reduction"), [
    (300, 1, 100, False, "mean"), (300, 1, 64, True, "sum"), (7, 3, 33, True, "mean"), (7, 3, 33, False, "mean"),
    (1100, 1, 1, True, "mean"), (5, 1, 0, False, "mean"), (5, 2, 0, True, "sum"), (0, 1, 9, True, "mean"),
])  # fmt: skip
def test_labels_are_located_as_in_pytorch(
    batch: int, labels: int, rows: int, sampled: bool, reduction: Any, device: str
) -> None:
    """With classes before, between and after this rank's rows. 1,100 samples take several programs."""
    start = 1000
    chosen = torch.randperm(2 * rows, generator=generator(1))[:rows].sort().values if sampled else None
    target = start + torch.randint(-9, 2 * rows + 9, (batch, labels), generator=generator(2))
    target[torch.rand(batch, labels, generator=generator(3)) < 0.3] = -1
    target = drop_repeated_labels(target)
    spec = LossSpec(5000, class_start=start, reduction=reduction)
    want = batch_labels(target, chosen, spec, rows, torch.float32)
    moved = None if chosen is None else chosen.to(device)
    got = locate_labels(target.to(device), moved, rows, start, mean=reduction == "mean")
    own = want.located.own
    slot = got.located.slot.cpu()
    assert torch.equal(got.located.own.cpu(), own) and torch.equal(slot[own], want.located.slot[own])
    assert not rows or not batch or (own.any() and not own.all())
    assert ((slot >= 0) & (slot < max(1, rows))).all()
    for name in ("present", "num_labels", "owned"):
        assert torch.equal(getattr(got, name).cpu().double(), getattr(want, name).double()), name
    torch.testing.assert_close(got.share.cpu(), want.share, rtol=1e-7, atol=0)
    torch.testing.assert_close(got.sample_weight.cpu(), want.sample_weight, rtol=1e-7, atol=0)


@on_devices
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "margin",
    [
        Margin(),
        Margin.cosface(0.4),
        Margin.arcface(0.5),
        Margin.arcface(0.5, easy_margin=True),
        Margin(m2=0.3, m3=0.2),
        Margin(m3=0.1, easy_margin=True),
        Margin(m2=3.0),
    ],
    ids=str,
)
def test_the_margin_and_its_derivative_are_those_of_float64(margin: Margin, exact: bool, device: str) -> None:
    """At angles from 0 to pi, past the angle at which the margin continues linearly. Away from both thresholds, where
    rounding decides."""
    angle = torch.cat([torch.linspace(0, math.pi, 41, dtype=torch.float64), torch.tensor([1e-6, 1e-3, math.pi - 1e-4])])
    angle = angle[((angle - (math.pi - margin.m2)).abs() > 1e-5) & ((angle - math.pi / 2).abs() > 1e-5)]
    w = torch.eye(2, 24)[torch.zeros(len(angle), dtype=torch.int64)]
    x = torch.zeros(len(angle), 24)
    x[:, 0], x[:, 1] = angle.cos().float(), angle.sin().float()
    slot, one = torch.arange(len(angle))[:, None], torch.ones(len(angle))
    own = slot % 7 != 3
    got = target_margins(
        *(t.to(device) for t in (x, one, w)), None, *(t.to(device) for t in (one, slot, own)), m2=margin.m2,
        m3=margin.m3, easy_margin=margin.easy_margin, exact=exact, sin_floor=SIN_FLOOR,
    )  # fmt: skip
    cos, sin = x[:, :1].double(), x[:, 1:2].double()
    psi, dpsi = margin.target(cos, sin)
    for value, right in zip(got, (cos, psi, dpsi if exact else torch.ones_like(dpsi))):
        torch.testing.assert_close(value.cpu().double(), torch.where(own, right, 0), rtol=3e-5, atol=3e-7)


def statistics(
    weights: Weights, samples: int
) -> tuple[LossSpec, RowStatistics, BatchLabels, Target | None, Target | None]:
    """In float64, with samples that have no label, no negative, a class of another rank or of none."""
    spec = LossSpec(1000, scale=20.0, weights=weights)
    g = generator(0)

    def numbers(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(samples, generator=g)).double()

    sums = {name: (numbers(-5, 20)).exp() for name in spec.distributions()}
    psi, teacher_cos = numbers(-1.2, 1.0)[:, None], numbers(-1, 1)[:, None]
    present, own = torch.ones(samples, 1, dtype=torch.bool), torch.ones(samples, 1, dtype=torch.bool)
    present[2], own[[2, 3, 4]], owned = False, False, present[:, 0].double()
    for each in sums.values():
        each[7] = 0.0
    owned[4] = 0
    share = present[:, 0].double() / (samples - 1)
    located = Labels(own, torch.zeros(samples, 1, dtype=torch.int64))
    labels = BatchLabels(located, present, present.sum(1).double(), owned, share, share.max())
    student = Target(psi, psi, numbers(0.5, 2)[:, None] * own) if weights.needs_student else None
    teacher = Target(teacher_cos, teacher_cos, own.double()) if weights.needs_teacher else None
    gap = numbers(-1, 1) * sums[spec.softened("teacher")] if weights.gamma > 0 else None
    stats = RowStatistics(
        sums, gap, owned, student and student.psi, student and student.cos, teacher and teacher.cos
    )  # fmt: skip
    return spec, stats, labels, student, teacher


def as_fp32(value: Any, device: str) -> Any:
    """Every tensor of nested tuples and dicts, moved; floating-point ones in fp32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {name: as_fp32(each, device) for name, each in value.items()}
    if isinstance(value, tuple):
        parts = [as_fp32(each, device) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


@on_devices
@pytest.mark.parametrize(
    "weights",
    [
        Weights(0.7),
        Weights(0.0, 0.6),
        Weights(0.0, 0.0, 0.5, 2.0),
        Weights(0.4, 0.6, 1.0, 2.0),
        Weights(0.4, 0.6, 1.0),
        Weights(0.0, 0.6, 1.0),
        Weights(0.4, 0.0, 1.0),
    ],
    ids=str,
)
def test_losses_and_coefficients_of_every_term_are_those_of_float64(weights: Weights, device: str) -> None:
    spec, *given = statistics(weights, 300)
    want = epilogue(spec, *given)  # type: ignore[arg-type]
    engine = TritonEngine(EngineInputs(torch.zeros(1, 1, device=device), None, None, spec, True, False))
    got = engine.coefficients(*as_fp32(tuple(given), device))

    def assert_near(value: Tensor | None, right: Tensor | None, atol: float = 1e-6) -> None:
        assert (value is None) == (right is None)
        if value is not None and right is not None:
            assert value.shape == right.shape and right.isfinite().sum() > 290
            torch.testing.assert_close(value.cpu().double(), right, rtol=1e-4, atol=atol, equal_nan=True)

    assert want.raw[:, 4].isnan().all() and not want.raw[:, 2].any()
    assert_near(got.raw, want.raw, 1e-5)  # the KL is a difference of logits of up to 20
    assert_near(got.student_target, want.student_target if weights.needs_student else None)
    assert_near(got.teacher_target, want.teacher_target)
    for mine, right in ((got.student, want.student), (got.teacher, want.teacher)):
        assert list(mine) == list(right)
        for name in right:
            # Logarithms: they range over many decades. They are negative for the KL's teacher, and 0 without a label.
            assert_near(mine[name].abs().log().clamp_min(-99), right[name].abs().log().clamp_min(-99))
            assert torch.equal(mine[name].sign().cpu().double(), right[name].sign())


@on_devices
def test_several_products_are_one_pass_of_the_gradient_of_x(device: str) -> None:
    b, width = 13, 40
    x, *products = torch.randn(4, b, width, generator=generator(1)).to(device)
    factors = torch.rand(3, b, generator=generator(2)).to(device)
    zero, slot = torch.zeros(b, 1, device=device), torch.zeros(b, 1, dtype=torch.int64, device=device)
    _, inverse = unit_rows(x)
    rest = (zero, zero, x, inverse, x, None, inverse, slot)
    for count in (1, 2, 3):
        total = sum(factors[i][:, None] * products[i] for i in range(count))
        want = finish_x_(total, torch.ones(b, device=device), *rest)  # type: ignore[arg-type]
        more = [(products[i], factors[i]) for i in range(1, count)]
        got = finish_x_(products[0].clone(), factors[0], *rest, more=more)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="13 rows of w are used, expected 5: pass rows with the row of each slot"):
        finish_x_(products[0], factors[0], zero, zero, x, inverse, x, None, inverse[:5], slot)


@on_devices
@pytest.mark.parametrize("width", [33, 512, 4099])
def test_the_gap_between_cosines_is_a_difference_along_a_product(width: int, device: str) -> None:
    a, b, c = torch.randn(3, 11, width, generator=generator(1))
    got = difference_along(a.to(device), b.to(device), c.to(device)).cpu().double()
    torch.testing.assert_close(got, ((a - b).double() * c).sum(1), rtol=1e-5, atol=1e-4)


@on_devices
@pytest.mark.parametrize(("dtype", "weight_grad"), [(torch.float16, "stored"), (torch.bfloat16, "recomputed")])
def test_16_bit_class_rows_are_read_without_a_copy_and_give_the_gradients_of_one(
    dtype: torch.dtype, weight_grad: str, device: str
) -> None:
    g = generator(3)
    w, x = torch.randn(70, 24, generator=g).to(device, dtype), torch.randn(20, 24, generator=g).to(device)
    rows = torch.arange(0, 70, 2, device=device)
    target = 2 * torch.randint(0, 35, (20, 2), generator=g).to(device)
    spec = LossSpec(70, margin=Margin.arcface(0.3), impl="triton", weight_grad=weight_grad, memory_budget_bytes=15_000)
    for options in ({}, {"rows": rows, "gather": True}):
        got, want = (discrimination_with_gradients(x, each, target, spec, **options) for each in (w, w.float()))  # type: ignore[arg-type]
        assert got.w is not None and got.w.any()
        for a, b in ((got.x, want.x), (got.w, want.w), (got.result.raw, want.result.raw)):
            assert a is not None and b is not None
            # On a GPU rows of another dtype are spread over the threads in another way, and so are their sums.
            assert torch.equal(a, b) if device == "cpu" else float((a - b).norm() / b.norm()) < 2.5e-3
