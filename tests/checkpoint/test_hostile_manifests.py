"""E8: a manifest with a valid seal and impossible content is damage like any other: it is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile_data import checkpoint

from megacid.checkpoint import store
from megacid.config.sections import GuardConfig
from megacid.training import guard as guard_module
from megacid.training.guard import Guard

GUARD = {"skipped": 1, "consecutive": 0, "recent": [2], "losses": [0.5, 1e30]}
WRONG: list[dict[str, Any]] = [
    *({"guard": wrong} for wrong in (None, [], "x", 7, {}, {"skipped": 1})),
    *({"guard": {**GUARD, **change}} for change in (
        {"more": 1}, {"skipped": -1}, {"skipped": 5}, {"skipped": 1.0}, {"skipped": True}, {"skipped": "1"},
        {"consecutive": None}, {"consecutive": 10**30}, {"recent": 7}, {"recent": {"2": 2}}, {"recent": [5]},
        {"recent": ["2"]}, {"recent": [0] * 1001}, {"losses": "0.5"}, {"losses": [None]}, {"losses": [float("nan")]},
        {"losses": [float("inf")]}, {"losses": [True]}, {"losses": [10**400]}, {"losses": [0.5] * 201},
    )),
    *({"updates": wrong} for wrong in (-5, 5, 10**30, 1.5, True, "3", None, [3])),
    *({"num_classes": wrong} for wrong in (-1, 10**30, 2.0, "2", None)),
    *({"embed_dim": wrong} for wrong in (-1, 10**30, 2.5)),
    *({"world": wrong} for wrong in (-1, 10**30, "1")),
    {"samples_seen": -1}, {"samples_seen": 10**30}, {"step": True}, {"step": 3.0}, {"step": -3}, {"step": 10**30},
]  # fmt: skip


def run_with(tmp_path: Path, **changes: Any) -> Path:
    """A run with a good checkpoint of step 3 and a newer one whose manifest has `changes`."""
    run = tmp_path / "run"
    checkpoint(run / "step-00000003", b"x", guard=GUARD)
    checkpoint(run / "step-00000004", b"x", **{"step": 4, "guard": GUARD, **changes})
    return run


@pytest.mark.parametrize("changes", WRONG, ids=lambda changes: json.dumps(changes)[:60])
def test_a_sealed_manifest_of_impossible_values_is_passed_over(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path / "alone", b"x", **{"guard": GUARD, **changes})
    with pytest.raises(ValueError, match="alone"):
        store.read_manifest(folder)
    run = run_with(tmp_path, **changes)
    chosen, problems = store.newest_valid(run, to_resume=True)
    assert chosen == run / "step-00000003" and len(problems) == 1 and "step-00000004" in problems[0]


@pytest.mark.parametrize("missing", ["guard", "updates"])
def test_a_checkpoint_without_the_state_of_training_is_passed_over_on_resume(tmp_path: Path, missing: str) -> None:
    run = run_with(tmp_path)
    path = run / "step-00000004" / store.MANIFEST
    manifest = store.read_manifest(path.parent)
    del manifest[missing]
    path.write_bytes(store.seal(manifest))
    chosen, problems = store.newest_valid(run, to_resume=True)
    assert chosen == run / "step-00000003" and len(problems) == 1 and f"has no {missing}" in problems[0]
    assert store.newest_valid(run)[0] == path.parent  # the student is whole


@pytest.mark.parametrize("size", [(1 << 24) + 1, 40 << 30])
def test_a_manifest_of_gigabytes_is_passed_over_before_it_is_read(tmp_path: Path, size: int) -> None:
    run = run_with(tmp_path)
    with open(run / "step-00000004" / store.MANIFEST, "r+b") as file:
        file.truncate(size)
    chosen, problems = store.newest_valid(run)
    assert chosen == run / "step-00000003" and "more than" in problems[0]


def test_what_the_guard_saves_is_what_a_manifest_may_hold(tmp_path: Path) -> None:
    assert (store._GUARD_STEPS, store._GUARD_LOSSES) == (guard_module._HORIZON, guard_module._WINDOW)
    state = Guard(1.0, GuardConfig()).state()
    assert store.read_manifest(checkpoint(tmp_path / "new", b"x", guard=state))["guard"] == state
    full = {"skipped": 3, "consecutive": 3, "recent": [0, 1, 2] * 333 + [3], "losses": [1e30] * 200}
    assert store.read_manifest(checkpoint(tmp_path / "full", b"x", guard=full))["guard"] == full
