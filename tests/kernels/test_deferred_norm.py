"""The backward of the class rows' norm waits for the gradient of the loss: one pass over the rows does both, and the
length of the gradient is its by-product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import assert_holds_in_the_interpreter, on_devices
from torch import Tensor

from megacid.classifier import PartialFC, RowAdamW
from megacid_kernels import (
    LossSpec,
    Margin,
    discrimination_with_gradients,
    linear_margin_cross_entropy,
    through_norm_,
)
from megacid_kernels.fused import INTERPRET

if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__)


def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 48, generator=g), torch.randn(70, 48, generator=g)
    w[5] = 0
    return x.to(device), w.to(device), torch.randint(70, (20,), generator=g).to(device)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backward_through_a_loss_gives_the_same_gradient(dtype: torch.dtype, device: str) -> None:
    x, w, target = inputs(device)
    w = w.to(dtype)
    want = discrimination_with_gradients(x, w, target, LossSpec(70, impl="triton")).w
    assert want is not None
    w.requires_grad_()
    loss = 3 * linear_margin_cross_entropy(x, w, target, impl="triton")
    for _ in range(2):
        (got,) = torch.autograd.grad(loss, w, retain_graph=True)
        assert torch.equal(got, (3 * want).to(dtype)) and got.any() and not got[5].any()


@on_devices
def test_rows_that_change_before_the_backward_are_refused(device: str) -> None:
    x, w, target = inputs(device)
    w.requires_grad_()
    loss = linear_margin_cross_entropy(x, w, target, impl="triton")
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_devices
def test_only_a_stored_gradient_can_wait(device: str) -> None:
    x, w, target = inputs(device)
    want = discrimination_with_gradients(x, w, target, LossSpec(70, impl="triton")).w
    waiting = discrimination_with_gradients(x, w, target, LossSpec(70, impl="triton"), defer_norm=True)
    assert waiting.w is not None and waiting.norm is not None and want is not None
    square = through_norm_(waiting.w, waiting.norm, torch.tensor(1.0, device=device))
    assert torch.equal(waiting.w, want)
    torch.testing.assert_close(square, want.square().sum(1), rtol=1e-5, atol=0)
    for options in ({"impl": "torch"}, {"impl": "triton", "weight_grad": "recomputed"}):
        assert discrimination_with_gradients(x, w, target, LossSpec(70, **options), defer_norm=True).norm is None


@on_devices
def test_the_classifiers_norm_is_that_of_its_gradient_until_somebody_changes_it(device: str) -> None:
    x, _, target = inputs(device)
    head = PartialFC(70, 48, impl="triton", sample_rate=0.8, seed=0, device=device)
    for backwards in (1, 2):
        head(x, target).mul(2.0).backward()
        known = head.grad_norm_sq()
        rows, grad = head.row_grad()
        torch.testing.assert_close(known, grad.square().sum(), rtol=1e-5, atol=0)
        assert len(rows) < 70 and known > 0, backwards
    grad.mul_(2)
    torch.testing.assert_close(head.grad_norm_sq(), grad.square().sum(), rtol=1e-5, atol=0)


@on_devices
def test_a_backward_after_an_optimizers_step_is_refused(device: str) -> None:
    """Of the kernels too, which autograd does not see."""
    x, _, target = inputs(device)
    head = PartialFC(70, 48, impl="triton", seed=0, device=device)
    optimizer = RowAdamW(head, lr=0.1)
    first, second = head(x, target), head(x, target)
    saved = head.weight.detach().requires_grad_()
    outside = linear_margin_cross_entropy(x, saved, target, impl="triton")
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"at version \d, expected version \d of the forward: call backward before"):
        second.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outside.backward()


@on_devices
def test_rows_that_are_not_contiguous_are_copied(device: str) -> None:
    x, w, target = inputs(device)
    strided = torch.stack([w, w], 2).bfloat16()[:, :, 0].requires_grad_()
    dense = w.bfloat16().requires_grad_()
    for rows in (strided, dense):
        linear_margin_cross_entropy(x, rows, target, impl="triton").backward()
    assert strided.grad is not None and dense.grad is not None and torch.equal(strided.grad, dense.grad)


@on_devices
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_loss_without_a_gradient_gives_none(impl: str, device: str) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    x, w, target = inputs(device)
    x.requires_grad_()
    Stop.apply(linear_margin_cross_entropy(x, w.requires_grad_(), target, impl=impl)).backward()
    assert x.grad is None and w.grad is None


@on_devices
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_caller_may_change_the_statistics_of_a_recomputed_gradient(impl: str, device: str) -> None:
    x, w, target = inputs(device)
    spec = LossSpec(70, impl=impl, weight_grad="recomputed", margin=Margin.arcface(0.3))
    slabs: list[list[Tensor]] = [[], []]
    for change, parts in zip((False, True), slabs):
        grads = discrimination_with_gradients(x, w, target, spec)
        if change:
            grads.result.target_cosine.zero_()
        assert grads.each_slab is not None
        grads.each_slab(lambda start, stop, grad, parts=parts: parts.append(grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*slabs)) and slabs[0]
