"""F4 and F29: saves that fail, on one rank or on all, and saves that are slow. The older checkpoints stay whole, all
ranks have the same outcome, and training goes on until it would only pretend to be saved."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import toy
from faultplan import Fault, FaultPlan
from harness import rank_fates

import megacid.train  # imported once here, inherited by forked ranks
import megacid.training.metrics
import megacid.training.trackers
from megacid import failpoints
from megacid.checkpoint import store

STEPS, EVERY = 9, 3  # saved at 3, 6 and 9
BEFORE_PUBLICATION = ["stage_made", "mid_file", "before_fsync", "after_fsync", "files_written"]
BY_THE_FIRST = ["before_manifest", "before_rename"]
AFTERWARDS = ["after_rename", "during_prune", "after_prune"]


def run_file(root: Path, name: str, **changes: Any) -> tuple[Path, Path]:
    settings = {"run__total_steps": STEPS, "run__save_every": EVERY, "run__keep_last": 3, **changes}
    return toy.run_file(root, name, **settings), root / "runs" / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With runs "whole1" and "whole2" that nothing happened to."""
    root = tmp_path_factory.mktemp("failures")
    toy.write_features(root / "features")
    for world in (1, 2):
        assert toy.train_toy(world, run_file(root, f"whole{world}")[0]) == [0] * world
    return root


def published(run: Path) -> list[int]:
    """The steps in a run directory, each verified; no stage is left."""
    assert list(run.glob(".tmp-*")) == []
    for _, directory in store.list_steps(run):
        store.verify(directory)
    return [step for step, _ in store.list_steps(run)]


def same_bits(root: Path, world: int, run: Path, *steps: int) -> None:
    for step in steps:
        want, got = (toy.tensors(d / store.step_name(step)) for d in (root / "runs" / f"whole{world}", run))
        assert toy.differing(want, got) == [], step


CASES = [
    *((2, rank, failpoint) for failpoint in BEFORE_PUBLICATION for rank in (0, 1)),
    *((world, 0, failpoint) for failpoint in BY_THE_FIRST for world in (1, 2)),
    (1, 0, "mid_file"), (2, None, "before_fsync"),
]  # fmt: skip


# The default run has each case with one of the two errors in turn.
ERRORS = [
    pytest.param(*case, number, marks=[] if (at + at // 2) % 2 == odd else pytest.mark.slow)
    for at, case in enumerate(CASES)
    for odd, number in enumerate((errno.ENOSPC, errno.EIO))
]


@pytest.mark.parametrize(("world", "rank", "failpoint", "number"), ERRORS)
def test_a_save_that_fails_leaves_the_older_ones_and_training_goes_on(
    root: Path, world: int, rank: int | None, failpoint: str, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    file, run = run_file(root, f"fails{world}{rank}{failpoint}{number}")
    plan = FaultPlan(Fault(f"store:{failpoint}", "os_error", rank=rank, step=2 * EVERY, value=number))
    assert toy.train_toy(world, file, plan=plan) == [0] * world
    said = capfd.readouterr().err
    assert published(run) == [EVERY, STEPS]
    same_bits(root, world, run, EVERY, STEPS)
    assert said.count("could not save step 6, older checkpoints are kept: ") == 1
    assert said.count("could not") == 1 and ("No space left" if number == errno.ENOSPC else "Input/output") in said
    assert rank is None or failpoint in BY_THE_FIRST or f"kept: rank {rank}: " in said


@pytest.mark.parametrize(("rank", "failpoint"), [(1, "mid_file"), (0, "before_fsync"), (0, "before_rename")])
def test_a_save_that_fails_in_the_background_is_the_same(
    root: Path, rank: int, failpoint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file, run = run_file(root, f"behind{rank}{failpoint}", run__save_in_background=True)
    plan = FaultPlan(Fault(f"store:{failpoint}", "os_error", rank=rank, step=2 * EVERY, value=errno.EIO))
    assert toy.train_toy(2, file, plan=plan) == [0, 0]
    assert capfd.readouterr().err.count("could not save step 6, older checkpoints are kept: ") == 1
    assert published(run) == [EVERY, STEPS]
    same_bits(root, 2, run, EVERY, STEPS)


@pytest.mark.parametrize("failpoint", AFTERWARDS)
def test_when_only_an_old_checkpoint_cannot_be_removed_the_new_one_is_saved(
    root: Path, failpoint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Saves at 1, 2, ... 9, two of which are kept; every one after step 5 fails to remove, which is no failed save."""
    file, run = run_file(root, f"remove{failpoint}", run__save_every=1, run__keep_last=2)
    faults = (Fault(f"store:{failpoint}", "os_error", rank=0, step=step, value=errno.EIO) for step in range(5, 9))
    assert toy.train_toy(2, file, plan=FaultPlan(*faults)) == [0, 0]
    said = capfd.readouterr().err
    assert said.count("could not remove an old checkpoint") == 4 and "could not save" not in said
    assert published(run) == [8, 9]  # the save after the last failure removed what had been left


def limited(argv: list[str], rank: int) -> int:
    """A trainer of which one rank can write files of at most 4 KiB while it saves step 6, as `ulimit -f` does it."""
    import torch.distributed as dist

    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        # Python ignores SIGXFSZ: the write ends with EFBIG.
        failpoints.hooks["store:stage_made"] = lambda step: resource.setrlimit(
            resource.RLIMIT_FSIZE, (4096 if step == 2 * EVERY else most, most)
        )
    return toy.train_here(argv)


@pytest.mark.parametrize("background", [False, True])
def test_a_real_limit_of_the_file_size_on_one_rank_is_a_failed_save_of_all(
    root: Path, background: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    file, run = run_file(root, f"limit{background}", run__save_in_background=background)
    argv = ["--deepspeed_config", str(file)]
    assert rank_fates(limited, 2, argv, 1) == [0, 0]
    said = capfd.readouterr().err
    assert said.count("could not save step 6, older checkpoints are kept: rank 1: [Errno 27] File too large") == 1
    assert published(run) == [EVERY, STEPS]
    same_bits(root, 2, run, EVERY, STEPS)


def without_directories(argv: list[str]) -> int:
    def refuse(root: Path, step: int) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(root))

    made = store.make_stage
    store.make_stage = lambda root, step: refuse(root, step) if step == 2 * EVERY else made(root, step)
    return toy.train_here(argv)


def test_a_stage_that_cannot_be_made_is_a_failed_save_of_all(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, run = run_file(root, "no_stage")
    assert rank_fates(without_directories, 2, ["--deepspeed_config", str(file)]) == [0, 0]
    assert capfd.readouterr().err.count("could not save step 6, older checkpoints are kept: rank 0: ") == 1
    assert published(run) == [EVERY, STEPS]
    same_bits(root, 2, run, EVERY, STEPS)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_three_failed_saves_in_a_row_end_the_run_on_all_ranks(
    root: Path, world: int, rank: int, background: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"run__save_every": 1, "run__save_in_background": background}
    file, run = run_file(root, f"three{world}{background}", **changes)
    # 2 and 3 fail, 4 does not: the count begins anew. 5, 6 and 7 fail.
    faults = [Fault("store:before_fsync", "os_error", rank=rank, step=s, value=errno.ENOSPC) for s in (2, 3, 5, 6, 7)]
    assert toy.train_toy(world, file, plan=FaultPlan(*faults)) == [74] * world
    said = capfd.readouterr().err
    assert said.count("could not save step") == 5 and said.count("error: ") == 1
    assert f"error: 3 checkpoints in a row could not be written to {run}, the last for step 7 (rank {rank}: " in said
    assert "No space left on device): free disk space or repair the disk, then run the same command again" in said
    assert published(run) == [1, 4]
    assert toy.train_toy(world, file) == [0] * world
    assert "resumed from " + str(run / store.step_name(4)) in (run / "log.txt").read_text()
    if world <= 2:
        same_bits(root, world, run, STEPS)


def test_a_slow_disk_is_seen_in_the_log(root: Path) -> None:
    file, run = run_file(root, "slow")
    plan = FaultPlan(Fault("store:before_fsync", "sleep", rank=1, step=2 * EVERY, value=0.4))
    assert toy.train_toy(2, file, plan=plan) == [0, 0]
    said = re.findall(
        r"saved \S+/step-0*(\d+): ([\d.]+) MiB in ([\d.]+) s \(([\d]+) MiB/s\)", (run / "log.txt").read_text()
    )
    assert [int(step) for step, *_ in said] == [3, 6, 9]
    size, seconds, speed = (float(value) for value in said[1][1:])
    assert seconds >= 0.4 and abs(speed - size / seconds) <= 1


def test_training_goes_on_while_a_slow_disk_is_written_and_what_is_saved_is_the_step_it_is_named_after(
    root: Path,
) -> None:
    """The copy of step 3 is written when steps 4 and 5 have been done: it holds none of them."""
    file, run = run_file(root, "meanwhile", run__save_in_background=True)
    plan = FaultPlan(*(Fault("store:stage_made", "sleep", rank=r, step=EVERY, value=0.6) for r in (0, 1)))
    assert toy.train_toy(2, file, plan=plan) == [0, 0]
    text = (run / "log.txt").read_text()
    said = re.search(r"copied step 3: [\d.]+ MiB in ([\d.]+) s, writing in the background", text)
    assert said is not None and float(said[1]) < 0.6
    between = text[said.end() : text.index(f"saved {run / store.step_name(EVERY)}")]
    assert "step 4/9" in between and "step 5/9" in between
    seconds = re.search(r"step-00000003: [\d.]+ MiB in ([\d.]+) s", text)
    assert seconds is not None and float(seconds[1]) >= 0.6
    assert published(run) == [3, 6, 9]
    same_bits(root, 2, run, 3, 6, 9)


def on_a_disk_of_its_own(argv: list[str], run: str, full_at: str) -> int:
    """A trainer whose run directory is a small disk, which is full from the failpoint `full_at` on."""
    libc = ctypes.CDLL(None, use_errno=True)
    private = libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None)  # CLONE_NEWNS, MS_PRIVATE
    if private or libc.mount(b"tmpfs", run.encode(), b"tmpfs", 0, b"size=4m"):
        return NO_MOUNT

    def fill() -> None:
        logged = Path(run) / "log.txt"
        if logged.exists():  # else further lines would fit on its last page
            with open(logged, "ab") as file:
                file.write(b"\n" * (-logged.stat().st_size % 4096))
        with open(Path(run) / "filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    if full_at == "start":
        fill()
    else:
        failpoints.hooks[full_at] = lambda step, **_: fill() if step == 4 else None
    return toy.train_here(argv)


NO_MOUNT = 99


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_ends_the_run_by_its_saves_and_not_by_its_logs(
    root: Path, background: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    file, run = run_file(root, f"full{background}", run__save_every=1, run__save_in_background=background)
    run.mkdir(parents=True)
    fates = rank_fates(on_a_disk_of_its_own, 1, ["--deepspeed_config", str(file)], str(run), "train:batch")
    if fates == [NO_MOUNT]:
        pytest.skip("mounting a file system is not permitted")
    said = capfd.readouterr().err
    assert fates == [74], said
    assert said.count("log.txt cannot be written any more") == 1
    assert "Traceback" not in said and "Logging error" not in said and said.count("error: ") == 1


def covered_by_an_empty_disk(argv: list[str], run: str) -> int:
    """A trainer whose run directory is covered by an empty read-only file system from step 4 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):  # CLONE_NEWNS, MS_PRIVATE
        return NO_MOUNT
    tried = []

    def cover(step: int, **_: object) -> None:
        if step == 4:
            tried.append(libc.mount(b"tmpfs", run.encode(), b"tmpfs", 1, None))  # MS_RDONLY

    failpoints.hooks["train:batch"] = cover
    code = toy.train_here(argv)
    return NO_MOUNT if tried == [-1] else code


@pytest.mark.parametrize("background", [False, True])
def test_a_run_directory_that_is_covered_by_a_read_only_disk_ends_the_run_by_its_saves(
    root: Path, background: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    file, run = run_file(root, f"covered{background}", run__save_every=1, run__save_in_background=background)
    fates = rank_fates(covered_by_an_empty_disk, 1, ["--deepspeed_config", str(file)], str(run))
    if fates == [NO_MOUNT]:
        pytest.skip("mounting a file system is not permitted")
    said = capfd.readouterr().err
    assert fates == [74], said
    assert "Traceback" not in said and "Logging error" not in said and said.count("error: ") == 1
    # A stage that is covered while it is written stays behind; the next start removes it.
    assert background or published(run)[-1] == 4
    assert toy.train_toy(1, file) == [0] and published(run)[-1] == STEPS


def test_a_start_on_a_full_disk_is_one_error(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, run = run_file(root, "full_start")
    run.mkdir(parents=True)
    fates = rank_fates(on_a_disk_of_its_own, 1, ["--deepspeed_config", str(file)], str(run), "start")
    if fates == [NO_MOUNT]:
        pytest.skip("mounting a file system is not permitted")
    said = capfd.readouterr().err
    assert fates == [2], said
    assert "Traceback" not in said and "Logging error" not in said and said.count("error: ") == 1
    assert "No space left on device" in said


def with_failing_metrics(argv: list[str], what: str) -> int:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "folder":
        megacid.training.trackers.SummaryWriter = refuse  # type: ignore[misc, assignment]
    elif what == "event":
        RecordWriter.write = refuse
    else:
        megacid.training.metrics.write_json_atomic = refuse  # type: ignore[assignment]
    return toy.train_here(argv)


@pytest.mark.parametrize("what", ["folder", "event", "summary"])
def test_metrics_that_cannot_be_written_are_one_warning_and_the_run_ends_well(
    root: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file, run = run_file(root, f"metrics_{what}", run__save_in_background=True)
    assert rank_fates(with_failing_metrics, 2, ["--deepspeed_config", str(file)], what) == [0, 0]
    said = capfd.readouterr().err
    name = "train_summary.json" if what == "summary" else "tensorboard"
    assert said.count("cannot be written") == 1 and f"{name} cannot be written" in said and "Traceback" not in said
    assert published(run) == [EVERY, 2 * EVERY, STEPS]
    same_bits(root, 2, run, EVERY, STEPS)


def test_a_log_file_that_cannot_be_opened_is_a_warning(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, run = run_file(root, "log_is_a_folder")
    (run / "log.txt").mkdir(parents=True)
    assert toy.train_toy(1, file) == [0]
    said = capfd.readouterr().err
    assert said.count("log.txt cannot be written") == 1 and "Traceback" not in said
