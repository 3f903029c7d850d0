"""Where a run begins: the newest whole checkpoint; and whether it went on as it would have."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path

from megacid.checkpoint import store
from megacid.config.schema import RunFile
from megacid.errors import UserError
from megacid.storage.atomic import write_json_atomic

log = logging.getLogger("megacid")


def find_checkpoint(run: RunFile, resume: str) -> str | None:
    """The directory to resume from; None to begin. Refuses to write over another run."""
    directory = run.directory
    if resume not in ("auto", "never"):
        try:
            store.verify(Path(resume))
        except ValueError as error:
            raise UserError(f"--resume {resume}: {error}; name a whole step-... directory, or use auto") from None
        _go_back(directory, Path(resume))
        return resume
    existing = store.list_steps(directory)
    if resume == "never" and existing:
        raise UserError(
            f"{directory} already has checkpoints up to step {existing[-1][0]} and --resume is never: choose another run.name, or --resume auto"
        )
    store.sweep_stages(directory)
    newest, problems = store.newest_valid(directory)
    for problem in problems:
        log.warning("not a whole checkpoint, passed over: %s", problem)
    if existing and newest is None:
        raise UserError(
            f"none of the {len(existing)} checkpoints in {directory} is whole ({problems[0]}): restore one, or choose another run.name"
        )
    return str(newest) if newest else None


def _go_back(directory: Path, chosen: Path) -> None:
    """Move later checkpoints of the run aside: the next start would go on from them, and not from what comes now."""
    existing = store.list_steps(directory)
    if existing and chosen.resolve().parent != directory.resolve():
        raise UserError(
            f"--resume {chosen} is of another run, and {directory} already has checkpoints up to step {existing[-1][0]}: choose another run.name"
        )
    start = store.read_manifest(chosen)["step"]
    for step, path in existing:
        if step > start:
            aside = path.with_name(f".abandoned-{path.name}-{time.time_ns():x}")
            path.rename(aside)
            log.warning("going back to step %d: %s is moved to %s, remove it when it is not needed", start, path, aside)


class ResumeLossCheck:
    """The loss of the first step after each checkpoint, kept beside it: a resumed run must meet the same one.

    It catches what no checksum can: state that was never saved, or saved under the wrong name. Rank 0 only.
    """

    def __init__(self, directory: Path, resumed_at: int | None, *, tolerance: float) -> None:
        """resumed_at: step of the checkpoint this start came from. tolerance: relative, of the loss."""
        self._file, self._tolerance, self._saved_at = directory / "next_loss.json", tolerance, resumed_at
        self._expected: float | None = None
        if resumed_at is not None:
            try:
                before = json.loads(self._file.read_text())
                self._expected = float(before["loss"]) if before["step"] == resumed_at else None
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                pass  # the run ended before that step, and nothing can be compared

    def saved(self, step: int) -> None:
        self._saved_at = step

    def first_loss(self, step: int, loss: float) -> None:
        """Called at every step; does something at the first step after a checkpoint or a resume."""
        if step != self._saved_at:
            return
        if self._expected is None:
            with contextlib.suppress(OSError):  # a full disk is the checkpoint's affair
                write_json_atomic(self._file, {"step": step, "loss": loss})
            return
        expected, self._expected = self._expected, None
        if abs(loss - expected) <= self._tolerance * abs(expected) or (loss != loss and expected != expected):
            log.info("the first loss after resuming is %.8g, before it was %.8g", loss, expected)
        else:
            log.warning(
                "the first loss after resuming is %.8g, but the run that went on from this checkpoint before had %.8g: "
                "the data or the code have changed, or the checkpoint misses something; compare before you go on",
                loss,
                expected,
            )
