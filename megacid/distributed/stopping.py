"""How an offline stage ends before it is done: asked to by a signal, or because another rank is gone.

Everything a stage leaves on the way is whole, so that it may end anywhere; what has to be arranged is that no rank waits
for one that has left. A rank that is asked to stop raises `Stopped` at its next poll, inside a block of `stop_together`, and
all ranks leave that block with it. Blocks are long (the embedding of all tars is one), so the request also goes through
a mark beside the output directory, which all ranks see: they poll it.
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
from megacid.errors import EXIT_AGAIN

Group = dist.ProcessGroup | None

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_EVERY_S = 0.5  # a look at the mark is a call to a disk that may be far away


class Stopped(BaseException):  # not an error: no `except Exception` on the way may hold it
    """The stage was asked to end. code: 128 + the signal's number, what the process exits with."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Progress(Protocol):
    """Reports work done, and is where a long stage may stop: call it often, and only inside a block of `stop_together`."""

    def __call__(self, rows: int, /) -> object:
        """Add `rows` to those done; 0 only polls. Raises Stopped when the stage was asked to end."""


StartProgress = Callable[[int], Progress]  # takes the rows to do in all


def no_progress(rows: int) -> None:
    """A `Progress` that reports nothing and never stops."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a request that `poll` raises. `with StopRequest() as stop:` in the main thread.

    A second SIGTERM changes nothing; a second SIGINT is a KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.code = 0
        self._mark: Path | None = None
        self._looked = 0.0
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
            os.close(self._pipe[1])  # the thread reads the end of the pipe and ends

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = self.code or 128 + number

    def share(self, out: Path, parallel: Parallel) -> None:
        """From here on a request reaches every rank. A collective; forgets the mark of an earlier run."""
        if parallel.world == 1:
            return
        self._mark = out.resolve().with_name(f".{out.resolve().name}.stop")
        if parallel.is_first:
            self._mark.unlink(missing_ok=True)
        barrier(parallel.group)
        # Python's handlers wait while the main thread is inside a collective, which may take hours; the byte that
        # arrives here does not.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._pipe[0],), daemon=True).start()
        if self.code:
            self._make_mark(self.code)

    def _listen(self, pipe: int) -> None:
        while data := os.read(pipe, 64):
            for number in data:
                if number in _SIGNALS:
                    self._make_mark(128 + number)
        os.close(pipe)

    def _make_mark(self, code: int) -> None:
        if self._mark is not None:
            with contextlib.suppress(OSError):
                self._mark.parent.mkdir(parents=True, exist_ok=True)
                self._mark.write_text(str(code))

    def asked(self) -> int:
        """Exit code of a request on this rank or, as far as the mark tells, on another; 0 for none."""
        if self.code == 0 and self._mark is not None and time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError, ValueError):
                return int(self._mark.read_text())
        return self.code

    def poll(self) -> None:
        """Raises Stopped when this rank or another was asked to stop. Called often, inside a block of `stop_together`."""
        if code := self.asked():
            raise Stopped(code)

    def polling(self, progress: Progress) -> Progress:
        """`progress`, which then also polls."""

        def report_and_poll(rows: int) -> None:
            progress(rows)
            self.poll()

        return report_and_poll

    def forget(self) -> None:
        """Remove the mark. One rank, when the others no longer need it."""
        if self._mark is not None:
            self._mark.unlink(missing_ok=True)


@contextlib.contextmanager
def stop_together(group: Group = None) -> Iterator[None]:
    """`fail_together`, whose ranks also stop together: Stopped inside the block on one rank is Stopped on every rank."""
    code = 0
    with fail_together(group):
        try:
            yield
        except Stopped as stopped:
            code = stopped.code
    code = max(gather_json(code, group))
    if code:
        raise Stopped(code)


def run_stage(work: Callable[[Parallel, StopRequest], None], out: Path, timeout_s: float) -> int:
    """Run a stage on this rank and return the exit code: 0, 128 + signal when asked to stop, 75 when a peer is gone.

    timeout_s: of collectives. Other errors pass. Logs go to the terminal; the rank ends with the launcher that started it.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megacid").setLevel(logging.INFO)
    if launched():  # without a launcher the parent is a shell, whose end must not end what nohup started
        set_parent_death_signal(signal.SIGTERM)
    rank = 0
    with StopRequest() as stop:
        try:
            with session(timeout_s) as parallel:
                rank = parallel.rank
                try:
                    stop.share(out, parallel)
                    work(parallel, stop)
                except RuntimeError as error:
                    if parallel.world == 1 or not from_a_collective(error):
                        raise
                    if code := stop.asked():
                        raise Stopped(code) from None
                    reason = str(error).strip().splitlines()[0][:200]
                    print(
                        f"error: rank {rank} of {parallel.world}: another rank is gone or does not answer ({reason}); "
                        "what was complete is kept, run the same command again",
                        file=sys.stderr,
                    )
                    return EXIT_AGAIN
        except Stopped as stopped:
            if rank == 0:
                _say(stopped)
            return stopped.code
        finally:
            # A request that came too late to matter leaves a mark as well.
            if rank == 0:
                stop.forget()
    return 0


def run_alone(work: Callable[[], int]) -> int:
    """Run a tool of one process; SIGTERM ends it at once, the way an exception does: temporary files are removed."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise Stopped(128 + number)

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        return work()
    except Stopped as stopped:
        _say(stopped)
        return stopped.code
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(stopped: Stopped) -> None:
    name = signal.Signals(stopped.code - 128).name
    print(f"stopped by {name}: what was complete is kept, run the same command to go on", file=sys.stderr)
