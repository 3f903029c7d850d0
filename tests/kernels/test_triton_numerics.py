"""Loss scales, extreme norms and labels_loss "mean" in Triton, as test_loss_scale.py, test_extreme_norms.py and
test_labels_loss.py test them in PyTorch.

Without a GPU in Triton's interpreter, see `interpreter.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import assert_holds_in_the_interpreter, on_devices
from test_extreme_norms import FACTORS, assert_norms_only_divide_gradients, rows
from test_labels_loss import call, inputs
from test_loss_scale import assert_rounded_once, confident, contrastive_inputs

from megacid import Margin
from megacid_kernels import (
    LossSpec,
    Weights,
    contrastive_cross_entropy,
    discrimination_with_gradients,
    linear_margin_cross_entropy,
)
from megacid_kernels.fused import INTERPRET, unit_rows

TINY = torch.finfo(torch.float32).tiny

if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__)


@on_devices
@pytest.mark.parametrize(("dtype", "weight_grad"), [(torch.float16, "stored"), (torch.bfloat16, "recomputed")])
def test_gradients_of_16_bit_inputs_are_rounded_after_the_loss_scale(
    dtype: torch.dtype, weight_grad: str, device: str
) -> None:
    x, w, target = (t.to(device) for t in confident(dtype))
    options: dict[str, Any] = {"scale": 16.0, "impl": "triton", "weight_grad": weight_grad}
    exact = discrimination_with_gradients(x, w, target, LossSpec(40, **options))
    given = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    assert_rounded_once(linear_margin_cross_entropy(*given, target, **options), given, [exact.x, exact.w])
    pairs = contrastive_inputs(dtype, device)
    wide = [t.float().requires_grad_() for t in pairs]
    right = torch.autograd.grad(contrastive_cross_entropy(*wide, impl="triton"), wide)
    mine = [t.requires_grad_() for t in pairs]
    assert_rounded_once(contrastive_cross_entropy(*mine, impl="triton"), mine, list(right))


@on_devices
@pytest.mark.parametrize(("weight_grad", "factors"), [("stored", FACTORS), ("recomputed", FACTORS[:1])])
def test_norms_outside_of_the_range_of_squares(weight_grad: str, factors: list[float], device: str) -> None:
    assert_norms_only_divide_gradients("triton", device, weight_grad, factors)


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


@on_devices
@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
def test_triton_is_within_the_gate_of_16_bit_factors(weight_grad: str, device: str) -> None:
    x, w, target, teacher = inputs()
    options: dict[str, Any] = {"margin": Margin(m2=0.2, m3=0.1), "weights": Weights(0.7, 0.4), "filter_threshold": 0.4}
    exact = call(x, w, target, teacher, **options)
    given = [t.to(device, torch.float32) for t in (x, w, teacher)]
    got = call(given[0], given[1], target.to(device), given[2], impl="triton", weight_grad=weight_grad, **options)
    for name, value, right in (("x", got.x, exact.x), ("w", got.w, exact.w), ("raw", got.result.raw, exact.result.raw)):
        assert value is not None and right is not None
        error = float((value.cpu().double() - right).norm() / right.norm())
        assert error < 2.5e-3, f"{name} is off by {error:.1e} of its norm"
