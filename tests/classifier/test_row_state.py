"""Blocks of rows are read and written back exactly, and roots are rounded correctly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megacid.classifier.row_state import correctly_rounded_sqrt, read_rows, write_rows


@pytest.fixture(params=[1, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", [slice(3, 8), torch.tensor([0, 3, 4, 11])])
def test_a_block_of_rows_comes_back_to_its_rows_and_no_others(
    where: slice | torch.Tensor, dtype: torch.dtype, threads: int
) -> None:
    state = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = state.clone()
    expected[where] *= -2
    buffer = torch.empty(len(expected[where]), 5)
    version = state._version
    rows = read_rows(state, where, buffer)
    assert rows.dtype == torch.float32 and torch.equal(rows, state[where].float())
    write_rows(state, where, rows.mul_(-2).to(dtype))
    assert torch.equal(state, expected) and state._version > version


def test_square_roots_are_correctly_rounded_for_zeros_and_denormals_as_well(threads: int) -> None:
    """MKL's are not: a sixth of them is off in the last bit."""
    generator = torch.Generator().manual_seed(0)
    positive = torch.randint(0x7F800000, (1 << 16,), generator=generator, dtype=torch.int32)  # bits of finite numbers
    denormal = torch.randint(0x00800000, (1 << 10,), generator=generator, dtype=torch.int32)
    x = torch.cat([positive, denormal, torch.zeros(7, dtype=torch.int32)]).view(torch.float32)[:, None]
    out = torch.empty_like(x)
    assert correctly_rounded_sqrt(x, out) is out
    # Exact: 24 bits squared are 48 of float64's 53.
    rounded, beyond = out.double(), torch.nextafter(out, torch.full_like(out, torch.inf)).double()
    below = torch.nextafter(out, torch.zeros_like(out)).double()
    middle_above, middle_below = (rounded + beyond) / 2, (rounded + below) / 2
    assert bool((middle_above.square() >= x.double()).all()) and bool((middle_below.square() <= x.double()).all())
