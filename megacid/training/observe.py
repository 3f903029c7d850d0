"""What a step shows of the student beyond its losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megacid.losses.objective import StudentOutput, TargetBatch


class Observed(NamedTuple):
    """Means over a batch. A cosine is 0 for a batch without the teacher's embeddings, or if they have another width."""

    cosine_image: float
    cosine_text: float
    logit_scale: float
    logit_bias: float


@torch.no_grad()
def observe(out: StudentOutput, targets: TargetBatch) -> Tensor:
    """The values of `Observed` for this rank's batch, float32 [4]."""
    pairs = ((out.image, targets.teacher_image), (out.text, targets.teacher_text))
    cosines = [
        out.logit_scale.new_zeros(())
        if teacher is None or teacher.shape != student.shape
        else (student * teacher).sum(-1).float().mean()
        for student, teacher in pairs
    ]
    return torch.stack([*cosines, out.logit_scale.detach(), out.logit_bias.detach()]).float()
