"""Clipping by one norm over a replicated student and sharded class rows, on 1 to 3 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from small_head import WIDTH, batch, make
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from megacid import PartialFC, RowSGD, clip_grad_norm_
from megacid.distributed.collectives import rank, world_size
from megacid.errors import UserError


def gradients(heads: int, grad_reduction: str, sample_rate: float) -> tuple[nn.Module, list[PartialFC]]:
    torch.manual_seed(3)
    student: nn.Module = nn.Linear(WIDTH, WIDTH)
    all_heads = [make(seed=n, sample_rate=sample_rate, grad_reduction=grad_reduction) for n in range(heads)]
    if dist.is_initialized() and grad_reduction == "mean":
        student = DistributedDataParallel(student)
    x, y = (part.chunk(world_size())[rank()] for part in batch(5))
    out = student(x)
    torch.stack([head(out, y) for head in all_heads]).sum().backward()
    if dist.is_initialized() and grad_reduction == "sum":
        for p in student.parameters():
            dist.all_reduce(p.grad)
    return student, all_heads


def dense_rows(head: PartialFC) -> Tensor:
    return torch.zeros_like(head.weight).index_copy_(0, *head.row_grad())


def clipped(max_norm: float, *options: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    student, heads = gradients(*options)
    norm = clip_grad_norm_(student.parameters(), heads if len(heads) > 1 else heads[0], max_norm)
    return norm, [p.grad for p in student.parameters() if p.grad is not None], [dense_rows(head) for head in heads]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    ("max_norm", "options"),
    [(0.1, (1, "mean", 0.3)), (0.1, (2, "sum", 1.0)), (1e6, (1, "mean", 0.3)), (float("inf"), (1, "mean", 1.0))],
)
def test_clipping_is_that_of_one_process_with_dense_gradients(
    world: int, max_norm: float, options: tuple[int, str, float]
) -> None:
    student, heads = gradients(*options)
    parameters = list(student.parameters())
    for head in heads:
        parameters.append(nn.Parameter(head.weight.clone()))
        parameters[-1].grad = dense_rows(head)
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    assert float(expected) > 1
    results = run_ranks(clipped, world, max_norm, *options)
    for norm, replicated, _ in results:
        assert torch.equal(norm, results[0][0])
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(replicated, [p.grad for p in student.parameters()], rtol=1e-5, atol=1e-6)
    for number, dense in enumerate(parameters[len(list(student.parameters())) :]):
        got = torch.cat([rows[number] for _, _, rows in results])
        torch.testing.assert_close(got, dense.grad, rtol=1e-5, atol=1e-6)


def clipped_with_a_sharded_student() -> tuple[Tensor, list[Tensor], Tensor]:
    torch.manual_seed(3)
    student, head = nn.Linear(WIDTH, WIDTH), make()
    fully_shard(student)
    x, y = (part.chunk(world_size())[rank()] for part in batch(5))
    head(student(x), y).backward()
    norm = clip_grad_norm_(student.parameters(), head, 0.1)
    assert type(norm) is Tensor
    return norm, [p.grad.full_tensor() for p in student.parameters()], dense_rows(head)  # type: ignore[union-attr]


def test_clipping_sums_the_norms_of_the_shards_of_fsdp() -> None:
    expected, replicated, (rows,) = clipped(0.1, 1, "mean", 1.0)
    results = run_ranks(clipped_with_a_sharded_student, 2)
    for norm, grads, _ in results:
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(grads, replicated, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([own for *_, own in results]), rows, rtol=1e-5, atol=1e-6)


def test_clipping_a_recomputed_gradient_stores_no_matrix() -> None:
    heads = [make(weight_grad=weight_grad, sample_rate=0.4) for weight_grad in ("stored", "recomputed")]
    optimizers = [RowSGD(head) for head in heads]
    for head, optimizer in zip(heads, optimizers):
        head(*batch()).backward()
        for max_norm in (0.5, 0.1):  # the second factor comes on top of the first
            assert float(clip_grad_norm_([], head, max_norm)) > max_norm
        torch.testing.assert_close(head.grad_norm_sq().sqrt(), torch.tensor(0.1), rtol=1e-4, atol=0)
        optimizer.step()
    assert type(heads[1]._row_grad).__name__ == "RecomputedRowGradient"
    torch.testing.assert_close(heads[0].weight, heads[1].weight)


def test_a_max_norm_that_is_no_number_is_refused_and_nothing_to_clip_is_zero() -> None:
    head = make()
    for max_norm in (-1.0, float("nan")):
        with pytest.raises(UserError, match=r"max_norm is .*, expected a number >= 0"):
            clip_grad_norm_([], head, max_norm)
    assert float(clip_grad_norm_(nn.Linear(2, 2).parameters(), [], 1.0)) == 0
    assert float(clip_grad_norm_(head.weight, head, 1.0)) == 0


def test_torchs_own_clipping_of_the_optimizers_parameters_clips_this_ranks_rows() -> None:
    try:
        torch.linalg.vector_norm(torch.eye(2).to_sparse())
    except NotImplementedError:
        pytest.skip("this PyTorch has no norm of sparse gradients")
    head = make()
    optimizer = RowSGD(head)
    head(*batch()).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
    torch.testing.assert_close(head.grad_norm_sq().sqrt(), torch.tensor(0.5), rtol=1e-4, atol=0)
    assert torch.nn.utils.clip_grad_norm_(head.parameters(), 0.1) == 0, "a model's walk leaves the shard alone"
