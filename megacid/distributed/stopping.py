"""Stops an offline stage early on all ranks: on a signal, or because another rank has ended.

A stage may end anywhere, since every file that it leaves is complete; but no rank may wait for one that has left. A
rank that is asked to stop raises `Stopped` at its next poll, inside a block of `stop_together`, and all ranks leave
that block with it. Blocks are long (embedding all tars is one), so the request also goes through a stop file next to
the output directory, which all ranks poll.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol

import torch.distributed as dist

from megacid.distributed.collectives import barrier
from megacid.distributed.consensus import fail_together, from_a_collective, gather_json
from megacid.distributed.parallel import Parallel, launched, session
from megacid.distributed.parent_process import set_parent_death_signal
from megacid.errors import EXIT_AGAIN, LogFormatter

Group = dist.ProcessGroup | None

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_POLL_S = 0.5  # between reads of the stop file, which may be on a slow network disk


class Stopped(BaseException):  # not an Exception, so no `except Exception` catches it
    """The stage was asked to stop. code: exit code of the process, 128 + the signal's number."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Progress(Protocol):
    """Reports work done. May raise Stopped: call it often, and only inside a block of `stop_together`."""

    def __call__(self, rows: int, /) -> object:
        """Add `rows` to those done; 0 only polls. Raises Stopped when the stage was asked to stop."""


StartProgress = Callable[[int], Progress]  # takes the rows to do in all


def no_progress(rows: int) -> None:
    """A `Progress` that reports nothing and never stops."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a request, on which `poll` raises Stopped. A context manager for the main thread.

    A second SIGTERM changes nothing; a second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.code = 0
        self._stop_file: Path | None = None
        self._stop_file_lock = threading.Lock()
        self._read_at = 0.0
        self._pipe: tuple[int, int] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # which ends the thread that reads it

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = self.code or 128 + number

    def share(self, out: Path, parallel: Parallel) -> None:
        """Share requests between the ranks from here on, and remove the stop file of an earlier run. A collective."""
        if parallel.world == 1:
            return
        self._stop_file = out.resolve().with_name(f".{out.resolve().name}.stop")
        if parallel.is_first:
            self._stop_file.unlink(missing_ok=True)
        barrier(parallel.group)
        # Python's handlers do not run while the main thread is inside a collective, which may take hours. The wake-up
        # byte arrives at once.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._pipe[0],), daemon=True).start()
        if self.code:
            self._write_stop_file(self.code)

    def _listen(self, pipe: int) -> None:
        while data := os.read(pipe, 64):
            for number in data:
                if number in _SIGNALS:
                    self._write_stop_file(128 + number)
        os.close(pipe)

    def _write_stop_file(self, code: int) -> None:
        with self._stop_file_lock, contextlib.suppress(OSError):
            if self._stop_file is not None:
                self._stop_file.parent.mkdir(parents=True, exist_ok=True)
                self._stop_file.write_text(str(code))

    def asked(self) -> int:
        """Exit code of a request on this rank or, by the stop file, on another; 0 for none."""
        if self.code == 0 and self._stop_file is not None and time.monotonic() - self._read_at > _POLL_S:
            self._read_at = time.monotonic()
            with contextlib.suppress(OSError, ValueError):
                return int(self._stop_file.read_text())
        return self.code

    def poll(self) -> None:
        """Raise Stopped when any rank was asked to stop. Call it often, inside a block of `stop_together`."""
        if code := self.asked():
            raise Stopped(code)

    def polling(self, progress: Progress) -> Progress:
        """`progress` with a poll after each call."""

        def report_and_poll(rows: int) -> None:
            progress(rows)
            self.poll()

        return report_and_poll

    def forget(self) -> None:
        """Remove the stop file, also for the thread that listens. For one rank, when the others no longer need it."""
        with self._stop_file_lock:
            if self._stop_file is not None:
                self._stop_file.unlink(missing_ok=True)
            self._stop_file = None


@contextlib.contextmanager
def stop_together(group: Group = None) -> Iterator[None]:
    """`fail_together` for work that polls: when one rank raises Stopped inside the block, every rank raises it."""
    code = 0
    with fail_together(group):
        try:
            yield
        except Stopped as stopped:
            code = stopped.code
    code = max(gather_json(code, group))
    if code:
        raise Stopped(code)


def run_stage(stage: Callable[[Parallel, StopRequest], None], out: Path | None, timeout_s: float) -> int:
    """Run a stage on this rank, with logs on the terminal, until it or the launcher that started the rank ends.

    Args:
        stage: the work of this rank.
        out: output directory of the stage, next to which the stop file is written; None: the blocks of the stage are
            so short that it needs none.
        timeout_s: of collectives, in seconds.

    Returns:
        Exit code: 0, 128 + signal when asked to stop, EXIT_AGAIN when another rank has ended.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("megacid").setLevel(logging.INFO)
    if launched():  # without a launcher the parent is a shell, whose end must not end what nohup started
        set_parent_death_signal(signal.SIGTERM)
    rank = 0
    with StopRequest() as stop:
        try:
            with session(timeout_s) as parallel:
                rank = parallel.rank
                try:
                    if out is not None:
                        stop.share(out, parallel)
                    stage(parallel, stop)
                except RuntimeError as error:
                    if parallel.world == 1 or not from_a_collective(error):
                        raise
                    if code := stop.asked():
                        raise Stopped(code) from None
                    reason = str(error).strip().splitlines()[0][:200]
                    print(
                        f"error: rank {rank} of {parallel.world} lost contact with another rank ({reason}); complete "
                        "output is kept, run the same command again to continue",
                        file=sys.stderr,
                    )
                    return EXIT_AGAIN
        except Stopped as stopped:
            if rank == 0:
                _print_stopped(stopped)
            return stopped.code
        finally:
            # Also after a request that came too late to have an effect.
            if rank == 0:
                stop.forget()
    return 0


def run_alone(tool: Callable[[], int]) -> int:
    """Run a tool of one process. SIGTERM ends it like an exception, so temporary files are removed."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise Stopped(128 + number)

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        return tool()
    except Stopped as stopped:
        _print_stopped(stopped)
        return stopped.code
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_stopped(stopped: Stopped) -> None:
    name = signal.Signals(stopped.code - 128).name
    print(f"stopped by {name}: complete output is kept, run the same command again to continue", file=sys.stderr)
