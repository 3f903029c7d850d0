"""Starts a tool or a training run as a process of its own, whose output goes to a log file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import checkout
from megacid.errors import UserError

LAST_LINES = 5  # of the log, in the error message


def run_logged(words: Sequence[str], log: Path, what: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a command and write its output to `log`.

    Args:
        what: what the command does, for the message.
        environment: variables to add.

    Raises:
        UserError: the command failed; the message has the last lines of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        variables = {**os.environ, **(environment or {})}
        code = subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, check=False, env=variables).returncode
    if code:
        with open(log) as lines:
            last = "".join(deque(lines, maxlen=LAST_LINES)).strip()
        raise UserError(f"{what} ended with exit code {code}, see {log}; last lines:\n{last}")


def training_command(run_file: str | Path, changes: Sequence[str], ranks: int) -> list[str]:
    """The command that trains on one machine; with several ranks through the deepspeed launcher on a free port.

    Args:
        changes: SECTION.KEY=VALUE overrides of the run file.
    """
    start = [sys.executable]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = str(Path(sys.executable).parent / "deepspeed")
        start = [launcher, "--num_gpus", str(ranks), "--master_port", str(port)]
    words = [*start, str(checkout.ROOT / "megacid" / "train.py"), "--deepspeed_config", str(run_file)]
    return words + [word for change in changes for word in ("--set", change)]
