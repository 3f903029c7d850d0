"""A thread beside each rank that notices when the rank stands still, finds out which rank is to blame, and ends the run.

The training loop says what it begins (`beat`). When nothing follows for `limit_s` seconds, the thread writes the stacks
of its process to `stalled/rank-00001.txt` and a report beside it, reads the reports of the other ranks (the run directory
is on a file system that all ranks see, as for checkpoints), and the lowest rank that reported prints the verdict. A rank
with a thread that waits inside torch.distributed is a victim; one without, or one without a report, is the culprit.
On GPUs collectives do not block, so that every rank may seem busy: then the rank that got least far is named.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megacid.storage.atomic import write_json_atomic

_PATIENCE_S = 2.5  # for the reports of ranks that began to wait a little later


class Watchdog:
    """directory: of the run. token: the same on every rank of this start, new at every start. limit_s: seconds without a
    beat. on_orphan: called once when `gone()` says that the launcher has ended. Ends the process with `exit_code`."""

    def __init__(
        self,
        directory: Path,
        rank: int,
        world: int,
        *,
        token: str,
        limit_s: float,
        exit_code: int,
        gone: Callable[[], bool] = lambda: False,
        on_orphan: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.rank, self.world, self.token = directory / "stalled", rank, world, token
        self.limit_s, self.exit_code = limit_s, exit_code
        self._gone, self._on_orphan = gone, on_orphan
        self._main = threading.main_thread().ident or 0
        self._beats = 0
        self._now = ("start", 0, 0, time.monotonic() + limit_s)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, phase: str, step: int, limit_s: float | None = None) -> None:
        """What the rank begins now, and how long that may take (default: limit_s)."""
        self._beats += 1
        self._now = (phase, step, self._beats, time.monotonic() + (limit_s or self.limit_s))

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = min(1.0, self.limit_s / 10)
        orphaned = False
        while not self._closed.wait(pause):
            if not orphaned and self._gone():
                orphaned = True
                self._on_orphan()
            phase, step, beats, deadline = self._now
            if time.monotonic() > deadline:
                self._end(phase, step, beats)

    def _end(self, phase: str, step: int, beats: int) -> None:
        try:
            said = self._report(phase, step, beats)
        except OSError as error:
            said = (
                f"rank {self.rank} stood still in {phase} of step {step}, and its report could not be written: {error}"
            )
        if said:
            print(f"error: {said}", file=sys.stderr, flush=True)
        os._exit(self.exit_code)  # the main thread cannot be interrupted inside a collective

    def _report(self, phase: str, step: int, beats: int) -> str | None:
        """Write this rank's stacks and report; the verdict if this rank is the one to print it."""
        self.folder.mkdir(exist_ok=True)
        with open(self._file(self.rank, "txt"), "w") as file:
            file.write(f"rank {self.rank}, process {os.getpid()} on {socket.gethostname()}: {phase} of step {step}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        where, waiting = self._position()
        mine = {
            "token": self.token, "rank": self.rank, "phase": phase, "step": step, "beats": beats, "where": where,
            "waiting": waiting, "process": os.getpid(), "host": socket.gethostname(),
        }  # fmt: skip
        write_json_atomic(self._file(self.rank, "json"), mine)
        deadline = time.monotonic() + _PATIENCE_S
        while len(reports := self._reports()) < self.world and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.rank != min(reports):
            time.sleep(0.5)  # a launcher ends everybody as soon as one rank has gone: let the verdict be printed first
            return None
        return verdict(reports, self.world, self.folder)

    def _file(self, rank: int, ending: str) -> Path:
        return self.folder / f"rank-{rank:05d}.{ending}"

    def _reports(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self.world):
            try:
                report = json.loads(self._file(rank, "json").read_text())
            except (OSError, ValueError):
                continue
            if report.get("token") == self.token:  # else of an earlier start
                found[rank] = report
        return found

    def _position(self) -> tuple[str, bool]:
        """Where the main thread is (innermost line outside torch), and whether a thread waits for other ranks."""
        frames = sys._current_frames()
        frames.pop(threading.get_ident(), None)
        stacks = {thread: traceback.extract_stack(frame) for thread, frame in frames.items()}
        # All threads, since backward passes on a GPU run in threads of their own.
        waiting = any(_waits(stack) for stack in stacks.values())
        stack: Sequence[traceback.FrameSummary] = stacks.get(self._main, [])
        own = [entry for entry in stack if f"{os.sep}torch{os.sep}" not in entry.filename] or list(stack)
        return (f"{own[-1].filename}:{own[-1].lineno} {own[-1].name}" if own else "an unknown place"), waiting


def _waits(stack: Sequence[traceback.FrameSummary]) -> bool:
    """Inside torch.distributed, or in the wait() of an asynchronous collective (which has no frame of its own)."""
    inside = any(f"{os.sep}torch{os.sep}distributed{os.sep}" in entry.filename for entry in stack[-8:])
    return inside or bool(stack and ".wait()" in (stack[-1].line or "") and "threading" not in stack[-1].filename)


def verdict(reports: dict[int, dict[str, Any]], world: int, folder: Path) -> str:
    """One sentence from the reports of the ranks that gave one."""
    silent = [rank for rank in range(world) if rank not in reports]
    busy = [rank for rank, report in reports.items() if not report["waiting"]]
    if not silent and (not busy or len(busy) == world):
        least = min(report["beats"] for report in reports.values())
        busy = [rank for rank, report in reports.items() if report["beats"] == least]
    parts = [f"rank {rank} has not even reported: it is dead, stopped or cut off" for rank in silent]
    parts += [
        "rank {rank} (process {process} on {host}) stands still in {phase} of step {step} at {where}".format(
            **reports[rank]
        )
        for rank in busy
    ]
    others = sorted(reports.keys() - set(busy))
    waiting = f"; rank {', '.join(map(str, others))} waited for it" if others else ""
    return (
        f"no progress: {'; '.join(parts)}{waiting}. Stacks of the ranks are in {folder}. "
        "Start the same command again to go on from the newest checkpoint"
    )
