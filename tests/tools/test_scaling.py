"""tools/scaling.py: its table is the one on docs/scaling.md, and no part of a step is missing from it."""

from __future__ import annotations

from pathlib import Path

import pytest

import scaling
from megacid.config.load import load_run
from megacid.training.communication import Collective
from megacid.training.step_time import EPYC, H100, Step

ROOT = Path(__file__).resolve().parents[2]


def test_the_groups_have_every_part_of_a_step_once() -> None:
    run = load_run(scaling.RUN_FILE, world=8).with_embed_dim(64)
    parts = Step(run, 8, "cuda", 64, 64, 1000, 1.0, 2.0, 10, [Collective("a", "all_reduce", 8)]).time(H100)
    grouped = [part for _, group in scaling.GROUPS.values() for part in group]
    assert sorted([*grouped, "fixed"]) == sorted(parts) and parts["fixed"] == 0


def test_table_and_figure_show_every_case(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    seconds = dict(zip(scaling.GROUPS, (0.1, 0.2, 0.3, 0.5, 0.9)))
    cases = [scaling.Case(gpus, 10**7, seconds, 1000, 12.3) for gpus in (8, 64)]
    *_, last = scaling.table(cases)
    assert last == "| 64 | 10M | 2,000 | 1,100 | 500 | 5% | 10% | 15% | 25% | **45%** | 12 |"
    scaling.draw(cases, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert all(word in drawn for word in (*scaling.GROUPS, "8 GPUs", "64 GPUs", "2,000 ms"))


def test_pages_have_the_fitted_costs_of_a_cpu() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rates = [1e-9 / cost for cost in (EPYC.tower_flop, EPYC.product_flop, EPYC.memory_byte, EPYC.link_byte)]
    said = "{:.0f} GFLOP/s in the student, {:.0f} in the objective, {:.1f} GB/s of memory traffic, {:.2f} GB/s sent"
    assert said.format(*rates) in page


@pytest.mark.slow
def test_page_has_the_table_that_the_tool_prints() -> None:
    assert "\n".join(scaling.table(scaling.predict())) in (ROOT / "docs" / "scaling.md").read_text(), (
        "run: python tools/scaling.py --out docs/images/scaling.svg, and copy its table to docs/scaling.md"
    )
