"""Two processes on one output directory: the second one is refused and told who holds it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from megacid.errors import UserError
from megacid.storage.directory_lock import DirectoryLock
from megacid.storage.stage_directory import StageDirectory, staged_folder
from megacid.training.lifecycle import RunLock


def forked(act: Callable[[], object]) -> int:
    """A process that has called `act` and now waits to be killed."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        kept = act()
        os.write(done, b"1")
        signal.pause()
        os._exit(kept is None)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    os.close(done)
    return pid


def ended(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def begun(out: Path) -> StageDirectory:
    stage = StageDirectory(out, "balance", {"k": 4})
    stage.begin()
    return stage


def entered(out: Path) -> object:
    folder = staged_folder(out)
    folder.__enter__()
    return folder


@pytest.mark.parametrize("act", [begun, entered, RunLock])
def test_a_second_process_on_one_output_is_refused_until_the_first_dies(
    tmp_path: Path, act: Callable[[Path], object]
) -> None:
    out = tmp_path / "out"
    pid = forked(lambda: act(out))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for _ in range(2):
        with pytest.raises(
            UserError, match=f"out is in use by process {pid} on {socket.gethostname()}: wait for it, or"
        ):
            act(out)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    ended(pid)
    act(out)


def test_a_finished_stage_leaves_no_lock_file(tmp_path: Path) -> None:
    ended(forked(lambda: begun(tmp_path)))
    assert (tmp_path / ".lock").exists()
    stage = begun(tmp_path)
    stage.commit({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "settings.json"]
    with staged_folder(tmp_path / "new"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "new", "settings.json"]


def test_the_lock_file_of_a_process_killed_after_meta_json_is_removed(tmp_path: Path) -> None:
    begun(tmp_path).commit({})
    pid = forked(lambda: DirectoryLock(tmp_path / ".lock", "out", "take another"))
    finished = StageDirectory(tmp_path, "balance", {"k": 4})
    finished.remove_partial_results()
    assert (tmp_path / ".lock").exists()  # its holder is alive
    ended(pid)
    finished.remove_partial_results()
    assert not (tmp_path / ".lock").exists()


def test_a_failed_stage_can_be_run_again_in_the_same_process(tmp_path: Path) -> None:
    failed = begun(tmp_path)
    begun(tmp_path).commit({})
    assert StageDirectory(tmp_path, "balance", {"k": 4}).finished() is not None and failed is not None


def test_a_killed_holder_with_living_data_workers_holds_nothing(tmp_path: Path) -> None:
    worker: list[int] = []
    ready, done = os.pipe()

    def with_worker() -> object:
        lock = DirectoryLock(tmp_path / ".lock", "out", "take another")
        os.write(done, f"{forked(lambda: lock)}".encode())
        return lock

    pid = forked(with_worker)
    worker.append(int(os.read(ready, 20)))
    ended(pid)
    DirectoryLock(tmp_path / ".lock", "out", "take another").release()
    os.kill(worker[0], signal.SIGKILL)


def test_a_lock_file_that_is_a_link_does_not_change_its_target(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(UserError, match="cannot write to the run directory"):
        RunLock(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_lock_file_removed_by_its_holder_is_not_locked_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path, real = tmp_path / ".lock", fcntl.lockf

    def remove_first(file: int, how: int) -> None:
        real(file, how)
        if (tmp_path / "once").exists():
            (tmp_path / "once").unlink()
            path.unlink()

    (tmp_path / "once").touch()
    monkeypatch.setattr(fcntl, "lockf", remove_first)
    DirectoryLock(path, "out", "take another")
    lock = DirectoryLock(path, "out", "take another")
    assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    lock.release()
    assert not path.exists()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def refuse(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    DirectoryLock(tmp_path / ".lock", "out", "take another").release()
    assert "out cannot be locked (No locks available)" in caplog.text
