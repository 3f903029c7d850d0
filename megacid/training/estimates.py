"""Logs what `--dry-run` estimates of a run: its peak memory, the classifier's plan, a step's collectives and time."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megacid.classifier import PartialFC
from megacid.config.schema import RunFile
from megacid.distributed.parallel import Parallel
from megacid.errors import one_line
from megacid.models.feature_tower import FeatureTower
from megacid.training.classifier_plan import plan_classifier
from megacid.training.communication import communication_estimate
from megacid.training.memory import memory_estimate, memory_warning, student_bytes
from megacid.training.step_time import COSTS, Step

if TYPE_CHECKING:
    from megacid.models.student import Student

log = logging.getLogger("megacid")


def report_estimates(
    run: RunFile,
    student: Student | FeatureTower,
    head: PartialFC | None,
    parallel: Parallel,
    teacher_width: int | None = None,
) -> None:
    """Log the estimates on rank 0, for a student that is not inside an engine yet.

    teacher_width: of all teachers together; None: the student's.
    """
    if not parallel.is_first:
        return
    num_classes = head.num_classes if head else 0
    for what, report in (
        ("peak memory", _report_peak_memory),
        ("classifier's plan", _report_classifier),
        ("time of a step", _report_step),
    ):
        try:
            report(run, student, num_classes, parallel.world, parallel.device.type, teacher_width)
        except Exception as error:  # such as a forward that reads a value, which fake tensors do not have
            # An error of this rank alone would leave the others in their next collective.
            log.warning("the %s cannot be estimated (%s)", what, one_line(error))


def _report_peak_memory(
    run: RunFile, student: Student | FeatureTower, num_classes: int, world: int, device: str, teacher_width: int | None
) -> None:
    memory = memory_estimate(run, student, num_classes, world, device, teacher_width)
    for name, parts in (("always", memory.always), ("in one phase", memory.phases)):
        log.info("estimated MiB of rank 0, %s: %s", name, _listed(parts))
    log.info(
        "estimated peak of rank 0 on %s, without the process: %.1f MiB, in the phase %s; host memory for a checkpoint: "
        "%.1f MiB, for an offloaded optimizer: %.1f MiB",
        device, memory.peak, memory.largest_phase, memory.checkpoint, memory.offloaded,
    )  # fmt: skip
    if warning := memory_warning(memory.peak, num_classes, device):
        log.warning("%s", warning)


def _report_classifier(
    run: RunFile, student: Student | FeatureTower, num_classes: int, world: int, device: str, teacher_width: int | None
) -> None:
    if num_classes:
        reserved = student_bytes(run, student, world, device)
        log.info("classifier: %s", plan_classifier(run, num_classes, student.embed_dim, world, device, reserved))


def _report_step(
    run: RunFile, student: Student | FeatureTower, num_classes: int, world: int, device: str, teacher_width: int | None
) -> None:
    step, costs = Step.of(run, student, num_classes, world, device, teacher_width), COSTS[device]
    if world > 1:
        parts = communication_estimate(step.collectives, world)
        log.info(
            "collectives of a step: %d; a rank sends %.1f MiB in a ring: %s",
            sum(one.number for one in step.collectives), sum(parts.values()), _listed(parts),
        )  # fmt: skip
    times = {name: 1e3 * seconds for name, seconds in step.time(costs).items()}
    log.info(
        "time of a step: %.1f ms, the prediction of a model with the costs of %s, not a measurement: %s",
        sum(times.values()), costs.source, _listed(times),
    )  # fmt: skip


def _listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
