"""One decision per step for all ranks and both optimizers: apply with this clipping factor, or skip."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megacid.distributed.collectives import Group, all_reduce_sum

log = logging.getLogger(__name__)


class TooManySkips(RuntimeError):  # noqa: N818  the run ends with its own exit code
    """max_consecutive_skips steps in a row were not finite."""


@dataclass(frozen=True)
class Verdict:
    """apply: both optimizers step, or neither. grad_norm: joint 2-norm of student and classifier. clip_scale: at most 1."""

    apply: bool
    grad_norm: float
    clip_scale: float


class Guard:
    def __init__(self, clip: float, max_consecutive_skips: int, group: Group = None) -> None:
        """clip: largest joint gradient norm, 0 for none."""
        self.clip, self.max_consecutive_skips, self.group = clip, max_consecutive_skips, group
        self.skipped, self.consecutive = 0, 0

    def decide(
        self, step: int, loss: Tensor, student_norm: Tensor, head_norm_sq: Tensor | None, what: Callable[[], str]
    ) -> Verdict:
        """loss, student_norm: 0-d, the same on every rank when finite. head_norm_sq: 0-d, of this rank's class rows.
        what: names samples and loss terms for the warning, called only then. Raises TooManySkips on every rank together."""
        bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(student_norm))
        mine = torch.stack(
            [(head_norm_sq if head_norm_sq is not None else student_norm.new_zeros(())).double(), bad.double()]
        )
        all_reduce_sum(mine, self.group)  # the one host synchronisation of a step
        head_sq, flagged = mine.tolist()
        if not math.isfinite(head_sq) or flagged > 0:
            self.skipped, self.consecutive = self.skipped + 1, self.consecutive + 1
            if (
                bool(bad)
                or not math.isfinite(float(student_norm))
                or (head_norm_sq is not None and not math.isfinite(float(head_norm_sq)))
            ):
                log.warning(
                    "step %d skipped on all ranks: loss %s, student gradient norm %s, classifier gradient norm^2 %s here; %s",
                    step, float(loss.detach()), float(student_norm), None if head_norm_sq is None else float(head_norm_sq), what(),
                )  # fmt: skip
            if self.consecutive >= self.max_consecutive_skips:
                raise TooManySkips(
                    f"{self.consecutive} steps in a row up to step {step} had a non-finite loss or gradient: "
                    "lower the learning rate or look at the samples named above; the last checkpoint is kept"
                )
            return Verdict(False, math.nan, 0.0)
        self.consecutive = 0
        norm = math.sqrt(float(student_norm) ** 2 + head_sq)
        scale = min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0
        return Verdict(True, norm, scale)
