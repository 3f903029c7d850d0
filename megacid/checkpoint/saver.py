"""Saving checkpoints: all ranks write, rank 0 publishes; in the foreground, or while training continues.

A background save is the same protocol in two parts. `save` copies the tensors to host memory, which is the only pause,
and a thread of each rank writes, syncs and hashes its own files. The thread runs no collective: it would interleave
with the training's in another order on each rank and deadlock. The main thread does the second part, gathering the
reports and publishing, at the first `poll` at which the thread of every rank has ended. Until then the stage directory
is no checkpoint, so a crash at any moment leaves the older ones.

Local work (directories, copies, files) may fail on one rank while the others wait in a collective. It never raises:
the error becomes text in the rank's report, and the reports decide for all ranks.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megacid.checkpoint import store
from megacid.checkpoint.copier import Copier
from megacid.checkpoint.state import PREFIX, NamedState, RowState
from megacid.distributed.collectives import Group, rank, world_size
from megacid.distributed.consensus import any_rank, broadcast_json, gather_json
from megacid.failpoints import failpoint

log = logging.getLogger(__name__)


class SaveFailed(RuntimeError):  # noqa: N818  the run ends with its own exit code
    """Several checkpoints in a row could not be written. Raised on every rank."""


@dataclass
class _Save:
    """A save in progress on one rank."""

    step: int
    fields: dict[str, Any]
    stage: Path | None = None
    error: str | None = None
    files: list[store.WrittenFile] = field(default_factory=list)
    write_s: float = 0.0
    thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    @contextlib.contextmanager
    def local(self, rank: int) -> Iterator[None]:
        """A block of local work, whose exception becomes this save's error."""
        try:
            yield
        except Exception as error:  # not only OSError: the other ranks wait for a report
            self.error = f"rank {rank}: {_text(error)}"


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


class Saver:
    """Saves the checkpoints of one run directory. Every method is a collective.

    Args:
        keep_last: number of newest checkpoints that stay.
        background: write while training continues; needs host memory for a copy of this rank's part.
        max_failures: number of failed saves in a row (disk full, I/O error) at which SaveFailed is raised.
        copier: to the mirror; None: without one.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int,
        group: Group = None,
        background: bool = False,
        max_failures: int = 3,
        copier: Copier | None = None,
    ) -> None:
        self.root, self.keep_last, self.group, self.copier = root, keep_last, group, copier
        self.background, self.max_failures = background, max_failures
        self.last_step = -1  # of the newest save begun
        self._under_way: _Save | None = None
        self._failures = 0

    def save(
        self,
        step: int,
        engine: NamedState,
        rows: dict[str, RowState],
        row_range: tuple[int, int],
        fields: dict[str, Any],
    ) -> None:
        """Write `root/step-...`. A save in progress is finished first. When a rank cannot write, all ranks only warn.

        Args:
            step: number of steps done.
            rows: {"head": classifier, "optimizer": its optimizer}; empty without a classifier.
            row_range: [start, stop) of this rank's classes.
            fields: further fields of the manifest, JSON-able.

        Raises:
            SaveFailed: on every rank.
        """
        self.finish()
        began, me = time.perf_counter(), rank(self.group)
        save = self._under_way = _Save(step, fields)
        self.last_step = step
        if me == 0:
            with save.local(me):
                save.stage = store.make_stage(self.root, step)
        name, save.error = broadcast_json([save.stage.name if save.stage else None, save.error], self.group)
        save.stage = self.root / name if name else None
        # Collectives first, files afterwards: a full disk on one rank must not leave the others waiting.
        student = self._own_student_tensors(engine)
        own: dict[str, Tensor] = {}
        with save.local(me):
            own = {f"{part}/{key}": value for part, owner in rows.items() for key, value in owner.state_rows().items()}
            if self.background:
                own = {key: value.detach().to("cpu", copy=True) for key, value in own.items()}
        bounds = {"start": str(row_range[0]), "stop": str(row_range[1])}
        if not self.background:
            self._write(save, student, own, bounds, began)
            self.finish()
            return
        size = sum(t.numel() * t.element_size() for t in (*student.values(), *own.values())) / 2**20
        began_writing = time.perf_counter()
        log.info("copied step %d: %.1f MiB in %.2f s, writing in the background", step, size, began_writing - began)
        save.thread = threading.Thread(
            target=self._write, args=(save, student, own, bounds, began_writing), name="saver", daemon=True
        )
        save.thread.start()

    def poll(self) -> None:
        """Publish a background save that every rank has written. Costs nothing while no save or copy is in progress."""
        if self._under_way is not None and not any_rank(self._under_way.busy, self.group):
            self.finish()
        if self.copier is not None:
            self.copier.poll()

    def close(self, limit_s: float | None = None) -> None:
        """`finish`, and wait for the copy to the mirror.

        limit_s: of the whole wait in seconds, about; None: the copy has the limit of a save.
        """
        began = time.monotonic()
        self.finish()
        if self.copier is not None:
            self.copier.finish(None if limit_s is None else limit_s - (time.monotonic() - began))

    def finish(self) -> None:
        """Wait for the save in progress, publish it and begin its copy to the mirror. SaveFailed on every rank."""
        if self._under_way is None:
            return
        save, self._under_way = self._under_way, None
        if save.thread is not None:
            save.thread.join()
        report = {"error": save.error, "files": [vars(file) for file in save.files], "write_s": save.write_s}
        reports = gather_json(report, self.group)
        error = broadcast_json(self._publish(save, reports) if rank(self.group) == 0 else None, self.group)
        self._failures = 0 if error is None else self._failures + 1
        if self._failures >= self.max_failures:
            raise SaveFailed(
                f"{self._failures} checkpoints in a row could not be written to {self.root}, the last for step "
                f"{save.step} ({error}): free disk space or repair the disk, then run the same command again to "
                "continue from the newest checkpoint"
            )
        if error is None and self.copier is not None:
            self.copier.begin(save.step, self.root / store.step_name(save.step), [file.name for file in save.files])

    def _own_student_tensors(self, engine: NamedState) -> dict[str, Tensor]:
        me, world = rank(self.group), world_size(self.group)
        own: dict[str, Tensor] = {}
        for i, (name, tensors) in enumerate(engine.named_state()):
            if i % world == me:
                own |= {f"{kind}/{name.removeprefix(PREFIX)}": value for kind, value in tensors.items()}
        if me == 0:
            own |= {f"buffer/{name.removeprefix(PREFIX)}": value for name, value in engine.named_buffers().items()}
        return own

    def _write(
        self, save: _Save, student: dict[str, Tensor], rows: dict[str, Tensor], bounds: dict[str, str], began: float
    ) -> None:
        """This rank's files. In the background: the body of the thread."""
        me = rank(self.group)
        if save.stage is not None and save.error is None:
            with save.local(me):
                failpoint("store:stage_made", step=save.step)
                name = f"student-{me:05d}.safetensors"
                save.files.append(store.write_tensors(save.stage, name, student, step=save.step))
                if rows:
                    name = f"classifier-{me:05d}.safetensors"
                    save.files.append(store.write_tensors(save.stage, name, rows, bounds, step=save.step))
                failpoint("store:files_written", step=save.step)
        save.write_s = time.perf_counter() - began

    def _publish(self, save: _Save, reports: list[Any]) -> str | None:
        """Publish on rank 0, or clean up. Returns the error."""
        began, errors = time.perf_counter(), [report["error"] for report in reports if report["error"]]
        files = [store.WrittenFile(**file) for report in reports for file in report["files"]]
        try:
            if errors or save.stage is None:
                raise OSError("; ".join(dict.fromkeys(errors)))
            final = store.publish(self.root, save.stage, save.step, files, save.fields)
        except Exception as error:  # the other ranks wait for the outcome
            log.warning("could not save step %d, older checkpoints are kept: %s", save.step, _text(error))
            if save.stage is not None:
                store.remove(save.stage)
            return _text(error)
        # The slowest rank's time; of a background save training lost less.
        seconds = max(report["write_s"] for report in reports) + time.perf_counter() - began
        size = sum(file.bytes for file in files) / 2**20
        log.info("saved %s: %.1f MiB in %.2f s (%.0f MiB/s)", final, size, seconds, size / seconds)
        try:
            failpoint("store:after_rename", step=save.step)
            store.prune(self.root, self.keep_last, step=save.step)
        except OSError as error:  # the new checkpoint is published already
            log.warning("could not remove an old checkpoint below %s: %s", self.root, error)
        return None
