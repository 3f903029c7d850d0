"""labels_loss "mean": the mean over a sample's labels of softmax losses in which its other labels are negatives.

The same in Triton: test_triton_numerics.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megacid import Margin
from megacid_kernels import Gradients, LossSpec, Weights, discrimination_with_gradients
from megacid_kernels.reference import discrimination_reference

MARGINS = [None, Margin.arcface(0.3), Margin(1.2, 0.2, 0.1)]


def inputs(labels: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, w, target, teacher) with repeated, missing and no labels, and several labels at high cosines."""
    g = torch.Generator().manual_seed(2)
    w = torch.randn(40, 16, generator=g, dtype=torch.float64)
    target = torch.randint(0, 40, (20, labels), generator=g)
    target[0, 1:], target[1], target[2, -1], target[3] = -1, -1, target[2, 0], target[4]
    x = w[target.clamp_min(0)].sum(1) + 0.3 * torch.randn(20, 16, generator=g, dtype=torch.float64)
    return x, w, target, x + torch.randn(20, 16, generator=g, dtype=torch.float64)


def call(x: Tensor, w: Tensor, target: Tensor, teacher: Tensor | None = None, **options: Any) -> Gradients:
    spec = LossSpec(**({"num_classes": 40, "scale": 12.0, "labels_loss": "mean"} | options))
    return discrimination_with_gradients(x, w, target, spec, teacher=teacher)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
def test_loss_and_gradients_are_those_of_autograd(margin: Margin | None, weight_grad: str) -> None:
    x, w, target, teacher = inputs()
    for threshold in (None, 0.3):
        mine, rows = x.clone().requires_grad_(), w.clone().requires_grad_()
        options: dict[str, Any] = {"margin": margin, "weights": Weights(0.7, 0.4), "filter_threshold": threshold}
        loss, raw = discrimination_reference(
            mine, rows, target, scale=12.0, teacher=teacher, labels_loss="mean", **options
        )
        loss.backward()
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
            got = call(x.to(dtype), w.to(dtype), target, teacher.to(dtype), weight_grad=weight_grad, **options)
            expected = raw.to(dtype), mine.grad, rows.grad
            for value, exact in zip((got.result.raw, got.x, got.w), expected):
                assert value is not None and exact is not None
                torch.testing.assert_close(value, exact.to(dtype), rtol=tolerance, atol=tolerance)


def test_it_is_the_mean_of_one_call_per_label() -> None:
    x, w, target, _ = inputs()
    full = torch.tensor([len(set(row)) == 3 and min(row) >= 0 for row in target.tolist()])
    x, target = x[full], target[full]
    assert len(x) > 10
    whole = call(x, w, target, margin=Margin.arcface(0.3))
    parts = [call(x, w, target[:, i], margin=Margin.arcface(0.3)) for i in range(3)]
    for name in ("x", "w"):
        grads = [getattr(part, name) for part in parts]
        torch.testing.assert_close(getattr(whole, name), torch.stack(grads).mean(0))
    torch.testing.assert_close(whole.result.loss, torch.stack([part.result.loss for part in parts]).mean())


def test_one_label_per_sample_is_the_cross_entropy_and_a_large_scale_stays_finite() -> None:
    x, w, target, _ = inputs(1)
    same = [call(x, w, target, labels_loss=name) for name in ("mean", "mlcd")]
    assert torch.equal(same[0].result.loss, same[1].result.loss) and torch.equal(same[0].w, same[1].w)
    x, w, target, _ = inputs()
    for factor in (1.0, -1.0):  # labels at cosine 1, and all of them at -1
        alone = torch.arange(40)[:, None].expand(-1, 2).contiguous()
        alone[:, 1] = (alone[:, 1] + 1) % 40
        got = call(factor * w.float(), w.float(), alone, scale=120.0, margin=Margin.arcface(0.5))
        expected, _ = discrimination_reference(
            factor * w, w, alone, scale=120.0, margin=Margin.arcface(0.5), labels_loss="mean"
        )
        assert got.x is not None and got.w is not None and got.x.isfinite().all() and got.w.isfinite().all()
        assert got.result.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_labels_are_neither_biased_nor_filtered_and_only_labels_at_all_give_a_loss() -> None:
    x, w, target, _ = inputs()
    spec = LossSpec(40, 12.0, labels_loss="mean", filter_threshold=-2.0)  # every other class is removed
    bias = torch.full((40,), 3.0, dtype=torch.float64)
    got = discrimination_with_gradients(x, w, target, spec, bias=bias)
    expected, _ = discrimination_reference(
        x, w, target, scale=12.0, filter_threshold=-2.0, bias=bias, labels_loss="mean"
    )
    assert got.result.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert got.x is not None and not got.x[:2].any() and got.x[4].any()  # one label, no label, three labels
