"""The suite balance-bookkeeping: every phase runs, and its laws are those of the measured values."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import balance_bookkeeping as bench
from megacid.distributed.array_exchange import Ranks


@pytest.mark.parametrize("link", ["components", "greedy"])
def test_every_phase_runs_without_products(link: str, tmp_path: Path) -> None:
    request = {"n": 25_000, "folder": str(tmp_path), "neighbor_clusters": 4, "link": link}
    phases = bench.phases_of(request, Ranks())
    assert {"links across clusters", "medoids", "masks and representatives", "report"} < phases.keys()
    assert all(seconds >= 0 for seconds, _ in phases.values())
    assert len(list((tmp_path / "keep").iterdir())) == len(list((tmp_path / "representative").iterdir())) == 3


def test_laws_part_what_every_rank_has_from_what_is_shared() -> None:
    rows = [
        {"phase": phase, "n": n, "ranks": ranks, "peak_mb": constant + n / 1e6 * (w + s / ranks)}
        for phase, constant, w, s in (("a", 100, 12.0, 30.0), ("b", 7, 0.0, 4.0))
        for n in (1_000_000, 4_000_000, 16_000_000)
        for ranks in (1, 2, 4)
    ]
    assert {phase: pytest.approx(law) for phase, law in bench.laws(rows, "peak_mb").items()} == {
        "a": (12.0, 30.0),
        "b": (0.0, 4.0),
    }
