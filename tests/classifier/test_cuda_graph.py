"""Steps of the classifier from a CUDA graph: the same bits, and an error wherever a replay would be wrong.

A CPU has no graphs. There `capture` is replaced by one that computes again in place, as a replay does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megacid import Margin, PartialFC, RowAdamW, clip_grad_norm_
from megacid.classifier import head_step
from megacid.errors import UserError
from megacid_kernels import Gradients, Weights

CLASSES, WIDTH, BATCH = 5000, 64, 48


def capture_on_cpu(function: Callable[[], Gradients], pool: Any) -> tuple[Gradients, Callable[[], None]]:
    outputs = function()

    def replay() -> None:
        again = function()
        pairs = zip((*outputs.result, outputs.x, outputs.w), (*again.result, again.x, again.w))
        for old, new in pairs:
            if old is not None and new is not None:
                old.copy_(new)

    return outputs, replay


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(head_step, "capture", capture_on_cpu)
        monkeypatch.setattr(head_step, "graph_pool", lambda weight: "pool")
    return str(request.param)


def batch(step: int, device: str, count: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Labels repeat in odd steps, so the number of rows varies."""
    g = torch.Generator().manual_seed(step)
    x, teacher = (torch.randn(count, WIDTH, generator=g).to(device) for _ in range(2))
    y = torch.randint(-1, 9 if step % 2 else CLASSES, (count,), generator=g)
    return x.requires_grad_(), y.to(device), teacher


def head_of(device: str, cuda_graph: bool, **options: Any) -> PartialFC:
    settings = {"sample_rate": 0.2, "static_shapes": True, "margin": Margin.arcface(0.2), **options}
    return PartialFC(CLASSES, WIDTH, scale=16.0, device=device, cuda_graph=cuda_graph, **settings)


def trained(device: str, cuda_graph: bool, weights: Weights, options: dict[str, Any]) -> dict[str, Any]:
    head = head_of(device, cuda_graph, **options)
    optimizer, seen = RowAdamW(head, lr=0.02), []
    for step in range(5):
        x, y, teacher = batch(step, device)
        out = head.discriminate(x, y, teacher_BD=teacher, weights=weights)
        (3 * out.loss).backward()
        norm = clip_grad_norm_([], head, 0.5)
        seen.append([*out, norm, x.grad, *head.metrics().values()])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen[-1].append(head.eval()(x, y))
        head.train()
    return {"steps": seen, "weight": head.weight.detach(), **optimizer.state_rows()}


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        (Weights(), {}),
        (Weights(0.4, 0.6, 1.0, 2.0), {"filter_threshold": 0.1, "log_q": True}),
        (Weights(), {"feature_rate": 0.5}),
        (Weights(), {"sample_rate": 1.0, "static_shapes": False}),
        (Weights(), {"impl": "torch"}),
    ],
    ids=["cross entropy", "three terms", "features", "all rows", "torch"],
)
def test_replayed_steps_are_the_computed_ones_bit_for_bit(
    weights: Weights, options: dict[str, Any], device: str
) -> None:
    got, expected = (trained(device, graph, weights, options) for graph in (True, False))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_each_of_two_shapes_is_captured_once_in_five_steps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captures, capture = [], head_step.capture
    monkeypatch.setattr(head_step, "capture", lambda *given: captures.append(1) or capture(*given))
    trained(device, True, Weights(), {})
    assert len(captures) == 2


def refusal(head: PartialFC, *given: Tensor) -> str:
    with pytest.raises(UserError) as error:
        head(*given)
    return str(error.value)


def test_changing_shapes_are_refused_by_name(device: str) -> None:
    head = head_of(device, True)
    x, y, _ = batch(0, device)
    head(x, y).backward()
    head.zero_grad()
    expected = f"emb is ({BATCH - 1}, {WIDTH}, torch.float32) with cuda_graph True, expected ({BATCH}, {WIDTH}, "
    assert refusal(head, x[1:], y[1:]).startswith(expected)
    assert refusal(head, x.detach(), y).startswith("requires_grad of the embeddings is False with cuda_graph True")
    with pytest.raises(UserError, match=r"^loss is LossSpec"):
        head.discriminate(x, y, teacher_BD=x.detach(), weights=Weights(0.5))


def test_a_gradient_that_the_next_step_would_overwrite_is_refused(device: str) -> None:
    head = head_of(device, True)
    x, y, _ = batch(0, device)
    first, second = head(x, y), head(x, y)
    with pytest.raises(UserError, match="after its next forward with cuda_graph True, expected before"):
        first.backward()
    second.backward()
    assert refusal(head, x, y).startswith("forward of the classifier before zero_grad with cuda_graph True")
    head.zero_grad()
    twin = copy.deepcopy(head)
    losses = [one(x, y) for one in (head, twin)]
    for loss in losses:
        loss.backward()  # each from its own graph
    assert torch.equal(losses[0], losses[1]) and torch.equal(head.row_grad()[1], twin.row_grad()[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"static_shapes": False}, "sample_rate is 0.2 with cuda_graph True, expected 1, or static_shapes True"),
        ({"weight_grad": "recomputed"}, "weight_grad is 'recomputed' with cuda_graph True, expected 'stored'"),
    ],
)
def test_a_head_whose_shapes_do_not_repeat_gets_no_graph(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        head_of("cpu", True, **options)


def test_a_cpu_has_no_graphs() -> None:
    assert refusal(head_of("cpu", True), *batch(0, "cpu")[:2]).startswith("cuda_graph is True on cpu, expected a CUDA")
