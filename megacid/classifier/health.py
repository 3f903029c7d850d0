"""Diagnostics over all class rows: never-hit, duplicate and collapsed classes. For occasional use, not for every step.

Legend: D width, L local classes, P sampled classes of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.sampling import Draw
from megacid.distributed.collectives import all_reduce_max, all_reduce_sum, gather_plain

DUPLICATE_COSINE = 0.99
_BINS = 32  # the last one counts classes of 2^31 hits
_BLOCK_BYTES = 1 << 24  # of class rows compared at a time: bounds the extra memory


@torch.no_grad()
def health(head: PartialFC, *, sample_size: int = 256) -> dict[str, float]:
    """Statistics of all class rows, the same on every rank. A collective of about 2 * sample_size * L * D operations.

    Args:
        head: the classifier.
        sample_size: number of evenly spread classes compared with all others to find near neighbours.

    Returns:
        never_hit: fraction of classes that have not been the label of a training sample yet.
        norm_min, norm_mean, norm_max: norms of the rows. Weight decay shrinks rows without gradient; the loss uses
            directions only.
        not_finite: number of rows with a NaN or an infinity.
        duplicates: fraction of the sampled classes with another class above cosine 0.99 (one cluster split in two).
        nearest_cosine: mean cosine of the sampled classes to the nearest other class.
        mean_direction: norm of the mean unit row: near 0 for spread classes, 1 when all have collapsed into one.
    """
    weight, start = head.weight.detach(), head.class_start
    norms = torch.linalg.vector_norm(weight, dim=1)
    finite = torch.isfinite(norms)
    norms = norms.masked_fill(~finite, 0.0)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)

    draw = Draw.of_step(head.num_classes, min(1.0, sample_size / head.num_classes), seed=head.seed, step=0)
    own_ids = draw.classes(start, head.class_stop, weight.device)
    sample_ids = gather_plain(own_ids, head.group)

    def unit(rows: slice | Tensor) -> Tensor:
        return weight[rows].masked_fill(~finite[rows, None], 0.0) * inverse[rows, None]

    sample_PD = gather_plain(unit(own_ids - start), head.group)
    nearest = weight.new_full((len(sample_ids),), -1.0)
    total = weight.new_zeros(head.embed_dim, dtype=torch.float64)
    step = max(1, _BLOCK_BYTES // (4 * head.embed_dim))
    for first in range(0, head.num_local, step):
        part = slice(first, min(first + step, head.num_local))
        rows = unit(part)
        total += rows.sum(0, dtype=torch.float64)
        cosine = sample_PD @ rows.T
        at = sample_ids - start - first  # a class is not its own neighbour
        inside = (at >= 0) & (at < len(rows))
        cosine[inside, at[inside]] = -1.0
        nearest = torch.maximum(nearest, cosine.amax(1))
    nearest = all_reduce_max(nearest, head.group)
    counts = torch.stack([norms.double().sum(), (~finite).sum().double(), (head.hits == 0).sum().double()])
    sums = all_reduce_sum(torch.cat([total, counts]), head.group)
    extremes = all_reduce_max(torch.stack([-norms.masked_fill(~finite, torch.inf).amin(), norms.amax()]), head.group)
    classes = head.num_classes
    return {
        "never_hit": float(sums[-1]) / classes,
        "norm_min": -float(extremes[0]),
        "norm_mean": float(sums[-3]) / classes,
        "norm_max": float(extremes[1]),
        "not_finite": float(sums[-2]),
        "duplicates": float((nearest > DUPLICATE_COSINE).double().mean()),
        "nearest_cosine": float(nearest.double().mean()),
        "mean_direction": float(torch.linalg.vector_norm(sums[:-3])) / classes,
    }


def health_warnings(stats: dict[str, float]) -> list[str]:
    """One sentence per problem in the result of `health` that needs action now."""
    warnings = []
    if stats["not_finite"]:
        warnings.append(f"{stats['not_finite']:.0f} class rows are not finite: go back to an earlier checkpoint")
    if stats["mean_direction"] > 0.9:
        warnings.append(
            f"the class rows have collapsed into one direction (their mean unit row has norm "
            f"{stats['mean_direction']:.2f}): lower classifier.lr, or check the embeddings"
        )
    elif stats["duplicates"] > 0.05:
        warnings.append(
            f"{100 * stats['duplicates']:.0f} % of the class rows have a duplicate (cosine above {DUPLICATE_COSINE}): "
            "use fewer clusters, or other centroids"
        )
    return warnings


@torch.no_grad()
def hit_histogram(head: PartialFC) -> Tensor:
    """Number of classes with 0, 1, 2-3, 4-7, ..., 2^31 hits over all ranks: int64 [33] on the host. A collective."""
    # The exponent that frexp returns is the number of binary digits of an integer n >= 1, and 0 for 0.
    digits = torch.frexp(head.hits.double()).exponent.long()
    counts = torch.zeros(_BINS + 1, dtype=torch.int64, device=head.hits.device)
    counts.index_add_(0, digits, torch.ones_like(digits))
    return all_reduce_sum(counts, head.group).cpu()
