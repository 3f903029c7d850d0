"""The operators against float64 autograd of the written-out formulas (megacid_kernels.reference)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megacid_kernels import (
    LossSpec,
    Weights,
    discrimination_with_gradients,
    linear_margin_cross_entropy,
    linear_margin_discrimination,
)
from megacid_kernels.margin import Margin
from megacid_kernels.reference import discrimination_reference

MARGINS = [
    Margin(),
    Margin.cosface(0.3),
    Margin.arcface(0.5),
    Margin.arcface(0.5, easy_margin=True),
    Margin(m2=0.3, m3=0.2),
    Margin(m1=1.35, m2=0.2, m3=0.1),
    Margin.sphereface(3.0),
    Margin.sphereface(1.35, easy_margin=True),
]


def make(batch: int, classes: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, teacher, w in float64 and labels with duplicates and a few -1; cosines from far below 0 to nearly 1."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(classes, width, generator=g, dtype=torch.float64)
    y = torch.randint(0, classes, (batch,), generator=g)
    pull = torch.linspace(-2.0, 3.0, batch, dtype=torch.float64)[:, None]
    x = w[y] * pull + torch.randn(batch, width, generator=g, dtype=torch.float64)
    teacher = w[y] * 1.5 + torch.randn(batch, width, generator=g, dtype=torch.float64)
    if batch > 3:
        y[1], y[batch // 2] = y[0], -1
    return x, teacher, w, y


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-12))


def both(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    teacher: Tensor | None = None,
    bias: Tensor | None = None,
    **options: object,
) -> list[tuple[Tensor, ...]]:
    """[(loss, raw, dx, dw)] of the operator in `dtype` and of the reference in float64."""
    out = []
    weights = options.get("weights", Weights())
    for kind in (dtype, None):
        xs, ws = (
            x.detach().to(kind or torch.float64).requires_grad_(),
            w.detach().to(kind or torch.float64).requires_grad_(),
        )
        t = teacher.to(xs.dtype) if teacher is not None else None
        if kind is not None:
            spec = LossSpec(num_classes=len(w), **options)  # type: ignore[arg-type]
            result = linear_margin_discrimination(xs, ws, y, spec, teacher=t, bias=bias)
            loss, raw = result.loss, result.raw
        else:
            keep = {k: v for k, v in options.items() if k in ("margin", "scale", "filter_threshold", "reduction")}
            loss, raw = discrimination_reference(xs, ws, y, teacher=t, weights=weights, bias=bias, **keep)  # type: ignore[arg-type]
        loss.backward()
        dx = torch.zeros_like(xs) if xs.grad is None else xs.grad
        out.append((loss.detach(), raw, dx, ws.grad))
    return out


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    torch.testing.assert_close(got[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=tolerance, atol=20 * tolerance)
    assert relative(got[2], expected[2]) < tolerance
    assert relative(got[3], expected[3]) < tolerance


@pytest.mark.parametrize("margin", MARGINS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_loss_and_gradients_equal_autograd_for_every_margin(
    margin: Margin, dtype: torch.dtype, tolerance: float
) -> None:
    x, _, w, y = make(33, 101, 24)
    got, expected = both(x, w, y, dtype, margin=margin)
    assert_same(got, expected, tolerance)
    assert (got[2][y < 0] == 0).all(), "an unlabelled sample must get exactly no gradient"


@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
@pytest.mark.parametrize("margin", MARGINS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_zero_rows_follow_the_formula_at_cosine_0(margin: Margin, dtype: torch.dtype, weight_grad: str) -> None:
    x, _, w, _ = (part.to(dtype).double() for part in make(8, 11, 24))
    y = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    x[[0, 1]], w[[1, 2, 9]] = 0.0, 0.0  # a zero sample, both, a zero class, and a zero negative
    unit_x, unit_w = (torch.nn.functional.normalize(rows, dim=1) for rows in (x, w))
    cos = unit_x @ unit_w.T
    target = cos.gather(1, y[:, None])
    psi, _ = margin.target(target, (1 - target.square()).sqrt())
    assert not target[:3].any()
    expected = torch.nn.functional.cross_entropy(16 * cos.scatter(1, y[:, None], psi), y, reduction="none")
    for sample in range(8):
        xs, ws = x[[sample]].to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        one = linear_margin_cross_entropy(
            xs, ws, y[[sample]], margin=margin, scale=16.0, weight_grad=weight_grad, impl="torch"
        )
        one.backward()
        torch.testing.assert_close(one.detach().double(), expected[sample], rtol=1e-5, atol=1e-5)
        assert torch.isfinite(xs.grad).all() and torch.isfinite(ws.grad).all()
        assert not ws.grad[[1, 2, 9]].any(), "a zero row has no direction to move"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0.5}, "margin is 0.5, expected a Margin"),
        ({"filter_threshold": math.nan}, "filter_threshold is nan"),
        ({"scale": torch.tensor(64.0, requires_grad=True)}, "scale is a tensor"),
        ({"scale": torch.tensor(64.0)}, "scale is a tensor"),
        ({"bias": torch.zeros(11, requires_grad=True)}, "bias requires grad"),
    ],
)
def test_what_gets_no_gradient_or_has_no_meaning_is_refused(options: dict, message: str) -> None:
    x, _, w, y = make(4, 11, 24)
    with pytest.raises(ValueError, match=message):
        linear_margin_cross_entropy(x, w, y, **options)
    bias = options.pop("bias", None)
    with pytest.raises(ValueError, match=message):
        linear_margin_discrimination(x, w, y, LossSpec(num_classes=11, **options), bias=bias)
    if bias is not None:
        with torch.no_grad():
            linear_margin_cross_entropy(x, w, y, bias=bias)


@pytest.mark.parametrize("scale", [30.0, 64.0, 100.0])
@pytest.mark.parametrize("margin", MARGINS, ids=str)
@pytest.mark.parametrize("shape", [(33, 101, 24), (1, 1, 5), (1, 97, 16), (17, 1, 3), (128, 1000, 64)], ids=str)
def test_float32_is_within_1e_5_of_float64(shape: tuple[int, int, int], margin: Margin, scale: float) -> None:
    """Loss, embedding gradient and row gradient for every margin and scale, ragged sizes, duplicate and absent labels.

    Relative to the size of the whole gradient; where every probability is 1 the gradient is 0 and the bound absolute.
    """
    x, _, w, y = make(*shape, seed=12)
    got, expected = both(x.float().double(), w.float().double(), y, torch.float32, margin=margin, scale=scale)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    for g, r in ((got[2], expected[2]), (got[3], expected[3])):
        assert float((g.double() - r).norm()) <= 1e-5 * max(float(r.norm()), 1.0)


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 129, 7), (7, 31, 5), (64, 13, 17), (5, 1, 4)], ids=str)
def test_ragged_sizes_equal_autograd(shape: tuple[int, int, int]) -> None:
    x, _, w, y = make(*shape, seed=1)
    got, expected = both(x, w, y, torch.float64, margin=Margin.arcface(0.3), scale=30.0)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


DISTILLATIONS = [
    Weights(1.0, 1.0, 1.0),
    Weights(0.7, 0.0, 0.0),
    Weights(0.0, 1.3, 0.0),
    Weights(0.0, 0.0, 2.0),
    Weights(0.5, 0.0, 1.5),
    Weights(1.0, 0.5, 0.8, temperature=4.0),
    Weights(0.0, 0.0, 1.0, temperature=2.5),
    Weights(0.0, 0.6, 1.0, temperature=0.9),
]


@pytest.mark.parametrize("weights", DISTILLATIONS, ids=str)
@pytest.mark.parametrize("threshold", [None, 0.35])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_distillation_terms_and_gradients_equal_autograd(
    weights: Weights, threshold: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    x, teacher, w, y = make(19, 53, 11, seed=2)
    got, expected = both(
        x, w, y, dtype, teacher, weights=weights, margin=Margin.arcface(0.4), filter_threshold=threshold, scale=32.0
    )
    assert_same(got, expected, tolerance)


def several_labels(y: Tensor, classes: int) -> Tensor:
    """[G, 3]: the label, a second one, a third that is missing, a repeat or the label of another sample."""
    labels = torch.stack([y, (y * 7 + 3) % classes, y.roll(1)], 1)
    labels[y < 0] = -1
    labels[2, 1:], labels[4, 2] = -1, labels[4, 0]
    return labels


@pytest.mark.parametrize("weights", [Weights(), Weights(0.7, 0.9), Weights(0.0, 1.0)], ids=str)
@pytest.mark.parametrize("threshold", [None, 0.35])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_several_labels_per_sample_equal_autograd(
    weights: Weights, threshold: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    x, teacher, w, y = make(19, 53, 11, seed=2)
    labels = several_labels(y, 53)
    got, expected = both(
        x,
        w,
        labels,
        dtype,
        teacher,
        weights=weights,
        margin=Margin.cosface(0.3),
        filter_threshold=threshold,
        scale=32.0,
    )
    assert_same(got, expected, tolerance)
    assert (got[2][y < 0] == 0).all()


def test_two_labels_by_hand() -> None:
    """ln(1 + e^-z0 + e^-z1) + ln(1 + e^z2 + e^z3), the labels' own classes not among the negatives."""
    w = torch.eye(4, dtype=torch.float64)
    x = torch.tensor([[0.5, 0.5, 0.5, -0.5]], dtype=torch.float64)
    loss = linear_margin_cross_entropy(x, w, torch.tensor([[0, 1]]), margin=Margin.cosface(0.1), scale=4.0)
    expected = math.log1p(2 * math.exp(-4 * 0.4)) + math.log1p(math.exp(2.0) + math.exp(-2.0))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "weights", [Weights(), Weights(0.4, 0.6, 1.0, temperature=2.0), Weights(1.0, 0.5, 0.5)], ids=str
)
@pytest.mark.parametrize("several", [False, True])
def test_a_bias_is_added_to_the_logits_of_negatives(weights: Weights, several: bool) -> None:
    x, teacher, w, y = make(19, 53, 11, seed=2)
    bias = torch.rand(53, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    if several:
        weights, y = Weights(weights.alpha, weights.beta), several_labels(y, 53)
    got, expected = both(x, w, y, torch.float64, teacher, bias, weights=weights, margin=Margin.arcface(0.4), scale=20.0)
    assert_same(got, expected, 1e-11)


def test_sum_reduction_equals_autograd() -> None:
    x, teacher, w, y = make(19, 53, 11, seed=2)
    got, expected = both(x, w, y, torch.float64, teacher, weights=Weights(0.5, 0.5, 1.0), scale=20.0, reduction="sum")
    assert_same(got, expected, 1e-11)


def test_diagnostics_are_the_target_cosine_the_largest_negative_and_what_was_filtered() -> None:
    x, _, w, y = make(23, 40, 9, seed=6)
    unit = torch.nn.functional.normalize
    cosine = unit(x) @ unit(w).T
    label = torch.nn.functional.one_hot(y.clamp_min(0), 40).bool() & (y >= 0)[:, None]
    out = linear_margin_discrimination(x, w, y, LossSpec(num_classes=40, scale=100.0, filter_threshold=0.4))
    torch.testing.assert_close(out.target_cosine[y >= 0], cosine[label])
    hidden = (cosine > 0.4) & ~label
    torch.testing.assert_close(out.largest_negative, cosine.masked_fill(label | hidden, -2).amax(1))
    assert torch.equal(out.removed, hidden.sum(1)) and int(out.removed.sum()) > 0


def test_gradients_without_autograd_are_those_of_autograd_and_may_use_the_rows_as_scratch() -> None:
    x, _, w, y = make(23, 40, 9, seed=6)
    xs, ws, spec = x.clone().requires_grad_(), w.clone().requires_grad_(), LossSpec(num_classes=40)
    linear_margin_discrimination(xs, ws, y, spec).loss.backward()
    scratch = w.clone()
    kept = discrimination_with_gradients(x, w, y, spec)
    used = discrimination_with_gradients(x, scratch, y, spec, overwrite_w=True)
    assert torch.equal(kept.x, xs.grad) and torch.equal(kept.w, ws.grad)
    torch.testing.assert_close((used.x, used.w), (xs.grad, ws.grad), rtol=1e-10, atol=1e-12)
    assert not torch.equal(scratch, w)


def test_a_shard_without_rows_gives_its_share_of_nothing() -> None:
    x = torch.randn(3, 4)
    out = discrimination_with_gradients(x, x.new_empty(0, 4), torch.full((3,), -1), LossSpec(num_classes=9))
    assert float(out.result.loss) == 0 and out.w.shape == (0, 4) and not out.x.any()


def test_a_wrong_teacher_distribution_would_be_seen() -> None:
    """The KL of a distribution with itself is 0 and without margin has no gradient."""
    x, _, w, y = make(9, 20, 6)
    xs = x.clone().requires_grad_()
    out = linear_margin_discrimination(xs, w, y, LossSpec(num_classes=20, weights=Weights(0, 0, 1.0, 3.0)), teacher=x)
    out.loss.backward()
    assert abs(float(out.raw[2])) < 1e-13
    assert float(xs.grad.abs().max()) < 1e-13


def test_filter_removes_confusing_negatives_from_the_denominator() -> None:
    w = torch.eye(4, dtype=torch.float64)
    x = torch.tensor([[0.6, 0.8, 0.0, 0.0]], dtype=torch.float64)
    loss = linear_margin_cross_entropy(x, w, torch.tensor([0]), scale=8.0, filter_threshold=0.5)
    assert loss.item() == pytest.approx(math.log1p(2 * math.exp(-8 * 0.6)), rel=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_target_cosine_of_exactly_one_is_finite(sign: float, margin: Margin) -> None:
    w = torch.eye(8)
    x = (sign * w[:5]).clone().requires_grad_()
    ws = w.clone().requires_grad_()
    loss = linear_margin_cross_entropy(x, ws, torch.arange(5), margin=margin, scale=64.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all() and torch.isfinite(ws.grad).all()
    psi = float(margin.target(torch.tensor(sign, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))[0])
    expected = math.log1p(7 * math.exp(-64 * psi))
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-25)


@pytest.mark.parametrize("scale", [30.0, 64.0, 100.0])
@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_gradients_at_cosines_of_exactly_one_equal_their_limit(margin: Margin, scale: float) -> None:
    """x = +-w_y: the label's own pull has no tangential part, so what is left are the negatives at a fixed psi.

    Rows whose normalisation is exact (four entries of 1 / 2): autograd would divide by the zero sine.
    """
    g = torch.Generator().manual_seed(4)
    w = torch.zeros(24, 16, dtype=torch.float64)
    for row in w:
        row[torch.randperm(16, generator=g)[:4]] = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    y = torch.tensor([0, 3, 3, 9, 17, 20, -1])
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    x = sign[:, None] * w[y] * 4
    xs, ws = x.float().requires_grad_(), w.float().requires_grad_()
    loss = linear_margin_cross_entropy(xs, ws, y, margin=margin, scale=scale)
    loss.backward()

    xr, wr, keep = x.clone().requires_grad_(), w.clone().requires_grad_(), y >= 0
    cosine = torch.nn.functional.normalize(xr[keep]) @ torch.nn.functional.normalize(wr).T
    psi = margin.target(sign[keep], torch.zeros_like(sign[keep]))[0]
    z = scale * cosine.scatter(1, y[keep, None], psi[:, None])
    expected = torch.nn.functional.cross_entropy(z, y[keep])
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for got, expected in ((xs.grad, xr.grad), (ws.grad, wr.grad)):
        assert float((got.double() - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1.0)


def test_tiny_losses_keep_their_digits() -> None:
    """1 - P_y of 1e-13 and less: a softmax minus one would give 0."""
    w = torch.eye(6)
    x = torch.eye(6)[:2].clone().requires_grad_()
    loss = linear_margin_cross_entropy(x, w, torch.arange(2), scale=64.0)
    loss.backward()
    assert loss.item() == pytest.approx(5 * math.exp(-64), rel=1e-4)
    # Each of the five negatives pulls with (scale / batch) * P_j.
    assert float(x.grad[0, 1]) == pytest.approx(32 * math.exp(-64), rel=1e-4)


@pytest.mark.parametrize("classes", [50, 100_000])
def test_scale_100_neither_overflows_nor_loses_accuracy(classes: int) -> None:
    x, _, w, y = make(6, classes, 16, seed=3)
    got, expected = both(x, w, y, torch.float32, margin=Margin.cosface(0.3), scale=100.0)
    assert_same(got, expected, 1e-4)


@pytest.mark.parametrize(("cosine", "scale"), [(-0.95, 64.0), (0.99, 100.0), (1.0, 88.0), (-0.55, 100.0)])
def test_batches_at_one_end_of_the_cosine_range_keep_their_accuracy(cosine: float, scale: float) -> None:
    """All logits near -61, where ln Z is far below 0, or near +100, where exp alone overflows float32."""
    g = torch.Generator().manual_seed(9)
    axis = torch.zeros(1, 12, dtype=torch.float64)
    axis[0, 0] = 1
    w = axis + 0.03 * torch.randn(9, 12, generator=g, dtype=torch.float64)
    side = torch.randn(5, 12, generator=g, dtype=torch.float64)
    side[:, 0] = 0
    side = side / side.norm(dim=1, keepdim=True)
    x = cosine * axis + math.sqrt(1 - cosine * cosine) * side
    got, expected = both(x, w, torch.tensor([0, 3, 8, 3, 1]), torch.float32, scale=scale)
    assert_same(got, expected, 2e-4)


def test_chunks_do_not_change_the_result() -> None:
    x, teacher, w, y = make(37, 29, 8, seed=4)
    results = []
    for budget in (None, (29 * 2 + 4 * 8) * 8 * 6, 1):
        got, _ = both(x, w, y, torch.float64, teacher, weights=Weights(1, 1, 1), memory_budget_bytes=budget)
        results.append(got)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-13)


def test_budget_decides_the_chunk() -> None:
    spec = LossSpec(num_classes=1000, memory_budget_bytes=10 * 1000 * 4)
    assert spec.samples_per_chunk(batch=60, rows=1000, width=0, labels=1, itemsize=4, device="cuda") == 10
    assert (
        spec.samples_per_chunk(batch=62, rows=1000, width=0, labels=1, itemsize=4, device="cuda") == 9
    )  # 7 equal ones
    assert spec.samples_per_chunk(batch=64, rows=1000, width=125, labels=2, itemsize=4, device="cuda") == 5
    assert LossSpec(num_classes=1000, memory_budget_bytes=1).samples_per_chunk(64, 1000, 8, 1, 4, "cpu") == 1
    assert LossSpec(num_classes=1000).samples_per_chunk(64, 1000, 8, 1, 4, "cpu") == 64
    # On a CPU without a budget: 64 MiB, or half of the gradient where that is more.
    assert LossSpec(num_classes=1 << 17).samples_per_chunk(512, 1 << 17, 256, 1, 4, "cpu") == 128
    assert LossSpec(num_classes=1 << 20).samples_per_chunk(512, 1 << 20, 512, 1, 4, "cpu") == 256
    assert LossSpec(num_classes=1 << 17).samples_per_chunk(512, 1 << 17, 256, 1, 4, "cuda") == 512


def test_two_runs_are_bitwise_equal() -> None:
    x, _, w, y = make(33, 70, 16, seed=5)
    a, b = (both(x, w, y, torch.float32, margin=Margin.arcface())[0] for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a, b))


def test_straight_through_only_changes_the_target_derivative() -> None:
    x, _, w, y = make(9, 12, 5, seed=6)
    margin, xs, wr = Margin.arcface(0.5), x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = linear_margin_cross_entropy(xs, w, y, margin=margin, margin_grad="straight_through", scale=20.0)
    loss.backward()

    class Detached:
        def target(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            psi, dpsi = margin.target(cos.detach(), sin.detach())
            return psi + cos - cos.detach(), dpsi

    expected, _ = discrimination_reference(wr, w, y, margin=Detached(), scale=20.0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(xs.grad, wr.grad)


def test_sampled_rows_are_a_softmax_over_those_classes() -> None:
    x, _, w, y = make(12, 40, 6, seed=7)
    rows = torch.unique(torch.cat([y[y >= 0], torch.tensor([0, 5, 39])]))
    start = 100
    ws = w[rows].clone().requires_grad_()
    loss = linear_margin_cross_entropy(
        x, ws, torch.where(y >= 0, y + start, y), rows=rows, class_start=start, num_classes=200, scale=16.0
    )
    loss.backward()
    slot = torch.searchsorted(rows, y.clamp_min(0))
    wr = w[rows].clone().requires_grad_()
    expected, _ = discrimination_reference(x, wr, torch.where(y >= 0, slot, y), scale=16.0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ws.grad, wr.grad)


def test_a_labelled_class_that_no_rank_holds_is_nan_and_not_a_number() -> None:
    loss = linear_margin_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 7, -1]), num_classes=9)
    assert torch.isnan(loss)


def test_no_label_at_all_is_zero_with_zero_gradients() -> None:
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = linear_margin_cross_entropy(x, w, torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not w.grad.any()


def test_upstream_gradient_and_reduction_scale_the_gradient() -> None:
    x, _, w, y = make(8, 9, 4, seed=8)
    xs = x.clone().requires_grad_()
    mean = linear_margin_cross_entropy(xs, w, y, scale=10.0)
    (g_mean,) = torch.autograd.grad(mean, xs)
    total = linear_margin_cross_entropy(xs, w, y, scale=10.0, reduction="sum")
    (g_total,) = torch.autograd.grad(total / 4, xs)
    labelled = int((y >= 0).sum())
    torch.testing.assert_close(total, mean * labelled)
    torch.testing.assert_close(g_total, g_mean * labelled / 4)


def test_zero_rows_give_finite_gradients_and_16_bit_inputs_keep_their_dtype() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    linear_margin_cross_entropy(x, torch.randn(3, 4), torch.tensor([0, 1]), margin=Margin.arcface()).backward()
    assert (x.grad == 0).all()
    x16 = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_margin_cross_entropy(x16, w, torch.tensor([0, 1]))
    loss.backward()
    expected, _ = discrimination_reference(x16.detach().double(), w.double(), torch.tensor([0, 1]))
    assert x16.grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "triton"}, "expected 'auto' or 'torch'"),
        ({"weight_grad": "lost"}, "expected one of 'auto', 'stored', 'recomputed'"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes is 0"),
        ({"num_classes": 2}, "num_classes is 2"),
        ({"margin_grad": "no"}, "margin_grad is 'no'"),
    ],
)
def test_unusable_options_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_margin_cross_entropy(torch.randn(2, 3), torch.randn(4, 3), torch.zeros(2, dtype=torch.int64), **change)


def test_unusable_tensors_are_refused() -> None:
    x, w, y = torch.randn(2, 3), torch.randn(4, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        linear_margin_cross_entropy(x, w, y.int())
    with pytest.raises(ValueError, match="one D"):
        linear_margin_cross_entropy(x, w[:, :2], y)
    with pytest.raises(ValueError, match="teacher is None"):
        linear_margin_discrimination(x, w, y, LossSpec(num_classes=4, weights=Weights(beta=1)))
    with pytest.raises(ValueError, match="rows is"):
        linear_margin_cross_entropy(x, w, y, rows=y)
    with pytest.raises(ValueError, match="bias is"):
        linear_margin_cross_entropy(x, w, y, bias=torch.zeros(3))
    with pytest.raises(ValueError, match="expected one label per sample, or more with gamma 0"):
        linear_margin_discrimination(
            x, w, y[:, None].expand(2, 2), LossSpec(num_classes=4, weights=Weights(gamma=1)), teacher=x
        )
