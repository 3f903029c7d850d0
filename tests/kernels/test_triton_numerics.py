"""Loss scales, extreme norms and labels_loss "mean" in Triton, as test_loss_scale.py, test_extreme_norms.py and
test_labels_loss.py test them in PyTorch.

Without a GPU in Triton's interpreter, see `interpreter.py`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
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
from megacid_kernels.fused.row_statistics import REDUCED_TILES, exponentials_spec
from megacid_kernels.fused.tuning import TABLE, TABLE_VARIABLE, as_json, tiles_for

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


@on_devices
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tiles", [1, REDUCED_TILES, 2 * REDUCED_TILES + 77])
def test_partial_statistics_of_many_tiles_are_reduced_in_parts(tiles: int, bias: bool, device: str) -> None:
    """To the sums, maxima and counts of all tiles; and a sample's bits do not depend on the other samples."""
    samples, shift, scale = 40, 3.0, 20.0
    g = torch.Generator().manual_seed(tiles)
    sums, largest = (torch.randn(tiles, samples, generator=g).exp().to(device) for _ in range(2))
    removed = torch.randint(0, 9, (tiles, samples), generator=g, dtype=torch.int32).to(device)
    x, slot = torch.zeros(samples, 1, device=device), torch.zeros(samples, 1, dtype=torch.int64, device=device)

    def reduce(part: slice) -> Any:
        n = len(x[part])
        spec = exponentials_spec(
            x, (n, 5), slot[part].contiguous(), slot[part].bool(), scale=scale, shift=shift,
            bias_S=torch.zeros(5, device=device) if bias else None, threshold=0.5, hidden_bS=None, largest=True,
        )  # fmt: skip
        result = spec.result(None, n, 5, x)
        partials = (sums[:, part].contiguous(), largest[:, part].contiguous(), removed[:, part].contiguous())
        spec.reduce(partials, result, slice(0, n))
        return result

    got, fewer = reduce(slice(0, samples)), reduce(slice(0, 3))
    torch.testing.assert_close(got.sums.double(), sums.double().sum(0), rtol=1e-6, atol=0)
    expected = largest.amax(0)
    if bias:  # the partials are exponents of two
        expected = (expected / math.log2(math.e) + shift) / scale
    torch.testing.assert_close(got.largest, expected)
    assert torch.equal(got.removed, removed.sum(0))
    for whole, part in ((got.sums, fewer.sums), (got.largest, fewer.largest), (got.removed, fewer.removed)):
        assert torch.equal(whole[:3], part)


def test_a_table_for_another_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    entry = dataclasses.replace(TABLE["sm_90", "float16", 512], matrix="in-place")
    path.write_text(as_json({("sm_90", "float16", 512): entry}))
    monkeypatch.setenv(TABLE_VARIABLE, str(path))
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    message = "MEGACID_KERNEL_TABLE is .*table.json' with tiles for sm_90, expected some for sm_80"
    with pytest.raises(ValueError, match=message):
        tiles_for(cuda, torch.float16, 512)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert tiles_for(cuda, torch.float16, 512) == entry != TABLE["sm_90", "float16", 512]
    assert tiles_for(cuda, torch.bfloat16, 512) == TABLE["sm_90", "bfloat16", 512]
