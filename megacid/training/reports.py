"""Collects what the trainer logs about a step and about all classes."""

from __future__ import annotations

import logging

from megacid.classifier.health import health, health_warnings, hit_histogram
from megacid.config.conditions import SimilarityTerm
from megacid.config.schema import RunFile
from megacid.training.guard import Verdict
from megacid.training.metrics import Metrics
from megacid.training.observe import Observed
from megacid.training.open_data import Data
from megacid.training.schedule import learning_rate_share, peak_rates
from megacid.training.state import StepOutput, TrainState

log = logging.getLogger("megacid")


def report_step(step: int, state: TrainState, output: StepOutput, verdict: Verdict, metrics: Metrics) -> None:
    """Log loss, terms, learning rate, gradient norm and the diagnostics of a step that is due.

    A collective.
    """
    metrics.step_done()
    if not metrics.due(step):
        return
    share = learning_rate_share(step, state.run.megacid.run.total_steps, state.run.megacid.schedule)
    diagnostics = state.head.metrics() if state.head is not None else {}
    seen = (step + 1) * state.run.global_batch
    scalars = {
        "train/samples_seen": float(seen),
        "train/epoch": seen / state.data.epoch_samples if state.data.position is None else state.data.position.epoch,
        **state.data.progress(seen),
        "train/lr": share * peak_rates(state.run)[0],
        "train/grad_norm": verdict.grad_norm,
        "train/skipped": float(state.guard.skipped),
        **_observed(state.run, state.data, Observed(*verdict.observed)),
        **{f"classifier/{name}": float(value) for name, value in diagnostics.items()},
    }
    metrics.log(step, output.loss, output.terms, scalars)


def _observed(run: RunFile, data: Data, observed: Observed) -> dict[str, float]:
    """What the run has of `observed`: cosines with a teacher of its width, scale and bias if they are learned."""
    block = run.megacid
    scalars: dict[str, float] = {}
    if data.teacher_dims and data.teacher_dim == block.student.embed_dim:
        scalars["train/cosine_image"] = observed.cosine_image
        if data.teacher_has_text:
            scalars["train/cosine_text"] = observed.cosine_text
    if SimilarityTerm.holds(block) and block.loss.temperature is None:
        scalars["train/logit_scale"] = observed.logit_scale
    if block.loss.form == "sigmoid":
        scalars["train/logit_bias"] = observed.logit_bias
    return scalars


def report_classes(step: int, state: TrainState, metrics: Metrics) -> None:
    """Log diagnostics over all class rows, and warn where they look wrong. A collective."""
    if state.head is None:
        return
    stats = health(state.head)
    metrics.log_classes(step, stats, hit_histogram(state.head))
    for warning in health_warnings(stats) if state.parallel.is_first else ():
        log.warning("%s", warning)
