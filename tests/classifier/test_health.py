"""Diagnostics over all classes: planted faults must be found, at every number of ranks."""

from __future__ import annotations

import pytest
import torch
from harness import run_ranks

from megacid import PartialFC
from megacid.classifier.health import health, health_warnings, hit_histogram

CLASSES = 101


def planted() -> torch.Tensor:
    w = torch.nn.functional.normalize(torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(0)))
    w *= torch.linspace(0.5, 2.0, CLASSES)[:, None]
    w[60] = 3 * w[5]  # a duplicate on another rank, of another length
    return w


def examine() -> tuple[dict[str, float], torch.Tensor]:
    head = PartialFC(CLASSES, 16, init=planted(), scale=8.0)
    labels = torch.tensor([3, 3, 3, 3, 9, 9, 80, -1])
    here = labels if torch.distributed.is_initialized() is False or torch.distributed.get_rank() == 0 else labels[:0]
    head(torch.randn(len(here), 16, requires_grad=True), here).backward()
    head.weight[7, 2] = torch.nan if head.class_start == 0 else head.weight[7, 2]
    return health(head, sample_size=CLASSES), hit_histogram(head)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_planted_faults_are_found(world: int) -> None:
    stats, histogram = run_ranks(examine, world)[-1]
    w = planted()
    norms = torch.cat([w[:7], w[8:]]).norm(dim=1)
    assert stats["not_finite"] == 1 and stats["duplicates"] == pytest.approx(2 / CLASSES)
    assert stats["norm_min"] == pytest.approx(float(norms.min())) and stats["norm_max"] == pytest.approx(
        float(norms.max())
    )
    assert stats["norm_mean"] == pytest.approx(float(norms.sum()) / CLASSES)
    assert stats["never_hit"] == pytest.approx((CLASSES - 3) / CLASSES)
    assert histogram.tolist() == [CLASSES - 3, 1, 1, 1] + [0] * 29
    assert stats["mean_direction"] < 0.2 and 0.3 < stats["nearest_cosine"] < 0.9


def test_collapsed_classes_have_one_direction() -> None:
    stats = health(PartialFC(50, 8, init=torch.ones(50, 8)))
    assert stats["mean_direction"] == pytest.approx(1.0, abs=1e-5) and stats["duplicates"] == 1.0
    (warning,) = health_warnings(stats)
    assert "collapsed into one direction" in warning


def test_healthy_classes_give_no_warning() -> None:
    assert health_warnings(health(PartialFC(50, 32, seed=1))) == []
    rows = torch.randn(40, 32)
    warnings = health_warnings(health(PartialFC(50, 32, init=torch.cat([rows, rows[:10]]))))
    assert warnings == [
        "40 % of the class rows have a duplicate (cosine above 0.99): use fewer clusters, or other centroids"
    ]


def test_a_hit_is_a_training_sample_and_evaluation_counts_none() -> None:
    head = PartialFC(5, 3)
    with torch.no_grad():
        head(torch.randn(2, 3), torch.tensor([0, 1]))
    assert not head.hits.any()
