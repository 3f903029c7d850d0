"""Rows whose squares leave fp32's range are normalised like others, and ordinary rows keep their bits.

Without a GPU the comparisons with Triton run in its interpreter, see `interpreter.py`.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import assert_holds_in_the_interpreter, on_devices
from torch import Tensor

from megacid import Margin, PartialFC
from megacid.offline.nearest import prepare
from megacid_kernels import Gradients, LossSpec, Weights, discrimination_with_gradients
from megacid_kernels.fused import INTERPRET, unit_rows
from megacid_kernels.rows import inverse_norms

if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__)


in_pytorch = pytest.mark.skipif(INTERPRET, reason="runs in the outer process")
# Powers of two near 1e20, 1e-30 and both ends of fp32: multiplication by them is exact.
FACTORS = [2.0**66, 2.0**-100, 2.0**124, 2.0**-112]
TINY = torch.finfo(torch.float32).tiny


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


@on_devices
@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
def test_the_loss_does_not_depend_on_any_norm_and_gradients_are_divided_by_it(weight_grad: str, device: str) -> None:
    x, w, teacher = rows(12, 1), rows(30, 2), rows(12, 3)
    exact = call("torch", "cpu", x.double(), w.double(), teacher.double(), weight_grad)
    for impl, place in (("torch", "cpu"), ("triton", device)):
        for factor in FACTORS if impl == "torch" or weight_grad == "stored" else FACTORS[:1]:
            mixed = torch.ones(30, 1)
            mixed[::2] = factor  # ordinary rows between the others
            got = call(impl, place, x * factor, w * mixed, teacher * factor, weight_grad)
            assert_near(got.result.raw, exact.result.raw)
            # Divided by 2^124 a gradient is subnormal.
            if factor < 2.0**120:
                assert got.x is not None and got.w is not None
                assert_near(got.x.double() * factor, exact.x)
                assert_near(got.w.cpu().double() * mixed, exact.w)


@on_devices
def test_fused_unit_rows_of_every_length_have_the_same_bits(device: str) -> None:
    w = rows(16, 4, 40).to(device)
    unit, half, _ = unit_rows(w, None, (torch.float32, torch.float16))
    for factor in FACTORS:
        scaled_unit, scaled_half, inverse = unit_rows(w * factor, None, (torch.float32, torch.float16))
        assert torch.equal(scaled_half, half) and inverse.isfinite().all()
        assert torch.equal(scaled_unit, unit) or factor > 2.0**120  # its inverses have fewer digits
        torch.testing.assert_close(scaled_unit, unit, rtol=1e-6, atol=0)
    limit = torch.zeros(5, 40)
    limit[:, 3] = torch.tensor([0.0, 1e-40, TINY, 2 * TINY, 3.4e38])
    unit, inverse = unit_rows(limit.to(device))
    assert unit[:, 3].tolist() == [0, 0, 0, 1, pytest.approx(1, rel=1e-6)] and not inverse[:3].any()


@in_pytorch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordinary_rows_keep_their_bits_beside_extreme_ones(dtype: torch.dtype) -> None:
    x = rows(40, 5).to(dtype)
    x[::3] *= 1e-30
    x[1::3] *= 1e25
    expected = 1 / torch.linalg.vector_norm(x[2::3], dim=1, keepdim=True)
    assert torch.equal(inverse_norms(x)[2::3], expected)
    exact = 1 / torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
    torch.testing.assert_close(inverse_norms(x), exact.to(dtype), rtol=1e-6, atol=0)
    assert torch.equal(inverse_norms(x.view(8, 5, -1)), inverse_norms(x).view(8, 5, 1))
    assert inverse_norms(x[:0]).shape == (0, 1)


@in_pytorch
def test_double_rows_outside_of_their_own_range() -> None:
    x = rows(6, 5).double()
    for factor in (2.0**900, 2.0**-900):
        assert torch.equal(inverse_norms(x * factor), inverse_norms(x) / factor)


@in_pytorch
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


@in_pytorch
def test_the_whole_range_of_fp16_is_used() -> None:
    """fp16's largest and smallest numbers, the latter subnormal in fp16."""
    x, w, teacher = rows(12, 1).sign(), rows(30, 2), rows(12, 3)
    expected = call("torch", "cpu", x, w, teacher, "stored").result.raw
    for size in (65504.0, 2.0**-24):
        got = call("torch", "cpu", (x * size).half(), w, teacher, "stored").result.raw
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@in_pytorch
def test_float32_rows_of_any_length_are_clustered_by_their_directions() -> None:
    x = rows(20, 6)
    expected = prepare(x.numpy(), "cosine", torch.device("cpu"))
    for factor in (*FACTORS, 2.0**-130):
        got = prepare((x * factor).numpy(), "cosine", torch.device("cpu"))
        torch.testing.assert_close(got, expected, rtol=0, atol=0 if factor > 2.0**-113 else 1e-4)
    assert not prepare(torch.zeros(2, 4).numpy(), "cosine", torch.device("cpu")).any()


@in_pytorch
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
