"""The numbers of docs/how-to/from-insightface.md: four samples, five classes, scale 8.

The published scheme is written out in plain PyTorch, here or in tools/benchmarks/published_partial_fc.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from doc_blocks import ROOT

from benchmarks.published_partial_fc import EagerPartialFC
from megacid import Margin, PartialFC

X = torch.tensor([[0.9, -0.2, 0.4], [0.1, 0.8, -0.5], [-0.6, 0.3, 0.7], [0.2, 0.2, 0.9]])
W = torch.tensor([[0.7, 0.1, 0.3], [0.3, 0.9, -0.2], [-0.5, 0.6, 0.4], [0.0, -0.3, 0.8], [0.6, -0.7, -0.1]])
Y = torch.tensor([0, 1, 3, 3])
SEVERAL = torch.tensor([[0, 1], [1, 2], [3, 2], [3, 0]])
SCALE = 8.0
PAGE = (ROOT / "docs" / "how-to" / "from-insightface.md").read_text()


def ours(target: torch.Tensor = Y, **options: object) -> tuple[float, torch.Tensor]:
    x = X.clone().requires_grad_()
    loss = PartialFC(5, 3, init=W, scale=SCALE, **options)(x, target)  # type: ignore[arg-type]
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad


def cosines() -> torch.Tensor:
    return F.normalize(X) @ F.normalize(W).T


def says(value: float, digits: int) -> float:
    """The value as the page prints it; the page must contain it."""
    text = f"{value:.{digits}f}"
    assert text in PAGE, f"docs/how-to/from-insightface.md does not say {text}"
    return float(text)


def test_the_derivative_of_the_margin_changes_the_gradient_and_not_the_loss() -> None:
    loss, exact = ours(margin=Margin.arcface(0.5))
    same, published = ours(margin=Margin.arcface(0.5), margin_grad="straight_through")
    assert loss == pytest.approx(same, rel=1e-6)
    says(loss, 4)
    assert says(float(exact.norm()), 2) == 3.90
    assert says(float(published.norm()), 2) == 3.20
    assert f"{100 * float((exact - published).norm() / published.norm()):.0f} %" in PAGE


def test_an_unlabelled_sample_is_left_out_and_not_pushed_away_from_every_class() -> None:
    target = torch.tensor([0, 1, 3, -1])
    loss, grad = ours(target, margin=Margin.cosface(0.3))
    x = X.clone().requires_grad_()
    published = EagerPartialFC(5, 3, margin=0.3, scale=SCALE, init=W)(x, target)
    published.backward()
    assert x.grad is not None
    assert grad[3].eq(0).all() and float(x.grad[3].norm()) > 0.5
    assert says(published.item(), 2) == 18.78
    assert says(loss, 2) == 2.01


def test_filtered_negatives_leave_the_denominator() -> None:
    loss, _ = ours(margin=Margin.cosface(0.3), filter_threshold=0.4)
    own = F.one_hot(Y, 5).bool()
    logits = cosines().masked_fill((cosines() > 0.4) & ~own, 0.0) - 0.3 * own
    assert says(float(F.cross_entropy(SCALE * logits, Y)), 4) == 0.0846
    assert says(loss, 4) == 0.0487
    says(ours(margin=Margin.cosface(0.3))[0], 4)


def test_an_angle_and_an_offset_act_together() -> None:
    assert says(ours(margin=Margin(m2=0.3, m3=0.2))[0], 4) == 2.3812
    logits = cosines() - 0.2 * F.one_hot(Y, 5)  # m3 > 0: the angle is not looked at
    assert says(float(F.cross_entropy(SCALE * logits, Y)), 4) == 1.3848


def test_labels_come_on_top_of_the_draw() -> None:
    target = torch.arange(64) * 15
    published = EagerPartialFC(1000, 8, sample_rate=0.1, margin=0.3, scale=64.0)
    assert len(published._sample(target.clone())) == 100
    head = PartialFC(1000, 8, sample_rate=0.1)
    used = []
    for step in range(200):
        head.set_step(step)
        head(torch.ones(64, 8), target)
        used.append(int(head.metrics()["sampled"]))
    assert f"{sum(used) / len(used):.0f} on average" in PAGE
    assert sum(used) / len(used) == pytest.approx(64 + 0.1 * (1000 - 64), abs=2)


def test_several_labels_are_one_loss_over_their_set() -> None:
    loss, grad = ours(SEVERAL, margin=Margin.cosface(0.3))
    x = X.clone().requires_grad_()
    logits = F.normalize(x) @ F.normalize(W).T
    terms = [F.cross_entropy(SCALE * (logits - 0.3 * F.one_hot(label, 5)), label) for label in SEVERAL.T]
    average = torch.stack(terms).mean()
    average.backward()
    assert x.grad is not None
    assert says(loss, 3) == 3.525
    assert says(float(grad.norm()), 3) == 3.950
    assert says(average.item(), 3) == 3.719
    assert says(float(x.grad.norm()), 3) == 1.836
    assert says(float(x.grad.norm()) * SEVERAL.shape[1], 3) == 3.672
    one_by_one = ours(SEVERAL[:, :1], margin=Margin.cosface(0.3))[0]
    assert one_by_one == pytest.approx(ours(SEVERAL[:, 0], margin=Margin.cosface(0.3))[0], rel=1e-6)
