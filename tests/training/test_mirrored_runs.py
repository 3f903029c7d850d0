"""Which checkpoint a run with a mirror starts from, which mirrors it refuses, and whole trainings with a mirror."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import toy
from faultplan import Fault, FaultPlan, kill
from harness import run_ranks
from mirror_data import flip, make_saver, save

from megacid.checkpoint import store
from megacid.checkpoint.mirror import Mirror
from megacid.config.load import load_run
from megacid.config.schema import RunFile
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.storage import object_store
from megacid.training.resume import find_checkpoint, open_run
from megacid.training.run_settings import write_config

ALONE = Parallel(0, 1, 0, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "RETRY_S", 0.15)
    monkeypatch.setattr(object_store, "_BACKOFF_S", 0.05)


@pytest.fixture
def run(tmp_path: Path) -> RunFile:
    """A run with the steps 1 and 2 in its directory and at its mirror."""
    run = load_run(toy.run_file(tmp_path, "a", run__checkpoint_mirror=f"{tmp_path}/mirror"), world=1)
    saver = make_saver(run.directory, f"{tmp_path}/mirror")
    save(saver, 1, 2)
    saver.close()
    write_config(run, run.directory, 1)
    mirror_of(run).put_config(run.directory)
    return run


def mirror_of(run: RunFile) -> Mirror:
    return Mirror(str(run.megacid.run.checkpoint_mirror), keep_last=2)


def start(run: RunFile, resume: str = "auto", fork: str | None = None) -> int | None:
    """The step that the run would start from."""
    chosen = find_checkpoint(run, resume, fork, ALONE, mirror_of(run))
    return None if chosen is None else store.verify(Path(chosen), to_resume=True)["step"]


def damage(directory: Path) -> None:
    flip(directory / "student-00000.safetensors")


# What happens to the run directory and to the mirror -> the step of the start, and whether it is fetched.
STARTS: dict[str, tuple[Callable[[Path, Path], object], int | None, bool]] = {
    "nothing local": (lambda run, mirror: shutil.rmtree(run), 2, True),
    "older local": (lambda run, mirror: shutil.rmtree(run / "step-00000002"), 2, True),
    "older mirror": (lambda run, mirror: shutil.rmtree(mirror / "step-00000002"), 2, False),
    "both": (lambda run, mirror: None, 2, False),
    "empty mirror": (lambda run, mirror: shutil.rmtree(mirror), 2, False),
    "damaged local": (lambda run, mirror: damage(run / "step-00000002"), 2, True),
    "damaged mirror": (lambda run, mirror: (shutil.rmtree(run), damage(mirror / "step-00000002")), 1, True),
    "damaged newer mirror": (
        lambda run, mirror: (shutil.rmtree(run / "step-00000002"), damage(mirror / "step-00000002")),
        1,
        False,
    ),
    "neither": (lambda run, mirror: (shutil.rmtree(run), shutil.rmtree(mirror)), None, False),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_takes_the_newest_whole_step_of_both(run: RunFile, tmp_path: Path, case: str) -> None:
    change, step, fetched = STARTS[case]
    change(run.directory, tmp_path / "mirror")
    before = {number for number, _ in store.list_steps(run.directory)}
    assert start(run) == step
    after = {number for number, _ in store.list_steps(run.directory)}
    replaced = list(run.directory.glob(".replaced-*"))
    assert fetched == (after != before or bool(replaced)) and list(run.directory.glob(".tmp-*")) == []
    if step is not None:
        assert (run.directory / "config.json").exists()


def test_two_places_without_a_valid_checkpoint_are_an_error(run: RunFile, tmp_path: Path) -> None:
    for step in (1, 2):
        for directory in (run.directory, tmp_path / "mirror"):
            damage(directory / store.step_name(step))
    with pytest.raises(UserError, match=r"none of the 4 checkpoints in \S+/runs/a and \S+/mirror is valid \("):
        start(run)


def test_never_is_refused_when_the_mirror_has_steps(run: RunFile) -> None:
    shutil.rmtree(run.directory)
    with pytest.raises(UserError, match=r"already has checkpoints up to step 2 and --resume is never"):
        start(run, "never")


def test_a_mirror_that_cannot_be_read_ends_the_start(run: RunFile, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "mirror")
    (tmp_path / "mirror").write_text("a file")
    with pytest.raises(UserError, match=r"/mirror/config.json cannot be read, tried for") as error:
        start(run)
    assert "\n" not in str(error.value)


def open_on_a_disk_of_its_own(file: str, root: str) -> str:
    rank = dist.get_rank()
    run = load_run(file, [f"run.dir={root}/disk{rank}"], world=2)
    try:
        open_run(run, "auto", None, Parallel(rank, 2, rank, torch.device("cpu"), dist.group.WORLD))
    except UserError as error:
        return str(error)
    return ""


def test_a_run_directory_that_the_ranks_do_not_share_is_refused_on_each(run: RunFile, tmp_path: Path) -> None:
    first, second = run_ranks(open_on_a_disk_of_its_own, 2, str(run.path), str(tmp_path))
    assert (
        first.replace("disk0", "disk1") == second
        and "/a is another directory on rank 1 than on rank 0, expected one that all" in first
    )


def change_config(mirror: Path, **changes: object) -> None:
    config = json.loads((mirror / "config.json").read_text())
    (mirror / "config.json").write_text(json.dumps({**config, **changes}))


FOREIGN: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "other settings": (
        lambda mirror: None,
        ["loss.cluster=2"],
        "the mirror of another run (megacid.loss.cluster: 1.0 -> 2.0): choose another URL",
    ),
    "other name": (lambda mirror: None, ["run.name=b"], "the mirror of another run (megacid.run.name: 'a' -> 'b')"),
    "a fork": (lambda mirror: change_config(mirror, fork_of="/x"), [], "another run (fork_of: '/x' -> None)"),
    "no config": (lambda mirror: (mirror / "config.json").unlink(), [], "up to step 2 and no config.json that says"),
    "damaged config": (
        lambda mirror: (mirror / "config.json").write_text("{"),
        [],
        "/mirror/config.json cannot be read: restore it, or choose another checkpoint_mirror",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_the_mirror_of_another_run_is_refused_and_stays_as_it_is(run: RunFile, tmp_path: Path, case: str) -> None:
    change, settings, message = FOREIGN[case]
    change(tmp_path / "mirror")
    with pytest.raises(UserError) as error:
        start(load_run(run.path, settings, world=1))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert mirror_of(run).steps() == [1, 2]


def test_settings_that_change_no_result_may_differ_from_those_at_the_mirror(run: RunFile) -> None:
    assert start(load_run(run.path, ["run.log_every=7", "run.keep_last=5"], world=1)) == 2
    student = run.megacid.student.model_copy(update={"embed_dim": None})  # filled in later
    assert start(replace(run, megacid=run.megacid.model_copy(update={"student": student}))) == 2


def test_settings_may_change_before_the_first_checkpoint_but_not_the_name(run: RunFile, tmp_path: Path) -> None:
    shutil.rmtree(run.directory)
    for step in (1, 2):
        shutil.rmtree(tmp_path / "mirror" / store.step_name(step))
    assert start(load_run(run.path, ["loss.cluster=2"], world=1)) is None
    with pytest.raises(UserError, match=r"another run \(megacid.run.name: 'a' -> 'b'\)"):
        start(load_run(run.path, ["run.name=b"], world=1))


@pytest.mark.parametrize("lead", ["", "file://"])
def test_a_mirror_in_the_run_directory_is_refused(run: RunFile, lead: str) -> None:
    settings = [f"run.checkpoint_mirror={lead}{run.directory}/"]
    with pytest.raises(UserError, match="the run directory itself, expected another place"):
        start(load_run(run.path, settings, world=1))


def test_a_fork_goes_on_from_its_mirror(run: RunFile, tmp_path: Path) -> None:
    parent = tmp_path / "parent" / "step-00000001"
    shutil.copytree(run.directory / "step-00000001", parent)
    for config in (run.directory, tmp_path / "mirror"):
        change_config(config, fork_of=str(parent))
    shutil.rmtree(run.directory)
    assert start(run, fork=str(parent)) == 2
    shutil.rmtree(run.directory)
    with pytest.raises(UserError, match="already has checkpoints and is a fork of"):
        start(run, fork=str(tmp_path / "another"))
    assert start(run) == 2


# ---- whole trainings -----------------------------------------------------------------------------------------------


def mirrored_file(root: Path, name: str, **changes: object) -> tuple[Path, Mirror]:
    settings = {"run__total_steps": 6, "run__save_every": 2, "run__checkpoint_mirror": str(root / f"{name}-mirror")}
    return toy.run_file(root, name, **{**settings, **changes}), Mirror(str(root / f"{name}-mirror"), keep_last=2)


def test_a_stopped_run_goes_on_from_its_mirror_when_its_directory_is_gone(tmp_path: Path) -> None:
    toy.write_features(tmp_path / "features")
    file, mirror = mirrored_file(tmp_path, "a")
    assert toy.train_toy(1, file, "--stop-after", "3") == [143]
    assert mirror.steps() == [2, 3]
    first = toy.tensors(tmp_path / "runs" / "a" / "step-00000003")
    shutil.rmtree(tmp_path / "runs")
    assert toy.train_toy(1, file) == [0]
    assert mirror.steps() == [4, 6]
    text = (tmp_path / "runs" / "a" / "log.txt").read_text()
    assert "resumed from" in text and "step 4/6" in text and "step 3/6" not in text
    shutil.copytree(tmp_path / "a-mirror" / "step-00000006", tmp_path / "step-00000006")
    assert (
        toy.differing(toy.tensors(tmp_path / "runs" / "a" / "step-00000006"), toy.tensors(tmp_path / "step-00000006"))
        == []
    )
    assert toy.differing(first, toy.tensors(tmp_path / "step-00000006")) != []


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("fault", [kill("mirror:file", rank=1, step=4), kill("mirror:before_manifest", rank=0, step=4)])
def test_two_ranks_killed_during_a_copy_end_with_the_bits_of_an_undisturbed_run(
    tmp_path: Path, fault: Fault, background: bool
) -> None:
    toy.write_features(tmp_path / "features")
    assert toy.train_toy(2, toy.run_file(tmp_path, "whole", run__total_steps=6, run__save_every=2)) == [0, 0]
    file, mirror = mirrored_file(tmp_path, "a", run__save_in_background=background)
    assert -9 in toy.train_toy(2, file, plan=FaultPlan(fault))
    assert mirror.steps() == [2]
    shutil.rmtree(tmp_path / "runs" / "a")  # the node is gone
    assert toy.train_toy(2, file) == [0, 0]
    assert "resumed from" in (tmp_path / "runs" / "a" / "log.txt").read_text()
    assert mirror.steps() == [4, 6]
    want, got = (toy.tensors(tmp_path / "runs" / name / "step-00000006") for name in ("whole", "a"))
    assert toy.differing(want, got) == []


@pytest.mark.slow
def test_going_back_goes_back_at_the_mirror_too(tmp_path: Path) -> None:
    toy.write_features(tmp_path / "features")
    file, mirror = mirrored_file(tmp_path, "a")
    assert toy.train_toy(2, file) == [0, 0]
    step = tmp_path / "runs" / "a" / "step-00000004"
    assert toy.train_toy(2, file, "--resume", str(step), "--stop-after", "5") == [143, 143]
    assert mirror.steps() == [4, 5]


@pytest.mark.slow
def test_a_mirror_that_is_lost_changes_neither_the_training_nor_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    toy.write_features(tmp_path / "features")
    file, mirror = mirrored_file(tmp_path, "a")
    assert toy.train_toy(2, file, plan=FaultPlan(Fault("mirror:file", "os_error", rank=1, nth=0))) == [0, 0]
    assert mirror.steps() == [] and capfd.readouterr().err.count("is not copied to") == 3
    assert [step for step, _ in store.list_steps(tmp_path / "runs" / "a")] == [4, 6]


@pytest.mark.slow
def test_a_sigterm_copies_the_step_that_it_saves(tmp_path: Path) -> None:
    toy.write_features(tmp_path / "features")
    file, mirror = mirrored_file(tmp_path, "a", run__save_every=5)
    plan = FaultPlan(Fault("train:applied", "signal", rank=1, step=1, value=15))
    assert toy.train_toy(2, file, plan=plan) == [143, 143]
    assert mirror.steps() == [3]


@pytest.mark.slow
def test_two_ranks_refuse_the_mirror_of_another_run_with_one_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    toy.write_features(tmp_path / "features")
    file, _ = mirrored_file(tmp_path, "a")
    assert toy.train_toy(2, file) == [0, 0]
    capfd.readouterr()
    assert toy.train_toy(2, file, "--set", "run.name=b") == [2, 2]
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "the mirror of another run (megacid.run.name: 'a' -> 'b')" in said
