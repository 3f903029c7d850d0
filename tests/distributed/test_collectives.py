"""The collectives and their gradients, with batches that differ and batches that are empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks

from megacid.distributed.collectives import gather_plain, gather_rows, rank, sum_over_ranks
from megacid.distributed.consensus import agree, any_rank, broadcast_json, gather_json

SIZES = [[2, 2], [3, 0, 1], [0, 0, 2, 5], [0, 0]]


def own(sizes: list[int]) -> torch.Tensor:
    return torch.arange(sizes[rank()] * 3, dtype=torch.float32).reshape(-1, 3) + 100 * rank()


def gathered(sizes: list[int], grad_reduction: str, known: bool) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    x = own(sizes).requires_grad_()
    whole, found = gather_rows(x, grad_reduction=grad_reduction, sizes=sizes if known else None)  # type: ignore[arg-type]
    # Every rank weighs the rows differently: the gradient is the sum over ranks of the weights of one's own rows.
    weight = torch.arange(len(whole), dtype=torch.float32)[:, None] + 10.0 * (rank() + 1)
    (whole * weight).sum().backward()
    assert torch.equal(gather_plain(x, sizes=sizes if known else None), whole)
    return whole.detach(), x.grad if x.grad is not None else torch.zeros_like(x), found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("grad_reduction", ["mean", "sum"])
@pytest.mark.parametrize("known", [False, True])
def test_gathered_rows_get_the_sum_of_all_ranks_gradients(sizes: list[int], grad_reduction: str, known: bool) -> None:
    world = len(sizes)
    results = run_ranks(gathered, world, sizes, grad_reduction, known)
    wanted = [torch.arange(n * 3, dtype=torch.float32).reshape(-1, 3) + 100 * r for r, n in enumerate(sizes)]
    at, factor = 0, world if grad_reduction == "mean" else 1
    for r, (whole, grad, found) in enumerate(results):
        assert torch.equal(whole, torch.cat(wanted)) and found == sizes
        rows = torch.arange(at, at + sizes[r], dtype=torch.float32)[:, None]
        want = factor * (world * rows + 10.0 * sum(range(1, world + 1)))
        assert torch.equal(grad, want.expand(-1, 3))
        at += sizes[r]


def summed() -> tuple[float, float]:
    x = torch.tensor(float(rank() + 1), requires_grad=True)
    total = sum_over_ranks(x * 2)
    (total * 5).backward()
    return total.item(), float(x.grad)


def test_a_sum_over_ranks_passes_the_gradient_to_every_part() -> None:
    assert run_ranks(summed, 3) == [(12.0, 10.0)] * 3


def talk() -> tuple[Any, Any, bool, str]:
    said = gather_json({"rank": rank(), "text": "é" * rank()})
    heard = broadcast_json([1, None, "x"] if rank() == 0 else None)
    try:
        agree("same" if rank() < 2 else "other", "the weather")
    except RuntimeError as error:
        return said, heard, any_rank(rank() == 1), str(error)
    return said, heard, any_rank(rank() == 1), ""


def test_objects_travel_as_json_and_a_disagreement_names_who_holds_what() -> None:
    for said, heard, flag, error in run_ranks(talk, 3):
        assert said == [{"rank": r, "text": "é" * r} for r in range(3)] and heard == [1, None, "x"] and flag
        assert "the weather" in error and "'same' on rank 0, 1" in error and "'other' on rank 2" in error
