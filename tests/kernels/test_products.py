"""Products of the PyTorch engine: oneDNN's and MKL's against float64, and when oneDNN is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megacid_kernels import products
from megacid_kernels.products import tiles, times, times_transposed, transposed_times

SHAPES = [(128, 2048, 512), (128, 256, 80), (1, 4096, 256), (640, 3, 128), (3, 640, 512)]  # M, N, K: K is summed


@pytest.fixture(params=["onednn", "mkl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: name == "onednn")
    monkeypatch.setattr(products, "_MIN_PRODUCTS", 0)
    return name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of oneDNN's products, on a CPU where it is faster."""
    shapes, multiply = [], products._onednn

    def counted(a: Tensor, b: Tensor) -> Tensor:
        product = multiply(a, b)
        shapes.append(tuple(product.shape))
        return product

    monkeypatch.setattr(products, "_onednn", counted)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    return shapes


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert float((got - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products_are_those_of_float64(m: int, n: int, k: int, library: str) -> None:
    a, b, total = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    exact = a.double() @ b.double().T
    assert_near(times_transposed(a, b), exact)
    wider = torch.full((m, n + 3), torch.nan)
    times_transposed(a, b, out=wider[:, 1 : n + 1])
    assert_near(wider[:, 1 : n + 1].contiguous(), exact)
    assert wider[:, [0, -2, -1]].isnan().all()
    assert_near(times(a, b.T.contiguous()), exact)
    sum_of_both = total.clone()
    assert times(a, b.T.contiguous(), sum_of_both) is sum_of_both
    assert_near(sum_of_both, exact + total)
    for add in (False, True):
        out = total.clone() if add else torch.full_like(total, torch.nan)
        transposed_times(a.T.contiguous(), b.T.contiguous(), out=out, add=add)
        assert_near(out, exact + add * total)


def test_equal_calls_give_equal_bits(library: str) -> None:
    a, b = torch.randn(128, 512), torch.randn(2048, 512)
    first = times_transposed(a, b)
    assert all(torch.equal(times_transposed(a, b), first) for _ in range(5))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 4), (5, 0, 4), (5, 4, 0)])
def test_empty_factors_have_empty_or_zero_products(m: int, n: int, k: int) -> None:
    a, b = torch.randn(m, k), torch.randn(n, k)
    assert torch.equal(times_transposed(a, b), torch.zeros(m, n))
    assert torch.equal(times(a, b.T), torch.zeros(m, n))
    out = torch.full((m, n), torch.nan)
    transposed_times(a.T, b.T, out=out, add=False)
    assert torch.equal(out, torch.zeros(m, n))


@pytest.mark.parametrize(
    ("count", "size", "lengths"),
    [
        (5000, 2048, [2048, 2048, 896, 8]),
        (4096, 2048, [2048, 2048]),
        (100, 2048, [100]),
        (300, 200, [200, 56, 44]),
        (0, 2048, []),
    ],
)
def test_tiles_have_few_lengths_that_are_multiples_of_128(count: int, size: int, lengths: list[int]) -> None:
    parts = tiles(count, size)
    assert [part.stop - part.start for part in parts] == lengths
    assert torch.equal(torch.cat([torch.arange(count)[part] for part in [*parts, slice(0, 0)]]), torch.arange(count))


def test_large_whole_fp32_factors_go_to_onednn(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(64, 256), torch.randn(512, 256)
    times_transposed(a, b)
    assert calls == [(64, 512)]
    parts_of_rows = torch.randn(512, 300)[:, :256]
    for x, w in ((a.double(), b.double()), (a[:4], b), (a, parts_of_rows), (a, torch.randn(500, 256))):
        times_transposed(x, w)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    times_transposed(a, b)
    assert len(calls) == 1
