"""Collects what the trainer logs about a step and about all classes."""

from __future__ import annotations

import logging

from megacid.classifier.health import health, health_warnings, hit_histogram
from megacid.training.guard import Verdict
from megacid.training.metrics import Metrics
from megacid.training.schedule import learning_rate_share, peak_rates
from megacid.training.state import StepOutput, TrainState

log = logging.getLogger("megacid")


def report_step(step: int, state: TrainState, output: StepOutput, verdict: Verdict, metrics: Metrics) -> None:
    """Log loss, terms, learning rate, gradient norm and the classifier's diagnostics of a step that is due.

    A collective.
    """
    if not metrics.due(step):
        return
    share = learning_rate_share(step, state.run.megacid.run.total_steps, state.run.megacid.schedule)
    diagnostics = state.head.metrics() if state.head is not None else {}
    scalars = {
        "train/lr": share * peak_rates(state.run)[0],
        "train/grad_norm": verdict.grad_norm,
        "train/skipped": float(state.guard.skipped),
        **{f"classifier/{name}": float(value) for name, value in diagnostics.items()},
    }
    metrics.log(step, output.loss, output.terms, scalars)


def report_classes(step: int, state: TrainState, metrics: Metrics) -> None:
    """Log diagnostics over all class rows, and warn where they look wrong. A collective."""
    if state.head is None:
        return
    stats = health(state.head)
    metrics.log_classes(step, stats, hit_histogram(state.head))
    for warning in health_warnings(stats) if state.parallel.is_first else ():
        log.warning("%s", warning)
