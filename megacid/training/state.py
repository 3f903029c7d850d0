"""What a run trains with, put together from its run file, and filled from a checkpoint.

The single parts are made by `assemble.py`; `train.py` steps them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacid.checkpoint import state, store
from megacid.classifier import PartialFC, RowAdamW, RowSGD
from megacid.config.schema import RunFile
from megacid.distributed.collectives import barrier
from megacid.distributed.parallel import Parallel
from megacid.failpoints import failpoint
from megacid.losses import Objective
from megacid.models.feature_tower import FeatureTower
from megacid.models.student import Student
from megacid.training.components import Data, make_classifier, make_objective, make_student, open_data, together
from megacid.training.guard import Guard
from megacid.training.memory import memory_estimate
from megacid.training.run_settings import check_same_settings, write_config
from megacid.training.schedule import parameter_groups

log = logging.getLogger("megacid")


@dataclass(frozen=True)
class Parts:
    """What a run trains with, on this rank."""

    run: RunFile
    parallel: Parallel
    data: Data
    student: Student | FeatureTower
    engine: Any
    objective: Objective
    head: PartialFC | None
    row_optimizer: RowAdamW | RowSGD | None
    guard: Guard

    @property
    def identity(self) -> dict[str, int]:
        """What a checkpoint must have in common with the run."""
        return {"num_classes": self.head.num_classes if self.head else 0, "embed_dim": self.student.embed_dim}

    @property
    def rows(self) -> dict[str, state.RowState]:
        """What is saved by global row."""
        if self.head is None or self.row_optimizer is None:
            return {}
        return {"head": self.head, "optimizer": self.row_optimizer}

    @property
    def row_range(self) -> tuple[int, int]:
        return (self.head.class_start, self.head.class_stop) if self.head else (0, 0)

    def facts(self, step: int) -> dict[str, Any]:
        """Of the manifest of a checkpoint after `step` steps."""
        return {
            **self.identity,
            "updates": step - self.guard.skipped,
            "samples_seen": step * self.run.global_batch,
            "world": self.parallel.world,
            "guard": self.guard.state(),
        }


def build(run: RunFile, parallel: Parallel) -> Parts:
    # deepspeed takes seconds to import: not before the settings are known to be good.
    from megacid.distributed.engine import Engine

    data = open_data(run, parallel)
    student = together(lambda: make_student(run, data), parallel)
    run = run.with_embed_dim(student.embed_dim)
    # The question is part of the block: ranks that see other files must not part over a collective.
    together(lambda: check_same_settings(run, run.directory) if store.list_steps(run.directory) else None, parallel)
    failpoint("start:building", step=0)
    head, row_optimizer = together(lambda: make_classifier(run, data, student.embed_dim, parallel), parallel)
    objective = make_objective(run, head, parallel)
    student.to(parallel.device)
    report_memory(run, student, head, parallel)
    groups = parameter_groups(student, float(run.deepspeed["optimizer"]["params"].get("weight_decay", 0.0)))
    engine = Engine(student, groups, run, parallel)
    guard = Guard(run.gradient_clipping, run.megacid.guard, parallel.group)
    return Parts(run, parallel, data, student, engine, objective, head, row_optimizer, guard)


def resume(parts: Parts, start_from: str | None) -> int:
    """Load the checkpoint, or record the settings of a new run; the step to go on from."""
    start = 0
    if start_from is not None:
        parts.engine.materialise_state(parts.student.image_shape, parts.student.text_length, parts.run.accumulation)
        start = state.restore(Path(start_from), parts.engine, parts.rows, parts.identity)
        parts.guard.load_state(store.read_manifest(Path(start_from))["guard"])
        log.info("resumed from %s", start_from)
    elif parts.parallel.is_first:
        write_config(parts.run, parts.run.directory, parts.parallel.world)
    barrier(parts.parallel.group)
    return start


def report_memory(run: RunFile, student: Student | FeatureTower, head: PartialFC | None, parallel: Parallel) -> None:
    parameters = sum(p.numel() for p in student.parameters())
    parts = memory_estimate(
        run, parameters, head.num_classes if head else 0, student.embed_dim, parallel.world, parallel.device.type
    )
    log.info("student %s: %.2f M parameters, width %d; classes %d; ranks %d; ZeRO stage %d; batch %d = %d x %d x %d ranks",
             run.megacid.student.model, parameters / 1e6, student.embed_dim, head.num_classes if head else 0, parallel.world, run.zero_stage,
             run.global_batch, run.micro_batch, run.accumulation, parallel.world)  # fmt: skip
    log.info(
        "memory of rank 0 without activations: %.1f MiB (%s)",
        sum(parts.values()),
        ", ".join(f"{name} {size:.1f}" for name, size in parts.items()),
    )
