"""A run that starts from a checkpoint of another run: --fork."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the run "origin", which was stopped after step 6."""
    root = tmp_path_factory.mktemp("fork")
    toy.write_features(root / "features")
    assert toy.train_toy(1, toy.run_file(root, "origin"), "--stop-after", "6") == [143]
    return root


@pytest.fixture
def start(root: Path) -> Iterator[str]:
    """The checkpoint to fork from; no fork may change a byte of its run."""
    run = root / "runs" / "origin"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    yield str(run / "step-00000006")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def config_of(root: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((root / "runs" / name / "config.json").read_text()))


def test_a_fork_is_continued_by_the_same_command(root: Path, start: str, capfd: pytest.CaptureFixture[str]) -> None:
    file = toy.run_file(root, "longer", schedule__warmup_steps=5, run__total_steps=12)
    fork = (file, "--fork", start)
    assert toy.train_toy(1, *fork, "--stop-after", "9") == [143]
    assert f"resumed from {start}" in capfd.readouterr().err
    config = config_of(root, "longer")
    assert config["fork_of"] == str(Path(start).resolve())
    assert config["changed"] == [
        f"megacid.run.total_steps: {toy.STEPS} -> 12",
        "megacid.schedule.warmup_steps: 3 -> 5",
    ]
    assert config["resolved"]["megacid"]["schedule"]["warmup_steps"] == 5
    assert toy.train_toy(1, *fork, "--set", "schedule.warmup_steps=4") == [2]
    assert "schedule.warmup_steps: 5 -> 4" in capfd.readouterr().err
    assert toy.train_toy(2, *fork) == [0, 0]
    assert f"resumed from {root / 'runs' / 'longer' / 'step-00000009'}" in capfd.readouterr().err
    assert config_of(root, "longer") == config
    assert toy.train_toy(1, file) == [0]  # without --fork, too
    assert "already finished" in capfd.readouterr().err


def test_a_fork_with_the_same_settings_is_the_same_run(root: Path, start: str) -> None:
    assert toy.train_toy(1, toy.run_file(root, "whole")) == [0]
    assert toy.train_toy(1, toy.run_file(root, "same"), "--fork", start) == [0]
    ends = [toy.tensors(root / "runs" / name / f"step-{toy.STEPS:08d}") for name in ("whole", "same")]
    assert toy.differing(*ends) == []
    assert config_of(root, "same")["changed"] == []


def test_a_fork_that_ended_before_its_first_checkpoint_does_not_start_from_scratch(
    root: Path, start: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = toy.run_file(root, "early")
    assert toy.train_toy(1, file, "--fork", start, "--stop-after", "7") == [143]
    for path in sorted((root / "runs" / "early").glob("step-*/**/*"), reverse=True):
        path.unlink()
    for path in (root / "runs" / "early").glob("step-*"):
        path.rmdir()
    assert toy.train_toy(1, file) == [2]
    assert f"early is a fork of {Path(start).resolve()} without a checkpoint" in capfd.readouterr().err
    assert toy.train_toy(1, file, "--fork", start, "--stop-after", "8") == [143]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("elsewhere", ["--resume", "START"], "belongs to another run than"),
        ("origin", ["--fork", "START"], "already has checkpoints and is no fork, expected a new run"),
        ("longer", ["--fork", "OTHER"], "is a fork of START, expected a new run for --fork OTHER"),
        ("elsewhere", ["--fork", "/nowhere/step-00000006"], "--fork /nowhere/step-00000006: "),
        ("elsewhere", ["--fork", "START/.."], "name a valid step-... directory"),
        ("elsewhere", ["--fork", "START", "--set", "run.total_steps=6", "--set", "schedule.warmup_steps=1"],
         "is at step 6 and run.total_steps is 6, expected more steps"),
        ("elsewhere", ["--fork", "START", "--set", "student.embed_dim=16"], "embed_dim"),
    ],
)  # fmt: skip
def test_a_fork_that_cannot_be_is_one_line_on_all_ranks(
    root: Path, start: str, world: int, name: str, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if name == "longer" and not (root / "runs" / name).exists():
        assert toy.train_toy(1, toy.run_file(root, name), "--fork", start, "--stop-after", "7") == [143]
    other = root / "runs" / "longer" / "step-00000007"
    texts = [word.replace("START", start).replace("OTHER", str(other)) for word in (*options, message)]
    assert toy.train_toy(world, toy.run_file(root, name), *texts[:-1]) == [2] * world
    output = capfd.readouterr().err
    assert texts[-1] in output and "Traceback" not in output
    assert not list((root / "runs" / "elsewhere").glob("step-*"))


def test_fork_and_resume_exclude_each_other(root: Path, start: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="SystemExit: 2"):
        toy.train_toy(1, toy.run_file(root, "both"), "--fork", start, "--resume", "never")
    assert "not allowed with argument" in capfd.readouterr().err


def test_the_origin_is_not_needed_once_the_fork_has_a_checkpoint(root: Path, start: str) -> None:
    file = toy.run_file(root, "orphan")
    copy = root / "copy" / "step-00000006"
    for path in Path(start).rglob("*"):
        target = copy / path.relative_to(start)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert toy.train_toy(1, file, "--fork", str(copy), "--stop-after", "8") == [143]
    assert config_of(root, "orphan")["changed"] is None  # a checkpoint without its run's config.json
    for path in sorted(copy.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert toy.train_toy(1, file, "--fork", str(copy)) == [0]


def test_a_dry_run_checks_where_it_would_start_and_writes_nothing(
    root: Path, start: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = toy.run_file(root, "dry")
    assert toy.train_toy(1, file, "--dry-run", "--fork", "/nowhere/step-00000006") == [2]
    assert "--fork /nowhere/step-00000006: " in capfd.readouterr().err
    assert toy.train_toy(1, file, "--dry-run", "--fork", start) == [0]
    assert f"the run would start from {start}" in capfd.readouterr().err
    assert not (root / "runs" / "dry").exists()
    assert toy.train_toy(1, toy.run_file(root, "origin"), "--dry-run") == [0]
    assert f"the run would start from {start}" in capfd.readouterr().err
