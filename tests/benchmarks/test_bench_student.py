"""Suite student of tools/bench.py: all trainers take the same steps, and a trainer with other losses is refused."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import student, student_ranks, suite
from benchmarks.ranks import ask_ranks
from megacid.errors import UserError


def found(**losses: float) -> dict[str, Any]:
    return {name: {"losses": [4.5, loss]} for name, loss in losses.items()}


def test_a_trainer_with_another_loss_is_refused_before_any_speed() -> None:
    student.check_losses(found(open_clip_train=4.2, megacid=4.20001))
    for wrong in (4.3, float("nan")):
        with pytest.raises(UserError, match=r"megacid has loss .* at step 1, expected 4.2, that of open_clip_train"):
            student.check_losses(found(open_clip_train=4.2, megacid=wrong))


def test_a_slower_trainer_and_a_slow_zero_1_meet_no_limit() -> None:
    rows = [
        {"model": "m", "ranks": 2, "trainer": name, "seconds": [seconds], "speed": 1.0 / seconds}
        for name, seconds in (("open_clip_train", 1.0), ("megacid ZeRO-0", 1.0), ("megacid ZeRO-1", 1.06))
    ]
    limits: list[suite.Limit] = student.check({"results": rows})
    assert [limit.met for limit in limits] == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_all_trainers_take_the_same_steps(world: int) -> None:
    request = {
        "model": "digits-student", "image_size": 32, "batch": 4, "threads": 1, "rounds": 1, "repeats": 1,
        "trainers": list(student_ranks.TRAINERS),
    }  # fmt: skip
    rows = ask_ranks("benchmarks.student_ranks", request, world)
    student.check_losses(rows)
    assert len({loss for values in rows.values() for loss in values["losses"]}) > 1
    # As many operators, and as much memory allocated, as open_clip_train or less.
    for name in ("megacid ZeRO-0", "megacid ZeRO-1"):
        assert rows[name]["operators"] < rows["open_clip_train"]["operators"]
        assert rows[name]["allocated_mib"] < 1.2 * rows["open_clip_train"]["allocated_mib"]
