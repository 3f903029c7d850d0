"""F25, F19: loader processes that die, hang, or lose their parent; shards of odd sizes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from faultplan import FaultPlan
from harness import run_ranks
from pair_data import same, stream, transform, write_shards
from PIL import Image

from megacid.data.batch import Batch, Positions
from megacid.data.features import FeatureSet, FeatureStream
from megacid.data.index import ShardIndex, load_index
from megacid.distributed.consensus import gather_json
from megacid.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("loader") / "shards")


def children() -> set[int]:
    pids: set[int] = set()
    for thread in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            pids |= {int(pid) for pid in (thread / "children").read_text().split()}
    return pids


ENDED_WITHIN_S = 30  # that they end is promised, and not how fast a loaded machine sees it


def gone(pids: set[int], within_s: float) -> bool:
    """Whether all of them have ended (a zombie has)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not [p for p in pids if Path(f"/proc/{p}/stat").exists() and _state(p) != "Z"]:
            return True
        time.sleep(0.02)
    return False


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


class At:
    """The transform, with something that happens in the worker at the image of one colour (row number)."""

    def __init__(self, row: int, act: Callable[[], object]) -> None:
        self.row, self.act = row, act

    def __call__(self, image: Image.Image) -> torch.Tensor:
        made = transform(image)
        if int(made[0, 0, 0]) == self.row:
            self.act()
        return made


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(600)


def stop_me() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def no_shared_memory() -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def exit_here() -> None:
    os._exit(3)


def read(batches: Iterator[Batch]) -> list[Batch]:
    def late(*_: object) -> None:
        raise AssertionError("the stream hangs")  # no OSError, which waiting for a process would swallow

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    try:
        return list(batches)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (kill_me, "was killed by SIGKILL, usually because the machine or container ran out of memory"),
        (
            no_shared_memory,
            "was killed by SIGBUS, usually because the machine or container ran out of shared memory (/dev/shm)",
        ),
        (exit_here, "ended with exit code 3"),
        (hang, "for 1.5 s (data.worker_timeout_s), usually because storage does not respond"),
        (stop_me, "for 1.5 s (data.worker_timeout_s), usually because storage does not respond"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_a_failure_in_time(
    index: ShardIndex, act: Callable[[], object], message: str, workers: int
) -> None:
    expected = list(stream(index))
    row = int(expected[2].sample_id[3])  # every sample once in the three batches of an epoch
    before = children()
    # A death is noticed at once, whatever the timeout; `read` gives up after 30 s.
    timeout_s = 1.5 if act in (hang, stop_me) else 600
    received = read(iter(stream(index, workers=workers, worker_timeout_s=timeout_s, transform=At(row, act), rank=0)))
    first = next(i for i, batch in enumerate(received) if batch.failure)
    assert len(received) == 6 and first <= 2  # what it had made before may be lost with it
    assert all(same(a, b) for a, b in zip(expected[:first], received))
    assert len({batch.failure for batch in received[first:]}) == 1
    assert (
        received[first].failure
        and received[first].failure.startswith("rank 0: ")
        and message in received[first].failure
    )
    assert gone(children() - before, ENDED_WITHIN_S), "workers were left behind"


def test_a_worker_killed_while_the_trainer_is_elsewhere_does_not_raise_there(index: ShardIndex) -> None:
    """torch raises at whatever line the trainer is when a worker dies: in a collective, its peers would wait."""
    before = children()
    batches = iter(stream(index, workers=1, total_steps=40, transform=At(1, lambda: time.sleep(0.05))))
    next(batches)
    (worker,) = children() - before
    os.kill(worker, signal.SIGKILL)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        sum(range(1000))  # a RuntimeError would come here
    rest = read(batches)
    assert len(rest) == 39 and rest[-1].failure and "SIGKILL" in rest[-1].failure


def test_workers_end_when_the_stream_is_left_early(index: ShardIndex) -> None:
    before, handler = children(), signal.getsignal(signal.SIGCHLD)
    batches = iter(stream(index, workers=2, total_steps=500))
    next(batches)
    assert len(children() - before) == 2
    batches.close()  # type: ignore[attr-defined]
    assert gone(children() - before, ENDED_WITHIN_S)
    assert signal.getsignal(signal.SIGCHLD) == handler or callable(signal.getsignal(signal.SIGCHLD))


@pytest.mark.parametrize(
    ("when", "message"),
    [("start", "loader workers cannot be started"), ("take", "cannot be received from a loader worker")],
)
def test_a_limit_of_the_system_is_a_failure_of_the_batch(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, when: str, message: str
) -> None:
    """Too many processes or open files: one rank alone meets it."""
    from torch.utils.data import dataloader

    def no_more(*_: object) -> None:
        raise OSError(24, "Too many open files")

    # Not the iterator's __init__, which would leave half an iterator behind.
    place: tuple[Any, str] = (
        (dataloader.DataLoader, "__iter__")
        if when == "start"
        else (dataloader._MultiProcessingDataLoaderIter, "_next_data")
    )
    monkeypatch.setattr(*place, no_more)
    received = read(iter(stream(index, workers=1)))
    assert len(received) == 6 and {batch.failure for batch in received} == {received[0].failure}
    assert received[0].failure and message in received[0].failure and "Too many open files" in received[0].failure


def test_a_worker_that_is_still_dying_when_its_files_are_closed_is_found_dead(index: ShardIndex) -> None:
    class Dying:
        pid, looks = 7, 0

        @property
        def exitcode(self) -> int | None:
            self.looks += 1
            return -9 if self.looks > 3 else None

    from megacid.data.workers import _dead

    assert "loader worker 7 was killed by SIGKILL" in (_dead([Dying()], 1.0) or "")  # type: ignore[list-item]


def test_an_error_of_the_program_in_a_worker_is_still_an_error(index: ShardIndex) -> None:
    def wrong() -> None:
        raise TypeError("a mistake in the transform")

    with pytest.raises(TypeError, match="a mistake in the transform"):
        read(iter(stream(index, workers=1, transform=At(3, wrong))))


PARENT = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
import test_loader_faults as faults
from pair_data import stream
from megacid.data.index import load_index
batches = iter(stream(load_index({shards!r}), workers=2, transform=faults.At({row}, faults.hang)))
next(batches)
time.sleep(0.3)
print(*faults.children(), flush=True)
time.sleep(600)
"""


def test_workers_do_not_outlive_a_parent_that_was_killed(index: ShardIndex) -> None:
    """Even one that hangs: torch's workers look after their parent only between two batches."""
    row = int(list(stream(index))[1].sample_id[0])
    path = [str(ROOT), str(ROOT / "kernels"), *(str(ROOT / "tests" / name) for name in ("", "data"))]
    code = PARENT.format(path=path, shards=str(index.root), row=row)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        workers = {int(pid) for pid in parent.stdout.readline().split()}
        assert len(workers) >= 2
    finally:
        parent.kill()
        parent.wait()
    assert gone(workers, ENDED_WITHIN_S)


def test_a_worker_whose_parent_is_gone_before_it_can_ask_for_the_signal_ends_itself() -> None:
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
    code += "from megacid.data.workers import start_worker; start_worker(1 << 22, 0); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "still here" not in done.stdout


# ---- F19: shards of odd sizes ------------------------------------------------------------------------------------


def odd_shards(folder: Path, *sizes: int) -> ShardIndex:
    return write_shards(folder, sizes={f"{n:05d}": size for n, size in enumerate(sizes)})


@pytest.mark.parametrize("world", [1, 2, 4])
def test_uneven_and_empty_shards_give_every_rank_as_many_batches(tmp_path: Path, world: int) -> None:
    index = odd_shards(tmp_path / "shards", 7, 1, 5, 0)
    ranks = [list(stream(index, rank=r, world=world, micro_batch=8 // world, total_steps=13)) for r in range(world)]
    assert {len(batches) for batches in ranks} == {13}
    together = [s for step in range(13) for batches in ranks for s in batches[step].sample_id.tolist()]
    assert [sorted(together[e * 13 : (e + 1) * 13]) for e in range(8)] == [list(range(13))] * 8
    assert not any(batch.failure for batches in ranks for batch in batches)


def test_fewer_samples_than_a_global_batch_is_said_at_once(tmp_path: Path) -> None:
    index = odd_shards(tmp_path / "shards", 3, 0, 4)
    with pytest.raises(
        UserError, match="has 7 usable samples of 7, expected at least one global batch of 8: use a smaller batch"
    ):
        stream(index)
    with pytest.raises(UserError, match="no complete sample"):
        odd_shards(tmp_path / "empty", 0, 0)


@pytest.mark.parametrize("kind", ["directory", "dangling", "pipe", "loop"])
def test_a_shard_that_is_no_file_is_named_not_passed_over(tmp_path: Path, kind: str) -> None:
    write_shards(tmp_path / "shards")
    odd = tmp_path / "shards" / "00003.tar"
    if kind == "directory":
        odd.mkdir()
    elif kind == "dangling":
        odd.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(odd)  # to open it would wait for a writer
    else:
        odd.symlink_to(odd)
    for allow_bad in (False, True):
        with pytest.raises(
            UserError, match=r"00003.tar is (a broken link|not a regular file), expected a tar: restore"
        ):
            load_index(tmp_path / "shards", allow_bad=allow_bad)


def test_a_shard_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "shards")
    (tmp_path / "shards" / "index" / "index.json").unlink()
    (tmp_path / "shards" / "index" / "00001.keys.json").unlink()

    def denied(path: Path, *_: object, **__: object) -> None:  # the permission itself would not stop root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("megacid.data.index_build.scan_tar", denied)
    with pytest.raises(UserError, match=r"00001.tar cannot be read \(Permission denied\): correct its permissions"):
        load_index(tmp_path / "shards")


def test_a_shard_that_vanishes_after_indexing_is_counted_then_fails(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "shards")
    (tmp_path / "shards" / "00001.tar").rename(tmp_path / "elsewhere")
    kept = list(stream(index, error_budget=1.0))
    assert {s for batch in kept for s in batch.sample_id.tolist()} == set(range(24)) - set(range(9, 16))
    assert not any(batch.failure for batch in kept)
    failed = list(stream(index))
    assert failed[-1].failure and "00001/k" in failed[-1].failure and "cannot be read" in failed[-1].failure


def test_a_table_that_turns_out_damaged_in_a_worker_is_a_failure(tmp_path: Path, index: ShardIndex) -> None:
    for workers in (0, 1):
        fresh = load_index(index.root)
        batches = stream(fresh, workers=workers)
        (path,) = index.root.glob("index/joined-*/rows-00000.npy")
        whole = path.read_bytes()
        try:
            path.write_bytes(whole[:-8])
            received = read(iter(batches))
        finally:
            path.write_bytes(whole)
        assert len(received) == 6 and received[-1].failure and f"{path} is damaged" in received[-1].failure


def until_a_failure(root: str, act: Callable[[], object]) -> tuple[int, list[str | None]]:
    """(step, failures by rank) where this rank stops: the worker of the last rank meets `act`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    index = load_index(root)
    options: dict[str, Any] = {"rank": rank, "world": world, "micro_batch": 8 // world}
    own = [batch.sample_id for batch in stream(index, **options)]
    transform = At(int(own[4][0]) if rank == world - 1 else 255, act)  # of the second epoch
    timeout_s = 1.5 if rank == world - 1 and act is hang else 600
    options |= {"workers": 1, "worker_timeout_s": timeout_s, "transform": transform, "start_step": 3}
    for step, batch in enumerate(stream(index, **options), 3):
        failures = gather_json(batch.failure, None)
        if any(failures):
            return step, failures
    raise AssertionError("no failure")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("act", [kill_me, hang])
def test_a_lost_worker_of_one_rank_is_heard_of_by_all_in_the_same_step(
    index: ShardIndex, act: Callable[[], object], world: int
) -> None:
    fates = run_ranks(until_a_failure, world, str(index.root), act, timeout_s=60)  # the worker hangs for 600 s
    assert fates == [fates[0]] * world and fates[0][0] <= 4
    assert fates[0][1][:-1] == [None] * (world - 1)
    assert fates[0][1][-1].startswith(f"rank {world - 1}: ")


# ---- through the trainer -----------------------------------------------------------------------------------------


def test_a_label_that_one_rank_meets_ends_all_ranks_together(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    features = FeatureSet(toy.write_features(tmp_path / "features"))
    plan = Positions(8, 4, 1, 1, 2, 9, 10)  # what rank 1 of 2 reads in step 9
    (batch,) = FeatureStream(features, plan, seed=0, block_shards=2)
    file, row = features.partition_of(int(batch.sample_id[2]))
    path = features.label_paths[file]
    labels = np.load(path)
    labels[row] = toy.CLASSES
    np.save(path, labels)
    codes = toy.train_toy(2, toy.run_file(tmp_path, "bad"), plan=FaultPlan(), timeout_s=60)
    assert codes == [66, 66]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{path.name} row {row} has label {toy.CLASSES}, expected 0 .. 1000" in errors[0]
    # What was learned before the bad step is kept.
    assert (tmp_path / "runs" / "bad" / "step-00000009").is_dir()
