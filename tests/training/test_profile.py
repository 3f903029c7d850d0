"""Bad values of --profile-steps, steps that are not profiled, and traces after an error or on a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy
from faultplan import Fault, FaultPlan

from megacid.errors import EXIT_NOT_FINITE, EXIT_STOPPED, UserError
from megacid.training.profile import steps_to_profile


@pytest.mark.parametrize(
    "option", ["", "3", "0:2", "3:2", "1:11", "a:b", "1:2:3", "-1:2", "1.5:2", " 1:2", "1:", "9" * 99]
)
def test_a_bad_range_is_one_message_with_an_example(option: str) -> None:
    with pytest.raises(
        UserError, match=r"--profile-steps is .*, expected A:B with 1 <= A <= B <= run.total_s.* \(10\)"
    ):
        steps_to_profile(option, 10)


def test_a_range_counts_as_the_log_does_and_is_bounded() -> None:
    assert steps_to_profile("1:1", 10) == range(0, 1) and steps_to_profile("2:10", 10) == range(1, 10)
    assert len(steps_to_profile("1:100", 1000)) == 100 and len(steps_to_profile(None, 10)) == 0
    with pytest.raises(UserError, match="at most 100 steps"):
        steps_to_profile("1:101", 1000)


def test_a_bad_range_is_one_error_before_data_are_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = toy.run_file(tmp_path, "bad", data__features=str(tmp_path / "nowhere"))
    assert toy.train_toy(2, file, "--profile-steps", "5:25") == [2, 2]
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and said.count("\n") == 1 and "run.total_steps (24)" in said


def test_a_trace_that_cannot_be_written_is_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toy.write_features(tmp_path / "features")
    file, run = toy.run_file(tmp_path, "full", run__total_steps=4, run__save_every=4), tmp_path / "runs" / "full"
    run.mkdir(parents=True)
    (run / "profile").write_text("in the way")
    assert toy.train_toy(1, file, "--profile-steps", "2:3") == [0]
    said = capfd.readouterr().err
    assert said.count("cannot be written") == 1 and "Traceback" not in said and "finished: " in said


def test_steps_before_an_error_have_a_trace_and_steps_before_the_start_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    toy.write_features(tmp_path / "features")
    file = toy.run_file(tmp_path, "failed", run__save_every=4, guard__max_consecutive_skips=1)
    plan = FaultPlan(Fault("train:batch", "nan_batch", step=5))
    assert toy.train_toy(1, file, "--profile-steps", "2:9", plan=plan) == [EXIT_NOT_FINITE]
    traces = [path.name for path in (tmp_path / "runs" / "failed" / "profile").iterdir()]
    assert traces == ["rank00000.steps2-6.pt.trace.json.gz"]
    capfd.readouterr()
    assert toy.train_toy(2, file, "--profile-steps", "2:4", "--stop-after", "6") == [EXIT_STOPPED] * 2
    said = capfd.readouterr().err
    assert said.count("--profile-steps 2:4 ends before step 5, where this start begins: pass later steps") == 1
    assert toy.train_toy(1, file, "--profile-steps", "8:9", "--dry-run") == [0]
    assert "--profile-steps is ignored" in capfd.readouterr().err
