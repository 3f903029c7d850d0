"""How the classifier cuts a step of a run into chunks or slabs: known from the run file and the number of classes."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from megacid.classifier.sampling import Draw, num_dims, padded_rows
from megacid.config.schema import RunFile
from megacid.distributed.parallel import shard_range
from megacid.errors import UserError
from megacid_kernels import LossSpec, Weights, resolve
from megacid_kernels.loss_spec import DEVICE_BYTES
from megacid_kernels.plan import Implementation, Plan, Sizes, Work, describe, make_plan, with_available_memory, work_of


class ClassifierPlan(NamedTuple):
    """Plan of a step on rank 0, whose class shard is the largest."""

    spec: LossSpec
    sizes: Sizes
    chosen: Implementation
    plan: Plan

    @property
    def work(self) -> Work:
        """Of a training step: the row optimizer calls `each_slab` with weight_grad "recomputed"."""
        return work_of(self.plan, self.spec, self.sizes, self.chosen, each_slab=self.spec.weight_grad == "recomputed")

    def __str__(self) -> str:
        return describe(self.plan, self.sizes, self.chosen, self.work)


def plan_classifier(
    run: RunFile, num_classes: int, embed_dim: int, world: int, device: str, student_bytes: int = 0
) -> ClassifierPlan:
    """The plan of a run with the cluster term.

    Args:
        num_classes: over all ranks.
        world: number of ranks.
        device: "cpu" or "cuda"; where there is no GPU, one of 80 GB is assumed.
        student_bytes: of the GPU, see `memory.student_bytes`; the default budget leaves them.

    Raises:
        UserError: `classifier.memory_budget_gb` does not hold one sample, or one class of a slab.
    """
    config = run.megacid.classifier
    spec, local = _loss_spec(run, num_classes, world), shard_range(num_classes, 0, world)[1]
    chosen: Implementation = "torch" if config.impl == "torch" or device == "cpu" else "triton"
    if device == "cuda" and torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        spec = with_available_memory(spec, gpu, local, embed_dim, student_bytes)
        chosen = resolve("auto", gpu, torch.float32) if config.impl == "auto" else chosen
    elif device == "cuda":
        spec = replace(spec, available_bytes=DEVICE_BYTES - 12 * local * embed_dim - student_bytes)
    sizes = Sizes(
        run.global_batch, spec.max_rows or 1, num_dims(embed_dim, config.feature_rate),
        run.megacid.data.labels_per_sample, gather=config.sample_rate < 1 and config.feature_rate == 1,
    )  # fmt: skip
    try:
        plan = make_plan(spec, sizes, chosen, device)
    except ValueError as error:
        raise UserError(f"{_budget(config.memory_budget_gb)}: {error}") from error
    if config.memory_budget_gb is not None and plan.bytes > plan.budget:
        raise UserError(
            f"{_budget(config.memory_budget_gb)}, expected at least {plan.bytes / 1e9}, the exponentials of one "
            f"sample with {sizes.rows} class rows: raise it, or write null for the default"
        )
    return ClassifierPlan(spec, sizes, chosen, plan)


def _budget(given: float | None) -> str:
    return f'"megacid.classifier.memory_budget_gb" is {"null" if given is None else given}'


def _loss_spec(run: RunFile, num_classes: int, world: int) -> LossSpec:
    """The classifier's loss with the number of rows that the largest shard uses in a step."""
    config, loss = run.megacid.classifier, run.megacid.loss
    local = rows = shard_range(num_classes, 0, world)[1]
    if config.sample_rate < 1:
        draw = Draw.of_step(num_classes, config.sample_rate, seed=0, step=0)
        # Labels of more than one class are spread over the ranks like the classes are.
        labels = run.global_batch * run.megacid.data.labels_per_sample
        rows = padded_rows(draw.max_count(local) + -(-labels // world), local, static_shapes=config.static_shapes)
    return LossSpec(
        num_classes=num_classes,
        scale=config.scale,
        weights=Weights(loss.alpha, loss.beta, loss.gamma, loss.cluster_temperature),
        filter_threshold=config.filter_threshold,
        max_rows=rows,
        impl=config.impl,
        weight_grad=config.weight_grad,
        precision=config.precision,
        memory_budget_bytes=None if config.memory_budget_gb is None else max(1, round(config.memory_budget_gb * 1e9)),
    )
