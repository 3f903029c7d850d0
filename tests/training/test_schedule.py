"""The learning rate of warm-up, stable, decay (wsd): its phases, its shapes, and what a longer run keeps of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import toy

from megacid.config.load import load_run
from megacid.config.sections import ScheduleConfig
from megacid.errors import UserError
from megacid.training.schedule import learning_rate_share


def rates(total_steps: int, schedule: ScheduleConfig) -> list[float]:
    return [learning_rate_share(step, total_steps, schedule) for step in range(total_steps + 1)]


@pytest.mark.parametrize(("shape", "at_a_quarter", "at_half"), [("1-sqrt", 0.5, 1 - 0.5**0.5), ("linear", 0.75, 0.5)])
def test_wsd_warms_up_stays_and_decays_in_its_share_of_the_steps(
    shape: str, at_a_quarter: float, at_half: float
) -> None:
    schedule = ScheduleConfig.model_validate(
        {"kind": "wsd", "warmup_steps": 4, "decay_share": 0.2, "decay_shape": shape, "final_share": 0.1}
    )
    shares = rates(100, schedule)
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4:81] == [1.0] * 77  # the decay has 20 steps, 80 to 99, and ends at 100
    assert all(a > b for a, b in itertools.pairwise(shares[80:]))
    assert shares[85] == pytest.approx(0.1 + 0.9 * at_a_quarter)
    assert shares[90] == pytest.approx(0.1 + 0.9 * at_half)
    assert shares[100] == pytest.approx(0.1)


def test_a_longer_run_has_the_rates_of_a_shorter_one_until_that_decays() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=10, decay_share=0.1)
    short, long = rates(200, schedule), rates(1000, schedule)
    assert short[:181] == long[:181] and short[181] < long[181] == 1.0


def test_the_least_decay_is_one_step_and_the_whole_run_may_decay() -> None:
    assert rates(10, ScheduleConfig(kind="wsd", decay_share=1e-6)) == [1.0] * 10 + [0.0]
    assert rates(4, ScheduleConfig(kind="wsd", decay_share=1.0, decay_shape="linear")) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_decay_that_begins_in_the_warm_up_is_refused(tmp_path: Path) -> None:
    file = toy.run_file(tmp_path, "early", schedule__kind="wsd", schedule__warmup_steps=12, schedule__decay_share=0.5)
    load_run(file, world=1)
    with pytest.raises(UserError) as error:
        load_run(file, ["schedule.warmup_steps=13"], world=1)
    assert str(error.value) == (
        '"megacid.schedule.decay_share" is 0.5, so the decay begins at step 12 of 24, expected at least warmup_steps, '
        "13: lower one of the two"
    )


def test_a_run_that_stops_in_the_decay_resumes_with_the_same_bits(tmp_path: Path) -> None:
    toy.write_features(tmp_path / "features")
    settings = {"run__total_steps": 8, "schedule__kind": "wsd", "schedule__decay_share": 0.5}
    whole, parts, constant = (toy.run_file(tmp_path, name, **settings) for name in ("whole", "parts", "constant"))
    assert toy.train_toy(1, whole) == [0]
    assert toy.train_toy(1, parts, "--stop-after", "6") == [143]
    assert toy.train_toy(1, parts) == [0]
    still = ("--set", "schedule.kind=constant", "--set", "schedule.decay_share=null")
    assert toy.train_toy(1, constant, *still) == [0]
    ends = [toy.tensors(tmp_path / "runs" / name / "step-00000008") for name in ("whole", "parts", "constant")]
    assert toy.differing(ends[0], ends[1]) == []
    assert toy.differing(ends[0], ends[2]) != []
