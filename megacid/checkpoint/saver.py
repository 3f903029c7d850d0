"""Saving: all ranks write, rank 0 publishes, training waits for it or goes on meanwhile.

In the background a save is the same protocol in two parts. `save` copies what is to be written to host memory, which is
the only pause, and a thread of each rank writes, syncs and hashes its own files. The thread knows nothing of the other
ranks: collectives from a thread would meet the training's in another order on each rank, and hang. The second part,
gathering the reports and publishing, is done on the main thread at the first `poll` at which every rank's thread has
ended. Until then the stage directory is no checkpoint, so a crash at any moment leaves the older ones.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megacid.checkpoint import store
from megacid.checkpoint.state import PREFIX, NamedState, RowState
from megacid.distributed.collectives import Group, any_rank, broadcast_json, gather_json, rank, world_size
from megacid.probes import probe

log = logging.getLogger(__name__)


class SaveFailed(RuntimeError):  # noqa: N818  the run ends with its own exit code
    """Several checkpoints in a row could not be written."""


@dataclass
class _Save:
    """One save under way, on one rank."""

    step: int
    facts: dict[str, Any]
    began: float
    error: str | None = None
    files: list[store.WrittenFile] = field(default_factory=list)
    thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Saver:
    """Checkpoints of one run directory. Every method is a collective.

    background: write while training goes on; needs host memory for a copy of this rank's part. max_failures: saves in a
    row that may fail (disk full, I/O error) with a warning, before SaveFailed is raised on every rank.
    """

    def __init__(
        self, root: Path, *, keep_last: int, group: Group = None, background: bool = False, max_failures: int = 3
    ) -> None:
        self.root, self.keep_last, self.group = root, keep_last, group
        self.background, self.max_failures = background, max_failures
        self._under_way: _Save | None = None
        self._failures = 0

    def save(
        self,
        step: int,
        engine: NamedState,
        rows: dict[str, RowState],
        row_range: tuple[int, int],
        facts: dict[str, Any],
    ) -> None:
        """Write `root/step-...` together. A save that is still under way is finished first.

        rows: {"head": classifier, "optimizer": its optimizer}, or empty. row_range: this rank's classes. facts: JSON for
        the manifest. When a rank cannot write, the older checkpoints stay and all ranks go on alike.
        """
        self.finish()
        save = self._under_way = _Save(step, facts, time.perf_counter())
        if rank(self.group) == 0:
            try:
                store.make_stage(self.root, step)
            except OSError as error:
                save.error = f"rank 0: {error}"
        # Collectives first, files afterwards: a full disk on one rank must not leave the others waiting.
        save.error = broadcast_json(save.error, self.group)
        student = self._own_student_tensors(engine)
        own = {f"{part}/{name}": value for part, owner in rows.items() for name, value in owner.state_rows().items()}
        bounds = {"start": str(row_range[0]), "stop": str(row_range[1])}
        probe("store:stage_made", step=step)
        if not self.background:
            self._write(save, student, own, bounds)
            self.finish()
            return
        own = {name: value.detach().to("cpu", copy=True) for name, value in own.items()}
        size = sum(t.numel() * t.element_size() for t in (*student.values(), *own.values())) / 2**20
        log.info("copied step %d: %.1f MiB in %.2f s; writing goes on in the background", step, size, time.perf_counter() - save.began)  # fmt: skip
        save.thread = threading.Thread(target=self._write, args=(save, student, own, bounds), name="saver", daemon=True)
        save.thread.start()

    def poll(self) -> None:
        """Publish a background save that every rank has written. Costs nothing while none is under way."""
        if self._under_way is not None and not any_rank(self._under_way.busy, self.group):
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way and publish it. Raises SaveFailed on every rank."""
        if self._under_way is None:
            return
        save, self._under_way = self._under_way, None
        if save.thread is not None:
            save.thread.join()
        reports = gather_json({"error": save.error, "files": [vars(file) for file in save.files]}, self.group)
        error = broadcast_json(self._publish(save, reports) if rank(self.group) == 0 else None, self.group)
        self._failures = 0 if error is None else self._failures + 1
        if self._failures >= self.max_failures:
            raise SaveFailed(
                f"{self._failures} checkpoints in a row could not be written to {self.root}, the last for step {save.step} "
                f"({error}): make room or repair the disk, then start the same command again; the older checkpoints stay"
            )

    def _own_student_tensors(self, engine: NamedState) -> dict[str, Tensor]:
        me, world = rank(self.group), world_size(self.group)
        own: dict[str, Tensor] = {}
        for i, (name, tensors) in enumerate(engine.named_state()):
            if i % world == me:
                own |= {f"{kind}/{name.removeprefix(PREFIX)}": value for kind, value in tensors.items()}
        if me == 0:
            own |= {f"buffer/{name.removeprefix(PREFIX)}": value for name, value in engine.named_buffers().items()}
        return own

    def _write(self, save: _Save, student: dict[str, Tensor], rows: dict[str, Tensor], bounds: dict[str, str]) -> None:
        """This rank's files; what goes wrong is kept for the report. In the background: the body of the thread."""
        if save.error is not None:
            return
        me, stage = rank(self.group), store.stage_path(self.root, save.step)
        try:
            save.files.append(store.write_tensors(stage, f"student-{me:05d}.safetensors", student, step=save.step))
            if rows:
                name = f"classifier-{me:05d}.safetensors"
                save.files.append(store.write_tensors(stage, name, rows, bounds, step=save.step))
        except Exception as error:  # not only OSError: the other ranks wait for a report
            save.error = f"rank {me}: {error}"
        probe("store:files_written", step=save.step)

    def _publish(self, save: _Save, reports: list[Any]) -> str | None:
        """Rank 0: publish, or clean up and say why not."""
        stage = store.stage_path(self.root, save.step)
        errors = [report["error"] for report in reports if report["error"]]
        files = [store.WrittenFile(**file) for report in reports for file in report["files"]]
        try:
            if errors:
                raise OSError("; ".join(dict.fromkeys(errors)))
            final = store.publish(self.root, stage, save.step, files, save.facts)
        except OSError as error:
            log.warning("could not save step %d, the older checkpoints stay: %s", save.step, error)
            shutil.rmtree(stage, ignore_errors=True)
            return str(error)
        seconds, size = time.perf_counter() - save.began, sum(file.bytes for file in files) / 2**20
        log.info("saved %s: %.1f MiB in %.2f s (%.0f MiB/s)", final, size, seconds, size / seconds)
        try:
            store.prune(self.root, self.keep_last, step=save.step)
        except OSError as error:  # this checkpoint is whole all the same
            log.warning("could not remove an old checkpoint below %s: %s", self.root, error)
        return None
