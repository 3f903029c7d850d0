"""The Triton kernels of the classifier head against float64 and against plain PyTorch at the same dtypes.

Without a GPU they run in Triton's interpreter, see `interpreter.py`. Its products are NumPy's, whose bits depend on the
processor and on the shape: equal bits are expected of equal calls only, and else agreement within rounding.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from interpreter import assert_holds_in_the_interpreter, on_devices
from torch import Tensor

from megacid_kernels import LossSpec
from megacid_kernels.fused import (
    INTERPRET,
    Exponentials,
    ProductTile,
    RowLosses,
    SoftmaxRows,
    Tile,
    add_labels_,
    exponentials,
    exponentials_,
    finish_x_,
    label_order,
    nearest,
    pitched,
    row_epilogue,
    rows_through_norm_,
    target_cosines,
    tiles_for,
    tuning,
    unit_rows,
)
from megacid_kernels.margin import Margin
from megacid_kernels.targets import locate

HERE = "cpu" if INTERPRET else "cuda"
SMALL = ProductTile(rows=32, columns=64, depth=32, warps=4, stages=2, group=2)
BY_DESCRIPTORS = dataclasses.replace(SMALL, descriptors=True)
IN_PLACE = Tile(rows=64, block=16, warps=4)  # a strip is 128 columns: most cases have several
# The interpreter's time grows with the number of programs: more rows in each.
MANY_ROWS = Tile(rows=64, block=512, warps=8) if INTERPRET else None

if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__)


def module_of(kernel: str) -> ModuleType:
    """The module, whose name in the package is that of its function."""
    return importlib.import_module(f"megacid_kernels.fused.{kernel}")


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def assert_no_worse(got: Tensor, plain: Tensor, want: Tensor, tolerance: float, terms: Tensor | float = 0) -> None:
    """Element by element: the kernel's error is at most that of plain PyTorch at the same dtypes plus tolerance *
    (|want| + terms). terms: the magnitude of the terms whose sum `want` is. NaN fails."""
    got, plain, want = got.cpu().double(), plain.cpu().double(), want.cpu().double()
    excess = (got - want).abs() - (plain - want).abs() - tolerance * (want.abs() + terms)
    assert bool((excess <= 0).all()), f"worse than plain PyTorch by up to {float(excess.max()):.3e}"


def relative(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.cpu().double() - want.double()).norm() / want.double().norm())


class Samples(NamedTuple):
    """x [b, D] near the class of its first label, w [S, D], and labels: some on another rank (slot 0), some of one
    class."""

    x: Tensor
    w: Tensor
    slot: Tensor  # [b, l]
    own: Tensor  # [b, l]

    def to(self, device: str) -> Samples:
        return Samples(*(tensor.to(device) for tensor in self))


def samples(b: int, S: int, D: int, labels: int, dtype: torch.dtype, seed: int = 0) -> Samples:
    random = torch.Generator().manual_seed(seed)
    slot = torch.randint(0, S, (b, labels), generator=random)
    slot[: b // 4, 0] = slot[0, 0]
    own = torch.rand(b, labels, generator=random) < 0.7
    own[0, 0] = True
    w = unit(numbers(S, D, seed=seed + 1))
    x = unit(w[slot[:, 0]] * torch.linspace(-0.5, 1.5, b)[:, None] + unit(numbers(b, D, seed=seed + 2)))
    return Samples(x.to(dtype), w.to(dtype), slot.masked_fill(~own, 0), own)


def negatives(cos: Tensor, slot: Tensor, own: Tensor) -> Tensor:
    """Which entries are no label of their sample, bool [b, S]."""
    keep = torch.ones_like(cos, dtype=torch.bool)
    sample, label = own.nonzero(as_tuple=True)
    keep[sample, slot[sample, label]] = False
    return keep


def threshold_in_a_gap(cos: Tensor, quantile: float) -> float:
    """A threshold near the quantile and in the widest gap there: rounding then moves no cosine across it."""
    values = cos.flatten().double().sort().values
    middle = int(quantile * len(values))
    near = values[max(0, middle - 20) : middle + 20]
    widest = int(near.diff().argmax())
    return float(near[widest] + near[widest + 1]) / 2


class Case(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, int, int]  # b, S, D
    labels: int = 1
    scale: float = 64.0
    bias: bool = False
    quantile: float | None = None  # of the cosines above which the filter removes
    tile: ProductTile | None = None


CASES = [
    Case(torch.float16, (70, 301, 80)),
    Case(torch.float16, (5, 70, 640), tile=dataclasses.replace(SMALL, depth=128)),
    Case(torch.bfloat16, (77, 200, 129), labels=3, scale=30.0, bias=True, tile=SMALL),
    Case(torch.float16, (40, 261, 64), labels=2, scale=100.0, quantile=0.9),
    Case(torch.bfloat16, (66, 130, 33), bias=True, quantile=0.5, tile=SMALL),
    Case(torch.float32, (33, 261, 40), labels=2, scale=100.0, bias=True, quantile=0.8),
    Case(torch.float32, (70, 301, 80), tile=SMALL),
    Case(torch.bfloat16, (1, 1, 1)),
    Case(torch.float16, (70, 301, 80), tile=BY_DESCRIPTORS),
    Case(torch.float16, (40, 261, 64), labels=2, scale=100.0, quantile=0.9, tile=BY_DESCRIPTORS),
    Case(torch.bfloat16, (66, 130, 40), bias=True, quantile=0.5, tile=BY_DESCRIPTORS),
    Case(torch.float16, (5, 70, 33), tile=BY_DESCRIPTORS),  # no multiple of 16 bytes: read through pointers
]


def name_of(case: Case) -> str:
    by = " by descriptors" if case.tile is not None and case.tile.descriptors else ""
    return f"{str(case.dtype)[6:]} {'x'.join(map(str, case.shape))}{by}"


@on_devices
@pytest.mark.parametrize("method", ["fused", "in-place"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_exponentials_and_row_statistics_are_as_exact_as_pytorch(case: Case, method: str, device: str) -> None:
    b, S, D = case.shape
    x, w, slot, own = cpu_samples = samples(b, S, D, case.labels, case.dtype)
    cos, plain_cos = x.double() @ w.double().T, x.float() @ w.float().T
    if method == "in-place":  # the rounding of the input cosines is not the kernel's
        plain_cos = plain_cos if case.dtype == torch.float32 else plain_cos.half().float()
        cos = plain_cos.double()
    shift = LossSpec(num_classes=S, scale=case.scale).shift()
    bias = numbers(S, seed=5) if case.bias else None
    threshold = threshold_in_a_gap(cos, case.quantile) if case.quantile else None
    keep = negatives(cos, slot, own)
    if bias is not None:
        bias[::7] = -math.inf  # no negatives, so the filter removes none of them
        keep &= bias > -math.inf
    hidden = keep & (cos > threshold) if threshold is not None else torch.zeros_like(keep)

    def logits(c: Tensor) -> Tensor:
        return (c * case.scale + (0 if bias is None else bias.to(c.dtype))).masked_fill(~keep | hidden, -torch.inf)

    x, w, slot, own = cpu_samples.to(device)
    options: dict[str, Any] = {"scale": case.scale, "shift": shift, "threshold": threshold}
    options["bias_S"] = None if bias is None else bias.to(device)
    if method == "fused":
        got = exponentials(x, w, slot, own, **options, tile=case.tile)
    else:
        full = torch.float32 if case.dtype == torch.float32 else torch.float16
        matrix = pitched(b, S, full, x.device) if S % 2 else torch.empty(b, S, dtype=full, device=device)
        got = exponentials_(matrix.copy_(plain_cos.to(device)), slot, own, **options, tile=IN_PLACE)
        assert got.matrix is not None and got.matrix.data_ptr() == matrix.data_ptr()

    want, plain = (logits(cos) - shift).exp(), (logits(plain_cos) - shift).exp()
    assert got.matrix is not None and got.largest is not None
    stored = torch.float32 if case.dtype == torch.float32 else torch.bfloat16
    assert got.matrix.dtype == stored and not got.matrix.cpu()[~keep | hidden].any()
    # A cosine, and with it the logit, is off by a few roundings of 2^-24: the order of a product's sum is not
    # specified. Tensor cores cut off what they add to the sum, 16 columns at a time.
    roundings = 6 + (D / 16 if device == "cuda" and case.dtype != torch.float32 else 0)
    tolerance = roundings * 2.0**-24 * case.scale
    assert_no_worse(got.matrix, plain.to(stored), want, tolerance)
    assert_no_worse(got.sums, plain.sum(1), want.sum(1), tolerance)
    got_largest, plain_largest, want_largest = (
        got.largest.cpu(),
        *(logits(c).amax(1) / case.scale for c in (plain_cos, cos)),
    )
    assert_no_worse(got_largest.exp(), plain_largest.exp(), want_largest.exp(), 1e-6)
    assert (got.hidden is None) == (got.removed is None) == (threshold is None)
    if got.hidden is not None and got.removed is not None:
        assert torch.equal(got.removed.cpu(), hidden.sum(1))
        assert torch.equal(got.hidden.cpu(), hidden) and hidden.any() and not hidden.all()


@on_devices
@pytest.mark.parametrize("method", ["fused", "in-place"])
def test_what_the_filter_hides_of_the_student_is_hidden_of_the_teacher(method: str, device: str) -> None:
    x, w, slot, own = samples(35, 100, 32, 2, torch.float16).to(device)
    teacher = unit(x.float() + unit(numbers(35, 32, seed=9)).to(device)).half()
    plain = {"scale": 20.0, "shift": 0.0}

    def make(rows: Tensor, **options: Any) -> Exponentials:
        if method == "fused":
            return exponentials(rows, w, slot, own, **plain, **options, tile=SMALL)
        return exponentials_((rows @ w.T).contiguous(), slot, own, **plain, **options, tile=IN_PLACE)

    hidden = make(x, threshold=0.1).hidden
    assert hidden is not None and hidden.any()
    got, whole = make(teacher, hidden_bS=hidden), make(teacher)
    assert got.matrix is not None and whole.matrix is not None and got.hidden is None and got.removed is None
    assert torch.equal(got.matrix, whole.matrix.masked_fill(hidden, 0))
    torch.testing.assert_close(got.sums, got.matrix.float().sum(1), rtol=4e-3, atol=0)


@on_devices
def test_a_label_is_left_out_wherever_in_a_tile_it_is(device: str) -> None:
    """With a single sample no other sample's label triggers the comparisons in its tile."""
    x, w = torch.ones(1, 16, device=device).half(), torch.ones(200, 16, device=device).half()
    own = torch.ones(1, 1, dtype=torch.bool, device=device)
    for label in (0, 31, 32, 63, 64, 127, 128, 199):
        slot = torch.full((1, 1), label, device=device)
        for got in (
            exponentials(x, w, slot, own, scale=0.5, shift=0.0, tile=SMALL),
            exponentials(x, w, slot, own, scale=0.5, shift=0.0, tile=BY_DESCRIPTORS),
            exponentials_(x @ w.T, slot, own, scale=0.5, shift=0.0, tile=IN_PLACE),
        ):
            assert got.matrix is not None and (got.matrix == 0).nonzero().tolist() == [[0, label]]
            torch.testing.assert_close(got.sums.item(), 199 * math.exp(8), rtol=1e-5, atol=0)


@on_devices
@pytest.mark.parametrize("scale", [30.0, 64.0, 100.0])
def test_cosines_of_exactly_one_neither_overflow_nor_vanish(scale: float, device: str) -> None:
    """Every sample has negatives at cos 1, 0 and -1; with 2^40 classes and scale 100 the last may underflow."""
    x = torch.eye(16, device=device)[:3].half()
    w = torch.cat([torch.eye(16), -torch.eye(16)]).to(device).half()
    slot, own = torch.full((3, 1), 5, device=device), torch.tensor([[True], [False], [False]], device=device)
    for classes in (32, 1 << 40):
        shift = LossSpec(num_classes=classes, scale=scale).shift()
        each = [math.exp(scale * c - shift) for c in (1, 0, -1)]
        want = torch.tensor([each[0] + each[2] + 29 * each[1], *[each[0] + each[2] + 30 * each[1]] * 2])
        for got in (
            exponentials(x, w, slot, own, scale=scale, shift=shift),
            exponentials_(x @ w.T, slot, own, scale=scale, shift=shift, tile=IN_PLACE),
        ):
            assert got.matrix is not None and got.largest is not None and (got.largest == 1).all()
            torch.testing.assert_close(got.sums.cpu(), want, rtol=2e-5, atol=0)
            torch.testing.assert_close(got.matrix[1, 1].item(), each[0], rtol=4e-3, atol=0)
            assert got.matrix.isfinite().all() and got.matrix[0, 5] == 0 and got.matrix[1, 5] > 0


@on_devices
def test_without_a_negative_the_sums_are_zero(device: str) -> None:
    none = torch.zeros(3, 1, dtype=torch.bool, device=device)
    x, w, slot = torch.ones(3, 16, device=device), torch.ones(1, 16, device=device), torch.zeros_like(none, dtype=int)
    options: dict[str, Any] = {"scale": 64.0, "shift": 0.0, "threshold": 0.5}
    for got in (
        exponentials(x, w, slot, ~none, **options),
        exponentials(x, w[:0], slot, none, **options),
        exponentials_(torch.ones(3, 1, device=device), slot, ~none, **options),
        exponentials_(torch.ones(3, 0, device=device), slot, none, **options),
    ):
        assert got.matrix is not None and got.matrix.shape[0] == 3 and not got.matrix.any()
        assert got.largest is not None and (got.largest == -torch.inf).all()
        assert (
            not got.sums.any()
            and got.removed is not None
            and not got.removed.any()
            and got.hidden is not None
            and not got.hidden.any()
        )
    for got in (
        exponentials(x[:0], w, slot[:0], none[:0], **options),
        exponentials_(torch.ones(0, 1, device=device), slot[:0], none[:0], **options),
    ):
        assert [len(part) for part in got if part is not None] == [0] * 5


@on_devices
def test_bits_are_the_same_again_and_in_any_order_of_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 x 4 tiles."""
    x, w, slot, own = samples(70, 200, 32, 1, torch.float16).to(device)
    options: dict[str, Any] = {"scale": 64.0, "shift": 0.0, "threshold": 0.3}
    want = exponentials(x, w, slot, own, **options, tile=SMALL)

    def same(got: Exponentials) -> bool:
        return all(torch.equal(a, b) for a, b in zip(got, want) if a is not None and b is not None)

    assert same(exponentials(x, w, slot, own, **options, tile=SMALL))
    assert same(exponentials(x, w, slot, own, **options, tile=dataclasses.replace(SMALL, group=8)))
    assert same(exponentials(x, w, slot, own, **options, store=False, largest=False, tile=SMALL))
    # Row statistics of 2 row tiles at a time: 12 bytes per row and tile of columns.
    monkeypatch.setattr(module_of("exponentials"), "_PARTIAL_BYTES", 2 * 32 * 12 * 4)
    assert same(exponentials(x, w, slot, own, **options, tile=SMALL))

    by_descriptors = exponentials(x, w, slot, own, **options, tile=BY_DESCRIPTORS)
    for number in (2, 1000):  # several tiles per program, and one
        monkeypatch.setattr(module_of("product"), "_multiprocessors", lambda device, number=number: number)
        got = exponentials(x, w, slot, own, **options, tile=BY_DESCRIPTORS)
        assert all(torch.equal(a, b) for a, b in zip(got, by_descriptors) if a is not None and b is not None)

    cos = (x @ w.T).contiguous()
    first, second = (exponentials_(cos.clone(), slot, own, **options, tile=IN_PLACE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second) if a is not None and b is not None)


@on_devices
def test_part_of_a_batch_has_the_same_values_within_rounding(device: str) -> None:
    x, w, slot, own = samples(150, 200, 32, 1, torch.float16).to(device)
    options: dict[str, Any] = {"scale": 64.0, "shift": 0.0, "threshold": None, "tile": SMALL}
    rows = slice(37, 90)
    whole = exponentials(x, w, slot, own, **options)
    part = exponentials(x[rows], w, slot[rows], own[rows], **options)
    for a, b in zip(part, whole):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b[rows], rtol=1e-2 if a.dtype.itemsize == 2 else 1e-3, atol=1e-30)


def plain_target(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x, w [..., D] unit rows."""
    sin = (x - w).norm(dim=-1) * (x + w).norm(dim=-1) / 2
    return (x * w).sum(-1), sin


@on_devices
@pytest.mark.parametrize(("width", "tile"), [(33, None), (512, None), (129, Tile(4, 64, 4))])
def test_target_cosines_and_sines_keep_their_digits(width: int, tile: Tile | None, device: str) -> None:
    """Angles from 0 over 1e-6 to pi, where 1 - cos^2 has no digits left. Labels of other ranks have invalid indices."""
    b, labels, L, S = 21, 2, 40, 15
    rows = torch.randperm(L, generator=torch.Generator().manual_seed(3))[:S]
    w = numbers(L, width, seed=1) * torch.logspace(-2, 2, L)[:, None]
    slot = torch.randint(0, S, (b, labels), generator=torch.Generator().manual_seed(4))
    own = torch.rand(b, labels, generator=torch.Generator().manual_seed(5)) < 0.8
    angle = torch.tensor([0.0, 1e-6, 1e-4, 1e-2, 1.0])[torch.arange(b) % 5]
    sign = 1.0 - 2.0 * (torch.arange(b) % 2)
    x = 3 * sign[:, None] * (unit(w[rows[slot[:, 0]]]) + angle[:, None] * unit(numbers(b, width, seed=2)))
    norms = [1 / x.norm(dim=1), 1 / w[rows].norm(dim=1)]
    given = [x, norms[0], w, rows, norms[1], slot.masked_fill(~own, 1 << 50), own]
    got = target_cosines(*(part.to(device) for part in given), tile=tile)
    plain = plain_target((x * norms[0][:, None])[:, None], w[rows[slot]] * norms[1][slot][..., None])
    exact = [n.double() for n in norms]
    want = plain_target((x.double() * exact[0][:, None])[:, None], w[rows[slot]].double() * exact[1][slot][..., None])
    for value, alike, true in zip(got, plain, want):
        assert_no_worse(value, torch.where(own, alike, 0), torch.where(own, true, 0), 1e-6, terms=0.1)
        assert not value.cpu()[~own].any()
    near = own[:, 0] & (angle < 1e-3) & (angle > 0)
    # The remaining error is the rounding of the unit rows, 6e-8 per entry; sqrt(1 - cos^2) would be off by 3e-4.
    assert (got[1].cpu()[near, 0] - want[1][near, 0]).abs().max() < 3e-7


@on_devices
def test_target_sines_of_all_zero_rows_are_those_of_cosine_0(device: str) -> None:
    x, w = numbers(4, 33, seed=1), numbers(4, 33, seed=2)
    x[[0, 1]], w[[1, 2]] = 0.0, 0.0
    slot, own = torch.arange(4)[:, None], torch.tensor([[True], [True], [True], [True]])
    inverse = [torch.where(rows.norm(dim=1) > 0, 1 / rows.norm(dim=1), 0.0) for rows in (x, w)]

    def cosines(own: Tensor) -> tuple[Tensor, Tensor]:
        parts = [part.to(device) for part in (x, inverse[0], w, inverse[1], slot, own)]
        cos, sin = target_cosines(*parts[:3], None, *parts[3:])
        return cos.cpu(), sin.cpu()

    cos, sin = cosines(own)
    assert cos[:3].flatten().tolist() == [0.0] * 3 and sin[:3].flatten().tolist() == [1.0] * 3
    torch.testing.assert_close(cos[3].square() + sin[3].square(), torch.ones(1))
    assert not any(part.any() for part in cosines(~own)), "a label of another rank"


def epilogue_of(sums: Tensor, psi: Tensor, share: Tensor, *, scale: float, shift: float) -> RowLosses:
    """Of the student's cross entropy, with labels of this rank and no margin."""
    ones = torch.ones_like(share)
    return row_epilogue(share, ones, ones, student=SoftmaxRows(sums, psi, scale, shift), dpsi_b=ones)


def test_terms_that_the_row_epilogue_reads_once_must_be_equal() -> None:
    ones = torch.ones(4)
    one = SoftmaxRows(ones, ones, 64.0, 0.0)
    other = one._replace(scale=32.0)
    for terms, message in (
        (
            {"student": one, "teacher": other},
            r"student and teacher have \(scale, shift\) \(64.0, 0.0\) and \(32.0, 0.0\)",
        ),
        ({"kl": (one, one._replace(shift=1.0))}, r"kl\[0\] and kl\[1\] have"),
        ({"student": one, "kl": (other, other)}, r"student and kl\[0\], which have the same sums, have"),
        ({"student": one, "kl": (one._replace(target=ones + 1), one)}, r"student and kl\[0\] have two targets"),
        ({"teacher": one, "kl": (one, one._replace(target=ones + 1))}, r"teacher and kl\[1\] have two targets"),
    ):
        with pytest.raises(ValueError, match=message):
            row_epilogue(ones, ones, ones, **terms)  # type: ignore[arg-type]


@on_devices
@pytest.mark.parametrize("scale", [30.0, 64.0, 100.0])
def test_row_epilogue_is_the_softplus_of_float64(scale: float, device: str) -> None:
    shift = LossSpec(num_classes=10_000_000, scale=scale).shift()
    psi = torch.linspace(-1.5, 1.0, 301)
    log_n = torch.linspace(-20, 80, 301)[torch.randperm(301, generator=torch.Generator().manual_seed(0))]
    sums, share = log_n.exp(), torch.rand(301, generator=torch.Generator().manual_seed(1)) / 4096
    sums[:3], share[5:9] = 0.0, 0.0
    rows = epilogue_of(*(t.to(device) for t in (sums, psi, share)), scale=scale, shift=shift)
    loss, coefficient, grad_cos = rows.raw[0].cpu(), rows.coefficients[0].cpu(), rows.student.cpu()

    def formulas(n: Tensor, p: Tensor, each: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        target = p * scale - shift
        d = n.log() - target
        log_z = torch.logaddexp(n.log(), target)
        bounded = (each.log() - log_z).clamp_max(88.0)
        return torch.nn.functional.softplus(d, threshold=1e9), bounded.exp(), -each * torch.sigmoid(d)

    want = formulas(sums.double(), psi.double(), share.double() * scale)
    plain = formulas(sums, psi, share * scale)
    # d is a difference of numbers up to 100; softplus and exponentials pass its absolute error of about 1e-5 on.
    for got, alike, true in zip((loss, coefficient, grad_cos), plain, want):
        assert_no_worse(got, alike, true, 3e-5)
    assert float(loss[sums > 0].min()) < 1e-20 or scale < 64, "the smallest losses are meant to be tiny"
    assert not loss[:3].any() and not coefficient[5:9].any() and not grad_cos[5:9].any()


@on_devices
def test_a_diverged_sample_stays_nan_in_the_epilogue(device: str) -> None:
    nan, one = torch.full((1,), torch.nan, device=device), torch.ones(1, device=device)
    for sums, psi in ((nan, one), (one, nan)):
        rows = epilogue_of(sums, psi, one, scale=64.0, shift=0.0)
        assert all(part.isnan().all() for part in (rows.raw[0], rows.coefficients[0], rows.student))


class LabelTerms(NamedTuple):
    """Inputs of the labels' gradients, fp32: x [b, D], w [L, D], rows [S], 1 / lengths, grad_cos and cos [b, l]."""

    x: Tensor
    w: Tensor
    rows: Tensor
    inverse_x: Tensor
    inverse_w: Tensor
    slot: Tensor
    own: Tensor
    grad_cos: Tensor
    cos: Tensor

    def to(self, device: str) -> LabelTerms:
        return LabelTerms(*(tensor.to(device) for tensor in self))

    def double(self) -> LabelTerms:
        return LabelTerms(*(t.double() if t.is_floating_point() else t for t in self))

    @property
    def row(self) -> Tensor:
        return self.rows[self.slot]

    def x_terms(self) -> Tensor:
        unit_x = self.x * self.inverse_x[:, None]
        unit_w = self.w[self.row] * self.inverse_w[self.slot][..., None]
        return (self.grad_cos[..., None] * (unit_w - self.cos[..., None] * unit_x[:, None])).sum(1)

    def w_terms(self) -> Tensor:
        """[b, l, D]"""
        unit_x = self.x * self.inverse_x[:, None]
        unit_w = self.w[self.row] * self.inverse_w[self.slot][..., None]
        return self.grad_cos[..., None] * (unit_x[:, None] - self.cos[..., None] * unit_w)


def label_terms(b: int, labels: int, width: int, L: int = 40, S: int = 15) -> LabelTerms:
    rows = torch.randperm(L, generator=torch.Generator().manual_seed(3))[:S].sort().values
    w = numbers(L, width, seed=1) * torch.logspace(-1, 1, L)[:, None]
    x = numbers(b, width, seed=2) * 3
    x[b // 2] = 0
    slot = torch.randint(0, S, (b, labels), generator=torch.Generator().manual_seed(4))
    slot[: b // 3, 0] = 7
    own = torch.rand(b, labels, generator=torch.Generator().manual_seed(5)) < 0.7
    inverse_x, inverse_w = 1 / x.norm(dim=1), 1 / w[rows].norm(dim=1)
    inverse_x[b // 2] = 0
    cos = plain_target((x * inverse_x[:, None])[:, None], w[rows[slot]] * inverse_w[slot][..., None])[0]
    grad_cos = numbers(b, labels, seed=6) * own
    return LabelTerms(x, w, rows, inverse_x, inverse_w, slot.masked_fill(~own, 0), own, grad_cos, cos * own)


def through_norm(grad: Tensor, unit_rows: Tensor, inverse: Tensor) -> Tensor:
    return (grad - unit_rows * (unit_rows * grad).sum(1, keepdim=True)) * inverse[:, None]


@on_devices
@pytest.mark.parametrize(
    ("width", "labels", "tile"), [(33, 1, None), (512, 3, None), (129, 2, Tile(4, 64, 4)), (4099, 1, None)]
)
def test_gradient_of_x_is_finished_as_exactly_as_by_pytorch(
    width: int, labels: int, tile: Tile | None, device: str
) -> None:
    b = 13
    terms = label_terms(b, labels, width)
    product, coefficient = numbers(b, width, seed=7) * 1e20, torch.rand(b) * 1e-20

    def finished(p: LabelTerms, total: Tensor, factor: Tensor) -> Tensor:
        return through_norm(factor[:, None] * total + p.x_terms(), p.x * p.inverse_x[:, None], p.inverse_x)

    want = finished(terms.double(), product.double(), coefficient.double())
    plain = finished(terms, product, coefficient)
    on = terms.to(device)
    slot = on.slot.masked_fill(~on.own, 1 << 50)
    arguments = [on.grad_cos, on.cos, on.x, on.inverse_x, on.w, on.rows, on.inverse_w, slot]
    got = product.to(device)
    assert finish_x_(got, coefficient.to(device), *arguments, tile=tile) is got
    assert_no_worse(got, plain, want, 1e-6, terms=want.abs().amax(1, keepdim=True))
    assert not got[b // 2].any()
    # A NaN sample affects no other sample and reads no invalid index.
    arguments[0] = torch.where(on.own, on.grad_cos, torch.nan)
    bad = finish_x_(product.to(device), coefficient.to(device), *arguments, tile=tile)
    lost = ~on.own.all(1)
    assert bad[lost].isnan().all() and torch.equal(bad[~lost], got[~lost])


@on_devices
@pytest.mark.parametrize(
    ("width", "labels", "tile"), [(33, 1, None), (512, 3, None), (129, 2, Tile(1, 64, 1)), (4099, 1, None)]
)
def test_labels_are_added_to_the_gradient_of_w_in_one_order(
    width: int, labels: int, tile: Tile | None, device: str
) -> None:
    terms = label_terms(20, labels, width)
    start = numbers(len(terms.rows), width, seed=8)

    def added(p: LabelTerms, total: Tensor) -> Tensor:
        return total.index_add(0, p.slot.flatten(), (p.w_terms() * p.own[..., None]).flatten(0, 1))

    want, plain = added(terms.double(), start.double()), added(terms, start)
    on, got = terms.to(device), start.to(device)
    order = label_order(on.slot, on.own)
    arguments = [order, on.grad_cos, on.cos, on.x, on.inverse_x, on.w, on.rows, on.inverse_w]
    assert add_labels_(got, *arguments, tile=tile) is got
    assert_no_worse(got, plain, want, 2e-6, terms=want.abs().amax(1, keepdim=True))
    untouched = torch.ones(len(terms.rows), dtype=torch.bool)
    untouched[terms.slot[terms.own]] = False
    assert untouched.any() and torch.equal(got.cpu()[untouched], start[untouched])
    assert torch.equal(add_labels_(start.to(device), *arguments, tile=tile), got)
    assert torch.equal(add_labels_(start.to(device)[:0], *arguments[:6], on.rows[:0], on.inverse_w[:0]), got[:0])


@on_devices
@pytest.mark.parametrize(("width", "tile"), [(33, None), (512, None), (129, Tile(4, 64, 4))])
def test_rows_go_through_the_norm_and_give_their_squared_length(width: int, tile: Tile | None, device: str) -> None:
    w, grad = numbers(30, width, seed=1) * torch.logspace(-2, 2, 30)[:, None], numbers(11, width, seed=2)
    w[8] = 0
    for rows in (torch.arange(2, 24, 2), None):
        chosen = w if rows is None else w[rows]
        part = grad if rows is not None else numbers(30, width, seed=3)
        inverse = torch.where(chosen.norm(dim=1) > 0, 1 / chosen.norm(dim=1), 0)
        plain = through_norm(part, chosen * inverse[:, None], inverse)
        want = through_norm(part.double(), chosen.double() * inverse.double()[:, None], inverse.double())
        got = part.to(device, copy=True)
        square = rows_through_norm_(
            got, w.to(device), None if rows is None else rows.to(device), inverse.to(device), tile=tile
        )
        assert_no_worse(got, plain, want, 1e-6, terms=want.abs().amax(1, keepdim=True))
        assert_no_worse(square, plain.square().sum(1), want.square().sum(1), 1e-6)
        assert not square[(chosen == 0).all(1).to(device)].any()
        # Times the gradient of the loss, into another matrix, rounded once.
        factor, out = torch.tensor(3.0, device=device), torch.empty_like(got, dtype=torch.bfloat16)
        given = part.to(device, copy=True), w.to(device), None if rows is None else rows.to(device), inverse.to(device)
        larger = rows_through_norm_(*given, factor=factor, out_SD=out, tile=tile)
        assert torch.equal(given[0].cpu(), part) and torch.equal(out, (got * 3).bfloat16())
        torch.testing.assert_close(larger, 9 * square, rtol=1e-6, atol=0)


def by_float64(x: Tensor, w: Tensor, y: Tensor, margin: Margin, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [b], d mean / d x, d mean / d w) by autograd."""
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    unit_x, unit_w = unit(x), unit(w)
    psi = margin.target(*plain_target(unit_x, unit_w[y]))[0]
    z = scale * (unit_x @ unit_w.T).index_put((torch.arange(len(y)), y), psi)
    loss = -z.log_softmax(1)[torch.arange(len(y)), y]
    grad_x, grad_w = torch.autograd.grad(loss.mean(), (x, w))
    return loss.detach(), grad_x, grad_w


@on_devices
@pytest.mark.parametrize(
    ("dtype", "method", "margin", "scale"),
    [
        (torch.float16, "fused", Margin.arcface(0.5), 64.0),
        (torch.float16, "in-place", Margin.cosface(0.4), 64.0),
        (torch.bfloat16, "fused", Margin.cosface(0.4), 30.0),
        (torch.float32, "fused", Margin.arcface(0.5), 64.0),
        (torch.float32, "in-place", Margin.arcface(0.5), 100.0),
    ],
)
def test_the_kernels_together_are_the_loss_and_its_gradients(
    dtype: torch.dtype, method: str, margin: Margin, scale: float, device: str
) -> None:
    """Two shards of sampled rows in turn, their statistics added as an all-reduce would."""
    b, L, D = 96, 700, 512 if dtype != torch.float32 else 80
    classes = torch.randperm(L, generator=torch.Generator().manual_seed(0))[:501].sort().values
    y = torch.randint(0, len(classes), (b,), generator=torch.Generator().manual_seed(1))
    y[: b // 4] = y[0]
    w_LD = numbers(L, D, seed=2) * torch.logspace(-1, 1, L)[:, None]
    x = unit(w_LD[classes[y]]) * torch.linspace(-1.0, 1.5, b)[:, None] + unit(numbers(b, D, seed=3))
    want_loss, want_x, want_w = by_float64(x, w_LD[classes], y, margin, scale)

    x, w_LD, target = x.to(device), w_LD.to(device), classes[y].to(device)[:, None]
    shift = LossSpec(num_classes=len(classes), scale=scale).shift()
    first, second = (torch.float16, torch.bfloat16) if dtype == torch.float16 else (dtype, dtype)
    unit_x, inverse_x = unit_rows(x, None, (first,), tile=MANY_ROWS)
    shards: list[dict[str, Any]] = []
    sums, psi = torch.zeros(2, b, 1, device=device)
    for rows in (classes[:200].to(device), classes[200:].to(device)):
        own, slot = locate(target, rows, 0, len(rows))
        *units, inverse_w = unit_rows(w_LD, rows, (first, second) if first != second else (first,), tile=MANY_ROWS)
        if method == "fused":
            negatives_here = exponentials(unit_x, units[0], slot, own, scale=scale, shift=shift)
        else:
            cos = pitched(b, len(rows), first, x.device).copy_(unit_x.float() @ units[0].float().T)
            negatives_here = exponentials_(cos, slot, own, scale=scale, shift=shift, tile=IN_PLACE)
        cos, sin = target_cosines(x, inverse_x, w_LD, rows, inverse_w, slot, own, tile=MANY_ROWS)
        psi_here, dpsi = (torch.where(own, part, 0) for part in margin.target(cos, sin))
        sums, psi = sums + negatives_here.sums[:, None], psi + psi_here
        shards.append(
            {
                "matrix": negatives_here.matrix,
                "unit_w": units[-1],
                "inverse_w": inverse_w,
                "rows": rows,
                "slot": slot,
                "own": own,
            }
            | {"cos": cos, "dpsi": dpsi}
        )
    share = torch.full((b,), 1 / b, device=device)
    losses = epilogue_of(sums, psi, share, scale=scale, shift=shift)
    loss, coefficient, grad_psi = losses.raw[0], losses.coefficients[0], losses.student
    grad_x, grad_w_parts = torch.zeros_like(x), []
    for s in shards:
        matrix, grad_cos = s["matrix"].float(), grad_psi[:, None] * s["dpsi"]
        grad_x += finish_x_(
            matrix @ s["unit_w"].float(), coefficient, grad_cos, s["cos"], x, inverse_x, w_LD, s["rows"],
            s["inverse_w"], s["slot"], tile=MANY_ROWS,
        )  # fmt: skip
        scaled = (coefficient[:, None] * unit_rows(x, tile=MANY_ROWS)[0]).to(second)
        grad_w = matrix.T @ scaled.float()
        order = label_order(s["slot"], s["own"])
        add_labels_(grad_w, order, grad_cos, s["cos"], x, inverse_x, w_LD, s["rows"], s["inverse_w"])
        square = rows_through_norm_(grad_w, w_LD, s["rows"], s["inverse_w"], tile=MANY_ROWS)
        torch.testing.assert_close(square, grad_w.square().sum(1))
        grad_w_parts.append(grad_w)

    tolerances = {torch.float16: (0.0065, 2.5e-3), torch.bfloat16: (0.05, 5e-3), torch.float32: (5e-5, 5e-6)}
    loss_tolerance, gradient_tolerance = tolerances[dtype]
    if method == "in-place" and dtype == torch.float16:
        loss_tolerance += scale * 2**-12 * 2  # the cosines themselves are rounded
    assert (loss.cpu() - want_loss).abs().max() < loss_tolerance
    assert relative(grad_x, want_x) < gradient_tolerance
    assert relative(torch.cat(grad_w_parts), want_w) < gradient_tolerance


def lowest_of_the_largest(value: Tensor) -> tuple[Tensor, Tensor]:
    largest = value.amax(1)
    at = torch.arange(value.shape[1]).expand_as(value)
    return largest, torch.where(value == largest[:, None], at, value.shape[1]).amin(1)


@on_devices
@pytest.mark.parametrize(
    ("dtype", "half_norm"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, True)]
)
def test_of_equally_near_centroids_the_lower_label_is_taken(
    dtype: torch.dtype, half_norm: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small integers products are exact, and rows have several best centroids in different tiles and strips."""
    random = torch.Generator().manual_seed(0)
    x, c = (torch.randint(-2, 3, (n, 20), generator=random).float() for n in (50, 300))
    c[150:] = c[:150].flip(0)
    norm = c.square().sum(1) / 2 if half_norm else None
    value = x @ c.T - (norm if norm is not None else 0)
    want = lowest_of_the_largest(value)
    assert ((value == want[0][:, None]).sum(1) > 1).all()
    for strips in (1, 3, 64):
        monkeypatch.setattr(module_of("nearest"), "_MAX_STRIPS", strips)
        got = nearest(x.to(device, dtype), c.to(device, dtype), norm if norm is None else norm.to(device), tile=SMALL)
        assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])


@on_devices
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32x3")],
)
@pytest.mark.parametrize("shape", [(130, 517, 96), (1, 1, 1), (37, 300, 129)])
def test_the_nearest_centroid_is_as_near_as_the_one_of_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, precision: Any, device: str
) -> None:
    b, K, D = shape
    c = numbers(K, D, seed=1).to(dtype)
    x = (c[torch.arange(b) * 7 % K] + 0.5 * numbers(b, D, seed=2)).to(dtype)
    half_norm = c.double().square().sum(1) / 2
    similarity = x.double() @ c.double().T - half_norm
    arguments = x.to(device), c.to(device), half_norm.float().to(device)
    value, label = (part.cpu() for part in nearest(*arguments, precision=precision))
    terms = float(half_norm.max())
    plain = (x.float() @ c.float().T - half_norm.float()).amax(1)
    assert_no_worse(value, plain, similarity.amax(1), 1e-6, terms=terms)
    chosen = similarity.gather(1, label[:, None])[:, 0]
    assert bool((chosen >= similarity.amax(1) - 1e-6 * terms).all())
    again = nearest(*arguments, precision=precision)
    assert torch.equal(again[0].cpu(), value) and torch.equal(again[1].cpu(), label)


@on_devices
def test_no_row_has_no_nearest_centroid(device: str) -> None:
    value, label = nearest(torch.ones(0, 4, device=device), torch.ones(3, 4, device=device))
    assert value.shape == label.shape == (0,) and label.dtype == torch.int64


def test_a_table_of_tiles_takes_precedence_over_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    mine = {
        ("sm_90", "float16", width): dataclasses.replace(
            tuning.TABLE["sm_90", "float16", 512], forward=dataclasses.replace(SMALL, group=group)
        )
        for width, group in ((256, 3), (1024, 5))
    }
    path.write_text(tuning.as_json(mine))
    before = tuning.lookup("sm_90", "bfloat16", 640)
    monkeypatch.setenv(tuning.TABLE_VARIABLE, str(path))
    tiles_of = {width: tuning.lookup("sm_90", "float16", width) for width in (1, 256, 257, 1024, 4096)}
    assert [tiles.forward.group for tiles in tiles_of.values() if tiles is not None] == [3, 3, 5, 5, 5]
    assert tiles_of[256] == mine["sm_90", "float16", 256]
    assert before is not None and tuning.lookup("sm_90", "bfloat16", 640) == before != tiles_of[1024]
    assert tuning.lookup("sm_61", "float16", 512) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": "both"}, "matrix is 'both'"),
        ({"forward": {"rows": 100, "columns": 64, "depth": 64, "warps": 4, "stages": 2}}, "rows of a tile is 100"),
        ({"colour": 1}, "an entry has"),
        ({"nearest": {"rows": 64}}, "missing"),
        ({"nearest": dataclasses.asdict(BY_DESCRIPTORS)}, '"nearest" has descriptors true, expected false'),
    ],
)
def test_an_invalid_table_is_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    entries = json.loads(tuning.as_json(tuning.TABLE))
    path.write_text(json.dumps([entries[0] | change]))
    monkeypatch.setenv(tuning.TABLE_VARIABLE, str(path))
    with pytest.raises(ValueError, match=f"MEGACID_KERNEL_TABLE is .*table.json.*{message}"):
        tuning.lookup("sm_80", "float16", 512)


@on_devices
def test_unusable_tensors_are_refused_by_name(device: str) -> None:
    x, w, slot, own = samples(4, 10, 16, 1, torch.float16).to(device)
    fine: dict[str, Any] = {"scale": 64.0, "shift": 0.0}
    hidden = torch.zeros(4, 10, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"w is torch.float32, expected torch.float16"):
        exponentials(x, w.float(), slot, own, **fine)
    with pytest.raises(ValueError, match=r"slot is torch.int32, expected torch.int64"):
        exponentials(x, w, slot.int(), own, **fine)
    with pytest.raises(ValueError, match="scale is 0, expected a finite number > 0"):
        exponentials(x, w, slot, own, scale=0, shift=0.0)
    with pytest.raises(ValueError, match="threshold and hidden are both given"):
        exponentials(x, w, slot, own, **fine, threshold=0.5, hidden_bS=hidden)
    with pytest.raises(ValueError, match=r"hidden has strides .* and ends in its last row"):
        short = torch.zeros(63, dtype=torch.bool, device=device).as_strided((4, 10), (17, 1))
        exponentials(x, w, slot, own, **fine, hidden_bS=short)
    with pytest.raises(ValueError, match=r"cos is torch.bfloat16, expected torch.float16 or torch.float32"):
        exponentials_(x.bfloat16() @ w.bfloat16().T, slot, own, **fine)
    with pytest.raises(ValueError, match=r"cos has strides \(1, 4\)"):
        exponentials_((w @ x.T).T, slot, own, **fine)
    with pytest.raises(ValueError, match=r"c has 0 rows, expected at least 1"):
        nearest(x, w[:0])
    with pytest.raises(ValueError, match="precision is 'tf32', expected one of"):
        nearest(x, w, precision="tf32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth of a tile is 48, expected a power of two"):
        dataclasses.replace(SMALL, depth=48)


on_a_gpu = pytest.mark.skipif(INTERPRET, reason="too large for the interpreter")
BENCH_SHAPES = [(4096, 131072, 512), (8192, 131072, 768), (8200, 131016, 640)]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["fused", "in-place"])
@pytest.mark.parametrize("shape", [*BENCH_SHAPES, (16400, 131080, 512)], ids=str)
def test_exponentials_at_the_shapes_of_the_bench(shape: tuple[int, int, int], method: str, dtype: torch.dtype) -> None:
    """The last shape has more than 2^31 entries. Some rows are compared with float64; two calls give equal bits."""
    b, S, D = shape
    x, w = (unit(torch.randn(n, D, device="cuda")).to(dtype) for n in (b, S))
    slot = torch.randint(0, S, (b, 1), device="cuda")
    own = torch.rand(b, 1, device="cuda") < 0.5

    def make() -> Exponentials:
        if method == "fused":
            return exponentials(x, w, slot, own, scale=64.0, shift=0.0)
        return exponentials_(x.half() @ w.half().T, slot, own, scale=64.0, shift=0.0)

    got = make()
    assert got.matrix is not None and got.largest is not None
    rows = torch.tensor([0, 1, b // 2, b - 2, b - 1], device="cuda")
    cos = x[rows].double() @ w.double().T
    cos[own[rows, 0].nonzero()[:, 0], slot[rows, 0][own[rows, 0]]] = -torch.inf
    want = (64 * cos).exp()
    assert relative(got.matrix[rows], want.cpu()) < 5e-3
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.0065 + (method == "in-place") * 64 * 2**-11
    torch.testing.assert_close(got.sums[rows].double().log(), want.sum(1).log(), rtol=0, atol=tolerance)
    torch.testing.assert_close(got.largest[rows].double(), cos.amax(1), rtol=0, atol=1e-3)
    matrix = got.matrix.clone()
    again = make()
    assert torch.equal(again.sums, got.sums) and again.matrix is not None and torch.equal(again.matrix, matrix)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 131072, 512), (8200, 131016, 640), (36000, 65536, 768)], ids=str)
def test_nearest_at_the_shapes_of_the_bench(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    b, K, D = shape
    x, c = (unit(torch.randn(n, D, device="cuda")).to(dtype) for n in (b, K))
    for precision in ("ieee", "tf32x3") if dtype == torch.float32 else ("ieee",):
        value, label = nearest(x, c, precision=precision)
        for rows in (slice(0, 64), slice(b - 64, b)):
            similarity = x[rows].double() @ c.double().T
            torch.testing.assert_close(value[rows].double(), similarity.amax(1), rtol=0, atol=2e-6)
            assert bool((similarity.gather(1, label[rows, None])[:, 0] >= similarity.amax(1) - 2e-6).all())
        again = nearest(x, c, precision=precision)
        assert torch.equal(again[0], value) and torch.equal(again[1], label)


@pytest.mark.gpu
@on_a_gpu
def test_the_statistics_of_the_tiles_stay_small_with_many_classes() -> None:
    x, w = torch.ones(4096, 64, device="cuda").half() / 8, torch.ones(1 << 22, 64, device="cuda").half() / 8
    slot, own = torch.zeros(2, 4096, 1, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = exponentials(x, w, slot.long(), own.bool(), scale=1.0, shift=0.0, store=False)
    assert got.matrix is None and torch.cuda.max_memory_allocated() - before < 300 << 20
    torch.testing.assert_close(got.sums, torch.full_like(got.sums, math.e * (1 << 22)), rtol=1e-5, atol=0)


@pytest.mark.gpu
@on_a_gpu
def test_the_table_has_tiles_for_this_device() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for width in (512, 768, 1024):
            assert tiles_for(torch.device("cuda"), dtype, width).forward.rows >= 16
