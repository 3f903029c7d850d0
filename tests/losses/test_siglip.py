"""The sigmoid form of the contrastive and the instance term is the loss of open_clip's SigLipLoss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor

from megacid.distributed.collectives import rank, world_size
from megacid.errors import UserError
from megacid.losses import Objective, contrastive_loss, instance_loss

BATCH, WIDTH = 12, 8
TERMS = {"contrastive": [("image_S", "text_S")], "instance": [("image_S", "text_T"), ("text_S", "image_T")]}


def whole_batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(4, BATCH, WIDTH, generator=g), dim=-1)
    return dict(zip(("image_S", "text_S", "image_T", "text_T"), rows))


def step(term: str, ours: bool) -> dict[str, Tensor]:
    """Value and gradients of the sum over ranks: of this rank's embeddings, and of the replicated scale and bias."""
    from open_clip.loss import SigLipLoss

    size = BATCH // world_size()
    own = slice(rank() * size, (rank() + 1) * size)
    local = {name: x[own].clone().requires_grad_(name.endswith("S")) for name, x in whole_batch().items()}
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -9.0))
    if ours:
        out = SimpleNamespace(image=local["image_S"], text=local["text_S"], logit_scale=scale, logit_bias=bias)
        batch = SimpleNamespace(label=None, teacher_image=local["image_T"], teacher_text=local["text_T"])
        weights = {"instance": 0.0, "cluster": 0.0, term: 1.0}
        loss = Objective(**weights, form="sigmoid", grad_reduction="mean")(out, batch)[0]
    else:
        theirs = SigLipLoss(rank=rank(), world_size=world_size())  # its default: exchange with both neighbours
        loss = torch.stack([theirs(local[a], local[b], scale, bias) for a, b in TERMS[term]]).sum()
    loss.backward()
    value, replicated = loss.detach().clone(), {"scale": scale.grad, "bias": bias.grad}
    if world_size() > 1:  # DistributedDataParallel averages over the ranks
        for x in [*replicated.values(), *([] if ours else [value])]:
            dist.all_reduce(x)
            x /= world_size()
    grads = {name: x.grad for name, x in local.items() if x.grad is not None}
    return {"loss": value, **replicated, **grads}  # type: ignore[dict-item]


def both(term: str) -> list[dict[str, Tensor]]:
    return [step(term, ours) for ours in (True, False)]


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("term", TERMS)
def test_loss_and_gradients_are_those_of_open_clip(term: str, world: int) -> None:
    pytest.importorskip("open_clip.loss")
    for mine, theirs in run_ranks(both, world, term):
        assert mine.keys() == theirs.keys() and len(mine) == 5
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_functions_compute_the_same_as_the_objective() -> None:
    x, scale, bias = whole_batch(), torch.tensor(10.0), torch.tensor(-9.0)
    contrastive = contrastive_loss(x["image_S"], x["text_S"], scale, logit_bias=bias)
    assert contrastive.item() == pytest.approx(step("contrastive", True)["loss"].item(), rel=1e-7)
    instance = instance_loss(*x.values(), scale, logit_bias=bias)  # type: ignore[misc]
    assert instance.item() == pytest.approx(step("instance", True)["loss"].item(), rel=1e-7)


def test_the_affinity_term_keeps_its_softmax_and_a_fixed_temperature_the_learned_bias() -> None:
    x = whole_batch()
    results: list[dict[str, Any]] = []
    for form in ("softmax", "sigmoid"):
        scale, bias = (torch.tensor(value, requires_grad=True) for value in (10.0, -9.0))
        out = SimpleNamespace(image=x["image_S"], text=x["text_S"], logit_scale=scale, logit_bias=bias)
        batch = SimpleNamespace(label=None, teacher_image=x["image_T"], teacher_text=x["text_T"])
        weights: dict[str, Any] = {"instance": 0.0, "cluster": 0.0, "contrastive": 1.0, "affinity": 1.0}
        loss, terms = Objective(**weights, form=form, temperature=0.2)(out, batch)
        if form == "sigmoid":
            loss.backward()
            assert scale.grad is None and bias.grad is not None and bias.grad.abs() > 1e-3
        results.append(terms)
    assert results[0]["affinity"] == results[1]["affinity"] and results[0]["contrastive"] != results[1]["contrastive"]


def test_another_form_is_refused() -> None:
    with pytest.raises(UserError, match=r'form is \'hinge\', expected "softmax" or "sigmoid"'):
        Objective(cluster=0, form="hinge")  # type: ignore[arg-type]
