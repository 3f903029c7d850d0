"""The published scheme that tools/bench.py compares with must be what it claims to be, defects included: otherwise the
comparison flatters us."""

from __future__ import annotations

import math

import pytest
import torch
from harness import run_ranks
from torch import Tensor

from benchmarks.published_partial_fc import PROBABILITY_FLOOR, EagerPartialFC
from megacid_kernels.margin import Margin
from megacid_kernels.reference import discrimination_reference


def problem(batch: int = 12, classes: int = 37, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """emb, weight in float64 and labels with a duplicate; losses between 0 and the floor's."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(classes, width, generator=g, dtype=torch.float64)
    target = torch.randint(0, classes, (batch,), generator=g)
    target[1] = target[0]
    emb = weight[target] + torch.randn(batch, width, generator=g, dtype=torch.float64)
    return emb, weight, target


def loss_and_grads(emb: Tensor, weight: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    head = EagerPartialFC(*weight.shape, init=weight, **options)  # type: ignore[arg-type]
    x = emb.clone().requires_grad_()
    loss = head(x, target)
    loss.backward()
    assert x.grad is not None and head.weight.grad is not None
    return loss.detach(), x.grad, head.weight.grad


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_loss_and_gradients_are_those_of_float64_autograd(tuned: bool, dtype: torch.dtype, tolerance: float) -> None:
    emb, weight, target = problem()
    got = loss_and_grads(emb.to(dtype), weight.to(dtype), target, tuned=tuned)
    x, w = emb.requires_grad_(), weight.requires_grad_()
    want, _ = discrimination_reference(x, w, target, margin=Margin.cosface(0.3), scale=64.0)
    want.backward()
    assert x.grad is not None and w.grad is not None
    for value, exact in zip(got, (want.detach(), x.grad, w.grad)):
        assert float((value.double() - exact).norm() / exact.norm()) < tolerance


def test_a_scaled_loss_scales_the_gradient() -> None:
    emb, weight, target = problem()
    for tuned in (False, True):
        head = EagerPartialFC(*weight.shape, init=weight, tuned=tuned)
        head(emb, target).backward()
        once, head.weight.grad = head.weight.grad, None
        (head(emb, target) * 3).backward()
        torch.testing.assert_close(head.weight.grad, once * 3)


def test_sampling_keeps_the_positives_and_equals_the_reference_on_the_sampled_rows() -> None:
    emb, weight, target = problem()
    loss, _, grad = loss_and_grads(emb, weight, target, sample_rate=0.5)
    rows = grad.abs().sum(1).nonzero()[:, 0]
    assert len(rows) == int(0.5 * len(weight)) and set(target.tolist()) <= set(rows.tolist())
    slot = torch.searchsorted(rows, target)
    want, _ = discrimination_reference(emb, weight[rows], slot, margin=Margin.cosface(0.3), scale=64.0)
    torch.testing.assert_close(loss, want)


def test_more_classes_in_the_batch_than_the_rate_allows_are_all_kept() -> None:
    emb, weight, target = problem()
    _, _, grad = loss_and_grads(emb, weight, target, sample_rate=0.1)
    assert grad.abs().sum(1).nonzero()[:, 0].tolist() == sorted(set(target.tolist()))


def test_gradient_is_dense_so_the_optimizer_moves_rows_that_no_step_sampled() -> None:
    emb, weight, target = problem()
    head = EagerPartialFC(*weight.shape, sample_rate=0.5, init=weight)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.5)
    head(emb, target).backward()
    grad = head.weight.grad
    assert grad is not None and grad.layout == torch.strided and grad.shape == weight.shape
    unused = grad.abs().sum(1) == 0
    assert int(unused.sum()) == len(weight) - int(0.5 * len(weight))
    optimizer.step()
    assert bool((head.weight[unused] != weight[unused]).any(1).all())


def test_loss_of_a_hopeless_sample_ends_at_the_floor() -> None:
    weight = torch.eye(4)
    emb, target = -weight[:1] + 1e-3, torch.tensor([0])
    exact, _ = discrimination_reference(emb.double(), weight.double(), target, margin=Margin.cosface(0.3), scale=128.0)
    loss, _, _ = loss_and_grads(emb, weight, target, scale=128.0)
    assert float(exact) > 100
    assert float(loss) == pytest.approx(-math.log(PROBABILITY_FLOOR)) == pytest.approx(69.0776, abs=1e-4)


def test_a_label_out_of_range_is_silently_no_class() -> None:
    emb, weight, target = problem()
    target[2] = len(weight)
    loss, _, _ = loss_and_grads(emb, weight, target)
    others = target != target[2]
    alone = loss_and_grads(emb[others], weight, target[others])[0]
    floor = -math.log(PROBABILITY_FLOOR)
    assert float(loss) == pytest.approx((float(alone) * int(others.sum()) + floor) / len(target))


def _on_rank() -> tuple[Tensor, Tensor, Tensor]:
    emb, weight, target = problem()
    part = slice(torch.distributed.get_rank(), None, 2)
    return loss_and_grads(emb[part], weight, target[part])


def test_two_ranks_equal_one_process() -> None:
    emb, weight, target = problem()
    loss, grad_emb, grad_weight = loss_and_grads(emb, weight, target)
    ranks = run_ranks(_on_rank, 2)
    for rank, (rank_loss, rank_emb, _) in enumerate(ranks):
        torch.testing.assert_close(rank_loss, loss)
        # Times the number of ranks: the data-parallel engine takes the mean of the student's gradients.
        torch.testing.assert_close(rank_emb, 2 * grad_emb[rank::2])
    torch.testing.assert_close(torch.cat([weight_grad for _, _, weight_grad in ranks]), grad_weight)
