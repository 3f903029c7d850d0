"""What a run needs in memory, from the shapes alone. Activations of the towers are not in it: they depend on the towers
and on recomputation."""

from __future__ import annotations

from megacid.classifier.sampling import Draw
from megacid.config.schema import RunFile
from megacid.distributed.parallel import shard_range
from megacid_kernels import LossSpec, Weights

MIB = 2**20


def memory_estimate(
    run: RunFile, parameters: int, num_classes: int, embed_dim: int, world: int, device: str
) -> dict[str, float]:
    """MiB of rank 0 (the largest class shard) by part, at the moment of a step when most is alive.

    parameters: of the student; num_classes: 0 without a classifier; device: its type.
    """
    share = [1.0 / world if run.zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    width = 2 if run.bf16 else 4
    parts = {
        "student weights": parameters * width * share[2],
        "student gradients": parameters * width * share[1],
        # Adam's two moments, and under bf16 the fp32 master copy (DeepSpeed keeps one in fp32 too when it partitions).
        "student optimizer": parameters * 4 * (3 if run.bf16 or run.zero_stage else 2) * share[0],
    }
    gathered = run.micro_batch * world
    if num_classes:
        parts |= _classifier(run, num_classes, embed_dim, world, gathered, device)
    parts["embeddings"] = gathered * embed_dim * 4 * 6
    return {name: size / MIB for name, size in parts.items()}


def _classifier(
    run: RunFile, num_classes: int, embed_dim: int, world: int, gathered: int, device: str
) -> dict[str, float]:
    config, loss = run.megacid.classifier, run.megacid.loss
    start, stop = shard_range(num_classes, 0, world)
    local = rows = stop - start
    if config.sample_rate < 1:
        draw = Draw.of_step(num_classes, config.sample_rate, seed=0, step=0)
        # A batch of more than one class is spread over the ranks like the classes are.
        rows = min(local, draw.max_count(local) + -(-gathered // world))
    moments = (2 if config.optimizer == "adamw" else 1) * (4 if config.moments == "fp32" else 2)
    used = embed_dim if config.feature_rate == 1 else max(1, round(config.feature_rate * embed_dim))
    spec = LossSpec(
        num_classes=num_classes,
        scale=config.scale,
        weights=Weights(loss.alpha, loss.beta, loss.gamma, loss.cluster_temperature),
        filter_threshold=config.filter_threshold,
        max_rows=rows,
    )
    matrices = len(spec.matrices("S")) + len(spec.matrices("T"))
    itemsize = 2 if device == "cuda" else 4  # of an exponential in Triton's engine, and in PyTorch's
    per_logit = itemsize * max(1, matrices) + (config.filter_threshold is not None)
    held: dict[str, float] = {
        "classifier rows": local * (embed_dim * 4 + 4),
        "classifier optimizer": local * (embed_dim * moments + 4 + (12 if config.lazy == "decay" else 0)),
    }
    if config.weight_grad == "recomputed":
        whole = rows * (used * 8 + gathered * per_logit)
        return held | {"a slab: rows, logits, gradient": min(spec.budget(device), whole)}
    chunk = spec.chunk(gathered, rows, used, run.megacid.data.labels_per_sample, itemsize, device)
    gradients = rows * used * 4
    if used < embed_dim or run.accumulation > 1:  # the gradient over all dimensions; the sum of the micro-batches
        gradients += rows * embed_dim * 4
    return held | {
        "sampled rows": rows * used * 4,
        "their gradient": gradients,
        "their logits": chunk * rows * per_logit,
    }
