"""Opens a run directory and its mirror, selects the checkpoint to resume from, and verifies that the loss continues."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
from pathlib import Path
from typing import Any

from megacid.checkpoint import store
from megacid.checkpoint.copier import Copier
from megacid.checkpoint.mirror import Mirror
from megacid.checkpoint.saver import Saver
from megacid.checkpoint.verification import find_problem
from megacid.config.load import expand_path
from megacid.config.schema import RunFile
from megacid.distributed.consensus import broadcast_json, fail_together, gather_json
from megacid.distributed.divided_work import Workers
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.storage.atomic import SETTINGS_BYTES, disk_errors, read_bounded, write_json_atomic
from megacid.training.lifecycle import Lifecycle, RunLock
from megacid.training.metrics import setup_logging
from megacid.training.run_settings import changed_settings, parse_config, read_config, recorded_settings

log = logging.getLogger("megacid")


def open_run(
    run: RunFile, resume: str, fork: str | None, parallel: Parallel
) -> tuple[RunLock | None, Mirror | None, str | None]:
    """Lock the run directory, start logging to it, and find the checkpoint to start from. A collective.

    A checkpoint that only the mirror has is fetched into the run directory.

    Returns:
        (the lock, on rank 0; the mirror, if there is one; the checkpoint directory or None, on every rank).
    """
    mirror = None
    with fail_together(parallel.group):
        lock = RunLock(run.directory) if parallel.is_first else None
        setup_logging(parallel.rank, run.directory)
        if run.megacid.run.checkpoint_mirror is not None:
            mirror = Mirror(run.megacid.run.checkpoint_mirror, keep_last=run.megacid.run.keep_last)
    if mirror is not None:
        _check_shared(run.directory, parallel)
    start_from = find_checkpoint(run, resume, fork, parallel, mirror)
    with fail_together(parallel.group):
        if parallel.is_first:
            store.remove_stages(run.directory)
    return lock, mirror, start_from


def _check_shared(directory: Path, parallel: Parallel) -> None:
    """Raise UserError on every rank unless all of them see the run directory of rank 0, as checkpoints need it."""
    mark = directory / str(broadcast_json(f".tmp-{secrets.token_hex(8)}", parallel.group))
    with fail_together(parallel.group), disk_errors(mark):
        if parallel.is_first:
            mark.touch()  # removed with the stages
    seen = gather_json(mark.exists(), parallel.group)
    with fail_together(parallel.group):
        if not all(seen):
            raise UserError(
                f"{directory} is another directory on rank {seen.index(False)} than on rank 0, expected one that all "
                "ranks share: put run.dir on a shared file system"
            )


def make_saver(run: RunFile, mirror: Mirror | None, lifecycle: Lifecycle, parallel: Parallel) -> Saver:
    """The saver of a run's checkpoints."""
    config, copier = run.megacid.run, None
    if mirror is not None:
        # A save waits for the last copy between two beats of the watchdog.
        wait_s = min(config.timeout_s, config.save_timeout_s) / 2
        copier = Copier(mirror, parallel.group, wait_s=wait_s, time_left=lifecycle.time_left)
    return Saver(
        run.directory,
        keep_last=config.keep_last,
        group=parallel.group,
        background=config.save_in_background,
        copier=copier,
    )


def find_checkpoint(
    run: RunFile, resume: str, fork: str | None, parallel: Parallel, mirror: Mirror | None = None
) -> str | None:
    """The checkpoint directory to start from, verified; None to start at step 0. A collective.

    It writes nothing without a mirror; with one it fetches the checkpoint if the run directory lacks it.

    Args:
        resume: "auto" (the newest valid checkpoint), "never", or the path of a checkpoint directory of this run.
        fork: the path of a checkpoint directory of another run, where this run starts while it has no checkpoint.

    Raises:
        UserError: the run directory holds checkpoints that must not be overwritten, or none that is valid.
    """
    option: str | None = None
    candidates: list[tuple[str, int | None]] = []
    with fail_together(parallel.group):
        if parallel.is_first:
            option, candidates = _candidates(run, resume, fork, mirror)
    option, candidates = broadcast_json([option, candidates], parallel.group)
    chosen, problems = None, []
    for path, step in candidates:
        if step is None or mirror is None:
            problem = find_problem(Path(path), Workers(parallel), to_resume=True)
        else:
            problem = mirror.fetch(step, run.directory, Workers(parallel))
        if problem is None:
            chosen = path
            break
        problems.append(problem)
        if parallel.is_first and option is None:
            log.warning("skipped an invalid checkpoint: %s", problem)
    with fail_together(parallel.group):
        if option is not None:
            _check_named(run, option, candidates[0][0], problems)
        elif chosen is None and candidates:
            raise UserError(
                f"none of the {len(candidates)} checkpoints in {run.directory}{f' and {mirror.url}' if mirror else ''} "
                f"is valid ({problems[0]}): restore one, or choose another run.name"
            )
    return chosen


def _candidates(
    run: RunFile, resume: str, fork: str | None, mirror: Mirror | None
) -> tuple[str | None, list[tuple[str, int | None]]]:
    """(the option that names a checkpoint, or None; the checkpoints to start from, in the order of preference).

    A checkpoint is (its directory; its step, if it is to be fetched from the mirror).
    """
    directory = run.directory
    config = read_config(directory)
    existing: list[tuple[int, bool]] = [(step, True) for step, _ in store.list_steps(directory)]
    if mirror is not None:
        mirrored, steps = _open_mirror(run, config, mirror)
        config = config or mirrored
        existing = sorted([*existing, *((step, False) for step in steps)])
    newest_first = [
        (str(directory / store.step_name(step)), None if is_local else step) for step, is_local in reversed(existing)
    ]
    origin = (config or {}).get("fork_of")
    if fork is not None:
        if not existing:
            return "--fork", [(expand_path(fork, "--fork"), None)]
        _check_same_fork(fork, origin, directory)
    elif resume not in ("auto", "never"):
        return "--resume", [(expand_path(resume, "--resume"), None)]
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


def _open_mirror(run: RunFile, local: dict[str, Any] | None, mirror: Mirror) -> tuple[dict[str, Any] | None, list[int]]:
    """(the config.json of a mirror, None for a new one; its steps). UserError for the mirror of another run.

    local: the config.json of the run directory.
    """
    setting = f'"megacid.run.checkpoint_mirror" is {mirror.url}'
    if Path(mirror.url.removeprefix("file://")).resolve() == run.directory.resolve():
        raise UserError(f"{setting}, the run directory itself, expected another place: correct it")
    data, steps = mirror.read_config(), mirror.steps()
    if data is None:
        if steps:
            raise UserError(
                f"{setting}, which has checkpoints up to step {steps[-1]} and no config.json that says of which run: "
                "restore it, or choose another URL"
            )
        return None, []
    config = parse_config(data, f"{mirror.url}/config.json", "choose another checkpoint_mirror")
    recorded = recorded_settings(config)
    if run.megacid.student.embed_dim is None:  # filled in when the data have been opened
        run = run.with_embed_dim(recorded["megacid.student.embed_dim"])
    differences = []
    if (name := recorded.get("megacid.run.name")) != run.megacid.run.name:
        differences.append(f"megacid.run.name: {name!r} -> {run.megacid.run.name!r}")
    if steps:  # until then settings may change, as in the run directory
        differences += changed_settings(run, config)
        if local is not None and (origin := config.get("fork_of")) != local.get("fork_of"):
            differences.append(f"fork_of: {origin!r} -> {local.get('fork_of')!r}")
    if differences:
        raise UserError(
            f"{setting}, the mirror of another run ({'; '.join(differences)}): choose another URL, or the settings of "
            "that run"
        )
    return config, steps


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
