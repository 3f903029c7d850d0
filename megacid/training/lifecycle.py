"""Lifetime of a run: the lock on its directory, requests to stop, and detection of a launcher that has ended."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType

from megacid.distributed.collectives import Group
from megacid.distributed.consensus import any_rank
from megacid.distributed.parallel import launched
from megacid.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from megacid.storage.directory_lock import DirectoryLock

log = logging.getLogger(__name__)

_STOP_S = 25.0  # torchrun and DeepSpeed kill their ranks 30 s after a signal
_FORWARDED_S = 2.0  # torchrun and DeepSpeed pass a Ctrl-C on to ranks that the terminal has signalled already


class RunLock(DirectoryLock):
    """An exclusive lock on a run directory."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError when the directory cannot be created or another process holds the lock."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            super().__init__(directory / ".lock", f"the run directory {directory}", "choose another run.name")
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {directory} ({error.strerror}): correct run.dir or its permissions"
            ) from None


class Lifecycle:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a flag, which the guard's all-reduce brings to all ranks at the same step.

    A second Ctrl-C ends the process at once.

    Created just before the first step: until then there is nothing to save, and the signals end the process at once.
    """

    def __init__(self, group: Group = None, stop_after: int = 0) -> None:
        """stop_after: number of steps after which to stop as if asked by a signal; 0 for none."""
        self.group, self.stop_after, self.asked = group, stop_after, False
        self._interrupted_s: float | None = None
        self._signalled_s: float | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request_stop()
        if number != signal.SIGUSR1:  # which batch systems send long before they end a job
            self._signalled_s = self._signalled_s or time.monotonic()
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_s is None:
            self._interrupted_s = now
            _say("interrupted: a checkpoint is saved after this step; press Ctrl-C again to end without it")
        elif not launched() or now - self._interrupted_s > _FORWARDED_S:
            _say("interrupted again: ended without a checkpoint of this step")
            os._exit(EXIT_INTERRUPTED)

    def request_stop(self) -> None:
        """Ask to stop after the current step. A second request changes nothing: a save in progress is finished."""
        self.asked = True

    def asked_after(self, step: int) -> bool:
        """Whether this rank was asked to stop after `step` (counted from 0)."""
        self.asked = self.asked or step + 1 == self.stop_after
        return self.asked

    def time_left(self) -> float:
        """Seconds until this process should end, since launchers kill ranks some time after a signal; else infinite."""
        if self._signalled_s is None or not launched():
            return math.inf
        return self._signalled_s + _STOP_S - time.monotonic()

    def stop_requested(self) -> bool:
        """True on every rank when any rank was asked to stop. A collective."""
        return any_rank(self.asked, self.group)

    def stopped_after(self, step: int) -> int:
        """Log that the run has stopped after `step`. Returns its exit code, the same on every rank. A collective."""
        log.info("stopped after step %d as requested: run the same command again to continue", step + 1)
        return EXIT_INTERRUPTED if any_rank(self._interrupted_s is not None, self.group) else EXIT_STOPPED


def _say(message: str) -> None:
    """Print a line on rank 0's stderr from a signal handler, where print and logging may be interrupted themselves."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            lead = "\n" if os.isatty(2) else ""  # below a progress bar
            os.write(2, f"{lead}{message}\n".encode())


def _process(pid: int) -> tuple[int, str, str] | None:
    """(parent, start time, command line) of a running process; None when it has ended, or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (OSError, IndexError):
        return None
    return None if fields[0] == "Z" else (int(fields[1]), fields[19], line)


class Launcher:
    """The processes that started this rank; none without a launcher.

    These are the rank's parent and, above DeepSpeed's per-node launcher, the `deepspeed` command: DeepSpeed does not
    pass a signal that kills the command on to the per-node launcher, whose ranks would keep running.
    """

    def __init__(self) -> None:
        self._alive: dict[int, str] = {}  # pid -> start time, since pids are reused
        parent = _process(os.getppid()) if launched() else None
        if parent is None:
            return
        self._alive[os.getppid()] = parent[1]
        above = _process(parent[0])
        if "deepspeed.launcher.launch" in parent[2] and above is not None and "deepspeed" in above[2]:
            self._alive[parent[0]] = above[1]

    def gone(self) -> bool:
        """Whether one of them has ended."""
        now = {pid: _process(pid) for pid in self._alive}
        return any(process is None or process[1] != self._alive[pid] for pid, process in now.items())
