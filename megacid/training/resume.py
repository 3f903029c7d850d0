"""Opens a run directory, selects the checkpoint to resume from, and verifies that the loss continues."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path

from megacid.checkpoint import store
from megacid.checkpoint.verification import find_problem
from megacid.config.load import expand_path
from megacid.config.schema import RunFile
from megacid.distributed.consensus import broadcast_json, fail_together
from megacid.distributed.divided_work import Workers
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
    start_from = find_checkpoint(run, resume, fork, parallel)
    with fail_together(parallel.group):
        if parallel.is_first:
            store.remove_stages(run.directory)
    return lock, start_from


def find_checkpoint(run: RunFile, resume: str, fork: str | None, parallel: Parallel) -> str | None:
    """The checkpoint directory to start from, verified; None to start at step 0. A collective that writes nothing.

    Args:
        resume: "auto" (the newest valid checkpoint), "never", or the path of a checkpoint directory of this run.
        fork: the path of a checkpoint directory of another run, where this run starts while it has no checkpoint.

    Raises:
        UserError: the run directory holds checkpoints that must not be overwritten, or none that is valid.
    """
    option: str | None = None
    candidates: list[str] = []
    with fail_together(parallel.group):
        if parallel.is_first:
            option, candidates = _candidates(run, resume, fork)
    option, candidates = broadcast_json([option, candidates], parallel.group)
    chosen, problems = None, []
    for path in candidates:
        problem = find_problem(Path(path), Workers(parallel), to_resume=True)
        if problem is None:
            chosen = path
            break
        problems.append(problem)
        if parallel.is_first and option is None:
            log.warning("skipped an invalid checkpoint: %s", problem)
    with fail_together(parallel.group):
        if option is not None:
            _check_named(run, option, candidates[0], problems)
        elif chosen is None and candidates:
            raise UserError(
                f"none of the {len(candidates)} checkpoints in {run.directory} is valid ({problems[0]}): restore one, "
                "or choose another run.name"
            )
    return chosen


def _candidates(run: RunFile, resume: str, fork: str | None) -> tuple[str | None, list[str]]:
    """(the option that names a checkpoint, or None; the checkpoints to start from, in the order of preference)."""
    directory = run.directory
    existing = store.list_steps(directory)
    newest_first = [str(path) for _, path in reversed(existing)]
    origin = (read_config(directory) or {}).get("fork_of")
    if fork is not None:
        if not existing:
            return "--fork", [expand_path(fork, "--fork")]
        _check_same_fork(fork, origin, directory)
    elif resume not in ("auto", "never"):
        return "--resume", [expand_path(resume, "--resume")]
    elif resume == "never" and existing:
        raise UserError(
            f"{directory} already has checkpoints up to step {existing[-1][0]} and --resume is never: choose another "
            "run.name, or --resume auto"
        )
    elif not existing and origin is not None:
        raise UserError(
            f"{directory} is a fork of {origin} without a checkpoint of its own yet: repeat --fork {origin}, or choose "
            "another run.name"
        )
    return None, newest_first


def _check_named(run: RunFile, option: str, path: str, problems: list[str]) -> None:
    """Raise UserError unless the checkpoint that an option names is valid and of the right run."""
    if problems:
        raise UserError(f"{option} {path}: {problems[0]}; name a valid step-... directory")
    if option == "--resume" and Path(path).resolve().parent != run.directory.resolve():
        raise UserError(
            f"--resume {path} belongs to another run than {run.directory}: start a new run from it with --fork {path} "
            "and another run.name"
        )
    total = run.megacid.run.total_steps
    if option == "--fork" and (step := store.read_manifest(Path(path))["step"]) >= total:
        raise UserError(
            f"--fork {path} is at step {step} and run.total_steps is {total}, expected more steps: raise "
            "run.total_steps"
        )


def _check_same_fork(fork: str, origin: str | None, directory: Path) -> None:
    """Raise UserError unless the run in `directory`, which has checkpoints, began with this --fork."""
    if origin is None or Path(expand_path(fork, "--fork")).resolve() != Path(origin):
        raise UserError(
            f"{directory} already has checkpoints and {'is no fork' if origin is None else f'is a fork of {origin}'}, "
            f"expected a new run for --fork {fork}: choose another run.name, or leave out --fork to continue"
        )


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
