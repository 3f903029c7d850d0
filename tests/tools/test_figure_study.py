"""tools/figures.py study: the figures show the statistics of the study's tables; which arms make a sweep."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline_data import run

pytest.importorskip("matplotlib")

from figure_kinds import study as tool
from figure_kinds.sweeps import AXES, sweeps
from megacid.offline.figure_style import GREY, figure_style
from study_file import Subset, load_study
from study_plan import Plan
from study_report import TEACHER, Finished, interval

ROOT = Path(__file__).resolve().parents[2]
ICONS = ROOT / "configs" / "study" / "icons.json"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # run files of a study are relative


def score(arm: str, seed: int) -> float:
    return (sum(map(ord, arm)) % 97 + 7 * math.sin(seed + len(arm))) / 200


def results(arms: Iterable[str], seeds: Iterable[int] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Finished runs of the icon study whose best learning rate is 2e-3, if they try it, with their real settings."""
    plan = Plan(load_study(ICONS), Path("out"), Path("corpus"), "digest")
    found = [{"digest": "d", "arm": TEACHER, "seed": 0, "metrics": {"validation": {"acc1": 0.9}}}]
    for arm in arms:
        rates = plan.rates(arm)
        best = 2e-3 if 2e-3 in rates else rates[0]
        for seed in seeds:
            for rate in (best,) if seed else rates:
                acc1 = score(arm, seed) if rate == best else 0.0
                metrics = {"validation": {"acc1": acc1, "lp_acc1": (1 + acc1) / 2}}
                settings = plan.run(arm, rate, seed).settings
                found.append(
                    {"digest": "d", "arm": arm, "seed": seed, "rate": rate, "metrics": metrics, "settings": settings}
                )
    return found


def finished(arms: Iterable[str], seeds: Iterable[int] = (0, 1, 2)) -> Finished:
    return Finished(results(arms, seeds), load_study(ICONS))


def test_bars_and_their_intervals_are_those_of_the_tables() -> None:
    arms = ["plain", "instance"]
    rows = tool.arm_rows(finished(arms), (TEACHER, *arms), "validation", ["acc1", "lp_acc1"])
    expected = interval([100 * score("plain", seed) for seed in range(3)])
    assert expected is not None and rows["plain"]["acc1"] == pytest.approx(expected)
    with figure_style():
        zero_shot, probe = tool.arms_figure(rows).axes
    assert [bar.get_width() for bar in zero_shot.patches] == pytest.approx([rows[arm]["acc1"].mean for arm in rows])
    assert [bar.get_width() for bar in probe.patches] == pytest.approx([rows[arm]["lp_acc1"].mean for arm in arms])
    ends = [collection.get_segments()[0][:, 0] for collection in zero_shot.collections]
    np.testing.assert_allclose(ends[0], [expected[0] - expected[1], expected[0] + expected[1]])
    assert [label.get_text() for label in zero_shot.get_yticklabels()] == [TEACHER, *arms]
    assert f"{expected[0]:.1f} ± {expected[1]:.1f}" in [text.get_text() for text in zero_shot.texts]


def test_an_arm_of_one_seed_has_no_interval_and_says_so() -> None:
    rows = tool.arm_rows(finished(["plain", "instance"], [0]), ["plain"], "validation", ["acc1"])
    assert rows["plain"]["acc1"].half is None
    differences = tool.difference_rows(finished(["plain", "instance"], [0]), ["instance"], "validation", ["acc1"])
    with figure_style():
        (bars,), (points,) = tool.arms_figure(rows).axes, tool.differences_figure(differences).axes
    assert bars.patches[0].get_hatch() and not bars.collections
    assert bars.texts[0].get_text().endswith("(one seed)")
    assert points.lines[1].get_markerfacecolor() == "none" and not points.collections
    two_equal = tool.Estimate(5.0, 0.0)  # an interval of width 0 is one
    with figure_style():
        (bars,) = tool.arms_figure({"plain": {"acc1": two_equal}}).axes
    assert not bars.patches[0].get_hatch()


def test_differences_are_paired_by_seed_and_coloured_where_the_interval_excludes_zero() -> None:
    done = finished(["plain", "instance", "mse"])
    rows = tool.difference_rows(done, ["instance", "mse"], "validation", ["acc1"])
    assert list(rows) == ["instance − plain", "mse − plain"]
    expected = interval([100 * (score("instance", seed) - score("plain", seed)) for seed in range(3)])
    assert expected is not None and rows["instance − plain"]["acc1"] == pytest.approx(expected)
    shown = {
        "a": {"acc1": tool.Estimate(2.0, 1.0)},
        "b": {"acc1": tool.Estimate(1.0, 1.5)},
        "c": {"acc1": tool.Estimate(-2.0, 1.0)},
    }
    with figure_style():
        (points,) = tool.differences_figure(shown).axes
    markers = [line for line in points.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in markers] == [2.0, 1.0, -2.0]
    colours = [line.get_color() for line in markers]
    assert colours[1] == GREY and len(set(colours)) == 3


def test_sweeps_are_the_arms_that_differ_in_one_setting_alone() -> None:
    file = load_study(ICONS)
    arms = file.chosen(["core", "balance", "classifier"])
    found = sweeps(finished(arms, [0]), arms)
    (r,), (k,), (balanced, random) = found["r"], found["k"], found["removed"]
    assert r.arms == {0.05: "r-0.05", 0.1: "r-0.1", 0.25: "instance-cluster", 0.5: "r-0.5", 1.0: "r-1"}
    assert k.arms == {256: "k-256", 1024: "k-1024", 4096: "instance-cluster", 16384: "k-16384"}
    assert list(k.arms) == sorted(k.arms)
    for line, kind in ((balanced, "balanced"), (random, "random")):
        assert line.arms == {0: "instance-cluster", 20: f"{kind}-20", 43.7: f"{kind}-43.7", 60: f"{kind}-60"}
        assert line.name.startswith(kind)
    few = ["instance-cluster", "r-0.1", "k-256", "balanced-20"]
    assert not any(sweeps(finished(few, [0]), few).values()), "two values are no sweep"


def test_subsets_balanced_on_other_clusters_or_cells_are_other_lines() -> None:
    file = load_study(ICONS)
    subsets, arms, done = dict(file.subsets), dict(file.arms), results(["instance-cluster", "balanced-20"], [0])
    places = {"k4096": {"clusters": "k4096"}, "k1024": {"clusters": "k1024"}, "64 cells": {"cells": 64}}
    for place, balanced_on in places.items():
        for share in (0.8, 0.6):
            name = f"{place}-{share}"
            subsets[name] = Subset(share=share, **balanced_on)
            subsets[f"random-{name}"] = Subset(random_as=name)
            for arm in (name, f"random-{name}"):
                arms[arm] = arms["balanced-20"].model_copy(update={"subset": arm})
                done += [one | {"arm": arm} for one in done if one["arm"] == "balanced-20"]
    chosen = ["instance-cluster", *arms.keys() - file.arms.keys()]
    lines = sweeps(Finished(done, replace(file, subsets=subsets, arms=arms)), chosen)["removed"]
    assert {line.name: line.arms for line in lines} == {
        f"{kind} in {place}{stays}": {0: "instance-cluster", 20: f"{prefix}{place}-0.8", 40: f"{prefix}{place}-0.6"}
        for place in places
        for kind, stays, prefix in (("balanced", ", nearest stays", ""), ("random, as many as balanced", "", "random-"))
    }


def test_lines_and_bands_of_a_sweep_are_means_and_intervals() -> None:
    arms = ["instance-cluster", "k-256", "k-1024"]
    done = finished(arms)
    rows = tool.arm_rows(done, arms, "validation", ["acc1"])
    rows["k-256"]["acc1"] = tool.Estimate(30.0, None)
    with figure_style():
        (panel,) = tool.sweep_figure(AXES["k"], sweeps(done, arms)["k"], rows).axes
    (line,), (band,) = panel.lines, panel.collections
    order = ["k-256", "k-1024", "instance-cluster"]
    assert line.get_xdata().tolist() == [256, 1024, 4096] and panel.get_xscale() == "log"
    assert line.get_ydata().tolist() == [rows[arm]["acc1"].mean for arm in order]
    corners = np.concatenate([path.vertices for path in band.get_paths()])
    assert corners[:, 0].min() == 1024, "a value of one seed has no band"
    mean, half = rows["instance-cluster"]["acc1"]
    at_end = corners[corners[:, 0] == 4096][:, 1]
    assert half is not None and (at_end.min(), at_end.max()) == pytest.approx((mean - half, mean + half))


def test_labels_of_an_axis_do_not_overlap() -> None:
    assert tool.spaced([0.05, 0.1, 0.2, 0.25, 0.5, 1.0], True) == [0.05, 0.1, 0.2, 0.5, 1.0]
    assert tool.spaced([0.0, 20.0, 43.7, 60.0], False) == [0.0, 20.0, 43.7, 60.0]


def test_the_command_draws_the_chosen_arms_and_names_what_is_missing(tmp_path: Path) -> None:
    words = ("figures", "study", ICONS, "--results", tmp_path / "results", "--out", tmp_path / "out")
    (tmp_path / "results").mkdir()
    assert "has no results" in run(*words, expect=2)
    for number, result in enumerate(results(["plain", "mse"])):
        (tmp_path / "results" / f"{number}.json").write_text(json.dumps(result))
    output = run(*words, expect=2)
    assert "has no finished arm" in output and "on the test sets" in output and "--part validation" in output
    assert "--arms has 'plane'" in run(*words, "--arms", "plane", expect=2)
    assert not (tmp_path / "out").exists()
    output = run(*words, "--part", "validation", "--arms", "mse", "--metrics", "acc1")
    printed = [line for line in output.splitlines() if line.startswith(str(tmp_path))]
    assert [Path(path).name for path in printed][::3] == ["study_arms.png", "study_differences.png"]
