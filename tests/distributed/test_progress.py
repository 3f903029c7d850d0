"""Progress of the tools where stderr is a terminal, and where it is a file or a pipe."""

from __future__ import annotations

import sys

import pytest

from megacid.distributed import progress
from megacid.distributed.progress import progress_bar


@pytest.mark.parametrize("total", [1000, None])
def test_without_a_terminal_progress_is_a_few_plain_lines(
    capsys: pytest.CaptureFixture[str], total: int | None
) -> None:
    with progress_bar("cluster", "row", total) as bar:
        bar.reset(1000)
        for _ in range(1000):
            bar.update()
        bar.desc = "labels"
    output = capsys.readouterr().err
    assert "\r" not in output and "\x1b" not in output and "\n\n" not in output
    lines = output.splitlines()
    assert len(lines) <= 4 and lines[-1].startswith("labels: 100%| 1.00k/1.00k [")


def test_lines_come_at_intervals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    with progress_bar("embed", "sample", 5) as bar, progress_bar("inner", "row", 5) as inner:
        for _ in range(5):
            bar.update()
            inner.update()
    lines = capsys.readouterr().err.splitlines()
    assert all(any(f" {n}.00/5.00 [" in line for line in lines if line.startswith("embed")) for n in range(1, 6))
    assert all(line.startswith(("embed: ", "inner: ")) for line in lines)


def test_a_bar_of_a_rank_that_reports_nothing_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("embed", "sample", 5, enabled=False) as bar:
        bar.reset(3)
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("embed", "sample", 5) as bar:
        bar.update(5)
    assert "\r" in capsys.readouterr().err
