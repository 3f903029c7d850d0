"""The head and the row optimizers in plain torch code: schedulers, closures, hooks, GradScaler, freezing, compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_ranks
from small_head import OPTIMIZERS, WIDTH, batch, make, update
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from megacid import PartialFC, RowAdamW, RowSGD, clip_grad_norm_
from megacid.distributed.collectives import rank
from megacid.errors import UserError

# ---- schedulers and hyper-parameters ----

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda opt: LambdaLR(opt, lambda step: 1 / (1 + step)),
    "cosine": lambda opt: CosineAnnealingLR(opt, 6),
    "one cycle": lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=8),
    "warm-up, then restarts": lambda opt: SequentialLR(
        opt, [LinearLR(opt, 0.1, total_iters=3), CosineAnnealingWarmRestarts(opt, 2)], milestones=[3]
    ),
    "plateau": lambda opt: ReduceLROnPlateau(opt, factor=0.5, patience=0),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_scheduler_drives_the_rows_as_it_drives_a_dense_optimizer(kind: str, schedule: str) -> None:
    """OneCycleLR also cycles betas and momentum."""
    head = make()
    dense = head.weight.clone().requires_grad_()
    options = {"lr": 0.05, "weight_decay": 0.1}
    optimizer = OPTIMIZERS[kind](head, **options)
    reference: torch.optim.Optimizer
    if kind == "adamw":
        reference = torch.optim.AdamW([dense], betas=(0.9, 0.98), **options)
    else:
        reference = torch.optim.SGD([dense], momentum=0.9, **options)
    schedulers = [SCHEDULERS[schedule](each) for each in (optimizer, reference)]
    rates = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)
        warnings.filterwarnings("error", "Detected call of")  # of the scheduler before the optimizer
        for step in range(8):
            head(*batch(step)).backward()
            dense.grad = head.row_grad()[1].clone()
            for each, scheduler in zip((optimizer, reference), schedulers):
                each.step()
                if step < 7:
                    scheduler.step(*([1.0] if schedule == "plateau" else []))
            optimizer.zero_grad()
            rates.append(optimizer.param_groups[0]["lr"])
            assert rates[-1] == reference.param_groups[0]["lr"]
    assert len(set(rates)) > 2
    torch.testing.assert_close(head.weight, dense.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("adamw", "lr", -0.1),
        ("adamw", "lr", float("nan")),
        ("adamw", "lr", "fast"),
        ("adamw", "betas", (0.9, 1.0)),
        ("adamw", "betas", 0.9),
        ("adamw", "eps", 0.0),
        ("adamw", "weight_decay", None),
        ("sgd", "momentum", 1.0),
        ("sgd", "lr", float("inf")),
    ],
)
def test_a_hyper_parameter_out_of_range_is_named_at_construction_and_at_a_step(
    kind: str, name: str, value: Any
) -> None:
    head, make_optimizer = make(), OPTIMIZERS[kind]
    with pytest.raises(UserError, match=f"classifier {name} (is|are)"):
        make_optimizer(head, **{name: value})
    optimizer, before = make_optimizer(head), head.weight.clone()
    head(*batch()).backward()
    optimizer.param_groups[0][name] = value
    with pytest.raises(UserError, match=f"classifier {name} (is|are)"):
        optimizer.step()
    assert torch.equal(head.weight, before)


def test_a_tensor_as_learning_rate_is_its_number() -> None:
    head, twin = make(), make()
    for each, lr in ((head, torch.tensor(0.5)), (twin, 0.5)):
        optimizer = RowSGD(each, lr=lr)  # type: ignore[arg-type]
        scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
        for seed in range(3):
            update(each, optimizer, seed)
            scheduler.step()
    assert torch.equal(head.weight, twin.weight)


# ---- the protocol of an optimizer ----


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_is_a_torch_optimizer_of_the_heads_rows(kind: str) -> None:
    head, calls = make(sample_rate=0.2), []
    optimizer = OPTIMIZERS[kind](head)
    assert isinstance(optimizer, torch.optim.Optimizer) and "lr: " in repr(optimizer)
    (group,) = optimizer.param_groups
    (rows,) = group["params"]
    assert rows.data_ptr() == head.weight.data_ptr() and rows.shape == head.weight.shape and rows.grad is None
    optimizer.register_step_pre_hook(lambda *_: calls.append(("before", head.step)))
    optimizer.register_step_post_hook(lambda *_: calls.append(("after", head.step)))

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = head(*batch())
        loss.backward()
        return loss

    expected = float(head(*batch()).detach())
    before = head.weight.clone()
    loss = optimizer.step(closure)
    assert float(loss.detach()) == expected and loss.requires_grad  # type: ignore[union-attr, arg-type]
    assert calls == [("before", 0), ("after", 1)] and not torch.equal(head.weight, before)
    indices, values = head.row_grad()
    assert torch.equal(rows.grad.indices()[0], indices) and torch.equal(rows.grad.values(), values)
    assert torch.equal(rows.grad.to_dense()[indices], values) and rows.grad.shape == head.weight.shape
    assert head.weight.grad is None
    for set_to_none in (True, False):
        head(*batch()).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert rows.grad is None and len(head.row_grad()[0]) == 0
    with pytest.raises(UserError, match="expected no other parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(UserError, match="change its values in place"):
        rows.grad = torch.zeros_like(rows)


def test_an_optimizer_follows_a_weight_that_was_replaced_and_refuses_one_that_was_moved() -> None:
    head, twin = make(), make()
    optimizer = RowAdamW(head)
    head.load_state_dict(twin.state_dict(), assign=True)
    update(head, optimizer, 0)
    assert optimizer.param_groups[0]["params"][0].data_ptr() == head.weight.data_ptr() == twin.weight.data_ptr()
    head.to("meta")
    with pytest.raises(UserError, match="the head is on meta, its RowAdamW on cpu, expected one device"):
        optimizer.step()


def test_accumulation_draws_once_per_step_with_a_scheduler_and_a_second_optimizer() -> None:
    student, head = nn.Linear(WIDTH, WIDTH), make(sample_rate=0.2)
    rows, other = RowAdamW(head), torch.optim.AdamW(student.parameters())
    schedulers = [LambdaLR(each, lambda step: 0.9**step) for each in (rows, other)]
    for step in range(4):
        used = []
        for micro in range(3):
            x, _ = batch(3 * step + micro)
            head(student(x), torch.full((len(x),), 7)).backward()
            used.append(head.row_grad()[0].tolist())
        assert used[0] == used[1] == used[2] and head.step == step
        for each in (rows, other, *schedulers):
            each.step()
        rows.zero_grad()
    assert head.step == 4


# ---- GradScaler ----

SCALE = 2.0**10


def scaled_run(
    kind: str, weight_grad: str, scaler: Any, unscale: bool, bad: int = -1
) -> tuple[PartialFC, list[float], list[int]]:
    """Four steps, of which number `bad` has an infinite row gradient; (head, scales, step of the draw)."""
    head = make(sample_rate=0.4, weight_grad=weight_grad)
    optimizer = OPTIMIZERS[kind](head, lr=0.05)
    scales, steps = [], []
    for step in range(4):
        x = batch(step)[0].requires_grad_()
        loss = head(x, batch(step)[1])
        (loss if scaler is None else scaler.scale(loss)).backward()
        if step == bad:
            head.scale_row_grad_(torch.tensor(float("inf")))
        if scaler is None:
            if step != bad:
                optimizer.step()
        else:
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        optimizer.zero_grad()
        steps.append(head.step)
    return head, scales, steps


@pytest.mark.parametrize("bad", [-1, 1])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_grad_scaler_unscales_the_rows_and_skips_an_infinite_gradient(
    kind: str, weight_grad: str, unscale: bool, bad: int
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=100)
    head, scales, steps = scaled_run(kind, weight_grad, scaler, unscale, bad)
    expected, _, expected_steps = scaled_run(kind, weight_grad, None, False, bad)
    assert torch.isfinite(head.weight).all() and steps == expected_steps
    assert scales == [SCALE] * 4 if bad < 0 else scales == [SCALE, SCALE / 2, SCALE / 2, SCALE / 2]
    torch.testing.assert_close(head.weight, expected.weight, rtol=1e-6, atol=1e-6)


def test_a_grad_scaler_scales_rows_and_student_together_and_clips_between() -> None:
    results = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=SCALE), torch.amp.GradScaler("cpu", enabled=False)):
        torch.manual_seed(0)
        student, head = nn.Linear(WIDTH, WIDTH), make()
        optimizers = torch.optim.SGD(student.parameters(), lr=0.1), RowSGD(head, lr=0.1)
        for step in range(3):
            x, y = batch(step)
            scaler.scale(head(student(x), y)).backward()
            for each in optimizers:
                scaler.unscale_(each)
            norm = clip_grad_norm_(student.parameters(), head, 0.5)
            assert 0.5 < float(norm) < 100, "unscaled"
            for each in optimizers:
                scaler.step(each)
            scaler.update()
            for each in optimizers:
                each.zero_grad()
        results.append((head.weight, student.weight.detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def one_rank_overflows(kind: str) -> tuple[list[float], list[int], Tensor]:
    def run(scaler: Any) -> Any:
        head = make(sample_rate=0.4)
        optimizer = OPTIMIZERS[kind](head, lr=0.05)
        scales, steps = [], []
        for step in range(4):
            x = batch(step + 10 * rank())[0].requires_grad_()
            scaler.scale(head(x, batch(step)[1])).backward()
            if step == 1 and rank() == 1:
                head.scale_row_grad_(torch.tensor(float("inf")))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            steps.append(head.step)
        return scales, steps, head.weight

    return run(ShardedGradScaler("cpu", init_scale=SCALE))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_overflow_on_one_rank_skips_the_step_on_every_rank(kind: str) -> None:
    for scales, steps, weight in run_ranks(one_rank_overflows, 2, kind):
        assert scales == [SCALE, SCALE / 2, SCALE / 2, SCALE / 2] and steps == [1, 1, 2, 3]
        assert torch.isfinite(weight).all()


# ---- the head as a module ----


def test_a_frozen_head_passes_the_embedding_gradient_and_keeps_its_rows() -> None:
    head, twin = make(sample_rate=0.3), make(sample_rate=0.3)
    optimizer, twin_optimizer = RowAdamW(head), RowAdamW(twin)
    head.requires_grad_(False)
    before, (x, y) = head.weight.clone(), batch()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for each, emb, opt in zip((head, twin), inputs, (optimizer, twin_optimizer)):
        each(emb, y).backward()
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert torch.equal(head.weight, before) and torch.equal(head.hits, twin.hits) and head.step == 1
    update(head.requires_grad_(), optimizer, 1)  # type: ignore[arg-type]
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("what", ["head", "student and head"])
def test_a_compiled_model_gives_the_same_loss_and_gradients(what: str) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"student": nn.Linear(WIDTH, WIDTH), "head": make(sample_rate=0.3)})
        optimizer, losses = RowAdamW(model["head"]), []  # type: ignore[arg-type]
        head: Any = model["head"]
        if compiled and what == "head":
            head = torch.compile(head, backend="eager")  # no C++ compiler needed

        def forward(x: Tensor, y: Tensor, student: nn.Module = model["student"], head: Any = head) -> Tensor:
            return head(student(x), y) * 2.0

        step = torch.compile(forward, backend="eager") if compiled and what != "head" else forward
        for seed in range(3):
            loss = step(*batch(seed))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        results.append((losses, optimizer.head.weight, model["student"].weight.grad))
    torch.testing.assert_close(results[0], results[1])
