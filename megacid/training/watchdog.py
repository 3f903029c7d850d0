"""A thread on each rank that detects a stall, finds the rank that caused it, and ends the run.

The training loop reports each phase that it enters (`beat`). When no beat follows within the limit, the thread writes
the stacks of its process to `stalled/rank-00001.txt` and a JSON report next to it, and reads the reports of the other
ranks (the run directory is on a shared file system, as for checkpoints). The lowest rank that reported prints the
verdict. A rank with a thread that waits inside torch.distributed is waiting for another; one without such a thread, or
one without a report, caused the stall. On GPUs collectives do not block the host, so every rank may look busy: then the
rank with the fewest beats is named.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megacid.config.schema import RunFile
from megacid.data.decode import decode_image
from megacid.data.jpeg import decode_jpeg
from megacid.distributed.consensus import broadcast_json
from megacid.distributed.parallel import Parallel
from megacid.errors import EXIT_AGAIN
from megacid.storage.atomic import read_json, write_json_atomic
from megacid.training.lifecycle import Launcher, Lifecycle
from megacid.training.trackers import close_after_error

_PATIENCE_S = 2.5  # for the reports of ranks whose limit ends a little later


class Watchdog:
    """Ends the process with EXIT_AGAIN when a beat is followed by none for its limit; checks that the launcher lives.

    When the launcher has ended, `lifecycle` is asked to stop the run.
    """

    def __init__(self, run: RunFile, parallel: Parallel, lifecycle: Lifecycle) -> None:
        """A collective: all ranks mark the reports of this start with one token."""
        self.folder, self.rank, self.world = run.directory / "stalled", parallel.rank, parallel.world
        self.token = broadcast_json(str(time.time_ns()), parallel.group)
        self.limit_s = run.megacid.run.timeout_s
        self._launcher, self._lifecycle = Launcher(), lifecycle
        self._main = threading.main_thread().ident or 0
        self._beats = 0
        self._now = ("start", 0, 0, time.monotonic() + self.limit_s)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, phase: str, step: int, limit_s: float | None = None) -> None:
        """Enter a phase of a step. limit_s: seconds until the next beat must follow; None for the run's timeout_s."""
        self._beats += 1
        self._now = (phase, step, self._beats, time.monotonic() + (limit_s or self.limit_s))

    def close(self) -> None:
        """Stop watching and join the thread."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = min(1.0, self.limit_s / 10)
        orphaned = False
        while not self._closed.wait(pause):
            if not orphaned and self._launcher.gone():
                orphaned = True
                self._lifecycle.request_stop()
            phase, step, beats, deadline = self._now
            if time.monotonic() > deadline:
                self._end(phase, step, beats)

    def _end(self, phase: str, step: int, beats: int) -> None:
        try:
            message = self._report(phase, step, beats)
        except OSError as error:
            message = (
                f"rank {self.rank} stalled in {phase} of step {step}, and its report could not be written: {error}"
            )
        if message:
            print(f"error: {message}", file=sys.stderr, flush=True)
        close_after_error()
        os._exit(EXIT_AGAIN)  # the main thread cannot be interrupted inside a collective

    def _report(self, phase: str, step: int, beats: int) -> str | None:
        """Write this rank's stacks and report. Returns the verdict on the rank that prints it."""
        if self.folder.is_symlink():
            with contextlib.suppress(IsADirectoryError):  # another rank replaced it first
                self.folder.unlink(missing_ok=True)
        self.folder.mkdir(exist_ok=True)
        stacks = self._file(self.rank, "txt")
        stacks.unlink(missing_ok=True)
        with open(stacks, "x") as file:  # "x" follows no link
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
            time.sleep(0.5)  # a launcher ends all ranks when one has ended: let the verdict be printed first
            return None
        return verdict(reports, self.world, self.folder)

    def _file(self, rank: int, ending: str) -> Path:
        return self.folder / f"rank-{rank:05d}.{ending}"

    def _reports(self) -> dict[int, dict[str, Any]]:
        reports = {}
        for rank in range(self.world):
            report = read_json(self._file(rank, "json"))
            if isinstance(report, dict) and report.get("token") == self.token:  # else it is of an earlier start
                reports[rank] = report
        return reports

    def _position(self) -> tuple[str, bool]:
        """The main thread's innermost line outside torch, and whether any thread waits for other ranks."""
        frames = sys._current_frames()
        frames.pop(threading.get_ident(), None)
        stacks = {thread: traceback.extract_stack(frame) for thread, frame in frames.items()}
        # Of all threads: backward passes on a GPU run in their own.
        waiting = any(_waits(stack) for stack in stacks.values())
        stack: Sequence[traceback.FrameSummary] = stacks.get(self._main, [])
        own = [entry for entry in stack if f"{os.sep}torch{os.sep}" not in entry.filename] or list(stack)
        where = f"{own[-1].filename}:{own[-1].lineno} {own[-1].name}" if own else "an unknown place"
        return where + decoded_sample(frames.get(self._main)), waiting


def decoded_sample(frame: FrameType | None) -> str:
    """For messages: the sample whose image is being decoded in this frame or one of its callers; "" for none."""
    while frame is not None and frame.f_code not in (decode_image.__code__, decode_jpeg.__code__):
        frame = frame.f_back
    return "" if frame is None else f", decoding {frame.f_locals['shard']}/{frame.f_locals['key']}"


def _waits(stack: Sequence[traceback.FrameSummary]) -> bool:
    """Whether a stack is in torch.distributed, or in the wait() of an asynchronous collective, which has no frame."""
    inside = any(f"{os.sep}torch{os.sep}distributed{os.sep}" in entry.filename for entry in stack[-8:])
    return inside or bool(stack and ".wait()" in (stack[-1].line or "") and "threading" not in stack[-1].filename)


def verdict(reports: dict[int, dict[str, Any]], world: int, folder: Path) -> str:
    """One sentence that names the ranks that caused the stall, from the reports of the ranks that wrote one."""
    silent = [rank for rank in range(world) if rank not in reports]
    busy = [rank for rank, report in reports.items() if not report["waiting"]]
    if not silent and (not busy or len(busy) == world):
        least = min(report["beats"] for report in reports.values())
        busy = [rank for rank, report in reports.items() if report["beats"] == least]
    causes = [
        f"rank {rank} did not report: its process has ended, is stopped or has lost its network" for rank in silent
    ]
    where = "rank {rank} (process {process} on {host}) is stalled in {phase} of step {step} at {where}"
    causes += [where.format(**reports[rank]) for rank in busy]
    others = sorted(reports.keys() - set(busy))
    waiting = f"; rank {', '.join(map(str, others))} waited for it" if others else ""
    return (
        f"no progress: {'; '.join(causes)}{waiting}. The stacks of all ranks are in {folder}. "
        "Run the same command again to continue from the newest checkpoint"
    )
