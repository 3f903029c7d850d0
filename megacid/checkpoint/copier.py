"""Copies published checkpoints to a mirror while training continues.

A thread of each rank copies the files that the rank wrote. The threads run no collective. When all have ended, the main
threads exchange the outcome at the next `poll`, and a thread of rank 0 copies the manifest, which makes the copy a
checkpoint, and removes old ones. A copy that fails is a warning, and training continues.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megacid.checkpoint.mirror import Mirror
from megacid.distributed.collectives import Group, rank
from megacid.distributed.consensus import any_rank, gather_json
from megacid.errors import one_line

log = logging.getLogger(__name__)

_POLL_S = 0.1


@dataclass
class _Copy:
    """The copy of one checkpoint on one rank.

    committing: every rank has copied its files. overdue: a save has waited for it as long as it may.
    """

    step: int
    directory: Path
    began: float = field(default_factory=time.monotonic)
    committing: bool = False
    overdue: bool = False
    error: str | None = None
    thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Run `work` in a thread; an exception of it becomes this copy's error."""
        self.thread = threading.Thread(target=self._run, args=(work,), name="mirror", daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # the other ranks wait for a report
            self.error = one_line(error, 1000) or type(error).__name__


class Copier:
    """Copies the checkpoints of one run, one at a time. Every method is a collective.

    Args:
        wait_s: how long a copy waits for the end of the last one, in seconds; after that its checkpoint is left out.
        time_left: seconds until this process should end, such as after a signal.
    """

    def __init__(
        self, mirror: Mirror, group: Group = None, *, wait_s: float, time_left: Callable[[], float] = lambda: math.inf
    ) -> None:
        self.mirror, self.group, self.wait_s, self._time_left = mirror, group, wait_s, time_left
        self._copy: _Copy | None = None

    def begin(self, step: int, directory: Path, names: list[str]) -> None:
        """Copy a published checkpoint. names: of the files in `directory` that this rank wrote."""
        if self._copy is not None:
            last = self._copy
            waited = self._wait(0.0 if last.overdue else self.wait_s)
            if self._copy is not None:
                last.overdue = True
                self._warn(
                    step, f"the copy of step {last.step} has not ended after {time.monotonic() - last.began:.0f} s"
                )
                return
            log.info("waited %.1f s for the copy of step %d to %s", waited, last.step, self.mirror.url)
        copy = self._copy = _Copy(step, directory)

        def copy_own_files() -> None:
            for name in names:
                self.mirror.put(directory / name, step)

        copy.start(copy_own_files)

    def poll(self) -> None:
        """Advance the copy that is going on, if this needs no waiting. Costs nothing without one."""
        copy = self._copy
        if copy is None or any_rank(copy.busy, self.group):
            return
        errors = gather_json(copy.error, self.group)
        named = [f"rank {number}: {error}" for number, error in enumerate(errors) if error is not None]
        if named:
            self._copy = None
            self._warn(copy.step, "; ".join(dict.fromkeys(named)))
        elif copy.committing:
            self._copy = None
            seconds = time.monotonic() - copy.began
            log.info("copied step %d to %s in %.1f s", copy.step, self.mirror.directory(copy.step), seconds)
        else:
            copy.committing = True
            if rank(self.group) == 0:
                copy.start(lambda: self.mirror.commit(copy.directory, copy.step))

    def finish(self, limit_s: float | None = None) -> None:
        """Wait for the end of the copy that is going on.

        limit_s: the longest wait in seconds; None: `wait_s`.
        """
        waited = self._wait(self.wait_s if limit_s is None else limit_s)
        if self._copy is not None:
            self._warn(self._copy.step, f"its copy has not ended after {waited:.0f} s")

    def _wait(self, limit_s: float) -> float:
        began = time.monotonic()
        while self._copy is not None:
            self.poll()
            left = min(began + limit_s - time.monotonic(), self._time_left())
            if self._copy is None or any_rank(left <= 0, self.group):
                break
            time.sleep(_POLL_S)
        return time.monotonic() - began

    def _warn(self, step: int, reason: str) -> None:
        if rank(self.group) == 0:
            log.warning("step %d is not copied to %s, training goes on: %s", step, self.mirror.url, reason)
