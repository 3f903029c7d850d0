"""The accumulation suite times the objective of one batch, and another one next to it."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from harness import run_ranks

from benchmarks import accumulation
from megacid.errors import UserError

SMALL = argparse.Namespace(suite="accumulation", batch=8, micro_batches=2, device="cpu", threads=1, clock="cpu")


def test_losses_of_one_batch_and_of_cached_gradients_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROUNDS", "REPEATS"):
        monkeypatch.setattr(accumulation, name, 1)
    (report,) = run_ranks(accumulation.run, 1, SMALL)
    rows: dict[str, Any] = {row["provider"]: row for row in report["results"]}
    assert rows["gradient-cache"]["loss"] == pytest.approx(rows["one-batch"]["loss"], rel=1e-6)
    assert rows["averaged"]["loss"] != pytest.approx(rows["one-batch"]["loss"], rel=1e-2)
    assert [limit.value for limit in accumulation.check(report)] == [rows["gradient-cache"]["time_over_one_batch"]]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="--batch is 9, expected a multiple of --micro-batches, 2"):
        accumulation.run(argparse.Namespace(batch=9, micro_batches=2))
