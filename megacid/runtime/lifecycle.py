"""Exit codes, the lock of a run directory, and the request to stop.

0    finished                          2    the user can put it right (one line says how)
65   too many non-finite steps         66   too many damaged samples
143  stopped by SIGTERM or SIGUSR1 after a checkpoint: start the same command again
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import IO

from megacid.distributed.collectives import Group, any_rank
from megacid.errors import UserError

EXIT_USER, EXIT_NOT_FINITE, EXIT_DATA, EXIT_STOPPED = 2, 65, 66, 143
_PR_SET_PDEATHSIG = 1


class RunLock:
    """An exclusive lock on a run directory. The kernel drops it when the process dies, however it dies."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError when the directory cannot be made or another run holds it."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = open(directory / ".lock", "a+")  # noqa: SIM115  held for the life of the run
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {directory} ({error.strerror}): correct run.dir or its permissions"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            raise UserError(
                f"the run directory {directory} is in use by {holder}: wait for it, or choose another run.name"
            ) from None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class Lifecycle:
    """Turns SIGTERM and SIGUSR1 into a flag on which all ranks agree at the same step."""

    def __init__(self, group: Group = None) -> None:
        self.group, self._asked = group, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        if sys.platform == "linux":
            # A launcher that dies without a word must not leave its ranks behind.
            with contextlib.suppress(OSError):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True  # a second signal changes nothing: the save under way ends first

    def stop_requested(self) -> bool:
        """True on every rank when one was asked to stop. A collective."""
        return any_rank(self._asked, self.group)
