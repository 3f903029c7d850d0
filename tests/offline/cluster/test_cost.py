"""The cost estimate before a clustering."""

from __future__ import annotations

import pytest
import torch

from megacid.offline.cluster.cost import assignment_flop, describe_cost, measured_rate
from megacid.offline.cluster.state import KMeansSettings

CPU = torch.device("cpu")


def test_flop_count_includes_every_comparison() -> None:
    flat = KMeansSettings(k=100, iterations=7)
    assert assignment_flop(flat, 1000, 16) == (2 * 16 * 1000 * 100 * 7, 2 * 16 * 1000 * 100)
    sampled = KMeansSettings(k=100, iterations=7, train_sample=250)
    assert assignment_flop(sampled, 1000, 16)[0] == assignment_flop(flat, 1000, 16)[0] / 4
    # 10 cells; 10 centroids in each, 7 times, then those of 3 cells, twice.
    levels = KMeansSettings(k=100, iterations=7, method="hierarchical", refine=2, refine_cells=3)
    assert assignment_flop(levels, 1000, 16)[0] == 2 * 16 * 1000 * (10 + 10 * 7 + 30 * 2)


def test_estimate_names_rows_clusters_ranks_and_memory() -> None:
    settings = KMeansSettings(k=40, iterations=3, train_sample=500, memory_gb=2.5)
    assert measured_rate(settings, 8, CPU) > 0
    text = describe_cost(settings, 2000, 8, 4, CPU)
    for part in (
        "2,000 rows of width 8",
        "40 clusters (flat)",
        "500 rows (12.5 per cluster)",
        "4 ranks",
        "memory bound 2.5 GB",
    ):
        assert part in text


@pytest.mark.parametrize(("seconds", "expected"), [(3.21, "3.21 s"), (600.0, "10 min"), (7.2e4, "20 h")])
def test_durations_have_a_readable_unit(seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = KMeansSettings(k=4, iterations=1)
    fit, labels = assignment_flop(settings, 100, 8)
    monkeypatch.setattr("megacid.offline.cluster.cost.measured_rate", lambda *_: (fit + labels) / seconds)
    assert f"about {expected} of distance computation" in describe_cost(settings, 100, 8, 1, CPU)
