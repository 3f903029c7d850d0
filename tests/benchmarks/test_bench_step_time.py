"""Suite step-time of tools/bench.py: its fit finds known costs, and held-out points do not affect their prediction."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from harness import run_ranks

from benchmarks import step_time, step_time_ranks
from benchmarks.step_time import FITTED, Grid, fit, folds_of, held_out

GRID = Grid(("classifier.sample_rate=0.5",), 16, (1,), (100, 400), (2,))


def random_columns(rows: int) -> torch.Tensor:
    """Of very different size, as operations and collectives are."""
    uniform = torch.rand(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return uniform * torch.tensor([1e12, 1e3, 1.0], dtype=torch.float64)


def test_the_fit_finds_costs_of_any_size() -> None:
    columns, costs = random_columns(9), torch.tensor([2e-12, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(fit(columns, columns @ costs), costs, rtol=1e-6, atol=1e-9)


def test_the_fit_has_no_negative_cost_and_none_of_what_no_point_does() -> None:
    columns, costs = random_columns(9), torch.tensor([2e-12, -3e-5, 0.5], dtype=torch.float64)
    found = fit(columns, columns @ costs)
    assert found[1] == 0 and found[0] > 0 and found[2] > 0
    columns[:, 2] = 0
    assert fit(columns, columns[:, 0] * 2e-12).tolist() == pytest.approx([2e-12, 0, 0], abs=1e-20)


def test_the_fit_weighs_errors_relative_to_the_time() -> None:
    columns = torch.tensor([[1.0], [1000.0]], dtype=torch.float64)
    assert 1.0 < float(fit(columns, torch.tensor([2.0, 1000.0], dtype=torch.float64))) < 2.0


def test_points_of_a_fold_do_not_affect_their_prediction() -> None:
    columns, folds = random_columns(9), torch.arange(9) % 3
    seconds = columns @ torch.tensor([2e-12, 1e-4, 0.5], dtype=torch.float64)
    torch.testing.assert_close(held_out(columns, seconds, folds), seconds)
    slow = seconds.clone()
    slow[4] *= 2
    changed = held_out(columns, slow, folds)
    torch.testing.assert_close(changed[folds == 1], seconds[folds == 1])
    assert not torch.isclose(changed[folds != 1], seconds[folds != 1], rtol=1e-3).any()


def test_each_third_of_the_grid_has_every_rank_batch_and_class_count() -> None:
    for grid in step_time.GRIDS.values():
        rows = [
            {"ranks": ranks, "classes": classes, "batch": batch}
            for ranks in grid.ranks for classes in grid.classes for batch in grid.batches
        ]  # fmt: skip
        folds = folds_of(rows, grid).tolist()
        for fold in range(3):
            part = [row for row, of in zip(rows, folds) if of == fold]
            assert len(part) == len(rows) // 3
            for key in ("classes", "batch"):
                values = {row[key] for row in part}
                assert len(values) > 1 and (grid.ranks == (1,) or values == {row[key] for row in rows}), key


def test_the_suite_measures_the_grid_and_predicts_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(module: str, request: dict[str, Any], world: int, device: str) -> dict[str, Any]:
        assert module == step_time_ranks.__name__
        answers: list[dict[str, Any]] = run_ranks(step_time_ranks.answer, world, request)
        return answers[0]

    monkeypatch.setattr(step_time, "ask_ranks", here)
    monkeypatch.setattr(step_time, "ROUNDS", 1)
    monkeypatch.setattr(step_time, "REPEATS", 1)
    monkeypatch.setitem(step_time.GRIDS, "cpu", GRID)
    report = step_time.run(argparse.Namespace(suite="step-time", device="cpu", threads=1, clock="cpu"))
    rows = report["results"]
    assert [(row["classes"], row["batch"]) for row in rows] == [(c, b) for c in GRID.classes for b in GRID.batches]
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted_s"] / row["cpu_s"][0] - 1)
    assert set(report["costs"]) == set(FITTED) - {"link_byte", "hop"}, "one rank sends nothing"
    (limit,) = step_time.check(report)
    assert limit.value == max(abs(row["error"]) for row in rows)
