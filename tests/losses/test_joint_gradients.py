"""All terms together on several ranks: the loss and every gradient of a shared student equal one process's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_counter import CollectiveCounter
from harness import run_ranks

from megacid import PartialFC
from megacid.distributed.collectives import rank, world_size
from megacid.losses import ClusterDistillation, Objective

BATCH, WIDTH, CLASSES = 17, 8, 23
CUTS = {1: [0, 17], 2: [0, 4, 17], 3: [0, 9, 9, 17], 4: [0, 1, 6, 12, 17]}


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def step(grad_reduction: str, weights: dict[str, Any]) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    pixels, words = torch.randn(BATCH, 6, generator=g), torch.randn(BATCH, 5, generator=g)
    teacher_image, teacher_text = (unit(torch.randn(BATCH, WIDTH, generator=g)) for _ in range(2))
    label = torch.randint(-1, CLASSES, (BATCH,), generator=g)
    towers = {"image": torch.randn(6, WIDTH, generator=g), "text": torch.randn(5, WIDTH, generator=g)}
    student = {name: w.requires_grad_() for name, w in towers.items()}
    student |= {name: torch.tensor(value, requires_grad=True) for name, value in (("scale", 2.0), ("bias", -3.0))}
    head = PartialFC(
        CLASSES,
        WIDTH,
        init=torch.randn(CLASSES, WIDTH, generator=g),
        sample_rate=0.6,
        scale=12.0,
        grad_reduction=grad_reduction,
    )
    cluster = ClusterDistillation(head, alpha=1.0, beta=0.5, gamma=0.7, temperature=1.5)
    objective = Objective(**weights, cluster_loss=cluster, grad_reduction=grad_reduction)
    own = slice(*CUTS[world_size()][rank() : rank() + 2])
    out = SimpleNamespace(
        image=unit(pixels[own] @ student["image"]),
        text=unit(words[own] @ student["text"]),
        logit_scale=student["scale"].exp(),
        logit_bias=student["bias"],
    )
    batch = SimpleNamespace(label=label[own], teacher_image=teacher_image[own], teacher_text=teacher_text[own])
    loss, terms = objective(out, batch)
    loss.backward()
    grads = {}
    for name, p in student.items():
        # The engine's reduction of a replicated parameter.
        grads[name] = torch.zeros_like(p) if p.grad is None else p.grad
        if world_size() > 1:
            dist.all_reduce(grads[name])
        grads[name] = grads[name] / (world_size() if grad_reduction == "mean" else 1)
    return {"loss": loss.detach(), **terms, **grads, "rows": head.row_grad()[1]}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("grad_reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "weights",
    [
        {"instance": 1.0, "cluster": 0.5, "contrastive": 0.7, "mse": 0.3},
        {"instance": 0.0, "cluster": 1.0},
        {"instance": 1.0, "cluster": 0.0},
        {"instance": 0.0, "cluster": 0.0, "mse": 1.0},
        {"instance": 0.0, "cluster": 0.0, "affinity": 1.0, "affinity_temperature": 0.2},
        {"instance": 1.0, "cluster": 0.5, "contrastive": 0.7, "form": "sigmoid"},
    ],
    ids=["all", "cluster", "instance", "mse", "affinity", "sigmoid"],
)
def test_a_shared_student_gets_the_gradient_of_one_process(
    world: int, grad_reduction: str, weights: dict[str, Any]
) -> None:
    expected = step(grad_reduction, weights)
    results = run_ranks(step, world, grad_reduction, weights)
    for part in results:
        for name, value in expected.items():
            if name != "rows":
                torch.testing.assert_close(part[name], value, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    rows, size = torch.cat([part["rows"] for part in results]), expected["rows"].abs().sum(0).clamp_min(1).max()
    torch.testing.assert_close(rows / size, expected["rows"] / size, rtol=2e-6, atol=2e-6)


def sizes_exchanged() -> int:
    with CollectiveCounter() as counter:
        step("mean", {"instance": 1.0, "cluster": 0.5, "contrastive": 0.7, "mse": 0.3})
    return [call.size for call in counter.calls].count(8 * world_size())


def test_unequal_batches_exchange_their_sizes_once() -> None:
    assert run_ranks(sizes_exchanged, 2) == [1, 1]
