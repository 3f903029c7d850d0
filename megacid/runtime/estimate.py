"""What a run needs in memory, from the shapes alone. Activations are not in it: they depend on the towers and on recomputation."""

from __future__ import annotations

from megacid.classifier.sampling import Draw, shard_range
from megacid.config import RunFile

MIB = 2**20


def memory_estimate(run: RunFile, parameters: int, num_classes: int, embed_dim: int, world: int) -> dict[str, float]:
    """MiB of rank 0 (the largest class shard) by part. parameters: of the student; num_classes: 0 without a classifier."""
    share = [1.0 / world if run.zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    width = 2 if run.bf16 else 4
    parts = {
        "student weights": parameters * width * share[2],
        "student gradients": parameters * width * share[1],
        # Adam's two moments, and under bf16 the fp32 master copy (DeepSpeed keeps one in fp32 too when it partitions).
        "student optimizer": parameters * 4 * (3 if run.bf16 or run.zero_stage else 2) * share[0],
    }
    if num_classes:
        start, stop = shard_range(num_classes, 0, world)
        gathered = run.micro_batch * world
        rate, rows = run.megacid.classifier.sample_rate, stop - start
        if rate < 1:
            rows = min(rows, Draw.of_step(num_classes, rate, seed=0, step=0).most(rows) + gathered)
        moments = 2 if run.megacid.classifier.optimizer == "adamw" else 1
        parts["classifier rows"] = (stop - start) * embed_dim * 4
        parts["classifier optimizer"] = (stop - start) * (embed_dim * 4 * moments + 4)
        parts["sampled rows and gradient"] = rows * embed_dim * 4 * 3
        parts["sampled logits (at most)"] = min(gathered * rows * 4 * 2, 1 << 30)
    parts["batch"] = run.micro_batch * (embed_dim * 2 * 4)
    return {name: size / MIB for name, size in parts.items()}
