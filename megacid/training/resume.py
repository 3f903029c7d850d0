"""Opens a run directory, selects the checkpoint to resume from, and verifies that the loss continues."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path

from megacid.checkpoint import store
from megacid.config.load import expand_path
from megacid.config.schema import RunFile
from megacid.distributed.consensus import broadcast_json, fail_together
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.storage.atomic import SETTINGS_BYTES, disk_errors, read_bounded, write_json_atomic
from megacid.training.lifecycle import RunLock
from megacid.training.metrics import setup_logging
from megacid.training.run_settings import read_config

log = logging.getLogger("megacid")


def open_run(run: RunFile, resume: str, fork: str | None, parallel: Parallel) -> tuple[RunLock | None, str | None]:
    """Lock the run directory, start logging to it, and find the checkpoint to start from. A collective.

    Returns:
        (the lock, on rank 0; the checkpoint directory or None, on every rank).
    """
    with fail_together(parallel.group):
        lock = RunLock(run.directory) if parallel.is_first else None
        setup_logging(parallel.rank, run.directory)
        start_from = find_checkpoint(run, resume, fork) if parallel.is_first else None
        if parallel.is_first:
            store.remove_stages(run.directory)
    return lock, broadcast_json(start_from, parallel.group)


def find_checkpoint(run: RunFile, resume: str, fork: str | None = None) -> str | None:
    """The checkpoint directory to start from; None to start at step 0. Runs on rank 0 alone and writes nothing.

    Args:
        resume: "auto" (the newest valid checkpoint), "never", or the path of a checkpoint directory of this run.
        fork: the path of a checkpoint directory of another run, where this run starts while it has no checkpoint.

    Raises:
        UserError: the run directory holds checkpoints that must not be overwritten, or none that is valid.
    """
    directory = run.directory
    existing = store.list_steps(directory)
    origin = (read_config(directory) or {}).get("fork_of")
    if fork is not None:
        if existing:
            _check_same_fork(fork, origin, directory)
            return _newest(directory)
        checkpoint = _named(fork, "--fork")
        if (step := store.read_manifest(Path(checkpoint))["step"]) >= run.megacid.run.total_steps:
            raise UserError(
                f"--fork {checkpoint} is at step {step} and run.total_steps is {run.megacid.run.total_steps}, expected "
                "more steps: raise run.total_steps"
            )
        return checkpoint
    if resume not in ("auto", "never"):
        checkpoint = _named(resume, "--resume")
        if Path(checkpoint).resolve().parent != directory.resolve():
            raise UserError(
                f"--resume {resume} belongs to another run than {directory}: start a new run from it with --fork "
                f"{resume} and another run.name"
            )
        return checkpoint
    if resume == "never" and existing:
        raise UserError(
            f"{directory} already has checkpoints up to step {existing[-1][0]} and --resume is never: choose another "
            "run.name, or --resume auto"
        )
    if not existing and origin is not None:
        raise UserError(
            f"{directory} is a fork of {origin} without a checkpoint of its own yet: repeat --fork {origin}, or choose "
            "another run.name"
        )
    return _newest(directory)


def _named(path: str, option: str) -> str:
    """The valid checkpoint directory that a command-line option names."""
    path = expand_path(path, option)
    try:
        store.verify(Path(path), to_resume=True)
    except ValueError as error:
        raise UserError(f"{option} {path}: {error}; name a valid step-... directory") from None
    return path


def _check_same_fork(fork: str, origin: str | None, directory: Path) -> None:
    """Raise UserError unless the run in `directory`, which has checkpoints, began with this --fork."""
    if origin is None or Path(expand_path(fork, "--fork")).resolve() != Path(origin):
        raise UserError(
            f"{directory} already has checkpoints and {'is no fork' if origin is None else f'is a fork of {origin}'}, "
            f"expected a new run for --fork {fork}: choose another run.name, or leave out --fork to continue"
        )


def _newest(directory: Path) -> str | None:
    """The newest valid checkpoint of a run directory; None when it has none at all."""
    newest, problems = store.newest_valid(directory, to_resume=True)
    for problem in problems:
        log.warning("skipped an invalid checkpoint: %s", problem)
    if newest is None and (existing := store.list_steps(directory)):
        raise UserError(
            f"none of the {len(existing)} checkpoints in {directory} is valid ({problems[0]}): restore one, or choose "
            "another run.name"
        )
    return str(newest) if newest else None


def abandon_later_checkpoints(directory: Path, start: int) -> None:
    """Move checkpoints and evaluation results after step `start` aside, since the next start would use them.

    Rank 0 alone. Call it when nothing can refuse the start any more: a refused --resume PATH leaves the run as it is.
    """
    for step, path in reversed(store.list_steps(directory) + store.list_steps(directory / "eval")):
        if step > start:
            aside = path.with_name(f".abandoned-{path.name}-{time.time_ns():x}")
            with disk_errors(aside):
                path.rename(aside)
            log.warning("going back to step %d: moved %s to %s, which may be removed", start, path, aside)


class ResumeLossCheck:
    """Compares the first loss after a resume with the loss that the run had at that step before.

    The loss of the first step after each checkpoint is stored in next_loss.json. The comparison detects what no
    checksum can: state that was never saved, or saved under a wrong name. Used on rank 0 only.
    """

    def __init__(self, directory: Path, resumed_at: int | None, *, tolerance: float) -> None:
        """resumed_at: step of the checkpoint that this start resumed from. tolerance: relative, of the loss."""
        self._file, self._tolerance, self._saved_at = directory / "next_loss.json", tolerance, resumed_at
        self._expected: float | None = None
        if resumed_at is not None:
            try:
                before = json.loads(read_bounded(self._file, SETTINGS_BYTES))
                self._expected = float(before["loss"]) if before["step"] == resumed_at else None
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                pass  # the run ended before that step: there is nothing to compare with

    def saved(self, step: int) -> None:
        """Note that a checkpoint was saved after `step` steps."""
        self._saved_at = step

    def first_loss(self, step: int, loss: float) -> None:
        """Called at every step: stores or compares the loss of the first step after a checkpoint or a resume."""
        if step != self._saved_at:
            return
        if self._expected is None:
            with contextlib.suppress(OSError):  # a full disk is reported by the next checkpoint
                write_json_atomic(self._file, {"step": step, "loss": loss})
            return
        expected, self._expected = self._expected, None
        if abs(loss - expected) <= self._tolerance * abs(expected) or (loss != loss and expected != expected):
            log.info("the first loss after resuming is %.8g, before it was %.8g", loss, expected)
        else:
            log.warning(
                "the first loss after resuming is %.8g, expected %.8g as before the interruption: data or code have "
                "changed, or the checkpoint is incomplete; find out which before you continue",
                loss,
                expected,
            )
