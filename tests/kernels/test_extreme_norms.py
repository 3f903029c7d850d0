"""Rows whose squares leave fp32's range are normalised like others, and ordinary rows keep their bits.

The same in Triton: test_triton_numerics.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megacid_kernels.rows
from megacid import Margin, PartialFC
from megacid.offline.nearest import prepare
from megacid_kernels import Gradients, LossSpec, Weights, discrimination_with_gradients
from megacid_kernels.rows import inverse_norms

# Powers of two near 1e20, 1e-30 and both ends of fp32: multiplication by them is exact.
FACTORS = [2.0**66, 2.0**-100, 2.0**124, 2.0**-112]


def rows(n: int, seed: int, width: int = 24) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def call(impl: str, device: str, x: Tensor, w: Tensor, teacher: Tensor, weight_grad: str) -> Gradients:
    spec = LossSpec(
        30, 16.0, Margin(m2=0.3), weights=Weights(1.0, 0.5, 0.5), impl=impl, weight_grad=weight_grad, precision="fp32"
    )
    target = torch.arange(12).mul(7).remainder(30).to(device)
    return discrimination_with_gradients(x.to(device), w.to(device), target, spec, teacher=teacher.to(device))


def assert_near(got: Tensor | None, expected: Tensor | None) -> None:
    assert got is not None and expected is not None
    assert float((got.cpu().double() - expected.double()).norm() / expected.double().norm()) < 1e-5


def assert_norms_only_divide_gradients(impl: str, device: str, weight_grad: str, factors: list[float]) -> None:
    """The loss depends on directions alone. Every other class row is ordinary."""
    x, w, teacher = rows(12, 1), rows(30, 2), rows(12, 3)
    exact = call("torch", "cpu", x.double(), w.double(), teacher.double(), weight_grad)
    for factor in factors:
        mixed = torch.ones(30, 1)
        mixed[::2] = factor
        got = call(impl, device, x * factor, w * mixed, teacher * factor, weight_grad)
        assert_near(got.result.raw, exact.result.raw)
        if factor < 2.0**120:  # divided by 2^124 a gradient is subnormal
            assert got.x is not None and got.w is not None
            assert_near(got.x.double() * factor, exact.x)
            assert_near(got.w.cpu().double() * mixed, exact.w)


@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
def test_the_loss_does_not_depend_on_any_norm_and_gradients_are_divided_by_it(weight_grad: str) -> None:
    assert_norms_only_divide_gradients("torch", "cpu", weight_grad, FACTORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordinary_rows_keep_their_bits_among_extreme_ones(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(40, 5).to(dtype)
    x[::3] *= 1e-30
    x[1::3] *= 1e25
    expected = 1 / torch.linalg.vector_norm(x[2::3], dim=1, keepdim=True)
    assert torch.equal(inverse_norms(x)[2::3], expected)
    exact = 1 / torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
    torch.testing.assert_close(inverse_norms(x), exact.to(dtype), rtol=1e-6, atol=0)
    assert torch.equal(inverse_norms(x.view(8, 5, -1)), inverse_norms(x).view(8, 5, 1))
    assert inverse_norms(x[:0]).shape == (0, 1)
    on_host = inverse_norms(x)
    monkeypatch.setattr(megacid_kernels.rows, "is_on_host", lambda x: False)
    assert torch.equal(inverse_norms(x), on_host) and torch.equal(inverse_norms(x.view(8, 5, -1)).view(40, 1), on_host)


def test_double_rows_outside_of_their_own_range() -> None:
    x = rows(6, 5).double()
    for factor in (2.0**900, 2.0**-900):
        assert torch.equal(inverse_norms(x * factor), inverse_norms(x) / factor)


def test_subnormal_rows_are_zero_rows_and_what_is_not_finite_stays_visible() -> None:
    x, w, teacher = rows(12, 1), rows(30, 2), rows(12, 3)
    small, zero = x.clone(), x.clone()
    small[3], zero[3] = x[3] * 1e-41, 0.0
    got, expected = (call("torch", "cpu", y, w, teacher, "stored") for y in (small, zero))
    assert torch.equal(got.result.raw, expected.result.raw) and got.x is not None and not got.x[3].any()
    for value in (torch.inf, torch.nan):
        broken = x.clone()
        broken[3, 2] = value
        assert call("torch", "cpu", broken, w, teacher, "stored").result.loss.isnan()


def test_the_whole_range_of_fp16_is_used() -> None:
    """fp16's largest and smallest numbers, the latter subnormal in fp16."""
    x, w, teacher = rows(12, 1).sign(), rows(30, 2), rows(12, 3)
    expected = call("torch", "cpu", x, w, teacher, "stored").result.raw
    for size in (65504.0, 2.0**-24):
        got = call("torch", "cpu", (x * size).half(), w, teacher, "stored").result.raw
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_float32_rows_of_any_length_are_clustered_by_their_directions() -> None:
    x = rows(20, 6)
    expected = prepare(x.numpy(), "cosine", torch.device("cpu"))
    for factor in (*FACTORS, 2.0**-130):
        got = prepare((x * factor).numpy(), "cosine", torch.device("cpu"))
        torch.testing.assert_close(got, expected, rtol=0, atol=0 if factor > 2.0**-113 else 1e-4)
    assert not prepare(torch.zeros(2, 4).numpy(), "cosine", torch.device("cpu")).any()


@pytest.mark.parametrize("sample_rate", [1.0, 0.4])
def test_the_classifier_gives_the_loss_of_its_directions(sample_rate: float) -> None:
    w, x, target = rows(30, 2), rows(12, 1), torch.arange(12)
    losses, gradients = [], []
    for factor in (1.0, 1e20, 1e-30):
        head = PartialFC(30, 24, init=w * factor, sample_rate=sample_rate)
        mine = (x * factor).requires_grad_()
        loss = head(mine, target)
        loss.backward()
        assert mine.grad is not None
        losses.append(loss.item())
        gradients.append(mine.grad.double() * factor)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for gradient in gradients[1:]:
        assert_near(gradient, gradients[0])
