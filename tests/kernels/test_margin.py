"""Margin: values, derivative, continuity, the ends of the cosine's range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megacid_kernels.margin import Margin

ALL = [
    Margin(), Margin.arcface(0.5), Margin.arcface(0.5, easy_margin=True), Margin.cosface(0.4), Margin.sphereface(1.35),
    Margin.sphereface(4.0), Margin(1.2, 0.3, 0.1), Margin(1.0, 0.3, 0.2), Margin(1.2, 0.3, 0.1, easy_margin=True),
]  # fmt: skip


def at(margin: Margin, theta: Tensor) -> tuple[Tensor, Tensor]:
    return margin.target(torch.cos(theta), torch.sin(theta))


def test_constructors_give_the_published_functions() -> None:
    theta = torch.linspace(0.05, 1.2, 50, dtype=torch.float64)
    torch.testing.assert_close(at(Margin.arcface(0.5), theta)[0], torch.cos(theta + 0.5))
    torch.testing.assert_close(at(Margin.cosface(0.3), theta)[0], torch.cos(theta) - 0.3)
    torch.testing.assert_close(at(Margin.sphereface(2.0), theta)[0], torch.cos(2 * theta))
    torch.testing.assert_close(at(Margin(1.2, 0.3, 0.1), theta)[0], torch.cos(1.2 * theta + 0.3) - 0.1)


@pytest.mark.parametrize("margin", ALL, ids=str)
def test_derivative_is_the_derivative_of_the_value(margin: Margin) -> None:
    # Angles away from sin < 0.001 and from the jumps; both sides of pi / 2 and past theta + m = pi.
    theta = torch.linspace(0.01, 3.13, 397, dtype=torch.float64).requires_grad_()
    psi, dpsi = at(margin, theta)
    (slope,) = torch.autograd.grad(psi.sum(), theta)
    torch.testing.assert_close(dpsi.detach(), slope / -torch.sin(theta.detach()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("margin", ALL, ids=str)
def test_more_similar_is_never_less_and_margin_never_helps(margin: Margin) -> None:
    theta = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    psi, _ = at(margin, theta)
    assert (psi[:-1] - psi[1:] >= -1e-12).all() or margin.easy_margin
    assert (psi <= torch.cos(theta) + 1e-12).all()


@pytest.mark.parametrize("margin", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_finite_and_bounded(margin: Margin, dtype: torch.dtype) -> None:
    cos = torch.tensor([1.0, -1.0, 1.0000001, -1.0000001, 0.0], dtype=dtype)
    psi, dpsi = margin.target(cos, torch.tensor([0.0, 0.0, 1e-7, 1e-7, 1.0], dtype=dtype))
    assert torch.isfinite(psi).all()
    assert torch.isfinite(dpsi).all() and (dpsi.abs() <= 1001 * margin.m1).all()


def test_sphereface_slope_at_cosine_one_is_its_limit() -> None:
    _, dpsi = Margin.sphereface(3.0).target(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert float(dpsi) == pytest.approx(9.0, rel=1e-5)


def test_arcface_past_pi_continues_linearly_on_both_sides_of_the_threshold() -> None:
    m = 0.5
    edge = math.cos(math.pi - m)
    cos = torch.tensor([edge + 1e-6, edge - 1e-6, -1.0], dtype=torch.float64)
    psi, dpsi = Margin.arcface(m).target(cos, (1 - cos * cos).clamp_min(0).sqrt())
    assert float(psi[0]) == pytest.approx(-1.0, abs=1e-6)
    assert psi[1:].tolist() == pytest.approx([edge - 1e-6 - m * math.sin(m), -1 - m * math.sin(m)])
    assert dpsi[1:].tolist() == [1.0, 1.0]


def test_sphereface_is_continuous_past_pi() -> None:
    theta = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    psi, _ = at(Margin.sphereface(4.0), theta)
    assert float((psi[1:] - psi[:-1]).abs().max()) < 1e-3
    assert float(psi[-1]) == pytest.approx(-7.0)


def test_easy_margin_leaves_obtuse_angles_alone() -> None:
    cos = torch.tensor([-0.5, -1e-9, 1e-9], dtype=torch.float64)
    psi, dpsi = Margin(m2=0.4, m3=0.1, easy_margin=True).target(cos, torch.sqrt(1 - cos * cos))
    assert psi[:2].tolist() == pytest.approx([-0.6, -0.1])
    assert float(psi[2]) == pytest.approx(-math.sin(0.4) - 0.1)
    assert dpsi[:2].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"m1": 0.5}, "m1 is 0.5"),
        ({"m2": 4.0}, "m2 is 4.0"),
        ({"m3": -0.1}, "m3 is -0.1"),
        ({"m2": math.nan}, "m2 is nan"),
    ],
)
def test_senseless_margins_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Margin(**kwargs)
