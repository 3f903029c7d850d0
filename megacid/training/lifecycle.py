"""The lock of a run directory, the request to stop, and what happens when the launcher is gone."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import IO

from megacid.distributed.collectives import Group
from megacid.distributed.consensus import any_rank
from megacid.distributed.parallel import launched
from megacid.errors import UserError


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
    """Turns SIGTERM and SIGUSR1 into a flag that all ranks learn of at the same step (the guard's all-reduce carries it).

    Made just before the first step: until then there is nothing to save, and the signals end the process at once.
    """

    def __init__(self, group: Group = None) -> None:
        self.group, self.asked = group, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request_stop()

    def request_stop(self) -> None:
        """Ask to stop after the step under way; again changes nothing: a save under way ends first."""
        self.asked = True

    def stop_requested(self) -> bool:
        """True on every rank when one was asked to stop. A collective."""
        return any_rank(self.asked, self.group)


def _process(pid: int) -> tuple[int, str, str] | None:
    """(parent, start time, command line) of a living process; None when there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (OSError, IndexError):
        return None
    return None if fields[0] == "Z" else (int(fields[1]), fields[19], line)


class Launcher:
    """The processes that started this rank: its parent, and above DeepSpeed's per-node launcher the `deepspeed` command.
    None for a program that no launcher started.

    DeepSpeed does not pass a signal that ends the command on to its per-node launcher, whose ranks would run on unseen.
    """

    def __init__(self) -> None:
        self._alive: dict[int, str] = {}  # pid -> start time, which tells a pid that was given away again
        parent = _process(os.getppid()) if launched() else None
        if parent is None:
            return
        self._alive[os.getppid()] = parent[1]
        above = _process(parent[0])
        if "deepspeed.launcher.launch" in parent[2] and above is not None and "deepspeed" in above[2]:
            self._alive[parent[0]] = above[1]

    def gone(self) -> bool:
        """True when one of them has ended."""
        now = {pid: _process(pid) for pid in self._alive}
        return any(found is None or found[1] != self._alive[pid] for pid, found in now.items())
