"""State dicts of the head and the row optimizers through files, over ranks, and copies of both."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from small_head import CLASSES, OPTIMIZERS, WIDTH, Row, make, update
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from megacid import PartialFC, RowAdamW, RowSGD
from megacid.distributed.collectives import rank, world_size
from megacid.errors import UserError


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def trained(kind: str, options: dict[str, Any], steps: int = 5) -> tuple[PartialFC, Row, Any]:
    head = make(sample_rate=0.3)
    optimizer = OPTIMIZERS[kind](head, lr=0.05, **options)
    scheduler = CosineAnnealingLR(optimizer, 20)
    for step in range(steps):
        update(head, optimizer, step)
        scheduler.step()
    return head, optimizer, scheduler


STATES = [(kind, {"moments": m, "lazy": z}) for kind in OPTIMIZERS for m in ("fp32", "bf16") for z in ("none", "decay")]


@pytest.mark.parametrize(("kind", "options"), STATES)
def test_a_run_resumed_from_state_dicts_goes_on_with_the_same_bits(kind: str, options: dict[str, Any]) -> None:
    """Without set_step: the step of the draw is part of the optimizer's state."""
    owners = trained(kind, options)
    states = through_a_file([owner.state_dict() for owner in owners])
    assert set(states[1]) == {"state", "param_groups"} and states[1]["param_groups"][0]["params"] == [0]
    others = trained(kind, options, steps=0)
    for owner, state in zip(others, states):
        owner.load_state_dict(state)
    for head, optimizer, scheduler in (owners, others):
        for step in range(5, 9):
            update(head, optimizer, step)
            scheduler.step()
    assert torch.equal(owners[0].weight, others[0].weight) and torch.equal(owners[0].hits, others[0].hits)
    for name, rows in owners[1].state_rows().items():
        assert torch.equal(rows, others[1].state_rows()[name]) and rows.dtype == others[1].state_rows()[name].dtype
    assert owners[1].param_groups[0]["lr"] == others[1].param_groups[0]["lr"] != 0.05


def states_of_ranks(kind: str, load: dict[str, Any] | None) -> dict[str, Any]:
    """This rank's state dicts, its own rows, and what it says about those of another rank."""
    head, optimizer, _ = trained(kind, {"lazy": "decay"}, steps=0 if load else 3)
    if load:
        head.load_state_dict(load["head"])
        optimizer.load_state_dict(load["optimizer"])
    own = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
    other: list[Any] = [None] * world_size()
    messages = []
    if world_size() > 1:
        dist.all_gather_object(other, pickle.dumps(own))
        for owner, name in ((head, "head"), (optimizer, "optimizer")):
            try:
                owner.load_state_dict(through_a_file(pickle.loads(other[1 - rank()])[name]))
            except UserError as error:
                messages.append(str(error))
    rows = {**head.state_rows(), **optimizer.state_rows()}
    return {"own": own, "messages": messages, "rows": rows}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_dicts_are_by_global_class_and_those_of_another_rank_are_refused(kind: str) -> None:
    one = states_of_ranks(kind, None)
    for parts in (run_ranks(states_of_ranks, 2, kind, None), run_ranks(states_of_ranks, 2, kind, one["own"])):
        for part in parts:
            assert len(part["messages"]) == 2, "60 classes: the shards have equal shapes"
            assert all("load this rank's own state, or a full_state()" in message for message in part["messages"])
    for name, rows in one["rows"].items():
        assert torch.equal(torch.cat([part["rows"][name] for part in parts]), rows), f"{name} from 1 to 2 ranks"


@pytest.mark.parametrize("prefix", ["", "parts.0."])
def test_a_heads_state_inside_a_model_and_without_metadata_loads(prefix: str) -> None:
    head, other = trained("sgd", {})[0], make()
    model = nn.ModuleDict({"parts": nn.ModuleList([other])}) if prefix else other
    plain = {prefix + name: rows for name, rows in head.state_dict().items()}
    model.load_state_dict(plain)
    assert torch.equal(other.weight, head.weight) and torch.equal(other.hits, head.hits)
    with pytest.raises(UserError, match="rows 0 to 58 of 'weight', expected 0 to 59"):
        model.load_state_dict({**plain, prefix + "weight": head.weight[:-1]})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "expected a state_dict of RowAdamW"),
        ({"param_groups": [{}], "state": {0: {"step": "five"}}}, "expected a state_dict of RowAdamW"),
        ({"param_groups": [{"lr": -1.0}], "state": {0: {}}}, "classifier lr is -1.0"),
        ({"param_groups": [{}], "state": {0: {}}}, "no 'exp_avg', only []"),
        (None, "expected a state_dict of RowAdamW"),
        (torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict(), "expected a state_dict of RowAdamW"),
        (RowSGD(make()).state_dict(), "no 'exp_avg'"),
        (RowAdamW(PartialFC(CLASSES, WIDTH + 1)).state_dict(), "expected (60, 8)"),
        (RowAdamW(make(), lazy="decay").state_dict(), "lazy 'decay', expected 'none'"),
        (RowAdamW(make()).full_state(), "expected a state_dict of RowAdamW"),
    ],
)
def test_a_state_of_something_else_is_refused_in_one_line_and_changes_nothing(state: Any, message: str) -> None:
    head, optimizer, _ = trained("adamw", {})
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError) as error:
        optimizer.load_state_dict(state)
    assert message in str(error.value) and "\n" not in str(error.value)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and head.step == 5
    assert all(torch.equal(after["state"][0][name], rows) for name, rows in optimizer.state_rows().items())
    update(head, optimizer, 9)


def test_a_reader_of_rows_with_pending_decay_is_refused_by_an_optimizer_without() -> None:
    rows = RowAdamW(make(), lazy="decay").state_rows()
    with pytest.raises(UserError, match="lazy 'decay', expected 'none'"):
        RowAdamW(make()).load_state_rows(lambda name, start, stop: rows[name][start:stop])
    with pytest.raises(UserError, match="'exp_avg' has 60 rows, expected 61"):
        RowAdamW(PartialFC(61, WIDTH), lazy="decay").load_full_state(rows)


@pytest.mark.parametrize(("kind", "options"), STATES)
def test_copies_of_an_optimizer_train_their_own_head(kind: str, options: dict[str, Any]) -> None:
    head, optimizer, _ = trained(kind, options)
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    pair = copy.deepcopy({"optimizer": optimizer, "head": head})
    assert pair["optimizer"].head is pair["head"]
    before = head.weight.clone()
    for twin in (*twins, pair["optimizer"]):
        assert twin.head is not head and twin.group["params"][0].data_ptr() == twin.head.weight.data_ptr()
        update(twin.head, twin, 7)
        assert torch.equal(head.weight, before) and not torch.equal(twin.head.weight, before)
    update(head, optimizer, 7)
    assert all(torch.equal(twin.head.weight, head.weight) for twin in (*twins, pair["optimizer"]))
    assert twins[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
