"""The sharded classifier on 1 to 4 ranks equals one process: values, gradients, metrics, runs that change ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor

from megacid import Margin, PartialFC, RowAdamW, RowSGD
from megacid.classifier import head_step, partial_fc
from megacid.distributed.collectives import Gathered, gather_plain, gather_rows, rank, world_size
from megacid.errors import UserError
from megacid_kernels import Gradients, LossSpec, Weights

CLASSES, WIDTH, BATCH = 53, 12, 22  # 53 classes divide unevenly by 2, 3 and 4
CUTS = {1: [0, 22], 2: [0, 15, 22], 3: [0, 9, 9, 22], 4: [0, 3, 13, 14, 22]}  # uneven batches, one of them empty


def data(labels: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    w = torch.randn(CLASSES, WIDTH, generator=g)
    y = torch.randint(-1, CLASSES, (BATCH, labels), generator=g)
    y[0], y[7] = y[13], -1  # a label on two ranks, a sample without any
    x = w[y[:, 0].clamp_min(0)] * 0.5 + torch.randn(BATCH, WIDTH, generator=g)
    return x, y if labels > 1 else y[:, 0], torch.randn(BATCH, WIDTH, generator=g), w


def mine(*tensors: Tensor) -> list[Tensor]:
    cut = CUTS[world_size()]
    return [t[cut[rank()] : cut[rank() + 1]] for t in tensors]


def one_step(options: dict[str, Any], weights: Weights, labels: int) -> dict[str, Any]:
    """Loss, this rank's embedding gradient after the engine's reduction, row gradient and metrics."""
    x, y, teacher, w = data(labels)
    x, y, teacher = mine(x, y, teacher)
    head = PartialFC(CLASSES, WIDTH, init=w, scale=16.0, memory_budget_bytes=CLASSES * 4 * 9, **options)
    head.set_step(3)
    x = x.clone().requires_grad_()
    out = head.discriminate(x, y, teacher_BD=teacher, weights=weights)
    out.loss.backward()
    rows, grad = head.row_grad()
    # The engine takes the mean over ranks. A rank's embeddings are its own, so its part is grad / world.
    share = world_size() if options.get("grad_reduction", "mean") == "mean" else 1
    return {
        "loss": out.loss.detach(),
        "x": x.grad / share,
        "rows": rows + head.class_start,
        "w": grad,
        "norm_sq": head.grad_norm_sq(),
        "hits": head.hits,
        "metrics": head.metrics(),
    }


OPTIONS: list[tuple[str, dict[str, Any], Weights, int]] = [
    ("all", {"margin": Margin.arcface(0.3)}, Weights(), 1),
    ("sampled", {"sample_rate": 0.3, "margin": Margin.cosface(0.2)}, Weights(), 1),
    ("hardly", {"sample_rate": 0.02}, Weights(), 1),  # one draw: some ranks use only rows of labels
    ("log_q", {"sample_rate": 0.4, "log_q": True}, Weights(), 1),
    ("filter", {"filter_threshold": 0.2, "sample_rate": 0.6}, Weights(), 1),
    ("dims", {"feature_rate": 0.5, "sample_rate": 0.5}, Weights(), 1),
    ("three", {"sample_rate": 0.5, "margin": Margin.cosface(0.2)}, Weights(0.8, 0.5, 1.5, 2.0), 1),
    ("mlcd", {"sample_rate": 0.5, "margin": Margin.cosface(0.2)}, Weights(1.0, 0.5), 3),
    ("mean", {"sample_rate": 0.5, "log_q": True, "labels_loss": "mean"}, Weights(1.0, 0.5), 3),
]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("grad_reduction", ["mean", "sum"])
@pytest.mark.parametrize(("options", "weights", "labels"), [o[1:] for o in OPTIONS], ids=[o[0] for o in OPTIONS])
def test_ranks_with_uneven_classes_and_batches_equal_one_process(
    world: int, reduction: str, grad_reduction: str, options: dict[str, Any], weights: Weights, labels: int
) -> None:
    options = {**options, "reduction": reduction, "grad_reduction": grad_reduction}
    expected = one_step(options, weights, labels)
    results = run_ranks(one_step, world, options, weights, labels)
    near = {"rtol": 1e-6, "atol": 1e-6}
    for part in results:
        assert torch.equal(part["loss"], results[0]["loss"]), "the loss is one number"
        torch.testing.assert_close(part["loss"], expected["loss"], **near)
        for name, value in expected["metrics"].items():
            torch.testing.assert_close(part["metrics"][name], value, **near, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(torch.cat([part["rows"] for part in results]), expected["rows"]), "other classes were used"
    assert torch.equal(torch.cat([part["hits"] for part in results]), expected["hits"])
    for name in ("x", "w"):
        got, size = torch.cat([part[name] for part in results]), max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(got / size, expected[name] / size, **near)
    norm_sq = torch.stack([part["norm_sq"] for part in results]).sum()
    torch.testing.assert_close(norm_sq, expected["norm_sq"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
@pytest.mark.parametrize(
    ("options", "weights", "labels"), [o[1:] for o in OPTIONS[1:]], ids=[o[0] for o in OPTIONS[1:]]
)
def test_padded_rows_change_nothing(
    world: int, weight_grad: str, options: dict[str, Any], weights: Weights, labels: int
) -> None:
    results = []
    for static in (False, True):
        settings = {**options, "weight_grad": weight_grad, "static_shapes": static}
        results.append(run_ranks(one_step, world, settings, weights, labels))
    for got, expected in zip(results[1], results[0]):
        assert len(expected["rows"]) < (CLASSES + world - 1) // world, "nothing is padded"
        for name in ("rows", "hits"):
            assert torch.equal(got.pop(name), expected.pop(name))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def shapes_of_steps(static: bool) -> list[tuple[Any, ...]]:
    """(rows, shapes of the tensors that the kernels get, its bound for chunks) of 6 steps."""
    head, seen = PartialFC(20_000, 4, sample_rate=0.2, static_shapes=static, log_q=True), []
    compute, g = head_step.discrimination_with_gradients, torch.Generator().manual_seed(rank())

    def noted(x: Tensor, w: Tensor, target: Tensor, spec: LossSpec, **options: Any) -> Gradients:
        grads = compute(x, w, target, spec, **options)
        tensors = (x, w, target, options["rows"], options["bias"], grads.x, grads.w)
        seen.append((*(tuple(t.shape) for t in tensors if t is not None), spec.max_rows))
        return grads

    head_step.discrimination_with_gradients = noted
    try:
        for step in range(6):
            head.set_step(step)
            x = torch.randn(32, 4, generator=g).requires_grad_()
            head(x, torch.randint(0, 20_000 if step % 2 else 20, (32,), generator=g)).backward()
            head.zero_grad()
    finally:
        head_step.discrimination_with_gradients = compute
    return seen


@pytest.mark.parametrize("world", [1, 2])
def test_static_shapes_repeat_from_step_to_step_on_every_rank(world: int) -> None:
    static, others = (run_ranks(shapes_of_steps, world, static) for static in (True, False))
    shapes = {shape for rank_shapes in static for shape in rank_shapes}
    assert len(shapes) == 1, shapes
    (*_, most) = shapes.pop()
    assert most % 512 == 0 and all(len(set(rank_shapes)) > 3 for rank_shapes in others)


def random_rows() -> Tensor:
    return PartialFC(3001, 7, seed=11).weight.detach()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_random_rows_are_one_matrix_for_every_number_of_ranks(world: int) -> None:
    assert torch.equal(torch.cat(run_ranks(random_rows, world)), random_rows())


# ---- runs that change the number of ranks ----

STEPS, SAVED = 26, 6


def train(
    optimizer: str, start: int, stop: int, state: dict[str, Any] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """A linear student in front of the head, on uneven batches; the whole state by global row at the end."""
    x, y, _, w = data()
    head = PartialFC(CLASSES, WIDTH, init=w, scale=16.0, sample_rate=0.4, **options)
    rows: RowAdamW | RowSGD
    if optimizer == "sgd":
        rows = RowSGD(head, lr=0.05)
    else:
        moments: Literal["bf16", "fp32"] = "bf16" if "bf16" in optimizer else "fp32"
        rows = RowAdamW(head, lr=0.02, moments=moments, lazy="decay" if "decay" in optimizer else "none")
    student = torch.nn.Linear(WIDTH, WIDTH)
    torch.nn.init.eye_(student.weight)
    torch.nn.init.zeros_(student.bias)
    if state is not None:
        head.load_full_state(state["head"])
        rows.load_full_state(state["rows"])
        student.load_state_dict(state["student"])

    def full_state() -> dict[str, dict[str, Tensor]]:
        owners: list[tuple[str, PartialFC | RowAdamW | RowSGD]] = [("head", head), ("rows", rows)]
        return {name: {k: v.clone() for k, v in owner.full_state().items()} for name, owner in owners}

    loaded = full_state()
    losses = []
    for step in range(start, stop):
        head.set_step(step)
        turn = step * 5 % BATCH
        (inputs, labels) = mine(x.roll(turn, 0), y.roll(turn, 0))
        loss = head(student(inputs), labels)
        loss.backward()
        rows.param_groups[0]["lr"] = 0.02 / (1 + step)
        rows.step()
        rows.zero_grad()
        with torch.no_grad():
            for p in student.parameters():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                if world_size() > 1:
                    dist.all_reduce(grad)
                p -= 0.05 * grad / world_size()
                p.grad = None
        losses.append(loss.item())
    return {"losses": losses, "loaded": loaded, **full_state(), "student": student.state_dict()}


def on(world: int, *args: Any) -> dict[str, Any]:
    return run_ranks(train, world, *args)[0] if world > 1 else train(*args)


# The default run has each number of ranks once before and once after, for each optimizer; the slow run has all pairs.
BRIEF = ((1, 3), (3, 4), (4, 2), (2, 1))
EVERY = tuple(product((1, 2, 3, 4), repeat=2))


@pytest.mark.parametrize("changes", [BRIEF, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["brief", "every"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-decay", "adamw-bf16", "sgd"])
def test_a_run_saved_and_continued_at_any_numbers_of_ranks_has_one_loss_curve(
    optimizer: str, changes: tuple[tuple[int, int], ...]
) -> None:
    whole = on(1, optimizer, 0, STEPS, None, {})
    assert whole["losses"][-1] < 0.8 * whole["losses"][0]
    saved = {world: on(world, optimizer, 0, SAVED, None, {}) for world in (1, 2, 3, 4)}
    for before, after in changes:
        kept = saved[before]
        again = on(after, optimizer, SAVED, STEPS, kept, {})
        for part in ("head", "rows"):
            for name, rows in kept[part].items():
                assert torch.equal(again["loaded"][part][name], rows), f"{name} changed from {before} to {after} ranks"
        # bf16 moments round stochastically: a bit of fp32 noise can become a bit of bf16.
        tolerance = 2e-3 if optimizer == "adamw-bf16" else 1e-6
        torch.testing.assert_close(
            torch.tensor(kept["losses"] + again["losses"]),
            torch.tensor(whole["losses"]),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, b=before, a=after: f"saved at {b} ranks, continued at {a}: {m}",
        )  # fmt: skip


def gathered_once(options: dict[str, Any]) -> None:
    """A caller that has gathered the embeddings gets what the classifier computes from this rank's own."""
    found, weights = [], Weights(0.8, 0.5, 1.5, 2.0)
    x, y, teacher, w = data()
    x, y, teacher = mine(x, y, teacher)
    for gathered in (False, True):
        head = PartialFC(CLASSES, WIDTH, init=w, scale=16.0, **options)
        x = x.detach().clone().requires_grad_()
        emb: Any = Gathered(gather_rows(x, grad_reduction="mean")[0]) if gathered else x
        anchor: Any = Gathered(gather_plain(teacher)) if gathered else teacher
        loss = head.discriminate(emb, y, teacher_BD=anchor, weights=weights).loss
        loss.backward()
        found.append((loss.detach(), x.grad, *head.row_grad()))
    for own, shared in zip(*found):
        assert own.equal(shared)
    with pytest.raises(UserError, match="Got 21 gathered embeddings, expected 22, one for each label of all ranks"):
        head(Gathered(torch.ones(21, WIDTH)), y)
    with pytest.raises(UserError, match=r"gathered: .* on rank 0, .* on rank 1, expected the same on every rank"):
        head(Gathered(torch.ones(22, WIDTH)) if rank() else torch.ones(len(y), WIDTH), y)
    with pytest.raises(UserError, match=r"gathered: \[\[22, 12\], None\] on rank 0, \[\[21, 12\], None\] on rank 1"):
        head(Gathered(torch.ones(22 - rank(), WIDTH)), y)


@pytest.mark.parametrize("options", [{"sample_rate": 0.5}, {"feature_rate": 0.5}], ids=["sampled", "dims"])
def test_gathered_embeddings_give_the_same_bits(options: dict[str, Any]) -> None:
    run_ranks(gathered_once, 2, options)


def agreement() -> tuple[int | None, str, str]:
    """The memory that the default budget follows where the ranks' GPUs differ; the errors of different budgets and of a
    rank that lacks Triton."""
    x, y = torch.randn(3, 4), torch.arange(3)

    def pretend(spec: LossSpec, *_: Any) -> LossSpec:
        return replace(spec, available_bytes=(90, 70)[rank()]) if spec.available_bytes is None else spec

    partial_fc.with_available_memory = pretend
    head = PartialFC(10, 4)
    for _ in range(2):
        head(x, y)
        head.finish_step()
    budgets = PartialFC(10, 4, memory_budget_bytes=(1000, 2000)[rank()])
    with pytest.raises(UserError) as error:
        budgets(x, y)
    partial_fc.resolve = lambda *_: ("triton", "torch")[rank()]
    with pytest.raises(UserError) as lacks_triton:
        head(x, y)
    return head._spec.available_bytes, str(error.value), str(lacks_triton.value)


def test_ranks_agree_on_the_budget_that_decides_how_many_collectives_they_make() -> None:
    (first, said, lacks), (second, also, lacks_too) = run_ranks(agreement, 2)
    assert first == second == 70
    assert said == also and "memory_budget_bytes: 1000 on rank 0, 2000 on rank 1" in said
    assert lacks == lacks_too and "impl: triton on rank 0, torch on rank 1, expected the same on every rank" in lacks
