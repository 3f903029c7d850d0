"""Metrics of a batch that forward has seen: cosines, accuracy among the sampled classes, and shares of rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.classifier.label_exchange import GatheredLabels
from megacid.distributed.collectives import all_reduce_max, all_reduce_sum
from megacid_kernels import Discrimination


@torch.no_grad()
def batch_metrics(
    out: Discrimination, labels: GatheredLabels, num_local: int, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Metrics of one forward: 0-d tensors, the same on every rank. A collective.

    Returns:
        target_cosine: mean cosine of the labelled samples to their class (with several labels: to all of them).
        largest_negative: mean over the labelled samples of their largest cosine to a sampled negative.
        accuracy: fraction of the labelled samples nearer to (one of) their classes than to every sampled negative.
        sampled: rows used by all ranks together.
        positive_share: fraction of these that are labels of the batch.
        filtered: mean number of negatives per labelled sample that `filter_threshold` removed.
    """
    present = labels.target_Gl >= 0
    labelled = present.any(1)
    count = labelled.sum().clamp_min(1)
    cosine = out.target_cosine.view(present.shape)
    largest = out.largest_negative.clone()
    rows = num_local if labels.rows is None else len(labels.rows)
    counts = torch.tensor([labels.num_positive, rows], dtype=torch.int64, device=largest.device)
    sums = torch.cat([(out.removed * labelled).sum()[None], counts])
    all_reduce_max(largest, group)
    all_reduce_sum(sums, group)
    best = cosine.masked_fill(~present, -torch.inf).amax(1)
    # -inf: all negatives are filtered, or there are none.
    seen = labelled & torch.isfinite(largest)
    return {
        "target_cosine": cosine.sum() / present.sum().clamp_min(1),
        "largest_negative": largest.masked_fill(~seen, 0.0).sum() / seen.sum().clamp_min(1),
        "accuracy": (labelled & (best > largest)).sum() / count,
        "sampled": sums[2],
        "positive_share": sums[1] / sums[2].clamp_min(1),
        "filtered": sums[0] / count,
    }
