"""The message about a lost loader worker names the samples that were being read, so that one can be removed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pair_data import stream, write_shards
from test_loader_faults import At, exit_here, hang, kill_me, read, stop_me

from megacid.data.index import ShardIndex, load_index
from megacid.training.watchdog import decoded_sample


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def end_me() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def name_of(index: ShardIndex, row: int) -> str:
    """Shard and key of a global row."""
    shard = int(index.starts.searchsorted(row, side="right")) - 1
    return f"{index.names[shard]}/k{row}"


CAUSES = {
    kill_me: "was killed by SIGKILL, usually because the machine or container ran out of memory",
    crash: "was killed by SIGSEGV, which is a fault of a library that it uses",
    end_me: "was killed by SIGTERM: send signals to the ranks only, not to their workers",
    exit_here: "ended with exit code 3",
    hang: "for 1.5 s (data.worker_timeout_s)",
    stop_me: "for 1.5 s (data.worker_timeout_s)",
}


@pytest.mark.parametrize("act", CAUSES)
def test_a_lost_worker_is_reported_with_the_sample_that_it_was_reading(
    tmp_path: Path, act: Callable[[], object]
) -> None:
    index = write_shards(tmp_path / "shards")
    row = int(list(stream(index))[1].sample_id[5])
    timeout_s = 1.5 if act in (hang, stop_me) else 600
    batches = read(iter(stream(index, workers=1, worker_timeout_s=timeout_s, transform=At(row, act))))
    failure = batches[-1].failure or ""
    assert CAUSES[act] in failure
    assert failure.endswith(f"; the workers were reading {name_of(index, row)}: if it happens there again, remove it")


def test_each_worker_is_named_and_idle_ones_are_not(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "shards")
    first = next(iter(stream(index)))
    at = At(int(first.sample_id[0]), hang)
    batches = read(iter(stream(index, workers=2, worker_timeout_s=1.5, transform=at, total_steps=2)))
    failure = batches[0].failure or ""
    assert failure.count("/k") == 1 and f"/k{int(first.sample_id[0])}:" in failure


def test_a_damaged_index_does_not_hide_why_a_worker_was_lost(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    index = load_index(tmp_path / "shards")
    row = int(next(iter(stream(index))).sample_id[0])

    def spoil() -> None:
        for path in (tmp_path / "shards" / "index").glob("*.members.npy"):
            path.write_bytes(b"")
        kill_me()

    fresh = load_index(tmp_path / "shards")
    batches = read(iter(stream(fresh, workers=1, transform=At(row, spoil))))
    assert "was killed by SIGKILL" in (batches[0].failure or "") and "/k" not in (batches[0].failure or "")


def test_the_watchdog_names_the_sample_that_the_trainer_itself_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data.workers 0 the main thread decodes, and its stack alone does not tell what."""
    index, said = write_shards(tmp_path / "shards"), []

    def look(*_: object) -> None:
        said.append(decoded_sample(sys._getframe()))

    monkeypatch.setattr("megacid.data.decode._refusal", look)
    batch = next(iter(stream(index)))
    assert said == [f", decoding {name_of(index, row)}" for row in batch.sample_id.tolist()]
    assert decoded_sample(sys._getframe()) == decoded_sample(None) == ""
