"""A tracker's package that is missing, and a tracker that fails while the run goes on."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import toy
from harness import run_ranks
from trackio_stand_in import Trackio
from train_run import losses

from megacid.config.load import load_run
from megacid.errors import UserError

SHORT = {"run__total_steps": 4, "run__save_every": 4, "run__log_every": 1}


def with_modules(argv: list[str], modules: dict[str, Any]) -> int:
    """The trainer with these modules in place of installed packages."""
    sys.modules.update(modules)
    return toy.train_here(argv)


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({"wandb": None}, "import of wandb halted"),
        # What Python makes of a folder ./wandb, where wandb writes by default.
        ({"wandb": types.ModuleType("wandb")}, "module 'wandb' has no attribute 'init'"),
    ],
    ids=["missing", "folder"],
)
def test_a_tracker_without_its_package_is_one_error_before_data_are_read(
    tmp_path: Path, modules: dict[str, Any], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = toy.run_file(tmp_path, "none", run__trackers=["wandb"], data__features=str(tmp_path / "nowhere"))
    for more in ([], ["--dry-run"]):
        argv = ["--deepspeed_config", str(file), *more]
        assert run_ranks(with_modules, 2, argv, modules) == [2, 2]
        said = capfd.readouterr().err
        assert said.count("error: ") == 1 and said.count("\n") == 1, said
        assert f'"megacid.run.trackers" has "wandb", but its package cannot be used ({reason}' in said
        assert 'pip install "megacid[wandb]"' in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("value", ['["mlflow"]', '"wandb"', '["tensorboard","tensorboard"]', "[3]", "7", "[[]]"])
def test_an_unknown_or_repeated_tracker_is_one_message_with_the_known_ones(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match=r'"megacid.run.trackers" is .*, expected a list of "tensorboard", "wandb", '):
        load_run(toy.run_file(tmp_path, "bad"), [f"run.trackers={value}"], world=1)


def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    toy.write_features(tmp_path / "features")
    calls = tmp_path / "calls"
    file = toy.run_file(tmp_path, "fails", run__trackers=["trackio", "tensorboard"], **SHORT)
    trackio = Trackio(calls, fail_at=2)
    assert run_ranks(with_modules, 1, ["--deepspeed_config", str(file)], {"trackio": trackio}) == [0]
    said = capfd.readouterr().err
    assert said.count("the run continues without it") == 1 and "Traceback" not in said
    assert "tracker trackio cannot be written any more (no route to host)" in said
    assert [name for name, *_ in trackio.read()] == ["init", "log"]
    assert losses(tmp_path / "runs" / "fails").keys() == {1, 2, 3, 4}


def test_without_trackers_nothing_of_them_is_written(tmp_path: Path) -> None:
    toy.write_features(tmp_path / "features")
    assert toy.train_toy(1, toy.run_file(tmp_path, "quiet", run__trackers=[], **SHORT)) == [0]
    left = {path.name for path in (tmp_path / "runs" / "quiet").iterdir()}
    assert {"log.txt", "train_summary.json"} < left and not left & {"tensorboard", "wandb", "trackers.json"}
