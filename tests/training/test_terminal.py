"""Training on a pseudo-terminal, where a bar stands below the log lines, and into a pipe, which gets plain lines."""

from __future__ import annotations

import os
import pty
import re
import sys
import threading
from pathlib import Path

import pytest
import toy
from faultplan import Fault, FaultPlan
from harness import run_ranks

from megacid.errors import EXIT_NOT_FINITE

SHORT = {"run__total_steps": 12, "run__save_every": 6, "run__log_every": 2}


class Screen:
    """What a terminal without a right margin shows: the few control sequences that rich and the trainer write."""

    def __init__(self, data: str) -> None:
        self.lines, self.row, self.column, self.cursor = [""], 0, 0, True
        for code, key, text in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b]+)", data):
            if key == "A":
                self.row -= int(code or 1)
            elif key == "K":
                self.lines[self.row] = "" if code == "2" else self.lines[self.row][: self.column]
            elif key in "hl" and code == "?25":
                self.cursor = key == "h"
            assert not key or key in "AKmhl", (code, key)
            for character in text:
                self._put(character)

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row + 1 - len(self.lines))
        else:
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1


def train_on(argv: list[str], terminal: int, plan: str | None) -> int:
    """Train with this file descriptor as stderr."""
    os.environ.update(TERM="xterm", COLUMNS="100")
    os.dup2(terminal, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    try:
        return toy.train_here(argv, plan)
    finally:
        sys.stderr.flush()


def output_of(argv: list[str], reader: int, writer: int, plan: str | None = None, code: int = 0) -> str:
    """What one rank, which ends with `code`, writes to its stderr, `writer`; `reader` is the other end."""
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(reader, 65536):
                parts.append(part)
        except OSError:  # a terminal whose other end is closed
            pass

    thread = threading.Thread(target=read)
    thread.start()
    assert run_ranks(train_on, 1, argv, writer, plan) == [code]
    os.close(writer)
    thread.join(20)
    os.close(reader)
    return b"".join(parts).decode()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("terminal")
    toy.write_features(root / "features")
    return root


def test_on_a_terminal_a_bar_stands_below_whole_log_lines(root: Path) -> None:
    argv = ["--deepspeed_config", str(toy.run_file(root, "bar", **SHORT))]
    output = output_of(argv, *pty.openpty())
    assert output.count("\r") > 4 and "\u2501" in output
    screen = Screen(output)
    shown = [line.rstrip() for line in screen.lines]
    logged = (root / "runs" / "bar" / "log.txt").read_text().splitlines()
    assert len(logged) > 12 and [line for line in logged if line.rstrip() not in shown] == []
    bars = [line for line in shown if "\u2501" in line]
    assert len(bars) == 1 and bars[0].startswith("train ") and "100%| 12.0/12.0 [" in bars[0]
    assert screen.cursor


def test_an_error_stands_below_the_bar_which_is_not_drawn_again(root: Path) -> None:
    argv = ["--deepspeed_config", str(toy.run_file(root, "failed", **SHORT, guard__max_consecutive_skips=1))]
    plan = FaultPlan(Fault("train:batch", "nan_batch", step=6)).to_json()
    screen = Screen(output_of(argv, *pty.openpty(), plan, EXIT_NOT_FINITE))
    shown = [line.rstrip() for line in screen.lines if line.strip()]
    assert shown[-1].startswith("error: ") and screen.cursor
    assert [i for i, line in enumerate(shown) if "\u2501" in line] == [len(shown) - 2]


def test_a_pipe_gets_the_log_lines_and_nothing_else(root: Path) -> None:
    argv = ["--deepspeed_config", str(toy.run_file(root, "pipe", **SHORT))]
    output = output_of(argv, *os.pipe())
    assert "\r" not in output and "\x1b" not in output and "\u2501" not in output
    assert output.splitlines() == (root / "runs" / "pipe" / "log.txt").read_text().splitlines()
