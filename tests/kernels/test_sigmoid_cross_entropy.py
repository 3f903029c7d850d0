"""sigmoid_cross_entropy against float64 autograd of the written-out formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megacid_kernels import sigmoid_cross_entropy

ANCHORS, CANDIDATES, START, WIDTH = 7, 23, 11, 9


def inputs(scale: float, bias: float) -> list[Tensor]:
    """Unit rows, scale and bias, in float64."""
    g = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(n, WIDTH, generator=g, dtype=torch.float64)) for n in (ANCHORS, CANDIDATES)]
    return [*rows, torch.tensor(scale, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)]


def written_out(anchor: Tensor, other: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
    pairs = torch.zeros(len(anchor), len(other), dtype=anchor.dtype)
    pairs[range(len(anchor)), range(start, start + len(anchor))] = 1
    logits = scale * anchor @ other.T + bias
    return -(pairs * F.logsigmoid(logits) + (1 - pairs) * F.logsigmoid(-logits)).sum()


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (100.0, 3.0), (100.0, -90.0)])
@pytest.mark.parametrize("budget", [1, 2 * 2 * CANDIDATES * 8, None])
def test_loss_and_gradients_are_those_of_float64(scale: float, bias: float, budget: int | None) -> None:
    """Also of the candidates, the scale and the bias; with one anchor per chunk, with two, and with all."""
    exact = [x.requires_grad_() for x in inputs(scale, bias)]
    expected = written_out(*exact, START)
    (expected * 0.3).backward()
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        given = [x.detach().to(dtype).requires_grad_() for x in exact]
        loss = sigmoid_cross_entropy(*given, START, memory_budget_bytes=budget)
        (loss * 0.3).backward()
        assert loss.dtype == dtype and abs(loss.item() - expected.item()) <= tolerance * (scale + expected.item())
        for mine, other in zip(given, exact, strict=True):
            assert mine.grad is not None and other.grad is not None and mine.grad.dtype == dtype
            assert (mine.grad.double() - other.grad).norm() <= tolerance * scale * (1 + other.grad.norm())


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_any_size_have_finite_values_and_gradients(sign: int) -> None:
    given = [x.float().requires_grad_() for x in inputs(100.0, sign * 1e4)]
    loss = sigmoid_cross_entropy(*given, START)
    loss.backward()
    wrong = ANCHORS if sign < 0 else ANCHORS * (CANDIDATES - 1)
    assert loss.item() == pytest.approx(wrong * 1e4, rel=0.01)
    assert given[3].grad is not None and given[3].grad.item() == pytest.approx(sign * wrong)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in given)


def test_only_the_inputs_that_need_one_get_a_gradient() -> None:
    for trained in range(4):
        given = [x.requires_grad_(i == trained) for i, x in enumerate(inputs(10.0, -10.0))]
        expected = torch.autograd.grad(written_out(*given, START), given[trained])
        torch.testing.assert_close(torch.autograd.grad(sigmoid_cross_entropy(*given, START), given[trained]), expected)


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_matrix_is_larger_than_a_chunk() -> None:
    anchors, candidates = 64, 512
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 4, generator=g).requires_grad_() for n in (anchors, candidates)]
    for budget, chunk in ((2 * 4 * candidates * 16, 16), (None, anchors)):
        with _Largest() as largest:
            sigmoid_cross_entropy(*rows, torch.tensor(10.0), torch.tensor(-10.0), memory_budget_bytes=budget).backward()
        assert largest.elements == chunk * candidates


def test_no_anchor_gives_zero() -> None:
    anchor, other, scale, bias = (x.requires_grad_() for x in inputs(10.0, -10.0))
    loss = sigmoid_cross_entropy(anchor[:0], other, scale, bias, START)
    loss.backward()
    assert loss.item() == 0 and other.grad is not None and not other.grad.any()


def test_inputs_that_do_not_fit_are_named() -> None:
    anchor, other, scale, bias = inputs(10.0, -10.0)
    with pytest.raises(ValueError, match=r"start is 20 with 7 anchors and 23 candidates, expected a pair"):
        sigmoid_cross_entropy(anchor, other, scale, bias, 20)
    with pytest.raises(ValueError, match=r"anchor is \(7, 8\) and other \(23, 9\)"):
        sigmoid_cross_entropy(anchor[:, :8], other, scale, bias)
    with pytest.raises(ValueError, match=r"bias is \(1,\), expected a 0-d tensor"):
        sigmoid_cross_entropy(anchor, other, scale, bias[None])
    with pytest.raises(ValueError, match=r"memory_budget_bytes is 0"):
        sigmoid_cross_entropy(anchor, other, scale, bias, memory_budget_bytes=0)
