"""Ranks verify a checkpoint together: each reads its share, and damage in any share is the same problem on all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import toy
from harness import run_ranks

from megacid.checkpoint import store, verification
from megacid.checkpoint.verification import find_problem
from megacid.distributed.divided_work import ALONE, Workers
from megacid.distributed.parallel import Parallel

SIZES = {"a": 5000, "b": 100, "c": 3000, "d": 3000, "e": 900, "f": 0}


GUARD = {"skipped": 0, "consecutive": 0, "recent": [], "losses": []}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    stage = store.make_stage(tmp_path, 1)
    files = []
    for name, size in SIZES.items():
        data = os.urandom(size)
        (stage / name).write_bytes(data)
        files.append(store.WrittenFile(name, size, hashlib.sha256(data).hexdigest()))
    return store.publish(tmp_path, stage, 1, files, {"updates": 1, "guard": GUARD})


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def problem_and_files(directory: Path) -> tuple[str | None, list[str]]:
    """What this rank finds, and the files that it reads."""
    rank, world = dist.get_rank(), dist.get_world_size()
    read = directory.parent / f"read-by-{rank}"
    read.write_text("")
    real = store.file_sha256

    def recorded(path: Path) -> str:
        with open(read, "a") as file:  # by a process of the rank
            print(path.name, file=file)
        return real(path)

    store.file_sha256 = recorded  # this process is a forked rank
    workers = Workers(Parallel(rank, world, 0, torch.device("cpu"), dist.group.WORLD))
    return find_problem(directory, workers, to_resume=True), read.read_text().split()


@pytest.mark.parametrize("world", [2, 4])
def test_every_file_is_read_by_one_rank_and_the_bytes_are_divided(checkpoint: Path, world: int) -> None:
    results = run_ranks(problem_and_files, world, checkpoint)
    assert [problem for problem, _ in results] == [None] * world
    shares = [read for _, read in results]
    assert sorted(name for read in shares for name in read) == sorted(SIZES)
    loads = [sum(SIZES[name] for name in read) for read in shares]
    assert loads == {2: [6000, 6000], 4: [5000, 3000, 3000, 1000]}[world]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_damage_in_the_share_of_any_rank_is_the_same_problem_on_every_rank(checkpoint: Path, world: int) -> None:
    shares = [read for _, read in run_ranks(problem_and_files, world, checkpoint)]
    for read in shares:
        path = checkpoint / read[-1] if SIZES[read[-1]] else checkpoint / read[0]
        flip(path)
        problems = [problem for problem, _ in run_ranks(problem_and_files, world, checkpoint)]
        assert problems[0] is not None and problems[0].startswith(f"{path} has sha256 ")
        assert problems == problems[:1] * world
        flip(path)


def test_the_first_damaged_file_is_named_whichever_rank_reads_it(checkpoint: Path) -> None:
    for name in ("c", "d", "e"):
        flip(checkpoint / name)
    problems = [problem for problem, _ in run_ranks(problem_and_files, 4, checkpoint)]
    assert problems[0] is not None and problems[0].startswith(f"{checkpoint}/c has sha256 ")
    assert problems == problems[:1] * 4


@pytest.mark.parametrize("harm", ["missing", "cut", "manifest"])
def test_what_rank_0_finds_before_the_hashes_is_known_to_all(checkpoint: Path, harm: str) -> None:
    if harm == "missing":
        (checkpoint / "b").unlink()
    elif harm == "cut":
        os.truncate(checkpoint / "b", 99)
    else:
        flip(checkpoint / store.MANIFEST)
    (problem, read), (other, other_read) = run_ranks(problem_and_files, 2, checkpoint)
    assert problem == other == find_problem(checkpoint, ALONE, to_resume=True) is not None
    assert read == other_read == []


def test_one_process_finds_what_verify_finds(checkpoint: Path) -> None:
    assert find_problem(checkpoint, ALONE) is None
    flip(checkpoint / "d")
    with pytest.raises(ValueError) as error:
        store.verify(checkpoint)
    assert find_problem(checkpoint, ALONE) == str(error.value)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_resume_from_the_older_step_whichever_share_is_damaged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], world: int
) -> None:
    toy.write_features(tmp_path / "features")
    settings = {"run__total_steps": 4, "run__save_every": 2}
    file = toy.run_file(tmp_path, "run", **settings)
    assert toy.train_toy(world, file) == [0] * world
    newest = tmp_path / "runs" / "run" / store.step_name(4)
    expected = toy.tensors(newest)
    for name in ("student-00000", f"classifier-{world - 1:05d}"):
        flip(newest / f"{name}.safetensors")
        capfd.readouterr()
        assert toy.train_toy(world, file) == [0] * world
        text = capfd.readouterr().err
        assert text.count("skipped an invalid checkpoint") == 1 and f"{name}.safetensors has sha256" in text
        assert toy.differing(expected, toy.tensors(newest)) == []
        for left in newest.parent.glob(".replaced-*"):
            left.rename(tmp_path / f"{name}-aside")
    flip(newest / "student-00001.safetensors")
    flip(newest.parent / store.step_name(2) / "student-00000.safetensors")
    assert toy.train_toy(world, file) == [2] * world
    text = capfd.readouterr().err
    assert text.count("none of the 2 checkpoints in") == 1 and "restore one" in text


def test_largest_files_are_dealt_first() -> None:
    files = [{"bytes": size} for size in (1, 9, 5, 5)]
    parallels = [Parallel(rank, 2, 0, torch.device("cpu"), None) for rank in range(2)]
    shares = [verification.share_of_files(files, Workers(parallel)) for parallel in parallels]
    assert shares == [[1, 0], [2, 3]]
