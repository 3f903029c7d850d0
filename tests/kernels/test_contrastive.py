"""contrastive_cross_entropy against float64 autograd of the written-out formula.

Without a GPU in Triton's interpreter, see `interpreter.py`.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import assert_holds_in_the_interpreter, on_devices
from torch import Tensor
from torch.nn import functional as F

from megacid_kernels import contrastive_cross_entropy
from megacid_kernels.fused import INTERPRET

if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__)


def pairs(anchors: int, candidates: int, width: int, start: int, noise: float) -> tuple[Tensor, Tensor]:
    """Unit rows fp64; noise 0: the pairs are equal."""
    generator = torch.Generator().manual_seed(anchors)
    other = F.normalize(torch.randn(candidates, width, generator=generator, dtype=torch.float64))
    own = other[start : start + anchors]
    return F.normalize(own + noise * torch.randn(own.shape, generator=generator, dtype=torch.float64)), other


def written_out(anchor: Tensor, other: Tensor, scale: Tensor, start: int) -> Tensor:
    return F.cross_entropy(scale * anchor @ other.T, torch.arange(start, start + len(anchor)), reduction="sum")


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(
    ("anchors", "candidates", "start", "budget"), [(7, 23, 11, 250), (16, 16, 0, None), (1, 1, 0, 1)]
)
def test_loss_and_gradients_are_those_of_float64(
    anchors: int, candidates: int, start: int, budget: int | None, scale: float
) -> None:
    """Also of the candidates and of the temperature; the second shape works in chunks of two anchors."""
    exact = [*pairs(anchors, candidates, 9, start, 0.5), torch.tensor(scale, dtype=torch.float64)]
    tensors = [x.clone().requires_grad_() for x in exact]
    expected = written_out(*tensors, start)
    (expected * 0.3).backward()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        given = [x.detach().to(dtype).requires_grad_() for x in exact]
        loss = contrastive_cross_entropy(*given, start, memory_budget_bytes=budget)
        (loss * 0.3).backward()
        assert loss.dtype == dtype and abs(loss.item() - expected.item()) <= tolerance * scale * anchors
        for mine, other in zip(given, tensors):
            assert mine.grad is not None and other.grad is not None
            assert (mine.grad.double() - other.grad).norm() <= tolerance * scale * (1 + other.grad.norm())


@on_devices
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_triton_is_within_the_gate_of_16_bit_factors(scale: float, device: str) -> None:
    """In chunks; the mean of the pairs' probabilities is far from 0 and 1, where a gradient would be a difference."""
    anchors, start, width = 50, 9, 64
    exact = [*pairs(anchors, 130, width, start, 0.35), torch.tensor(scale, dtype=torch.float64)]
    tensors = [x.clone().requires_grad_() for x in exact]
    expected = written_out(*tensors, start)
    expected.backward()
    given = [x.to(device, torch.float32).requires_grad_() for x in exact]
    loss = contrastive_cross_entropy(*given, start, impl="triton", memory_budget_bytes=130 * 2 * 20)
    loss.backward()
    # Eight sigma of a logit whose factors are rounded to fp16, for every anchor.
    assert abs(loss.item() - expected.item()) <= anchors * 8 * 0.58 * scale * 2**-11 / width**0.5
    for name, mine, other in zip(("anchor", "other", "scale"), given, tensors):
        assert mine.grad is not None and other.grad is not None
        error = (mine.grad.cpu().double() - other.grad).norm() / other.grad.norm()
        assert error <= 2.5e-3, f"gradient of {name} is off by {error:.1e} of its norm"


def test_a_confident_pair_keeps_the_digits_of_its_loss() -> None:
    """-ln P of P = 1 - 1e-13 is not 0; a softmax that is normalised first would round it away."""
    anchor, other = torch.eye(2, 8), torch.eye(2, 8)
    loss = contrastive_cross_entropy(anchor, other, torch.tensor(30.0))
    expected = 2 * torch.log1p(torch.exp(torch.tensor(-30.0, dtype=torch.float64)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_far_from_unit_length_neither_overflow_nor_vanish() -> None:
    anchor, other = pairs(5, 6, 4, 0, 0.5)
    expected = written_out(30 * anchor, 40 * other, torch.tensor(100.0), 0)
    loss = contrastive_cross_entropy(30 * anchor.float(), 40 * other.float(), torch.tensor(100.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_only_what_is_asked_for_gets_a_gradient_and_16_bits_are_computed_in_32() -> None:
    anchor, other = pairs(6, 8, 5, 1, 0.5)
    mine, scale = anchor.bfloat16().requires_grad_(), torch.tensor(20.0)
    loss = contrastive_cross_entropy(mine, other.bfloat16(), scale, 1)
    loss.backward()
    assert mine.grad is not None and mine.grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(written_out(mine.detach().double(), other.bfloat16().double(), scale, 1).item())
    with torch.no_grad():
        assert not contrastive_cross_entropy(mine, other.bfloat16(), scale, 1).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other_GD": torch.ones(4, 3)}, r"anchor is \(2, 2\) and other \(4, 3\)"),
        ({"start": 3}, "start is 3 with 2 anchors and 4 candidates"),
        ({"scale": torch.ones(1)}, r"scale is \(1,\), expected a 0-d tensor"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes is 0, expected > 0"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    given = {"anchor_bD": torch.ones(2, 2), "other_GD": torch.ones(4, 2), "scale": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=message):
        contrastive_cross_entropy(**(given | change))
