"""Losses of other projects from written values: insightface, MLCD, OneVision-Encoder, open_clip.

The values were computed once in float64 with numpy from the formulas in the docstrings.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megacid import Margin
from megacid.errors import UserError
from megacid.losses import Objective, affinity_loss
from megacid_kernels import affinity_cross_entropy, linear_margin_cross_entropy

# One sample and four classes at the cosines 1, 0, -1 and 0.6; s = 2. The gradient of x is along its second coordinate.
X = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)


def loss_and_gradient(labels: list[int], **options: Any) -> list[float]:
    x = X.clone().requires_grad_()
    target = torch.tensor([labels] if len(labels) > 1 else labels)
    loss = linear_margin_cross_entropy(x, W, target, scale=2.0, **options)
    loss.backward()
    assert x.grad is not None and x.grad[0, 0] == 0
    return [loss.item(), float(x.grad[0, 1])]


@pytest.mark.parametrize(
    ("margin_grad", "gradient"), [("straight_through", -1.1809666347789), ("exact", -1.509160619520)]
)
def test_arcface_of_insightface(margin_grad: str, gradient: float) -> None:
    """z_3 = 2 cos(acos 0.6 + 0.5); insightface adds the angle under no_grad, so d z_3 / d cos is 2."""
    got = loss_and_gradient([3], margin=Margin.arcface(0.5), margin_grad=margin_grad)
    assert got == pytest.approx([2.0020122823462, gradient], abs=1e-12)


def test_mlcd() -> None:
    """ln(1 + e^-z0 + e^-z3) + ln(1 + e^z1 + e^z2) with z0 = 2 (1 - 0.5), z3 = 2 (0.6 - 0.5), z1 = 0, z2 = -2."""
    got = loss_and_gradient([0, 3], margin=Margin.cosface(0.5))
    assert got == pytest.approx([1.5409761638333, 0.3375343070319], abs=1e-12)


def test_mean_over_labels_of_onevision_encoder() -> None:
    """[CE(1, 0, -2, 1.2; 0) + CE(2, 0, -2, 0.2; 3)] / 2: the margin 0.5 acts on the own label of each softmax alone.
    The gradient is that of the mean, with the factor 1/2."""
    got = loss_and_gradient([0, 3], margin=Margin.cosface(0.5), labels_loss="mean")
    assert got == pytest.approx([1.5236310633020, -0.0874807251996], abs=1e-12)


def directions(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def three_pairs() -> list[Tensor]:
    """The student's images and texts, the teacher's images and texts."""
    return [directions(0, 50, 120), directions(20, 80, 100), directions(10, 60, 130), directions(0, 70, 110)]


def test_distill_clip_loss_of_open_clip() -> None:
    """1/2 the mean of -softmax(5 vT tT') . log_softmax(3 vS tS') over rows, plus the same over columns."""
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = affinity_loss(*three_pairs(), scale, 5.0)  # type: ignore[call-arg]
    loss.backward()
    assert scale.grad is not None
    assert [loss.item(), scale.grad.item()] == pytest.approx([0.6423078928854, -0.041336349121], abs=1e-9)


def test_distill_clip_loss_is_that_of_the_installed_open_clip() -> None:
    module = pytest.importorskip("open_clip.loss")
    g = torch.Generator().manual_seed(0)
    results = []
    for ours in (True, False):
        g.manual_seed(0)
        v_S, t_S, v_T, t_T = (torch.nn.functional.normalize(torch.randn(7, 5, generator=g)).double() for _ in range(4))
        inputs = [v_S.requires_grad_(), t_S.requires_grad_(), torch.tensor(14.0).double().requires_grad_()]
        if ours:
            loss = affinity_loss(v_S, t_S, v_T, t_T, inputs[2], 100.0)
        else:
            loss = module.DistillClipLoss()(*inputs, v_T, t_T, 100.0)[1]
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 3 * 9 * 8 * 2, None])
def test_affinity_in_chunks_of_any_size_is_that_of_autograd(budget: int | None) -> None:
    """Also for a teacher of another width; the anchors are some of the candidates."""
    g = torch.Generator().manual_seed(1)
    anchor, other = (torch.randn(n, 4, generator=g, dtype=torch.float64).requires_grad_() for n in (5, 9))
    teacher = torch.randn(5, 6, generator=g, dtype=torch.float64), torch.randn(9, 6, generator=g, dtype=torch.float64)
    scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    p = (1.5 * teacher[0] @ teacher[1].T).softmax(1)
    expected = -(p * (scale * anchor @ other.T).log_softmax(1)).sum()
    inputs = [anchor, other, scale]
    exact = torch.autograd.grad(expected, inputs, torch.tensor(0.3, dtype=torch.float64))
    loss = affinity_cross_entropy(anchor, other, scale, *teacher, 1.5, memory_budget_bytes=budget)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss * 0.3, inputs)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(got, exact))
    narrow = [t.detach().float().requires_grad_() for t in inputs]
    loss = affinity_cross_entropy(*narrow, *teacher, 1.5, memory_budget_bytes=budget)  # type: ignore[call-arg]
    for a, b in zip(torch.autograd.grad(loss * 0.3, narrow), exact):
        torch.testing.assert_close(a, b.float(), rtol=3e-6, atol=3e-6)


def test_affinity_of_equal_embeddings_has_no_gradient_and_the_teacher_never_gets_one() -> None:
    v, t, *_ = three_pairs()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    v_S, t_S, v_T, t_T = (x.clone().requires_grad_() for x in (v, t, v, t))
    affinity_loss(v_S, t_S, v_T, t_T, scale, 5.0).backward()
    assert v_T.grad is None and t_T.grad is None
    for x in (v_S, t_S, scale):
        assert x.grad is not None and float(x.grad.abs().max()) < 1e-14
    empty = torch.zeros(0, 4, requires_grad=True)
    assert affinity_loss(empty, empty, empty, empty, torch.tensor(2.0), 5.0).item() == 0


def test_affinity_inputs_that_do_not_fit_are_named() -> None:
    v, t, *_ = three_pairs()
    scale = torch.tensor(5.0)
    with pytest.raises(ValueError, match="the teacher has 2 anchors and 3 candidates, expected 3 and 3"):
        affinity_cross_entropy(v, t, scale, v[:2], t, 5.0)
    with pytest.raises(ValueError, match=r"teacher_anchor is \(3, 1\) and its candidates \(3, 2\)"):
        affinity_cross_entropy(v, t, scale, v[:, :1], t, 5.0)
    with pytest.raises(ValueError, match=r"scale is \(1,\), expected a 0-d tensor"):
        affinity_cross_entropy(v, t, scale[None], v, t, 5.0)
    with pytest.raises(UserError, match=r"affinity_temperature is 0, expected > 0"):
        Objective(cluster=0, affinity=1.0, affinity_temperature=0)
    with pytest.raises(ValueError, match="labels_loss is 'max', expected one of 'mlcd', 'mean'"):
        loss_and_gradient([0, 3], labels_loss="max")
