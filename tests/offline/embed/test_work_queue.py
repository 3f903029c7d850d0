"""tools/embed.py on several ranks, with slow and dead ranks and file systems without locks: always the same files."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faultplan import Fault, kill
from offline_data import save_model, write_shards
from offline_tool import KILLED, Tool

from megacid.distributed.parallel import Parallel
from megacid.errors import EXIT_AGAIN
from megacid.offline.embed.work_queue import WorkQueue, create_queue

DYNAMIC: list[object] = ["--sharding", "dynamic"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a model, and its embeddings made by one rank."""
    folder = tmp_path_factory.mktemp("sharing")
    write_shards(folder / "shards")
    save_model(folder / "model", 0)
    assert Tool("embed", folder, "emb", folder / "log").fates(1) == [0]
    return folder


@pytest.fixture
def pair(stage: Path, tmp_path: Path) -> Tool:
    return Tool("embed", stage, f"emb-{len(list(stage.iterdir()))}", tmp_path / "log")


def makers(pair: Tool) -> dict[str, Callable[..., None]]:
    """Hooks that record which rank wrote a partition."""

    def note(step: int) -> None:
        with open(f"{pair.log}.made", "a") as file:
            file.write(f"{step} {torch.distributed.get_rank()}\n")

    return {"embed:shard_done": note}


def made(pair: Tool) -> dict[int, int]:
    """Shard -> the rank that wrote it; asserts that none was written twice."""
    lines = [line.split() for line in Path(f"{pair.log}.made").read_text().splitlines()]
    assert len(lines) == len({shard for shard, _ in lines})
    return {int(shard): int(rank) for shard, rank in lines}


def rank_0_waits(pair: Tool, file: str) -> dict[str, Callable[..., None]]:
    """Hook: rank 0 does not finish its first shard before that file exists."""

    def wait(step: int) -> None:
        deadline = time.monotonic() + 300
        while torch.distributed.get_rank() == 0 and not (pair.out / file).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return {"embed:partition": wait}


@pytest.mark.parametrize("sharding", ["dynamic", "static"])
def test_a_finished_rank_takes_over_shards_of_a_slow_rank(sharding: str, stage: Path, pair: Tool) -> None:
    # The last file that rank 1 writes: of shard 2 with dynamic sharding, of shard 1 with static.
    file = f"metadata/metadata_0000{2 if sharding == 'dynamic' else 1}.parquet"
    hooks = makers(pair) | rank_0_waits(pair, file)
    assert pair.fates(2, hooks=hooks, more=["--sharding", sharding]) == [0, 0], pair.output
    assert made(pair) == {0: 0, 1: 1, 2: 1 if sharding == "dynamic" else 0}
    pair.equals(stage / "emb")
    # The progress bar counts all ranks.
    assert "this run: 36 samples in" in pair.output[0] and "on 2 ranks" in pair.output[0]


def test_claims_of_a_killed_rank_are_taken_over(stage: Path, pair: Tool) -> None:
    hooks = makers(pair) | rank_0_waits(pair, "text_emb/text_emb_00001.npy")
    assert pair.fates(2, kill("embed:text_written", rank=1, step=1), hooks=hooks, more=DYNAMIC) == [EXIT_AGAIN, KILLED]
    assert made(pair) == {0: 0, 1: 0, 2: 0}
    assert "lost contact with another rank" in pair.output[0] and not (pair.out / "meta.json").exists()
    assert pair.fates(2, kill("embed:partition")) == [0, 0], "a complete partition was embedded again"
    pair.equals(stage / "emb")


def test_a_failing_rank_releases_its_claims(stage: Path, pair: Tool) -> None:
    """It waits for the other ranks before it reports the error, and they would wait for its shard."""
    flag = Path(f"{pair.log}.begun")

    def rank_1_first(step: int) -> None:
        deadline = time.monotonic() + 300
        while torch.distributed.get_rank() == 0 and not flag.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        flag.touch()

    full = Fault("offline:file", "os_error", rank=1)
    hooks = makers(pair) | {"embed:partition": rank_1_first}
    assert pair.fates(2, full, hooks=hooks, more=DYNAMIC) == [2, 2], pair.output
    assert made(pair) == {0: 0, 1: 0, 2: 0} and not (pair.out / "meta.json").exists()
    assert pair.output[0].count("No space left on device") == 1
    assert pair.fates(2, kill("embed:partition")) == [0, 0], "a complete partition was embedded again"
    pair.equals(stage / "emb")


def no_locks(file: int, *_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("lockf", [no_locks, lambda *_: None], ids=["none", "of one host"])
def test_without_locks_between_ranks_sharding_is_static(
    lockf: Callable[..., None], stage: Path, pair: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "lockf", lockf)
    hooks = makers(pair) | rank_0_waits(pair, "failures/failures_00001.parquet")
    assert pair.fates(2, hooks=hooks, more=DYNAMIC) == [0, 0], pair.output
    assert "file system without locks between the ranks: using --sharding static" in pair.output[0]
    assert made(pair) == {0: 0, 1: 1, 2: 0}
    pair.equals(stage / "emb")


def test_a_shard_finished_before_the_lock_was_acquired_is_not_claimed(tmp_path: Path) -> None:
    """A network file system may return stale bytes before the lock; POSIX locks do not exclude their own process."""
    path = tmp_path / "queue"
    create_queue(path, np.array([False, True, False]), 2)
    one, two = (WorkQueue(path, 3, Parallel(rank, 2, rank, torch.device("cpu"), None), "dynamic") for rank in (0, 1))
    with one, two:
        assert not two._claim(1) and two._claim(2)
        one.finish(2)
        assert list(two.claim()) == [0]
        assert not one.finished()
        one.finish(0)
        assert two.finished() and list(one.claim()) == []
        assert (one.note_progress(3), one.note_progress(0), one.note_total(10)) == (3, 0, 7)
