"""How the classes as a whole are: what a loss curve does not show. Asked for now and then, not in every step.

Legend: D width, L local classes, P probed classes of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.sampling import Draw
from megacid.distributed.collectives import all_reduce_max, all_reduce_sum, gather_plain

DUPLICATE_COSINE = 0.99
_BINS = 32  # 2^31 hits
_BLOCK_BYTES = 1 << 24  # of rows at a time: the probe is to need little beside the rows


@torch.no_grad()
def health(head: PartialFC, *, sample_size: int = 256) -> dict[str, float]:
    """Facts about all rows, the same on every rank. A collective; costs about 2 * sample_size * L * D operations.

    never_hit         share of the classes that were no training sample's label so far
    norm_min, norm_mean, norm_max    of the rows: weight decay shrinks what is not pulled, and only direction counts
    not_finite        rows with a NaN or an infinity
    duplicates        share of `sample_size` evenly spread classes with another class above cosine 0.99: one cluster in two
    nearest_cosine    their mean cosine to the nearest other class
    mean_direction    length of the mean unit row: near 0 for classes all around, 1 when all have collapsed into one
    """
    weight, start = head.weight.detach(), head.class_start
    norms = torch.linalg.vector_norm(weight, dim=1)
    finite = torch.isfinite(norms)
    norms = norms.masked_fill(~finite, 0.0)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)

    draw = Draw.of_step(head.num_classes, min(1.0, sample_size / head.num_classes), seed=head.seed, step=0)
    mine = draw.classes(start, head.class_stop, weight.device)
    sample_ids = gather_plain(mine, head.group)

    def unit(rows: slice | Tensor) -> Tensor:
        return weight[rows].masked_fill(~finite[rows, None], 0.0) * inverse[rows, None]

    sample_PD = gather_plain(unit(mine - start), head.group)
    nearest = weight.new_full((len(sample_ids),), -1.0)
    total = weight.new_zeros(head.embed_dim, dtype=torch.float64)
    step = max(1, _BLOCK_BYTES // (4 * head.embed_dim))
    for first in range(0, head.num_local, step):
        part = slice(first, min(first + step, head.num_local))
        rows = unit(part)
        total += rows.sum(0, dtype=torch.float64)
        cosine = sample_PD @ rows.T
        at = sample_ids - start - first  # a probe is not its own neighbour
        inside = (at >= 0) & (at < len(rows))
        cosine[inside, at[inside]] = -1.0
        nearest = torch.maximum(nearest, cosine.amax(1))
    nearest = all_reduce_max(nearest, head.group)
    sums = torch.cat([total, torch.stack([norms.double().sum(), (~finite).sum().double(), (head.hits == 0).sum().double()])])  # fmt: skip
    sums = all_reduce_sum(sums, head.group)
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


def health_warnings(facts: dict[str, float]) -> list[str]:
    """What in `health` an operator should look at now, one sentence each."""
    found = []
    if facts["not_finite"]:
        found.append(f"{facts['not_finite']:.0f} class rows are not finite: go back to an earlier checkpoint")
    if facts["mean_direction"] > 0.9:
        found.append(f"the class rows have collapsed into one direction (their mean unit row has length {facts['mean_direction']:.2f}): lower classifier.lr, or look at the embeddings")  # fmt: skip
    elif facts["duplicates"] > 0.05:
        found.append(f"{100 * facts['duplicates']:.0f} % of the class rows have a duplicate (cosine above {DUPLICATE_COSINE}): take fewer clusters, or other centroids")  # fmt: skip
    return found


@torch.no_grad()
def hit_histogram(head: PartialFC) -> Tensor:
    """int64 [33] on the host: classes with 0 hits, 1, 2-3, 4-7, ... 2^31 hits, over all ranks. A collective."""
    # frexp's exponent of n >= 1 is the number of its binary digits, and 0 of 0.
    digits = torch.frexp(head.hits.double()).exponent.long()
    counts = torch.zeros(_BINS + 1, dtype=torch.int64, device=head.hits.device)
    counts.index_add_(0, digits, torch.ones_like(digits))
    return all_reduce_sum(counts, head.group).cpu()
