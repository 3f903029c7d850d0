"""F3: whatever happens to the files of a checkpoint is found and named, and the one before it serves."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import toy

import megacid.train  # noqa: F401  imported once here, inherited by forked ranks
from megacid.checkpoint import store
from megacid.errors import run_tool
from tools import ckpt

STEPS, EVERY = 8, 3  # saved at 3, 6 and 8; 6 and 8 stay
OFFSETS = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damage")
    toy.write_features(root / "features")
    for world in (1, 2, 4):
        file = toy.run_file(root, f"whole{world}", run__total_steps=STEPS, run__save_every=EVERY)
        assert toy.train_toy(world, file) == [0] * world
    return root


def copy_of(root: Path, world: int, place: str) -> tuple[Path, Path, Path]:
    """(run file, newest checkpoint, the one before) of a copy of the finished run in another place."""
    name = f"whole{world}"
    settings = {"run__total_steps": STEPS, "run__save_every": EVERY, "run__dir": str(root / place)}
    file = toy.run_file(root, name, **settings)
    run = root / place / name
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(root / "runs" / name, run)
    return file, run / store.step_name(STEPS), run / store.step_name(2 * EVERY)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_flipped_byte_of_every_file_is_found_and_named(root: Path, world: int) -> None:
    _, newest, before = copy_of(root, world, "flipped")
    random = np.random.default_rng(world)
    files = sorted(newest.iterdir())
    assert len(files) == 2 * world + 1
    for path in files:
        size = path.stat().st_size
        # The first byte, the length and the text of the header, the last byte; the rest by chance.
        offsets = {0, 7, 8, 20, size - 1} | set(random.choice(size, OFFSETS, replace=False).tolist())
        for offset in sorted(offsets):
            with open(path, "r+b") as handle:
                handle.seek(offset)
                was = handle.read(1)[0]
                handle.seek(offset)
                handle.write(bytes([was ^ (1 << int(random.integers(8)))]))
            began = time.monotonic()
            found, problems = store.newest_valid(newest.parent)
            assert found == before and len(problems) == 1 and str(path) in problems[0], (path.name, offset)
            assert time.monotonic() - began < 5
            with open(path, "r+b") as handle:
                handle.seek(offset)
                handle.write(bytes([was]))
    assert store.newest_valid(newest.parent) == (newest, [])


def swap(one: Path, other: Path) -> None:
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def from_before(path: Path) -> None:
    shutil.copy(path.parents[1] / store.step_name(2 * EVERY) / path.name, path)


def replace(path: Path, by: Callable[[Path], object]) -> None:
    path.unlink()
    by(path)


HARMS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "gone": lambda path: path.unlink(),
    "a directory": lambda path: replace(path, Path.mkdir),
    "a pipe": lambda path: replace(path, os.mkfifo),
    "a link to itself": lambda path: replace(path, lambda p: p.symlink_to(p.name)),
    "of an older checkpoint": from_before,
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_files_that_are_not_as_written_are_found_and_named(
    root: Path, world: int, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, newest, _ = copy_of(root, world, "harmed")
    for name in sorted(path.name for path in newest.iterdir()):
        _, newest, before = copy_of(root, world, "harmed")
        HARMS[harm](newest / name)
        found, problems = store.newest_valid(newest.parent)
        assert found == before and len(problems) == 1, name
        assert str(newest) in problems[0] and (name in problems[0] or name == store.MANIFEST), problems
        # The tool sees the same, and lives.
        assert run_tool(lambda run=newest.parent: ckpt.main(["list", str(run)])) == 1
        listed = capsys.readouterr().out.splitlines()
        assert [line.endswith("ok") for line in listed] == [True, False] and str(newest) in listed[1]
        for command in ("verify", "show", "export"):
            options = ["--out", str(root / "rows.npy")] if command == "export" else []
            if (newest / store.MANIFEST).exists() or command == "verify":
                assert run_tool(lambda words=(command, str(newest), *options): ckpt.main(list(words))) == 2
                assert "error: not a valid checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["student", "classifier"])
@pytest.mark.parametrize("world", [2, 4])
def test_files_of_two_ranks_that_changed_places_are_found(root: Path, world: int, kind: str) -> None:
    _, newest, before = copy_of(root, world, "swapped")
    swap(newest / f"{kind}-00000.safetensors", newest / f"{kind}-00001.safetensors")
    found, problems = store.newest_valid(newest.parent)
    assert found == before and f"{kind}-00000.safetensors" in problems[0]


def test_files_that_the_manifest_does_not_name_change_nothing(root: Path) -> None:
    _, newest, _ = copy_of(root, 1, "more")
    (newest / "student-00001.safetensors").write_bytes(b"not mine")
    (newest / "notes").mkdir()
    (newest.parent / "step-0000000x").mkdir()
    (newest.parent / "step-99999999").write_text("a file")
    (newest.parent / "step-000000009").mkdir()  # nine digits, and not the name of step 9
    (newest.parent / "step-00000009\n").mkdir()
    assert store.newest_valid(newest.parent) == (newest, [])
    assert toy.differing(toy.tensors(root / "runs" / "whole1" / newest.name), toy.tensors(newest)) == []


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("harm", ["a flipped byte", "gone", "no manifest", "no directory left but its name"])
def test_the_trainer_passes_over_a_damaged_checkpoint_and_ends_with_the_same_bits(
    root: Path, world: int, harm: str
) -> None:
    file, newest, before = copy_of(root, world, "fallen")
    victim = newest / f"classifier-{world - 1:05d}.safetensors"
    if harm == "a flipped byte":
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    elif harm == "gone":
        victim.unlink()
    elif harm == "no manifest":
        (newest / store.MANIFEST).unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    assert toy.train_toy(world, file) == [0] * world
    said = (newest.parent / "log.txt").read_text()
    assert f"skipped an invalid checkpoint: {newest}" in said and f"resumed from {before}" in said
    assert toy.differing(toy.tensors(root / "runs" / f"whole{world}" / newest.name), toy.tensors(newest)) == []
    # The damaged one is kept aside, for whoever wants to know what happened to it.
    assert len(list(newest.parent.glob(f".replaced-{newest.name}-*"))) == 1


@pytest.mark.parametrize("world", [1, 2])
def test_with_no_whole_checkpoint_the_trainer_ends_and_says_which_it_found(
    root: Path, world: int, capfd: pytest.CaptureFixture[str]
) -> None:
    file, newest, before = copy_of(root, world, "none")
    for directory in (newest, before):
        os.truncate(directory / "student-00000.safetensors", 100)
    assert toy.train_toy(world, file) == [2] * world
    said = capfd.readouterr().err
    assert said.count("error: ") == 1
    assert "none of the 2 checkpoints" in said and f"{newest / 'student-00000.safetensors'} has 100 bytes" in said


def test_quarantine_renames_what_is_damaged_and_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, newest, before = copy_of(root, 1, "quarantine")
    assert run_tool(lambda: ckpt.main(["quarantine", str(newest.parent)])) == 0
    assert newest.is_dir() and capsys.readouterr().out == ""
    (newest / "student-00000.safetensors").unlink()
    assert run_tool(lambda: ckpt.main(["list", str(newest.parent)])) == 1
    assert newest.is_dir()  # only on the explicit command
    assert run_tool(lambda: ckpt.main(["quarantine", str(newest.parent)])) == 0
    assert sorted(path.name for path in newest.parent.glob("*step-*")) == [f".bad-{newest.name}", before.name]
    assert f".bad-{newest.name}" in capsys.readouterr().out
    assert toy.train_toy(1, file) == [0]
    assert store.newest_valid(newest.parent) == (newest, [])
    assert (newest.parent / f".bad-{newest.name}").is_dir()


def test_a_run_never_loads_a_checkpoint_of_another_step_under_a_good_name(root: Path) -> None:
    _, newest, before = copy_of(root, 1, "renamed")
    shutil.rmtree(newest)
    before.rename(newest)
    found, problems = store.newest_valid(newest.parent)
    assert found is None and f"has step {2 * EVERY}, expected that of its directory {newest.name}" in problems[0]
