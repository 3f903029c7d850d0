"""A loss scale is exact for 16-bit inputs: gradients stay fp32 until it has multiplied them, and are rounded once.

The same in Triton: test_triton_numerics.py.
"""

from __future__ import annotations

import pytest
import torch
from harness import run_ranks
from torch import Tensor
from torch.nn import functional as F

from megacid import Margin, PartialFC
from megacid.distributed.collectives import rank, world_size
from megacid_kernels import (
    LossSpec,
    Weights,
    affinity_cross_entropy,
    contrastive_cross_entropy,
    discrimination_with_gradients,
    linear_margin_cross_entropy,
    linear_margin_discrimination,
)
from megacid_kernels.reference import discrimination_reference

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
# 2^40 overflows fp16, as it does after one rounding; 2^-20 makes its numbers subnormal.
SCALES = (2.0**16, 2.0**40, 2.0**-20, -1.0, 0.0)


def confident(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(x, w, target) with a mean loss of about 0.03, most of whose gradients are smaller than fp16's 6e-8."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(40, 32, generator=g)
    target = torch.randint(0, 40, (64,), generator=g)
    return (w[target] + 0.85 * torch.randn(64, 32, generator=g)).to(dtype), w.to(dtype), target


def assert_rounded_once(loss: Tensor, inputs: list[Tensor], exact: list[Tensor | None]) -> None:
    """Every scale's gradients are `exact`, fp32, times that scale, rounded once from the product in float64. All scales
    share a graph: a backward must not change what it kept."""
    for scale in SCALES:
        got = torch.autograd.grad(loss * scale, inputs, retain_graph=True)
        passed = torch.autograd.grad(loss, inputs, torch.tensor(scale, device=loss.device), retain_graph=True)
        for given, mine, other, wide in zip(inputs, got, passed, exact, strict=True):
            assert wide is not None and wide.dtype == torch.float32
            assert mine.dtype == given.dtype and torch.equal(mine, (wide.double() * scale).to(given.dtype))
            assert torch.equal(mine, other)


@HALVES
def test_the_margin_operators_round_once(dtype: torch.dtype) -> None:
    x, w, target = confident(dtype)
    teacher, given = w[target] + 0.1 * x, [x.clone().requires_grad_(), w.clone().requires_grad_()]
    for weight_grad in ("stored", "recomputed"):
        exact = discrimination_with_gradients(x, w, target, LossSpec(40, 16.0, weight_grad=weight_grad))
        loss = linear_margin_cross_entropy(*given, target, scale=16.0, weight_grad=weight_grad)
        assert_rounded_once(loss, given, [exact.x, exact.w])
    spec = LossSpec(40, 16.0, Margin(m2=0.2, m3=0.1), weights=Weights(0.5, 0.7, 0.3, 2.0))
    exact = discrimination_with_gradients(x, w, target, spec, teacher=teacher)
    loss = linear_margin_discrimination(*given, target, spec, teacher=teacher).loss
    assert_rounded_once(loss, given, [exact.x, exact.w])


def contrastive_inputs(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Unit anchors and candidates, and a temperature."""
    x, w, target = confident()
    return [F.normalize(t).to(device, dtype) for t in (x, w[target])] + [torch.tensor(20.0).to(device, dtype)]


@HALVES
@pytest.mark.parametrize("term", ["contrastive", "affinity"])
def test_the_operators_on_pairs_round_once(term: str, dtype: torch.dtype) -> None:
    def loss_of(anchor: Tensor, other: Tensor, scale: Tensor) -> Tensor:
        if term == "contrastive":
            return contrastive_cross_entropy(anchor, other, scale)
        return affinity_cross_entropy(anchor, other, scale, anchor.detach().roll(1, 1), other.detach(), 10.0)

    given = contrastive_inputs(dtype)
    wide = [t.float().requires_grad_() for t in given]
    exact = torch.autograd.grad(loss_of(*wide), wide)
    mine = [t.requires_grad_() for t in given]
    assert_rounded_once(loss_of(*mine), mine, list(exact))


@HALVES
def test_small_gradients_under_a_loss_scale_are_those_of_float64(dtype: torch.dtype) -> None:
    """At a loss of 0.03 fp16 without a loss scale would keep no digit of most samples' gradients."""
    x, w, target = confident(dtype)
    exact = x.double().requires_grad_()
    loss, _ = discrimination_reference(exact, w.double(), target, scale=16.0)
    loss.backward()
    assert loss.item() < 0.1 and exact.grad is not None
    x.requires_grad_()
    (linear_margin_cross_entropy(x, w, target, scale=16.0) * 65536).backward()
    assert x.grad is not None and x.grad.isfinite().all()
    error = (x.grad.double() / 65536 - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert float(error.max()) < (5e-4 if dtype == torch.float16 else 4e-3)


@HALVES
def test_inputs_of_two_dtypes_keep_their_own(dtype: torch.dtype) -> None:
    x, w, target = confident()
    for x_dtype, w_dtype in ((dtype, torch.float32), (torch.float32, dtype), (dtype, torch.float64)):
        mine = x.to(x_dtype).requires_grad_(), w.to(w_dtype).requires_grad_()
        wide = torch.float64 if w_dtype == torch.float64 else torch.float32
        exact = discrimination_with_gradients(*(t.detach() for t in mine), target, LossSpec(num_classes=40))
        got = torch.autograd.grad(linear_margin_cross_entropy(*mine, target) * 4096, mine)
        for mine_grad, exact_grad, given in zip(got, (exact.x, exact.w), mine):
            assert exact_grad is not None and exact_grad.dtype == wide
            assert torch.equal(mine_grad, (exact_grad * 4096).to(given.dtype))


def test_a_compiled_graph_rounds_as_the_eager_one() -> None:
    x, w, target = confident(torch.float16)

    def loss_of(x: Tensor, w: Tensor) -> Tensor:
        return linear_margin_cross_entropy(x, w, target) * 65536

    results = []
    for call in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        mine = x.clone().requires_grad_(), w.clone().requires_grad_()
        results.append(torch.autograd.grad(call(*mine), mine))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_grad_scaler_skips_an_overflow_and_unscales_what_fp16_holds() -> None:
    x, w, target = confident()
    moved = []
    for dtype, start in ((torch.float32, 1.0), (torch.float16, 2.0**12), (torch.float16, 2.0**40)):
        mine = x.half().float().requires_grad_()
        optimizer, scaler = torch.optim.SGD([mine], lr=1.0), torch.amp.GradScaler("cpu", init_scale=start)
        scaler.scale(linear_margin_cross_entropy(mine.to(dtype), w, target, scale=16.0)).backward()
        scaler.step(optimizer)
        moved.append(mine.detach() - x.half().float())
    assert float((moved[1] - moved[0]).norm() / moved[0].norm()) < 1e-3 and not moved[2].any() and moved[0].any()


def head_gradients(dtype: torch.dtype, computed: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    """(this rank's embedding gradient, its row gradient) for the numbers that `dtype` holds, given as `computed`."""
    x, w, target = confident(dtype)
    head = PartialFC(40, 32, init=w.float(), sample_rate=0.5, scale=16.0)
    mine = x.tensor_split(world_size())[rank()].to(computed, copy=True).requires_grad_()
    (head(mine, target.tensor_split(world_size())[rank()]) * scale).backward()
    assert mine.grad is not None
    return mine.grad, head.row_grad()[1]


@HALVES
@pytest.mark.parametrize("world", [1, 2])
def test_the_classifier_sums_over_ranks_in_fp32_and_rounds_once(dtype: torch.dtype, world: int) -> None:
    calls = (dtype, dtype, 65536.0), (dtype, torch.float32, 1.0)
    got, exact = ([head_gradients(*call)] if world == 1 else run_ranks(head_gradients, world, *call) for call in calls)
    for (x, rows), (wide_x, wide_rows) in zip(got, exact):
        assert x.dtype == dtype and torch.equal(x, (wide_x * 65536).to(dtype))
        assert rows.dtype == torch.float32 and torch.equal(rows, wide_rows * 65536)
        assert float(x.norm()) > 0
