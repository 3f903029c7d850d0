"""The flat reduction of gradients: the sums and weights of DeepSpeed's own, at ZeRO 0 and 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from harness import run_ranks
from torch import Tensor, nn

from megacid.config.load import load_run
from megacid.distributed.collectives import reduce_scatter_flat
from megacid.distributed.reduction import _Replicated, is_left_open, norm_sq


def _replicated() -> tuple[list[Tensor], float]:
    used, unused = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.ones(5))
    reduction = _Replicated([used, unused], 1 / dist.get_world_size(), None)
    for _ in range(2):  # the buffer holds the last step's values
        used.grad = torch.full((3, 2), 2.0 ** dist.get_rank())
        unused.grad = None
        reduction.reduce()
    return [p.grad for p in (used, unused)], float(reduction.norm())  # type: ignore[misc]


@pytest.mark.parametrize(("world", "mean"), [(1, 1.0), (2, 1.5)])
def test_gradients_are_averaged_and_a_parameter_without_one_gets_zeros(world: int, mean: float) -> None:
    # torch's AdamW leaves out a parameter without a gradient, whose weight would not decay.
    for (used, unused), norm in run_ranks(_replicated, world):
        assert torch.equal(used, torch.full((3, 2), mean)) and torch.equal(unused, torch.zeros(5))
        assert norm == pytest.approx(mean * 6**0.5)


def _scattered() -> Tensor:
    world, rank = dist.get_world_size(), dist.get_rank()
    x = (rank + 1) * torch.arange(world * 4, dtype=torch.float32)
    return reduce_scatter_flat(x, torch.empty(4), received=torch.empty(world * 4 + 3))


@pytest.mark.parametrize("world", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_each_rank_gets_the_sum_of_its_part(world: int) -> None:
    total = sum(range(1, world + 1)) * torch.arange(world * 4, dtype=torch.float32)
    assert torch.equal(torch.cat(run_ranks(_scattered, world)), total)


def test_the_norm_of_a_large_gradient_has_seven_digits() -> None:
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=g) for shape in ((20_000, 64), (4096,), (7,), (64, 64, 3), ())]
    exact = torch.cat([grad.double().reshape(-1) for grad in grads]).norm()
    assert float(norm_sq(grads).sqrt()) == pytest.approx(float(exact), rel=1e-7)


DEEPSPEEDS_OWN: dict[int, dict[str, Any]] = {
    0: {"zero_optimization": {"stage": 0}, "communication_data_type": "fp32"},
    1: {"zero_optimization": {"stage": 1, "overlap_comm": False}},
}


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3))])
@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_run_ends_with_the_weights_of_deepspeeds_own_reduction(tmp_path: Path, stage: int, world: int) -> None:
    toy.write_features(tmp_path / "features")
    changes = {"run__total_steps": 12, "train_batch_size": 24}
    ours = toy.run_file(tmp_path, "ours", **changes, zero_optimization={"stage": stage})
    theirs = toy.run_file(tmp_path, "theirs", **changes, **DEEPSPEEDS_OWN[stage])
    assert is_left_open(load_run(ours, [], world=world)) and not is_left_open(load_run(theirs, [], world=world))
    ends = []
    for file in (ours, theirs):
        assert toy.train_toy(world, file) == [0] * world
        ends.append(toy.tensors(tmp_path / "runs" / file.stem / "step-00000012"))
    assert ends[0].keys() == ends[1].keys()
    # Of every tensor's norm: AdamW enlarges the rounding of single numbers whose gradient is nearly zero. A mean over 3
    # ranks rounds otherwise.
    bound = 1e-6 if world < 3 else 1e-4
    for name, value in ends[0].items():
        expected = ends[1][name].double()
        assert float((value.double() - expected).norm()) <= bound * float(expected.norm()), name
