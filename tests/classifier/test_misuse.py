"""What users of other heads do: evaluation mode, casts, torch optimizers, data-parallel wrappers, copies, arguments."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from megacid import Margin, PartialFC, RowAdamW, RowSGD
from megacid.errors import UserError

CLASSES, WIDTH = 60, 8


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, WIDTH, generator=g), torch.randint(0, CLASSES, (6,), generator=g)


def make(**options: Any) -> PartialFC:
    w = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1))
    return PartialFC(CLASSES, WIDTH, **{"init": w, "scale": 16.0, **options})


# ---- evaluation ----

SAMPLING: list[dict[str, Any]] = [
    {"sample_rate": 0.1},
    {"sample_rate": 0.1, "log_q": True},
    {"sample_rate": 0.5, "feature_rate": 0.5},
    {"sample_rate": 0.1, "weight_grad": "recomputed"},
    {"sample_rate": 0.1, "filter_threshold": 0.3},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_evaluation_uses_all_classes_and_counts_nothing(options: dict[str, Any]) -> None:
    head, (x, y) = make(**options), batch()
    whole = make(**{**options, "sample_rate": 1.0, "feature_rate": 1.0})
    expected = whole(x, y)
    assert not torch.equal(head.train()(x, y), expected)
    hits = head.hits.clone()
    head.eval()
    for step in (3, 4):
        head.set_step(step)
        assert torch.equal(head(x, y), expected)
    with torch.no_grad():
        assert torch.equal(head(x, y), expected)
    assert torch.equal(head.hits, hits) and len(head.row_grad()[0]) == 0
    assert {k: float(v) for k, v in head.metrics().items()} == {k: float(v) for k, v in whole.metrics().items()}


@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
def test_evaluation_passes_the_embedding_gradient_but_no_row_gradient(weight_grad: str) -> None:
    head, (x, y) = make(sample_rate=0.1, weight_grad=weight_grad).eval(), batch()
    x, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    head(x, y).backward()
    make()(other, y).backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert len(head.row_grad()[0]) == 0 and not head.hits.any()


def test_evaluation_between_micro_batches_leaves_their_row_gradient() -> None:
    head, twin, (x, y) = make(sample_rate=0.1), make(sample_rate=0.1), batch()
    for each in (head, twin):
        each(x, y).backward()
        if each is head:
            each.eval()(x.requires_grad_(), y).backward()
            each.train()
        each(x.detach(), y).backward()
    assert all(torch.equal(a, b) for a, b in zip(head.row_grad(), twin.row_grad()))
    assert torch.equal(head.hits, twin.hits)


def test_train_after_evaluation_samples_as_before() -> None:
    head, (x, y) = make(sample_rate=0.1), batch()
    before = head(x, y)
    head.eval()(x, y)
    assert torch.equal(head.train()(x, y), before)


def counted_once(forward: Callable[[PartialFC, Tensor, Tensor], Tensor]) -> Tensor:
    head, (x, y) = make(sample_rate=0.2), batch()
    forward(head, x.requires_grad_(), y).backward()
    assert torch.equal(head.hits.long(), torch.bincount(y, minlength=CLASSES))
    return head.row_grad()[1]


def test_a_forward_without_grad_counts_no_hits_and_costs_no_gradient() -> None:
    def with_rehearsal(head: PartialFC, x: Tensor, y: Tensor) -> Tensor:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                head(x, y)
        assert not head.hits.any()
        return head(x, y)

    def with_checkpoint(reentrant: bool) -> Callable[[PartialFC, Tensor, Tensor], Tensor]:
        return lambda head, x, y: checkpoint(lambda z: head(z * 2.0, y), x, use_reentrant=reentrant)

    rows = counted_once(lambda head, x, y: head(x, y))
    for forward in (with_rehearsal, with_checkpoint(True), with_checkpoint(False)):
        torch.testing.assert_close(counted_once(forward), rows)


# ---- the step of the draw ----


def classes_used(steps: int, set_step: Callable[[PartialFC, int], None], optimizer: type | None = RowSGD) -> int:
    head, (x, _) = PartialFC(1000, WIDTH, sample_rate=0.05, scale=8.0), batch()
    rows, used = optimizer(head) if optimizer else None, set()
    for step in range(steps):
        set_step(head, step)
        for _ in range(2):  # micro-batches
            head(x, torch.full((len(x),), 7)).backward()
        used |= set(head.row_grad()[0].tolist())
        if rows is not None:
            rows.step()
        head.zero_grad()
    return len(used)


@pytest.mark.parametrize("optimizer", [RowAdamW, RowSGD])
def test_a_forgotten_set_step_does_not_freeze_the_draw(optimizer: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = classes_used(50, lambda head, step: head.set_step(step), optimizer)
        assert classes_used(50, lambda head, step: None, optimizer) == whole > 900
        once = classes_used(50, lambda head, step: head.set_step(0) if step == 0 else None, optimizer)
    assert once == whole


def test_one_step_number_for_many_updates_is_said_once() -> None:
    with pytest.warns(UserWarning, match="got step 0 for two updates") as caught:
        assert classes_used(9, lambda head, step: head.set_step(0)) == 51
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head, (x, y) = make(), batch()  # every class is used: the number does not matter
        for _ in range(3):
            head.set_step(0)
            head(x, y).backward()
            opt = RowSGD(head)
            opt.step()


def test_a_resumed_run_draws_by_the_step_and_not_by_the_calls_so_far() -> None:
    def losses(start: int, stop: int) -> list[float]:
        head, (x, y), values = make(sample_rate=0.1), batch(), []
        rows = RowSGD(head, lr=0.0)
        head.set_step(start)
        for _ in range(start, stop):
            loss = head(x, y)
            loss.backward()
            rows.step()
            rows.zero_grad()
            values.append(loss.item())
        return values

    assert losses(0, 8)[5:] == losses(5, 8)


# ---- torch optimizers and data-parallel wrappers ----


def run_steps(optimizer: torch.optim.Optimizer, head: PartialFC, student: nn.Module, steps: int = 3) -> list[str]:
    (x, y), messages = batch(), []
    for _ in range(steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            head(student(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        messages += [str(warning.message) for warning in caught]
    return messages


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_torch_optimizer_with_the_heads_weight_is_said_once(make_optimizer: Any) -> None:
    student = nn.Linear(WIDTH, WIDTH)
    for trainable in (False, True):
        head = make()
        head.requires_grad_(trainable)
        model = nn.ModuleDict({"student": student, "head": head})
        messages = run_steps(make_optimizer(model.parameters(), lr=0.1), head, student)
        assert len(messages) == 1 and make_optimizer.__name__ in messages[0] and "RowAdamW(head)" in messages[0]
        separate = make_optimizer([{"params": student.parameters()}, {"params": make().parameters()}], lr=0.1)
        assert run_steps(separate, make(), student) == [], "another head's weight"


def test_no_alarm_when_somebody_trains_the_rows() -> None:
    student = nn.Linear(WIDTH, WIDTH)
    head = make()
    assert run_steps(torch.optim.SGD(student.parameters(), lr=0.1), head, student) == []
    head = make()
    RowAdamW(head)
    model = nn.ModuleDict({"student": student, "head": head})
    assert run_steps(torch.optim.SGD(model.parameters(), lr=0.1), head, student) == []
    by_hand = make()
    by_hand.row_grad()
    assert run_steps(torch.optim.SGD([*student.parameters(), by_hand.weight], lr=0.1), by_hand, student) == []


def model_with_head() -> nn.ModuleDict:
    return nn.ModuleDict({"student": nn.Linear(WIDTH, WIDTH), "parts": nn.ModuleList([PartialFC(CLASSES, WIDTH)])})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.parts = nn.Linear(WIDTH, WIDTH), nn.ModuleList([PartialFC(CLASSES, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)


def fully_sharded() -> dict[str, tuple[str, bool]]:
    results = {}
    for kind in ("alone", "parent", "ignored", "student", "replicate"):
        model = Model()
        head = model.parts[0]
        assert isinstance(head, PartialFC)
        before, message = head.weight.clone(), ""
        try:
            if kind == "replicate":
                replicate(model)(torch.ones(2, WIDTH))
            elif kind == "ignored":
                fully_shard(model, ignored_params={head.weight})
            else:
                fully_shard({"alone": head, "parent": model, "student": model.student}[kind])
        except UserError as error:
            message = str(error)
        results[kind] = message, torch.equal(head.weight, before)
    return results


def test_a_head_inside_fully_shard_or_replicate_is_refused_before_its_rows_change() -> None:
    for results in run_ranks(fully_sharded, 2):
        for kind, (message, unchanged) in results.items():
            wrapper = {"alone": "fully_shard", "parent": "fully_shard", "replicate": "DistributedDataParallel"}
            assert unchanged and message.startswith(f"PartialFC is inside {wrapper[kind]}" if kind in wrapper else "")
            assert bool(message) == (kind in wrapper), message


def wrapped(kind: str) -> tuple[str, bool]:
    model = model_with_head()
    head = model["parts"][0]  # type: ignore[index]
    before = head.weight.clone()
    if kind == "ignored":
        ignored = ["parts.0.weight", "parts.0.hits"]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    try:
        DistributedDataParallel({"alone": head, "student": model["student"]}.get(kind, model))
        message = ""
    except UserError as error:
        message = str(error)
    return message, torch.equal(head.weight, before)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["alone", "parent", "ignored", "student"])
def test_a_head_inside_ddp_is_refused_before_its_rows_are_overwritten(kind: str, world: int) -> None:
    for message, unchanged in run_ranks(wrapped, world, kind):
        assert unchanged
        assert ("outside" in message) == (kind in ("alone", "parent")), message


# ---- casts ----

CASTS: list[Callable[[nn.Module], object]] = [
    lambda m: m.half(),
    lambda m: m.bfloat16(),
    lambda m: m.double(),
    lambda m: m.to(torch.float16),
    lambda m: m.to("cpu", torch.bfloat16),
    lambda m: m.type(torch.float64),
    lambda m: nn.ModuleDict({"head": m}).half(),
]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_leaves_the_rows_in_fp32_and_says_so(cast: Callable[[nn.Module], object], dtype: torch.dtype) -> None:
    head, twin, (x, y) = make(sample_rate=0.3), make(sample_rate=0.3), batch()
    rows, twin_rows = RowAdamW(head), RowAdamW(twin)
    with pytest.warns(UserWarning, match=r"ignores the cast to torch\.\w+: cast the embeddings"):
        cast(head)
    assert head.weight.dtype == torch.float32 and head.hits.dtype == torch.int32
    for each, optimizer in ((head, rows), (twin, twin_rows)):
        loss = each(x.to(dtype).requires_grad_(), y)
        loss.backward()
        optimizer.step()
    assert torch.equal(head.weight, twin.weight)


def test_moving_without_a_cast_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make().to("cpu").float().to(torch.float32).weight.dtype == torch.float32


def test_rows_are_fp32_under_another_default_dtype() -> None:
    expected = PartialFC(CLASSES, WIDTH, seed=3).weight
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            head = PartialFC(CLASSES, WIDTH, seed=3)
            head(*batch()).backward()
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(head.weight, expected) and head.row_grad()[1].dtype == torch.float32


def test_rows_that_were_replaced_by_another_dtype_are_named() -> None:
    head = make()
    head.load_state_dict({"weight": head.weight.half(), "hits": head.hits}, assign=True)
    with pytest.raises(UserError, match=r"rows are torch\.float16, expected torch\.float32"):
        head(*batch())


# ---- arguments, copies, states ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0.5}, "margin is 0.5, expected a Margin"),
        ({"margin": (1.0, 0.5, 0.0)}, "margin is (1.0, 0.5, 0.0), expected a Margin"),
        ({"margin": Margin}, "expected a Margin such as"),
        ({"filter_threshold": float("nan")}, "filter_threshold is nan"),
        ({"filter_threshold": float("inf")}, "filter_threshold is inf"),
        ({"filter_threshold": "0.4"}, "filter_threshold is '0.4'"),
        ({"filter_threshold": torch.tensor(0.4)}, "filter_threshold is tensor(0.4000)"),
        ({"scale": nn.Parameter(torch.tensor(64.0))}, "scale is a tensor"),
        ({"scale": torch.tensor(64.0)}, "scale is a tensor"),
        ({"scale": "64"}, "scale is '64'"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def copied() -> tuple[float, float]:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group = groups[dist.get_rank()]
    head, (x, y) = make(group=group, sample_rate=0.5), batch()
    head(x, y).backward()
    optimizer = RowAdamW(head)
    twin_optimizer = copy.deepcopy(optimizer)
    twin = twin_optimizer.head
    assert twin.group is group and twin.weight is not head.weight and len(twin.row_grad()[0]) == 0
    optimizer.step()
    with pytest.raises(UserError, match=r"save state_rows\(\)"):
        pickle.dumps(head)
    head.set_step(5)
    twin.set_step(5)
    loss = twin(x, y)
    loss.backward()
    twin_optimizer.step()
    return float(loss.detach()), float(head(x, y).detach())


def test_a_deep_copy_shares_the_group_and_nothing_else() -> None:
    for before, after in run_ranks(copied, 2):
        assert before != after, "the copy has the rows from before the update"
    head = make(sample_rate=0.5)
    head(*batch()).backward()
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(twin.weight, head.weight) and torch.equal(twin(*batch()), head(*batch()))


OPTIMIZERS: dict[str, Callable[[PartialFC], RowAdamW | RowSGD]] = {
    "adamw": RowAdamW,
    "adamw-decay": lambda head: RowAdamW(head, lazy="decay"),
    "sgd": RowSGD,
    "sgd-decay": lambda head: RowSGD(head, lazy="decay"),
}


@pytest.mark.parametrize(("saved", "loaded"), [(a, b) for a in OPTIMIZERS for b in OPTIMIZERS if a != b])
def test_a_state_of_another_lazy_or_optimizer_is_named(saved: str, loaded: str) -> None:
    head = make()
    state, optimizer = OPTIMIZERS[saved](head).full_state(), OPTIMIZERS[loaded](head)
    same_lazy = ("decay" in saved) == ("decay" in loaded)
    with pytest.raises(UserError, match="has no" if same_lazy else "so it is of lazy"):
        optimizer.load_full_state(state)
    optimizer.load_full_state(OPTIMIZERS[loaded](head).full_state())
