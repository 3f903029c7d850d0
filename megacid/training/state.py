"""The state of a run on one rank: everything that a step reads and changes, its checkpoints, and resuming from one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from megacid.checkpoint import store
from megacid.checkpoint.mirror import Mirror
from megacid.checkpoint.state import RowState, restore
from megacid.classifier import PartialFC, RowAdamW, RowSGD
from megacid.config.schema import RunFile
from megacid.data.batch import Batch
from megacid.data.order import derive_key
from megacid.data.pipes.commands import StreamPosition
from megacid.distributed.collectives import barrier
from megacid.distributed.consensus import agree, fail_together, gather_json
from megacid.distributed.parallel import Parallel
from megacid.losses import Objective
from megacid.models.compiled import compile_towers, eager_towers
from megacid.models.feature_tower import FeatureTower
from megacid.models.output import StudentOutput
from megacid.storage.atomic import disk_errors
from megacid.training.components import Components, build_components
from megacid.training.estimates import report_estimates
from megacid.training.evaluation import Evaluation
from megacid.training.flops import step_flops
from megacid.training.guard import Guard
from megacid.training.memory import report_memory
from megacid.training.open_data import Data
from megacid.training.resume import abandon_later_checkpoints
from megacid.training.run_settings import write_config
from megacid.training.schedule import groups_of_run

if TYPE_CHECKING:
    from megacid.distributed.engine import Engine
    from megacid.models.student import Student

log = logging.getLogger("megacid")


@dataclass(frozen=True)
class TrainState:
    """What a run trains with, on this rank."""

    run: RunFile
    parallel: Parallel
    data: Data
    student: Student | FeatureTower
    engine: Engine
    objective: Objective
    head: PartialFC | None
    row_optimizer: RowAdamW | RowSGD | None
    guard: Guard
    evaluation: Evaluation
    flops: float | None = None  # of a step of all ranks, on rank 0

    @property
    def identity(self) -> dict[str, int]:
        """The sizes that a checkpoint must have in common with the run."""
        return {"num_classes": self.head.num_classes if self.head else 0, "embed_dim": self.student.embed_dim}

    @property
    def rows(self) -> dict[str, RowState]:
        """What a checkpoint stores by global row."""
        if self.head is None or self.row_optimizer is None:
            return {}
        return {"head": self.head, "optimizer": self.row_optimizer}

    @property
    def row_range(self) -> tuple[int, int]:
        """[start, stop) of this rank's classes."""
        return (self.head.class_start, self.head.class_stop) if self.head else (0, 0)

    def embed(self, step: int, micro: int, batch: Batch) -> StudentOutput:
        """Forward of a micro-batch. Random operations of the student, such as dropout, depend only on the run's seed,
        step, micro-batch and rank, so a second forward and a resumed run repeat them."""
        image = batch.image if self.data.normalize is None else self.data.normalize(batch.image)
        out: StudentOutput = self.engine(
            image, batch.text, seed=derive_key(self.run.megacid.run.seed, step, micro, self.parallel.rank)
        )
        return out

    def manifest(self, step: int) -> dict[str, Any]:
        """Fields of the manifest of a checkpoint after `step` steps. A collective."""
        return {
            **self.identity,
            "updates": step - self.guard.skipped,
            "samples_seen": step * self.run.global_batch,
            "world": self.parallel.world,
            "guard": self.guard.state(),
            **({} if self.data.position is None else {"stream": self._stream_state(self.data.position)}),
        }

    def _stream_state(self, position: StreamPosition) -> dict[str, Any]:
        return position.state(gather_json(position.next_turns, self.parallel.group))

    def check_replicas(self, step: int) -> None:
        """Raise RanksDisagree when ranks are at different steps or a bit of the student differs. A collective."""
        agree(str(step), "the step", self.parallel.group)
        digest = self.engine.replica_digest()
        if digest is not None:
            what = f"the student's weights after step {step + 1} (the replicas have diverged)"
            agree(digest, what, self.parallel.group)


@dataclass(frozen=True)
class StepOutput:
    """Result of one step on this rank.

    loss, terms: 0-d, of the whole batch. finite: bool, one for each of sample_ids: whether its embedding is finite.
    observed: see `observe`. failure: why the data of this rank end the run.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    sample_ids: list[int]
    finite: torch.Tensor
    observed: torch.Tensor
    failure: str | None

    @classmethod
    def of(
        cls,
        loss: torch.Tensor,
        terms: dict[str, torch.Tensor],
        read: list[tuple[torch.Tensor, str | None]],
        finite: torch.Tensor,
        observed: torch.Tensor,
    ) -> StepOutput:
        """The result with all sample ids and the first failure. read: both of each micro-batch."""
        ids, failures = zip(*read)
        failure = next(filter(None, failures), None)
        return cls(loss, terms, torch.cat(ids).tolist(), finite, observed, failure)

    def describe(self, name_of: Callable[[int], str]) -> tuple[bool, str]:
        """For the guard's warnings: whether an embedding of this rank is non-finite; terms and samples as text.

        name_of: `Data.name_of`.
        """
        bad = [number for number, good in zip(self.sample_ids, self.finite.tolist()) if not good]
        named = bad or self.sample_ids
        shown = ", ".join(map(name_of, named[:8])) + (", ..." if len(named) > 8 else "")
        kind = "samples with a non-finite embedding" if bad else "samples"
        terms = ", ".join(f"{name} {float(value):.6g}" for name, value in self.terms.items())
        return bool(bad), f"terms {terms}; {kind} {shown}"


def build_train_state(
    run: RunFile, parallel: Parallel, start_from: str | None = None, *, estimate: bool = False
) -> TrainState:
    """Build everything that the run trains with. A collective; every rank raises the same error.

    Args:
        start_from: the checkpoint that `resume` will load, which makes a fit of initial values unnecessary.
        estimate: log the estimates of `--dry-run`, which take seconds for a large student.
    """
    components = build_components(run, parallel)
    run, student = components.run, components.student
    student.to(parallel.device)
    flops = step_flops(run, student, components.head) if parallel.is_first else None
    report_memory(run, student, components.head, parallel)
    if estimate:
        report_estimates(run, student, components.head, parallel, components.data.teacher_dim)
    if (
        start_from is None
        and not isinstance(student, FeatureTower)
        and run.megacid.student.projection_init == "teacher"
    ):
        from megacid.training.projection_fit import fit_projections

        fit_projections(student, components.data, run, parallel)
    if run.megacid.student.compile:
        compile_towers(cast("Student", student))
    return with_engine(components, parallel, flops)


def with_engine(components: Components, parallel: Parallel, flops: float | None = None) -> TrainState:
    """Put the student of `components` into an engine, which completes what a run trains with. A collective."""
    # After the checks of settings and data, because importing deepspeed takes seconds.
    from megacid.distributed.engine import Engine

    run, student = components.run, components.student
    return TrainState(
        **vars(components),
        parallel=parallel,
        engine=Engine(student, groups_of_run(run, student), run, parallel),
        guard=Guard(run.gradient_clipping, run.megacid.guard, parallel.group),
        flops=flops,
    )


def resume(state: TrainState, start_from: str | None, mirror: Mirror | None = None, *, going_back: bool) -> int:
    """Load the checkpoint directory `start_from`, then change the run directory and the mirror for this start. Returns
    the first step.

    The settings of a new run or fork are recorded. A collective.

    Args:
        going_back: whether to move later checkpoints aside, as --resume PATH does.
    """
    start, directory = 0, state.run.directory
    if start_from is not None:
        # Eager, because compiling a batch of 1 takes as long as that of the training.
        with eager_towers(state.run.megacid.student.compile):
            state.engine.materialise_state(state.student.image_shape, state.student.text_length, state.run.accumulation)
        start = restore(Path(start_from), state.engine, state.rows, state.identity, state.parallel.group)
        manifest = store.read_manifest(Path(start_from))
        state.guard.load_state(manifest["guard"])
        if state.data.position is not None:
            log.info("data: %s", state.data.position.load_state(manifest.get("stream")))
        log.info("resumed from %s", start_from)
    barrier(state.parallel.group)  # until here any rank may still refuse the checkpoint
    with fail_together(state.parallel.group):
        if state.parallel.is_first:
            if going_back:
                if mirror is not None:
                    mirror.remove_after(start)
                abandon_later_checkpoints(directory, start)
            if not store.list_steps(directory):
                with disk_errors(directory / "config.json"):
                    fork_of = None if start_from is None else Path(start_from)
                    write_config(state.run, directory, state.parallel.world, fork_of)
                    (directory / "next_loss.json").unlink(missing_ok=True)  # of an earlier start with other settings
            if mirror is not None:
                mirror.put_config(directory)
    return start
