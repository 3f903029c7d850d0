"""Learning rates as a pure function of the step, and the student's parameter groups."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from megacid.config.schema import RunFile
from megacid.config.sections import ScheduleConfig


def learning_rate_share(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Fraction of the peak learning rate at `step` (from 0): linear warm-up to 1, then cosine decay or constant."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    return schedule.final_share + (1 - schedule.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def peak_rates(run: RunFile) -> tuple[float, float]:
    """Peak learning rates of the student and of the class rows."""
    student = float(run.deepspeed["optimizer"]["params"]["lr"])
    rows = run.megacid.classifier.lr
    return student, student if rows is None else rows


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: `weight_decay` for matrices, none for biases, norms and the logit scale (ndim < 2)."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
