"""Figures of a study: its arms with intervals, their paired differences, and its sweeps.

Writes study_arms (means over seeds with 95 % intervals), study_differences (of the arms that the study file compares,
paired by seed) and, for each of r, k and the share of removed pairs with at least three values, study_sweep_r,
study_sweep_k and study_sweep_removed. The statistics are those of the tables of tools/study.py --report.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from figure_kinds.sweeps import AXES, Axis, Sweep, sweeps
from megacid.errors import UserError
from megacid.offline.figure_style import (
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    PAGE,
    add_legend,
    new_figure,
    save_figure,
)
from study_file import TEACHER, load_study
from study_report import LEVEL, METRICS, Finished, interval, load_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="STUDY.json", help="study file")
    parser.add_argument(
        "--results", type=Path, required=True, metavar="DIR", help="results/ of a directory written by tools/study.py"
    )
    parser.add_argument("--arms", nargs="+", default=[], metavar="NAME", help="groups or arms (default: all)")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="metrics (default: all)")
    parser.add_argument(
        "--part", choices=("test", "validation"), default="test", help="sets that were evaluated (default: test)"
    )


class Estimate(NamedTuple):
    """A mean over seeds in percent, and half of its interval; None for one seed."""

    mean: float
    half: float | None

    @property
    def text(self) -> str:
        return f"{self.mean:.1f} ± {self.half:.1f}" if self.half is not None else f"{self.mean:.1f} (one seed)"


def estimate(values: Sequence[float]) -> Estimate | None:
    """None without values."""
    found = interval(values)
    if found is not None:
        return Estimate(*found)
    return Estimate(values[0], None) if values else None


Rows = dict[str, dict[str, Estimate]]  # name of the row -> metric -> estimate


def arm_rows(finished: Finished, arms: Sequence[str], part: str, metrics: Sequence[str]) -> Rows:
    """The arms with at least one of the metrics."""
    rows = {}
    for arm in arms:
        values = {metric: estimate(list(finished.values(arm, part, metric).values())) for metric in metrics}
        rows[arm] = {metric: found for metric, found in values.items() if found is not None}
    return {arm: row for arm, row in rows.items() if row}


def difference_rows(finished: Finished, arms: Sequence[str], part: str, metrics: Sequence[str]) -> Rows:
    """Arm minus each arm that it is compared with, of those with a common seed."""
    rows = {}
    for arm in arms:
        for other in finished.file.arms[arm].against:
            values = {metric: estimate(finished.differences(arm, other, part, metric)) for metric in metrics}
            rows[f"{arm} − {other}"] = {metric: found for metric, found in values.items() if found is not None}
    return {name: row for name, row in rows.items() if row}


def _panels(rows: Rows) -> tuple[Figure, list[tuple[str, Any]]]:
    """A figure with a panel for each metric that occurs, one line per row."""
    metrics = [metric for metric in METRICS if any(metric in row for row in rows.values())]
    figure, axes = new_figure(PAGE, 0.75 + 0.19 * len(rows), columns=len(metrics), sharey=True)
    axes[0, 0].set_yticks(range(len(rows)), list(rows))
    axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)  # the first row at the top
    for ax, metric in zip(axes[0], metrics):
        ax.set_title(textwrap.fill(METRICS[metric], 15))
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", alpha=0.3, linewidth=0.5)
        ax.set_axisbelow(True)
    return figure, list(zip(metrics, axes[0]))


def arms_figure(rows: Rows) -> Figure:
    """Bars from 0 with intervals; the teacher is grey, an arm of one seed hatched."""
    figure, panels = _panels(rows)
    for metric, ax in panels:
        shown = [(place, name, row[metric]) for place, (name, row) in enumerate(rows.items()) if metric in row]
        for place, name, found in shown:
            style = {"color": GREY if name == TEACHER else COLOURS[0], "hatch": "////" if found.half is None else None}
            ax.barh(place, found.mean, 0.7, xerr=found.half, edgecolor="white", linewidth=0,
                    error_kw={"elinewidth": 0.9, "capsize": 2}, **style)  # fmt: skip
        right = max(found.mean + (found.half or 0) for _, _, found in shown) or 1.0
        for place, _, found in shown:
            ax.text(found.mean + (found.half or 0) + 0.03 * right, place, found.text, va="center", fontsize=6)
        ax.set_xlim(0, 1.75 * right)
    figure.supxlabel(f"percent; mean over seeds with its {100 * LEVEL:.0f} % interval", fontsize=7)
    return figure


def differences_figure(rows: Rows) -> Figure:
    """Differences with intervals, in colour where the interval excludes 0; those of one seed are hollow."""
    figure, panels = _panels(rows)
    for metric, ax in panels:
        ax.axvline(0, color="#555555", linewidth=0.7)
        for place, row in enumerate(rows.values()):
            if metric in row:
                mean, half = row[metric]
                clear = half is not None and abs(mean) > half
                colour = GREY if not clear else COLOURS[0] if mean > 0 else COLOURS[1]
                fill = "none" if half is None else colour
                ax.errorbar(mean, place, xerr=half, fmt="o", markersize=3.5, capsize=2, color=colour, mfc=fill)
    note = f"percentage points, paired by seed, with {100 * LEVEL:.0f} % intervals; grey: 0 is not excluded"
    if any(found.half is None for row in rows.values() for found in row.values()):
        note += "; hollow: one seed"
    figure.supxlabel(note, fontsize=7)
    return figure


def sweep_figure(axis: Axis, lines: Sequence[Sweep], rows: Rows) -> Figure:
    """Means along an axis, with bands of their intervals; a value of one seed has no band. rows: of all arms."""
    metrics = [m for m in METRICS if any(m in rows[arm] for line in lines for arm in line.arms.values())]
    figure, axes = new_figure(PAGE, 2.4, columns=len(metrics))
    for ax, metric in zip(axes[0], metrics):
        for number, line in enumerate(lines):
            points = [(x, rows[arm][metric]) for x, arm in line.arms.items() if metric in rows[arm]]
            colour = COLOURS[number % len(COLOURS)]
            style = {"linestyle": DASHES[number % len(DASHES)], "marker": MARKERS[number % len(MARKERS)]}
            ax.plot([x for x, _ in points], [p.mean for _, p in points], color=colour, markersize=3.5, label=line.name,
                    **style)  # fmt: skip
            low = [p.mean - p.half if p.half is not None else float("nan") for _, p in points]
            high = [p.mean + p.half if p.half is not None else float("nan") for _, p in points]
            ax.fill_between([x for x, _ in points], low, high, color=colour, alpha=0.15, linewidth=0)
        values = sorted({x for line in lines for x in line.arms})
        if axis.logarithmic:
            ax.set_xscale("log")
        shown = spaced(values, axis.logarithmic)
        ax.set_xticks(values, [f"{x:g}" if x in shown else "" for x in values])
        ax.minorticks_off()
        ax.set_title(f"{METRICS[metric]} (%)")
        ax.grid(alpha=0.3, linewidth=0.5)
    figure.supxlabel(axis.title, fontsize=8)
    if len(lines) > 1:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        add_legend(figure, dict(zip(labels, handles)), "upper")
    return figure


def spaced(values: Sequence[float], logarithmic: bool) -> list[float]:
    """Of ascending values those whose labels have room: an axis has room for about five."""
    places = [math.log(x) if logarithmic else x for x in values]
    shown = [0]
    for number in range(1, len(values)):
        if places[number] - places[shown[-1]] >= 0.18 * (places[-1] - places[0]):
            shown.append(number)
    return [values[number] for number in shown]


def draw(args: argparse.Namespace) -> list[Path]:
    file = load_study(args.file)
    arms = file.chosen(args.arms)
    finished = Finished(load_results(args.results), file)
    rows = arm_rows(finished, (TEACHER, *arms), args.part, args.metrics)
    if not set(rows) - {TEACHER}:
        remedy = "run tools/study.py --test, or pass --part validation" if args.part == "test" else "run the study"
        raise UserError(
            f"{args.results} has no finished arm with {' or '.join(args.metrics)} on the {args.part} sets, expected "
            f"some: {remedy}"
        )
    differences = difference_rows(finished, arms, args.part, args.metrics)
    paths = save_figure(arms_figure(rows), args.out / "study_arms")
    if differences:
        paths += save_figure(differences_figure(differences), args.out / "study_differences")
    for name, lines in sweeps(finished, [arm for arm in arms if arm in rows]).items():
        if lines:
            paths += save_figure(sweep_figure(AXES[name], lines, rows), args.out / f"study_sweep_{name}")
    return paths
