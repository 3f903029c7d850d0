"""Parity with the published partial FC where it differs from calculus: the margin acts on the value of the target logit
and not on its gradient (d z_y / d cos = scale). The numbers were worked out once with numpy in float64 from

    z_j = s cos_j, z_y = s cos(arccos(cos_y) + m2) - s m3,  P = softmax(z),  loss = -mean ln P_y
    d loss / d cos_ij = s (P_ij - [j = y_i]) / B

and the derivative of x / |x|; no code of ours took part.
"""

from __future__ import annotations

import pytest
import torch

from megacid import Margin, PartialFC

X = torch.tensor([[0.9, -0.2, 0.4], [0.1, 0.8, -0.5], [-0.6, 0.3, 0.7], [0.2, 0.2, 0.9]])
W = torch.tensor([[0.7, 0.1, 0.3], [0.3, 0.9, -0.2], [-0.5, 0.6, 0.4], [0.0, -0.3, 0.8], [0.6, -0.7, -0.1]])
Y = torch.tensor([0, 1, 3, 3])

ARCFACE = (
    2.2287641353,
    [
        [-0.0939129, -0.98662873, -0.28201033],
        [-0.08705557, 0.03548091, 0.03935834],
        [-0.75746865, 1.92382607, -1.47375573],
        [1.02181288, 1.18600788, -0.49062684],
    ],
    [
        [-0.56316154, 0.69404863, 1.08269404],
        [0.03017662, 0.00407835, 0.0636175],
        [0.00595072, -0.64900802, 0.98095043],
        [1.18480631, -2.15276006, -0.80728502],
        [0.47606155, 0.3365644, 0.50041849],
    ],
)
COSFACE = (
    1.8193388882,
    [
        [-0.10313676, -1.08353256, -0.30970858],
        [-0.08949848, 0.03647655, 0.04046279],
        [-0.7537913, 1.91448632, -1.46660097],
        [0.88829954, 1.0310403, -0.42651996],
    ],
    [
        [-0.50056483, 0.71288746, 0.93035546],
        [0.03077135, 0.00367759, 0.06270618],
        [-0.02087638, -0.63708653, 0.92953432],
        [1.24511259, -2.02261322, -0.75847996],
        [0.52253549, 0.36950332, 0.54868966],
    ],
)
# ArcFace over the sampled classes 0, 1, 3 and 4 alone.
SAMPLED = (
    0.6510058848,
    [
        [-0.09389637, -0.98670316, -0.28208474],
        [0.0097563, -0.00036402, 0.00136882],
        [0.00678601, 0.71399148, -0.30017976],
        [1.55699511, 0.88332507, -0.54229337],
    ],
    [
        [-0.74505014, 0.79105573, 1.47476508],
        [-0.25244263, 0.15957607, 0.33942835],
        [0.13858255, -1.21882368, -0.45705888],
        [0.47603171, 0.3361768, 0.50295268],
    ],
)


def step(head: PartialFC) -> tuple[torch.Tensor, torch.Tensor]:
    x = X.clone().requires_grad_()
    loss = head(x, Y)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize(
    ("margin", "published"),
    [(Margin.arcface(0.5), ARCFACE), (Margin.cosface(0.3), COSFACE)],
    ids=["arcface", "cosface"],
)
def test_straight_through_is_the_published_forward_and_backward(
    margin: Margin, published: tuple[float, list[list[float]], list[list[float]]]
) -> None:
    head = PartialFC(5, 3, init=W, scale=8.0, margin=margin, margin_grad="straight_through")
    loss, grad = step(head)
    assert loss.item() == pytest.approx(published[0], rel=1e-6)
    torch.testing.assert_close(grad, torch.tensor(published[1]), rtol=0, atol=1e-6)
    rows, row_grad = head.row_grad()
    assert rows.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(row_grad, torch.tensor(published[2]), rtol=0, atol=1e-6)


def test_sampled_classes_are_the_published_softmax_over_those_classes() -> None:
    head = PartialFC(
        5, 3, init=W, scale=8.0, margin=Margin.arcface(0.5), margin_grad="straight_through", sample_rate=0.2
    )
    for number in range(100):  # a step whose one drawn class is 4: labels 0, 1, 3 join it
        head.set_step(number)
        loss, grad = step(head)
        rows, row_grad = head.row_grad()
        head.zero_grad()
        if rows.tolist() == [0, 1, 3, 4]:
            break
    else:
        raise AssertionError("class 4 was never drawn")
    assert loss.item() == pytest.approx(SAMPLED[0], rel=1e-6)
    torch.testing.assert_close(grad, torch.tensor(SAMPLED[1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(row_grad, torch.tensor(SAMPLED[2]), rtol=0, atol=1e-6)


def test_the_exact_derivative_differs_from_the_published_one_where_the_angle_has_a_margin() -> None:
    exact = PartialFC(5, 3, init=W, scale=8.0, margin=Margin.arcface(0.5))
    loss, grad = step(exact)
    assert loss.item() == pytest.approx(ARCFACE[0], rel=1e-6)
    assert float((grad - torch.tensor(ARCFACE[1])).abs().max()) > 0.05
    cosface = PartialFC(5, 3, init=W, scale=8.0, margin=Margin.cosface(0.3))  # an offset has the derivative 1 anyway
    torch.testing.assert_close(step(cosface)[1], torch.tensor(COSFACE[1]), rtol=0, atol=1e-6)
