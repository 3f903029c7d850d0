"""linear_margin_cross_entropy as a torch operator: opcheck, torch.compile, torch.export, and its errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from megacid import Margin
from megacid_kernels import (
    LossSpec,
    discrimination_with_gradients,
    linear_margin_cross_entropy,
    linear_margin_discrimination,
)

# Fake tensors announce a CUDA device to autograd even where there is none. It starts a thread per device at the first
# backward, and a process with such threads cannot fork ranks that go backward: so the first one is before all of them.
torch.ones(1, requires_grad=True).sum().backward()


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, 6, generator=g, dtype=dtype) for n in (9, 14))
    return x, w, torch.tensor([0, 3, 3, -1, 13, 5, 0, 1, 2])


def arguments(*, need_x: bool, need_w: bool, **changes: Any) -> tuple[Any, ...]:
    x, w, target = tensors()
    values: dict[str, Any] = {
        "x": x.requires_grad_(need_x), "w": w.requires_grad_(need_w), "target": target, "rows": None, "bias": None,
        "m1": 1.0, "m2": 0.4, "m3": 0.1, "easy_margin": False, "margin_grad": "exact", "scale": 16.0,
        "filter_threshold": None, "num_classes": 14, "class_start": 0, "max_rows": None, "reduction": "mean",
        "group": "", "impl": "auto", "weight_grad": "auto", "precision": "auto", "memory_budget_bytes": None,
        "labels_loss": "mlcd",
        "need_x": need_x, "need_w": need_w,
    }  # fmt: skip
    return tuple((values | changes).values())


@pytest.mark.parametrize(("need_x", "need_w"), [(True, True), (False, False), (True, False)])
def test_opcheck_finds_nothing(need_x: bool, need_w: bool) -> None:
    operator = torch.ops.megacid_kernels.linear_margin_cross_entropy.default
    torch.library.opcheck(operator, arguments(need_x=need_x, need_w=need_w))
    changes = {"rows": torch.arange(14), "bias": torch.rand(14), "weight_grad": "recomputed", "filter_threshold": 0.2}
    torch.library.opcheck(operator, arguments(need_x=need_x, need_w=need_w, **changes), test_utils="test_faketensor")


class Head(nn.Module):
    """A projection before the operator and arithmetic after it, so that there is a graph on both sides."""

    def __init__(self) -> None:
        super().__init__()
        x, w, _ = tensors(1)
        self.project, self.weight = nn.Parameter(x[:6].clone()), nn.Parameter(w)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss = linear_margin_cross_entropy(
            x @ self.project, self.weight, target, margin=Margin(m2=0.3, m3=0.1), scale=16.0, filter_threshold=0.9
        )
        return 2 * loss + self.weight.square().mean()


def test_compiled_without_a_graph_break_the_gradients_are_the_same() -> None:
    x, _, target = tensors()
    results = []
    for wrap in (lambda head: head, lambda head: torch.compile(head, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        head, given = Head(), x.clone().requires_grad_()
        call: Callable[..., Tensor] = wrap(head)
        loss = call(given, target)
        loss.backward()
        with torch.no_grad():
            evaluated = call(given, target)
        torch.testing.assert_close(evaluated, loss.detach())
        results.append((loss.detach(), given.grad, head.project.grad, head.weight.grad))
    torch.testing.assert_close(results[1], results[0])
    assert float(results[0][1].norm()) > 0.1


def test_exported_it_is_one_node() -> None:
    x, _, target = tensors()
    program = torch.export.export(Head().eval(), (x, target), strict=False)
    names = [str(node.target) for node in program.graph.nodes if "megacid" in str(node.target)]
    assert names == ["megacid_kernels.linear_margin_cross_entropy.default"]
    torch.testing.assert_close(program.module()(x, target), Head()(x, target))


def test_a_margin_of_another_class_gives_the_same_numbers() -> None:
    class Other:
        def target(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            return Margin.arcface(0.4).target(cos, sin)

    results = []
    for margin in (Margin.arcface(0.4), Other()):
        x, w, target = (t.requires_grad_() if t.is_floating_point() else t for t in tensors())
        loss = linear_margin_cross_entropy(x, w, target, margin=margin, scale=16.0)
        loss.backward()
        results.append((loss.detach(), x.grad, w.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "triton"}, "impl is 'triton' with tensors on cpu"),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of"),
        ({"precision": "fp16"}, "precision is 'fp16' with impl 'torch'"),
        ({"scale": 200.0}, r"scale is 200.0 with 14 classes .* <= 160"),
        ({"weight_grad": "recomputed", "memory_budget_bytes": 8}, r"memory_budget_bytes is 8, expected at least \d+"),
        ({"target": torch.full((9,), 14)}, "target holds 14, expected -1 .* to 13"),
        ({"target": torch.full((9,), -2)}, "target holds -2"),
        ({"x": torch.zeros(9, 6, dtype=torch.int64)}, r"x is torch\.int64, expected a floating-point dtype"),
    ],
)
def test_what_cannot_be_used_is_named(change: dict[str, Any], message: str) -> None:
    x, w, target = tensors()
    with pytest.raises(ValueError, match=message):
        linear_margin_cross_entropy(**({"x": x, "w": w, "target": target} | change))


def test_tensors_on_two_devices_are_refused() -> None:
    x, w, target = tensors()
    with pytest.raises(ValueError, match="target is on meta, expected cpu like x"):
        discrimination_with_gradients(x, w, target.to("meta"), LossSpec(num_classes=14))


def test_without_triton_auto_on_cuda_is_pytorch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from megacid_kernels.engines import dispatch

    monkeypatch.setattr(dispatch, "_why_no_triton", lambda: "No module named 'triton'")
    dispatch._warn_once.cache_clear()
    cuda = torch.device("cuda")
    with pytest.warns(UserWarning, match="No module named 'triton'") as caught:
        chosen = [dispatch.resolve("auto", cuda, torch.float32) for _ in range(3)]
    assert chosen == ["torch"] * 3 and len(caught) == 1
    with pytest.raises(ValueError, match="Triton cannot be imported"):
        dispatch.resolve("triton", cuda, torch.float32)
    monkeypatch.setattr(dispatch, "_why_no_triton", lambda: None)
    assert dispatch.resolve("auto", cuda, torch.bfloat16) == "triton"
    assert dispatch.resolve("auto", cuda, torch.float64) == "torch"
    with pytest.raises(ValueError, match=r"torch\.float64, expected float32 or 16 bits"):
        dispatch.resolve("triton", cuda, torch.float64)


def test_several_labels_and_no_rows_are_allowed() -> None:
    x, w, target = tensors()
    several = torch.stack([target, target.roll(1)], 1)
    got = linear_margin_cross_entropy(x, w, several, scale=16.0)
    expected = linear_margin_discrimination(x, w, several, LossSpec(num_classes=14, scale=16.0)).loss
    assert torch.equal(got, expected)
    assert float(linear_margin_cross_entropy(x, w[:0], target.fill_(-1), num_classes=14)) == 0


def on_a_rank(explicit: bool, compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, x's gradient summed over the ranks, this shard's gradient of w) of 14 classes in uneven shards."""
    x, w, target = tensors(dtype=torch.float64)
    group, start, stop = None, 0, 14
    if dist.is_initialized():
        group = dist.new_group([0, 1]) if explicit else None
        start, stop = ((0, 9), (9, 14))[dist.get_rank()]
    w = w[start:stop].clone().requires_grad_()
    x.requires_grad_()

    def loss_of(x: Tensor, w: Tensor) -> Tensor:
        return linear_margin_cross_entropy(
            x,
            w,
            target,
            margin=Margin.cosface(0.2),
            scale=16.0,
            group=group,
            class_start=start,
            num_classes=14,
            max_rows=9,
        )

    loss = (torch.compile(loss_of, fullgraph=True, backend="aot_eager") if compiled else loss_of)(x, w)
    loss.backward()
    assert x.grad is not None and w.grad is not None
    if dist.is_initialized():
        dist.all_reduce(x.grad)
    return loss.detach(), x.grad, w.grad


@pytest.mark.parametrize(("explicit", "compiled"), [(False, False), (True, False), (False, True)])
def test_the_group_is_found_by_its_name(explicit: bool, compiled: bool) -> None:
    expected = on_a_rank(False, False)
    parts = run_ranks(on_a_rank, 2, explicit, compiled)
    for loss, x, _ in parts:
        torch.testing.assert_close((loss, x), expected[:2])
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), expected[2])


def test_without_values_the_loss_is_the_operator() -> None:
    """On the meta device, with fake tensors and while make_fx traces."""
    x, w, target = tensors()

    def loss_of(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return linear_margin_cross_entropy(x, w, target, margin=Margin(m3=0.1), scale=16.0)

    assert loss_of(*(t.to("meta") for t in (x, w, target))).is_meta
    with FakeTensorMode() as mode:
        assert loss_of(*(mode.from_tensor(t) for t in (x, w, target))).shape == ()
    graph = make_fx(loss_of)(x, w, target)
    assert sum("linear_margin_cross_entropy" in str(node.target) for node in graph.graph.nodes) == 1
    assert torch.equal(graph(x, w, target), loss_of(x, w, target))


def test_a_margin_of_a_derived_class_is_obeyed_in_a_graph_as_outside() -> None:
    class Double(Margin):
        def target(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * cos, torch.full_like(cos, 2.0)

    (x, w, target), margin = tensors(), Double()

    def loss_of(x: Tensor) -> Tensor:
        return linear_margin_cross_entropy(x, w, target, margin=margin, scale=16.0)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(loss_of, backend="aot_eager")(x), loss_of(x))
