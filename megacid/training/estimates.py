"""Logs what `--dry-run` estimates of a run: its peak memory and the collectives of a step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megacid.classifier import PartialFC
from megacid.config.schema import RunFile
from megacid.distributed.parallel import Parallel
from megacid.errors import one_line
from megacid.models.feature_tower import FeatureTower
from megacid.training.communication import communication_estimate, step_collectives
from megacid.training.memory import memory_estimate

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
    for what, report in (("peak memory", _report_peak_memory), ("communication", _report_communication)):
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
        "%.1f MiB", device, memory.peak, memory.largest_phase, memory.checkpoint,
    )  # fmt: skip


def _report_communication(
    run: RunFile, student: Student | FeatureTower, num_classes: int, world: int, device: str, teacher_width: int | None
) -> None:
    if world == 1:
        return
    collectives = step_collectives(run, student, num_classes, world, device, teacher_width)
    parts = communication_estimate(collectives, world)
    log.info(
        "collectives of a step: %d; a rank sends %.1f MiB in a ring: %s",
        sum(one.number for one in collectives), sum(parts.values()), _listed(parts),
    )  # fmt: skip


def _listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
