"""The trainer's command line: options, start-up of the ranks, error reporting and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable

from megacid.checkpoint.saver import SaveFailed
from megacid.config.load import load_run
from megacid.config.schema import RunFile
from megacid.data.batch import DataBudgetError
from megacid.distributed import parallel as parallel_module
from megacid.distributed.consensus import RanksDisagree, agree_on_mapping, fail_together, from_a_collective
from megacid.distributed.parallel import Parallel
from megacid.distributed.parent_process import set_parent_death_signal
from megacid.errors import (
    EXIT_AGAIN,
    EXIT_DATA,
    EXIT_DISAGREE,
    EXIT_INTERRUPTED,
    EXIT_NOT_FINITE,
    EXIT_NOT_SAVED,
    EXIT_USER,
    UserError,
    printable,
)
from megacid.training.dry_run import dry_run
from megacid.training.guard import TooManySkips
from megacid.training.profile import steps_to_profile
from megacid.training.run_settings import check_packages, settings_of_this_rank
from megacid.training.trackers import check_trackers, close_after_error

EXIT_CODES: dict[type[Exception], int] = {
    TooManySkips: EXIT_NOT_FINITE,
    DataBudgetError: EXIT_DATA,
    RanksDisagree: EXIT_DISAGREE,
    SaveFailed: EXIT_NOT_SAVED,
}
ERRORS_OF_ALL_RANKS = tuple(EXIT_CODES)
"""Errors that every rank raises at the same point, with the same message."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a CLIP student by contrastive, distillation and cluster discrimination losses. "
        "Run the same command again to continue from the newest checkpoint.",
    )
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", required=True, metavar="RUN.json",
        help='the run file (JSON or Hjson): DeepSpeed\'s keys and a "megacid" block',
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="override one value of the run file, for example classifier.sample_rate=0.2; may be repeated",
    )  # fmt: skip
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH",
        help="where to start: the newest valid checkpoint of the run (auto, the default), step 0 (never; refused when "
        "the run has checkpoints), or the checkpoint directory PATH of this run, moving later ones aside",
    )  # fmt: skip
    start.add_argument(
        "--fork", metavar="PATH",
        help="start a new run from the checkpoint directory PATH of another run, with other settings if you like; the "
        "same command again continues the new run",
    )  # fmt: skip
    parser.add_argument(
        "--stop-after", type=int, default=0, metavar="STEP",
        help="save a checkpoint after this step and exit with code 143, as SIGTERM does",
    )  # fmt: skip
    parser.add_argument(
        "--profile-steps", metavar="A:B",
        help="profile the steps A to B, as the log numbers them: a trace for each rank in the run directory's profile/",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true",
        help="start as training does, compute the first loss, print the memory that the run needs, and exit; the run "
        "directory is not written to",
    )  # fmt: skip
    parser.add_argument(
        "--print-config", action="store_true", help="print the run file with every default filled in, as JSON, and exit"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers add it
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_main(argv: list[str] | None, train: Callable[[RunFile, argparse.Namespace, Parallel], int]) -> int:
    """Run the trainer's command line on this rank and return its exit code.

    Args:
        argv: the options, without the program name; None: the process's own.
        train: the training loop; returns an exit code.
    """
    args = parse_args(argv)
    if parallel_module.launched():  # without a launcher the parent is a shell, and nohup must outlive it
        set_parent_death_signal(signal.SIGTERM)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        run = load_run(args.deepspeed_config, args.set, world=world)
        args.profile_steps = steps_to_profile(args.profile_steps, run.megacid.run.total_steps)
    except UserError as error:
        return _fail(error, EXIT_USER, rank, everywhere=True)
    if args.print_config:
        if rank == 0:
            print(json.dumps(run.resolved(), indent=2))
        return 0
    try:
        limits = run.megacid.run
        # The watchdog reports a stall first; the collectives' own timeout covers a watchdog that cannot.
        timeout_s = max(limits.timeout_s, limits.save_timeout_s) + 60
        parallel = parallel_module.init(timeout_s, start_timeout_s=limits.start_timeout_s, always=True)
        agree_on_mapping(settings_of_this_rank(run, world), "the run", parallel.group)
        with fail_together(parallel.group):
            check_packages()
            if parallel.is_first:
                check_trackers(run.megacid.run.trackers)
        return dry_run(run, args, parallel) if args.dry_run else train(run, args, parallel)
    except UserError as error:
        return _fail(error, EXIT_USER, rank, everywhere=error.on_every_rank)
    except KeyboardInterrupt:  # while the run was built; Lifecycle handles it from the first step on
        message = "interrupted before the first step: run the same command again"
        return _fail(message, EXIT_INTERRUPTED, rank, everywhere=True)
    except ERRORS_OF_ALL_RANKS as error:
        return _fail(error, EXIT_CODES[type(error)], rank, everywhere=True)
    except Exception as error:
        if not from_a_collective(error):
            raise
        reason = str(error).strip().splitlines()[0]
        lost = RuntimeError(
            f"rank {rank} lost contact with the other ranks ({reason}): one of them has ended or is late, see its own "
            "message; run the same command again to continue"
        )
        return _fail(lost, EXIT_AGAIN, rank, everywhere=False)
    finally:
        close_after_error()
        parallel_module.shutdown()


def _fail(error: Exception | str, code: int, rank: int, *, everywhere: bool) -> int:
    """Print the error as one line on stderr, on rank 0 alone when all ranks have the same one. Returns `code`."""
    if rank == 0 or not everywhere:
        with contextlib.suppress(OSError):  # stderr may be a file on the full disk
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
    return code
