"""`train.py --dry-run`: everything that a training start does, up to the loss of the first micro-batch."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
from typing import TYPE_CHECKING

import torch

from megacid.config.schema import RunFile
from megacid.data.batch import Batch, DataBudgetError
from megacid.distributed.consensus import as_user_error, fail_together, gather_json
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.models.feature_tower import FeatureTower
from megacid.models.output import StudentOutput
from megacid.training.metrics import setup_logging
from megacid.training.resume import find_checkpoint
from megacid.training.state import TrainState, build_train_state

if TYPE_CHECKING:
    from megacid.models.student import Student

log = logging.getLogger("megacid")


def dry_run(run: RunFile, args: argparse.Namespace, parallel: Parallel) -> int:
    """Build what the run trains with and compute its first loss, without backward and update. A collective.

    The checkpoint that the run would start from is verified, but not loaded.

    Nothing is written to the run directory; with NVMe offload DeepSpeed makes its swap directory. Every rank raises the
    same error.
    """
    setup_logging(parallel.rank, None)
    with fail_together(parallel.group):
        _check_directory(run)
    start_from = find_checkpoint(run, args.resume, args.fork, parallel)
    with as_user_error("DeepSpeed or the model cannot be set up", (DataBudgetError,)):
        state = build_train_state(run, parallel, start_from, estimate=True)
    batch = _first_batch(state)
    out = _forward(state, batch)
    with as_user_error("the loss of the first micro-batch fails"):
        if state.head is not None:
            state.head.set_step(0)
        loss, terms = state.objective(out, batch)
    first, shown = loss.item(), ", ".join(f"{name} {value.item():.6g}" for name, value in terms.items())
    with fail_together(parallel.group):
        if not math.isfinite(first):
            raise UserError(
                f"the loss of the first micro-batch is {first} ({shown}), expected a finite number: check "
                "student.pretrained, data.teacher and classifier.init for values that are not finite"
            )
    if parallel.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(parallel.device) / 2**30
        log.info("peak memory of rank %d up to the first loss: %.2f GiB, without backward", parallel.rank, peak)
    log.info("loss of the first micro-batch: %.6g (%s)", first, shown)
    if start_from is not None:
        log.info("the run would start from %s", start_from)
    if args.profile_steps:
        log.info("--profile-steps is ignored: a dry run does no step")
    log.info("dry run: %s is valid for %d steps on %d ranks", run.path, run.megacid.run.total_steps, parallel.world)
    return 0


def _check_directory(run: RunFile) -> None:
    path = run.directory.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not writable" if existing.is_dir() else "is not a directory"
        raise UserError(
            f"cannot write to the run directory {run.directory} ({existing} {reason}): correct run.dir or its "
            "permissions"
        )


def _first_batch(state: TrainState) -> Batch:
    group = state.parallel.group
    with fail_together(group):
        batch = next(iter(state.data.stream(0)))
        if not isinstance(state.student, FeatureTower):
            _check_tokens(batch, state.student)
    for failure in filter(None, gather_json(batch.failure, group)):
        raise DataBudgetError(failure)
    return batch.to(state.engine.device)


def _check_tokens(batch: Batch, student: Student) -> None:
    """A token beyond the vocabulary is an assertion of the device, which names nothing."""
    largest, vocabulary = int(batch.text.max()), int(student.clip.vocab_size)  # type: ignore[arg-type]
    if largest >= vocabulary:
        raise UserError(
            f"a caption has the token {largest}, but the text tower of {student.model!r} has a vocabulary of "
            f"{vocabulary}: use its own tokenizer"
        )


def _forward(state: TrainState, batch: Batch) -> StudentOutput:
    # ZeRO 3 gathers parameters in the forward: a block of `fail_together` must contain no collective.
    together = fail_together(state.parallel.group) if state.run.zero_stage < 3 else contextlib.nullcontext()
    with together, as_user_error("the student's forward fails"):
        out = state.embed(0, 0, batch)
        for kind, embedding in (("images", out.image), ("texts", out.text)):
            missing = kind == "texts" and isinstance(state.student, FeatureTower)
            if not missing and embedding.shape[-1] != state.student.embed_dim:
                raise UserError(
                    f"the student gives {kind} of width {embedding.shape[-1]}, expected embed_dim "
                    f"{state.student.embed_dim}: use another architecture"
                )
    return out
