"""Estimates the memory of a run from its shapes, without the activations of the student's towers."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from megacid.classifier import PartialFC
from megacid.classifier.sampling import Draw, num_dims
from megacid.config.schema import RunFile
from megacid.distributed.parallel import Parallel, shard_range
from megacid.models.feature_tower import FeatureTower
from megacid_kernels import LossSpec, Weights

if TYPE_CHECKING:
    from megacid.models.student import Student

log = logging.getLogger("megacid")

MIB = 2**20


def memory_estimate(
    run: RunFile, parameters: int, num_classes: int, embed_dim: int, world: int, device: str, frozen: int = 0
) -> dict[str, float]:
    """Peak memory of rank 0, which has the largest class shard, in MiB by part.

    Args:
        parameters: number of the student's parameters.
        num_classes: over all ranks; 0 without a classifier.
        world: number of ranks.
        device: "cpu" or "cuda".
        frozen: number of those parameters without gradient.
    """
    trained = parameters - frozen
    share = [1.0 / world if run.zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    width = 2 if run.bf16 else 4
    sizes = {
        "student weights": parameters * width * share[2],
        "student gradients": trained * width * share[1],
        # Adam's two moments, and under bf16 the fp32 master copy (DeepSpeed keeps one in fp32 too when it partitions).
        "student optimizer": trained * 4 * (3 if run.bf16 or run.zero_stage else 2) * share[0],
    }
    if run.megacid.student.ema_decay is not None:
        sizes["EMA of the student"] = trained * 4 / world
    if frozen and device == "cpu":
        sizes["frozen weights for checkpoints"] = frozen * 4
    gathered = run.global_batch
    if num_classes:
        sizes |= _classifier(run, num_classes, embed_dim, world, gathered, device)
    sizes["embeddings"] = gathered * embed_dim * 4 * 6
    return {name: size / MIB for name, size in sizes.items()}


def _classifier(
    run: RunFile, num_classes: int, embed_dim: int, world: int, gathered: int, device: str
) -> dict[str, float]:
    config = run.megacid.classifier
    local = shard_range(num_classes, 0, world)[1]
    moments = (2 if config.optimizer == "adamw" else 1) * (4 if config.moments == "fp32" else 2)
    used = num_dims(embed_dim, config.feature_rate)
    spec = loss_spec(run, num_classes, world)
    rows = spec.max_rows or local
    matrices = len(spec.distributions())
    itemsize = _exponential_bytes(device)
    per_logit = itemsize * max(1, matrices) + (config.filter_threshold is not None)
    stored: dict[str, float] = {
        "classifier rows": local * (embed_dim * 4 + 4),
        "classifier optimizer": local * (embed_dim * moments + 4 + (12 if config.lazy == "decay" else 0)),
    }
    if config.weight_grad == "recomputed":
        whole = rows * (used * 8 + gathered * per_logit)
        return stored | {"a slab: rows, logits, gradient": min(spec.budget_bytes(device), whole)}
    chunk = samples_per_chunk(run, spec, embed_dim, device)
    gradients = rows * used * 4
    if used < embed_dim:  # the gradient over all dimensions
        gradients += rows * embed_dim * 4
    return stored | {
        "sampled rows": rows * used * 4,
        "their gradient": gradients,
        "their logits": chunk * rows * per_logit,
    }


def loss_spec(run: RunFile, num_classes: int, world: int) -> LossSpec:
    """The classifier's loss with the number of rows that the largest shard uses in a step."""
    config, loss = run.megacid.classifier, run.megacid.loss
    local = rows = shard_range(num_classes, 0, world)[1]
    if config.sample_rate < 1:
        draw = Draw.of_step(num_classes, config.sample_rate, seed=0, step=0)
        # A batch of more than one class is spread over the ranks like the classes are.
        rows = min(local, draw.max_count(local) + -(-run.global_batch // world))
    return LossSpec(
        num_classes=num_classes,
        scale=config.scale,
        weights=Weights(loss.alpha, loss.beta, loss.gamma, loss.cluster_temperature),
        filter_threshold=config.filter_threshold,
        max_rows=rows,
    )


def _exponential_bytes(device: str) -> int:
    return 2 if device == "cuda" else 4  # in Triton's engine, and in PyTorch's


def samples_per_chunk(run: RunFile, spec: LossSpec, embed_dim: int, device: str) -> int:
    """Samples of the global batch whose logits the classifier computes at a time."""
    used, labels = num_dims(embed_dim, run.megacid.classifier.feature_rate), run.megacid.data.labels_per_sample
    return spec.samples_per_chunk(
        run.global_batch, spec.max_rows or 1, used, labels, _exponential_bytes(device), device
    )


def frozen_count(student: Student | FeatureTower) -> int:
    """Number of the student's parameters that are frozen."""
    return sum(p.numel() for p in student.parameters() if not p.requires_grad)


def report_memory(run: RunFile, student: Student | FeatureTower, head: PartialFC | None, parallel: Parallel) -> None:
    """Log the sizes of the run and the memory of rank 0, without activations."""
    parameters = sum(p.numel() for p in student.parameters())
    frozen = frozen_count(student)
    num_classes = head.num_classes if head else 0
    where = parallel.device.type
    sizes = memory_estimate(run, parameters, num_classes, student.embed_dim, parallel.world, where, frozen)
    log.info(
        "student %s: %.2f M parameters, width %d; classes %d; ranks %d; ZeRO stage %d; batch %d = %d x %d x %d ranks",
        run.megacid.student.model, parameters / 1e6, student.embed_dim, num_classes, parallel.world, run.zero_stage,
        run.global_batch, run.micro_batch, run.accumulation, parallel.world,
    )  # fmt: skip
    if run.megacid.student.freeze:
        log.info("frozen: %.2f M of the %.2f M parameters", frozen / 1e6, parameters / 1e6)
    log.info(
        "memory of rank 0 without activations: %.1f MiB (%s)",
        sum(sizes.values()),
        ", ".join(f"{name} {size:.1f}" for name, size in sizes.items()),
    )
    if workers := run.megacid.data.workers:
        prefetch, shape = run.megacid.data.prefetch, student.image_shape
        log.info(
            "shared memory of the images prefetched by a rank: %.1f MiB = %d workers x %d x %d x %s bytes",
            workers * prefetch * run.micro_batch * math.prod(shape) / MIB,
            workers, prefetch, run.micro_batch, " x ".join(map(str, shape)),
        )  # fmt: skip
