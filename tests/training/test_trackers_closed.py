"""Trackers are closed at the end of a run, after its summary and its lock, and after the message of an error."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import toy
from faultplan import Fault, FaultPlan, kill
from harness import rank_fates
from wandb_files import exit_codes

from megacid.config.load import load_run
from megacid.config.schema import RunFile
from megacid.training import trackers
from megacid.training.trackers import Trackers, close_after_error

CLOSED = "the recording tracker was closed"


class Recording:
    """Writes what it finds in the run directory when it is closed."""

    def __init__(self, run: RunFile, start_step: int) -> None:
        self.directory = run.directory

    def scalars(self, values: dict[str, float], step: int) -> None:
        pass

    def histogram(self, tag: str, edges: list[float], counts: list[int], step: int) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        print(CLOSED, file=sys.stderr, flush=True)
        found = {
            "failed": failed,
            "summary": (self.directory / "train_summary.json").exists(),
            "locked": (self.directory / ".lock").exists(),
        }
        with open(self.directory / "closed", "a") as file:
            file.write(json.dumps(found) + "\n")


def train_recorded(argv: list[str], plan: str) -> int:
    trackers._TRACKERS["tensorboard"] = Recording
    return toy.train_here(argv, plan)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("closed")
    toy.write_features(root / "features")
    return root


def closings(root: Path, name: str, codes: list[int], *faults: Fault, **changes: Any) -> list[dict[str, bool]]:
    settings = {"run__total_steps": 8, "run__save_every": 8, "run__trackers": ["tensorboard"], **changes}
    file = toy.run_file(root, name, **settings)
    argv = ["--deepspeed_config", str(file)]
    assert rank_fates(train_recorded, len(codes), argv, FaultPlan(*faults).to_json()) == codes
    return [json.loads(line) for line in (root / "runs" / name / "closed").read_text().splitlines()]


@pytest.mark.parametrize(("name", "code", "fault"), [("end", 0, []), ("stop", 143, [signal.SIGTERM])])
def test_a_run_writes_its_summary_releases_its_lock_and_then_closes_its_trackers(
    root: Path, name: str, code: int, fault: list[int]
) -> None:
    asked = [Fault("train:batch", "signal", rank=0, step=4, value=number) for number in fault]
    assert closings(root, name, [code], *asked) == [{"failed": False, "summary": True, "locked": False}]


NAN = [Fault("train:batch", "nan_batch", step=step) for step in range(2, 8)]
ERRORS: dict[str, tuple[list[int], list[Fault]]] = {
    "of all ranks": ([65, 65], NAN),
    "of a lost rank": ([75, -9], [kill("train:batch", rank=1, step=4)]),
    "of a stall": ([75, 75], [Fault("train:batch", "sleep", rank=1, step=4, value=300)]),
    "of the user": ([2], []),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_printed_and_then_the_trackers_are_closed_as_those_of_a_failed_run(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes, faults = ERRORS[name]
    if name == "of the user":
        from megacid.errors import UserError
        from megacid.training.metrics import Metrics

        def refuse(*args: Any, **options: Any) -> None:
            raise UserError("the loss cannot be logged: expected a test")

        monkeypatch.setattr(Metrics, "log", refuse)  # in the forked rank
    (closed,) = closings(root, name.replace(" ", "_"), codes, *faults, run__timeout_s=1.5)
    assert closed["failed"] and not closed["summary"]
    said = capfd.readouterr().err
    assert said.count(CLOSED) == 1 and 0 <= said.index("error: ") < said.index(CLOSED), said


def test_a_tracker_that_cannot_be_closed_does_not_keep_a_failed_run(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    class Stuck(Recording):
        def close(self, *, failed: bool) -> None:
            time.sleep(60)

    monkeypatch.setattr(trackers, "_OF_THIS_PROCESS", [])
    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", Stuck)
    Trackers(load_run(toy.run_file(root, "stuck", run__trackers=["tensorboard"]), [], world=1), 0)
    began = time.monotonic()
    close_after_error(within_s=0.2)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("failed", [False, True])
def test_wandb_marks_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool) -> None:
    monkeypatch.setattr(trackers, "_OF_THIS_PROCESS", [])
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = load_run(toy.run_file(tmp_path, "run", run__trackers=["wandb"]), [], world=1)
    run.directory.mkdir(parents=True)
    opened = Trackers(run, 0)
    opened.scalars({"train/loss": 1.0}, 1)
    if not failed:
        opened.close()
    close_after_error(within_s=60)
    deadline = time.monotonic() + 60
    while not (found := exit_codes(run.directory)) and time.monotonic() < deadline:
        time.sleep(0.1)  # a process of wandb writes the file
    assert found == [int(failed)]
