"""E7: a link in a run directory does not lead a run to write a file elsewhere. E11: log lines show no control codes."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megacid.errors import LogFormatter, UserError, printable, run_tool
from megacid.storage.atomic import write_json_atomic
from megacid.training.lifecycle import RunLock
from megacid.training.metrics import setup_logging
from megacid.training.resume import ResumeLossCheck
from megacid.training.watchdog import Watchdog

SECRET = "not to be written to"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "secret").write_text(SECRET)
    return tmp_path / "run"


@pytest.fixture
def root_logger() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger("megacid")
    handlers, levels = root.handlers[:], (root.level, package.level)
    root.handlers = []  # setup_logging closes those that it finds
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])


PLANTS: dict[str, Callable[[Path], object]] = {
    "a link": lambda path: path.symlink_to("../secret"),
    "a link to nothing": lambda path: path.symlink_to("../new"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a directory": lambda path: path.symlink_to("../elsewhere"),
    "a pipe": os.mkfifo,
}


def untouched(run: Path) -> None:
    assert (run.parent / "secret").read_text() == SECRET
    assert not (run.parent / "new").exists() and list((run.parent / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("plant", PLANTS)
def test_a_link_for_the_lock_is_refused_in_one_line(run: Path, plant: str) -> None:
    PLANTS[plant](run / ".lock")
    with pytest.raises(UserError, match=r"cannot write to the run directory .*\.lock is .*remove it"):
        RunLock(run)
    untouched(run)


def test_a_hard_link_for_the_lock_is_not_overwritten(run: Path) -> None:
    (run / ".lock").hardlink_to(run.parent / "secret")
    with pytest.raises(UserError, match=r"\.lock was not written by a run: remove it"):
        RunLock(run)
    untouched(run)


def refusal_in_another_process(run: Path) -> str:
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            RunLock(run)
        except UserError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with open(reader) as file:
        return file.read()


def test_the_lock_of_an_earlier_start_is_taken_over(run: Path) -> None:
    for _ in range(2):
        lock = RunLock(run)
        assert refusal_in_another_process(run).startswith(
            f"the run directory {run} is in use by process {os.getpid()} on "
        )
        lock.release()


@pytest.mark.parametrize("plant", PLANTS)
def test_a_link_for_the_log_is_refused_in_one_line(run: Path, plant: str, root_logger: None) -> None:
    PLANTS[plant](run / "log.txt")
    with pytest.raises(UserError, match=r"cannot write to .*log\.txt is .*remove it"):
        setup_logging(0, run)
    untouched(run)


def watchdog(run: Path) -> Any:
    """What `Watchdog._report` needs, without its thread."""
    dog = object.__new__(Watchdog)
    dog.folder, dog.rank, dog.world, dog.token, dog._main = run / "stalled", 0, 1, "now", 0
    return dog


@pytest.mark.parametrize("plant", [plant for plant in PLANTS if "link" in plant])
@pytest.mark.parametrize("place", ["stalled", "stalled/rank-00000.txt", "stalled/rank-00000.json"])
def test_a_report_of_a_stall_replaces_a_link(run: Path, place: str, plant: str) -> None:
    path = run / place
    path.parent.mkdir(exist_ok=True)
    PLANTS[plant](path)
    assert "no progress" in watchdog(run)._report("data", 3, 7)
    assert "data of step 3" in (run / "stalled" / "rank-00000.txt").read_text()
    assert json.loads((run / "stalled" / "rank-00000.json").read_text())["step"] == 3
    assert not (run / "stalled").is_symlink() and not path.is_symlink()
    untouched(run)


@pytest.mark.parametrize("content", ["[]", "7", "null", "[" * 100_000, '{"token": "before"}'])
def test_a_report_of_another_shape_is_no_report(run: Path, content: str) -> None:
    (run / "stalled").mkdir()
    (run / "stalled" / "rank-00000.json").write_text(content)
    assert watchdog(run)._reports() == {}


@pytest.mark.parametrize("plant", [plant for plant in PLANTS if "link" in plant])
@pytest.mark.parametrize("temporary", [False, True])
def test_next_loss_and_other_json_replace_a_link(
    run: Path, temporary: bool, plant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda size: "7")
    for name in ("next_loss.json", "train_summary.json"):
        PLANTS[plant](run / (f".tmp-7-{name}" if temporary else name))
    ResumeLossCheck(run, 3, tolerance=1e-3).first_loss(3, 1.5)
    write_json_atomic(run / "train_summary.json", {"seconds": 1})
    assert json.loads((run / "next_loss.json").read_text()) == {"step": 3, "loss": 1.5}
    assert sorted(path.name for path in run.iterdir()) == ["next_loss.json", "train_summary.json"]
    untouched(run)


# ---- control characters ----------------------------------------------------------------------------------------------

CODES = {"\x1b": "\\x1b", "\x07": "\\x07", "\r": "\\r", "\x7f": "\\x7f", "\x9b": "\\x9b", "\u2028": "\\u2028",
         "\u202e": "\\u202e", "\udc9b": "\\udc9b", "\0": "\\x00"}  # fmt: skip


@pytest.mark.parametrize("code", CODES, ids=ascii)
def test_control_characters_are_escapes_in_logs_and_errors(
    run: Path, code: str, root_logger: None, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(0, run)
    key = f"a{code}[2Jb"
    logging.getLogger("megacid.data").warning("bad sample: %s", key)
    line = (run / "log.txt").read_text()
    assert line.endswith(f"bad sample: a{CODES[code]}[2Jb\n") and code not in line

    def fail() -> int:
        raise UserError(key)

    assert run_tool(fail) == 2
    assert capsys.readouterr().err.endswith(f"error: a{CODES[code]}[2Jb\n")


def test_a_newline_in_a_key_forges_no_log_line_and_a_traceback_stays(run: Path) -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "key %s", ("a\n12:00:00 step 1/1  loss 0",), None)
    assert LogFormatter("%(message)s").format(record) == r"key a\n12:00:00 step 1/1  loss 0"
    try:
        raise RuntimeError("a\x1bb")
    except RuntimeError as error:
        record.exc_info = (RuntimeError, error, error.__traceback__)
    lines = LogFormatter("%(message)s").format(record).splitlines()
    assert len(lines) > 3 and lines[-1] == r"RuntimeError: a\x1bb"


def test_text_of_all_languages_stays_as_it_is() -> None:
    text = "naïve café, 日本語, עברית, عربي, हिन्दी, 👩‍👩‍👧, tab\tand\nnewline"
    assert printable(text) == text
