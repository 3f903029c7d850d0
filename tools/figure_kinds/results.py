"""Figure 1 of the CLIP-CID paper: results of one task over data sets, as a radar and as bars.

Reads the JSON files of tools/eval.py and of CLIP_benchmark; of a directory, all *.json. Writes fig1a_radar, for at
least three data sets, and fig1b_bars. Every model needs a result on every data set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import study_report
from figure_kinds.labels import Source, source
from megacid.errors import UserError, nearest
from megacid.evaluate.suite import SUITES, set_name
from megacid.evaluate.tasks import ADAMW, UNPROJECTED
from megacid.models.hub import LOCAL_DIR, display_name, has_own_weights
from megacid.offline.figure_style import COLOURS, MARKERS, PAGE, add_legend, new_figure, save_figure
from megacid.storage.atomic import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROBE = ("lp_acc1", "lp_mean_average_precision")
# CLIP_benchmark's name of a task -> the metrics that are drawn: of each data set the first that its results have.
METRICS = {
    "linear_probe": _PROBE,
    UNPROJECTED: _PROBE,
    ADAMW: _PROBE,
    "zeroshot_classification": ("acc1", "mean_average_precision"),
    "knn": ("knn_acc1",),
    "zeroshot_retrieval": ("image_retrieval_recall@5",),
}
TITLES = study_report.METRICS | {
    **dict.fromkeys(("lp_mean_average_precision", "mean_average_precision"), "mAP"),
    "knn_acc1": "kNN top-1",
}
_FEATURES_OR_FIT = {UNPROJECTED: ", features before the projection", ADAMW: ", AdamW"}  # in titles
_SPOKES = 3  # data sets of a radar, at least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", type=source, nargs="+", metavar="[LABEL=]PATH", help="JSON file of a result, or directory of them"
    )
    parser.add_argument("--task", choices=METRICS, default="linear_probe", help="task (default: linear_probe)")
    parser.add_argument(
        "--metric", help="metric of the task, a share from 0 to 1 (default: lp_acc1, or that of another task)"
    )
    parser.add_argument(
        "--datasets", nargs="+", metavar="NAME", help="data sets to show, in this order (default: all that occur)"
    )


@dataclass(frozen=True)
class Table:
    """Percent by model and data set, [models, datasets]; metrics: one per data set."""

    models: list[str]
    datasets: list[str]
    metrics: list[str]
    percent: np.ndarray

    @property
    def metric(self) -> str:
        """The metric of most data sets."""
        return max(self.metrics, key=self.metrics.count)

    @property
    def names(self) -> list[str]:
        """The data sets as they are written, without the folders of their names where these are not needed."""
        short = [name.rpartition("/")[2] for name in self.datasets]
        names = short if len(set(short)) == len(short) else self.datasets
        return [
            name if metric == self.metric else f"{name}\n({TITLES.get(metric, metric)})"
            for name, metric in zip(names, self.metrics)
        ]


def read_results(sources: Sequence[Source], task: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics by model and data set, of the results of this task. Names of data sets lack CLIP_benchmark's "wds/".

    Raises:
        UserError: no result of the task, a file that is none, two results of a model on a data set that differ, or a
            label of two models.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    models: dict[str, str] = {}  # by label
    tasks = set()
    for given in sources:
        path = Path(given.text)
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        for file in files:
            result = read_json(file)
            _check(file, result)
            tasks.add(_task(result))
            if _task(result) != task:
                continue
            model, dataset = _model(result), set_name(result["dataset"])
            label = given.label or (display_name(model) if has_own_weights(model) else model)
            if (other := models.setdefault(label, model)) != model:
                raise UserError(
                    f"the label {label!r} has results of 2 models ({'; '.join(sorted((model, other)))}), expected one: "
                    "give each model its own, LABEL=PATH"
                )
            if found.setdefault(label, {}).setdefault(dataset, result["metrics"]) != result["metrics"]:
                raise UserError(
                    f"{file} and an earlier file have different results of {model} on {dataset}, expected one: leave "
                    "one of them out"
                )
    if not found:
        known = f", only of {', '.join(sorted(tasks))}" if tasks else ""
        where = ", ".join(given.text for given in sources)
        raise UserError(f"{where} has no result of {task}{known}: run tools/eval.py first, or pass another --task")
    return found


def _check(file: Path, result: Any) -> None:
    """Raise UserError unless this is a result in CLIP_benchmark's schema."""
    keys = {"dataset": str, "model": str, "pretrained": str, "task": str, "metrics": dict}
    wrong = [key for key, kind in keys.items() if not isinstance(result, dict) or not isinstance(result.get(key), kind)]
    if wrong:
        reason = f"has no valid {wrong[0]!r}" if isinstance(result, dict) else "is missing or no JSON object"
        raise UserError(f"{file} {reason}, expected a result of tools/eval.py or CLIP_benchmark: leave it out")


def _task(result: dict[str, Any]) -> str:
    """The task by our name: CLIP_benchmark's linear_probe has AdamW's weight decay, ours the strength C of L-BFGS."""
    by_adamw = result["task"] == "linear_probe" and "weight_decay" in result["metrics"]
    return ADAMW if by_adamw else str(result["task"])


def _model(result: dict[str, Any]) -> str:
    """The model of a result: hf-hub:ORG/NAME, local-dir:PATH, or an architecture with the name of its weights.

    A model with weights of its own is in `pretrained` of tools/eval.py, and in `model` of CLIP_benchmark.
    """
    names = result["pretrained"], result["model"]
    own = next(filter(has_own_weights, names), None)
    if own is None:
        return f"{result['model']}, {result['pretrained']}"
    return f"{LOCAL_DIR}{Path(own.removeprefix(LOCAL_DIR)).resolve()}" if own.startswith(LOCAL_DIR) else own


def tabulate(
    found: dict[str, dict[str, dict[str, Any]]], metrics: Sequence[str], datasets: Sequence[str] | None = None
) -> Table:
    """The table of a figure.

    Args:
        found: of `read_results`.
        metrics: of each data set the first that all of its results have is taken.
        datasets: None: all that occur.

    Raises:
        UserError: a model lacks a data set, or a result has none of the metrics.
    """
    known = list(dict.fromkeys(name for of_model in found.values() for name in of_model))
    for name in datasets or ():
        if name not in known:
            raise UserError(f"--datasets has {name!r}, which the results lack: {nearest(name, known)}")
    order = [*SUITES["clip_cid14"], *sorted(known)]
    datasets = list(dict.fromkeys(datasets)) if datasets else sorted(known, key=order.index)
    common = [name for name in datasets if all(name in of_model for of_model in found.values())]
    for model, of_model in found.items():
        if missing := [name for name in datasets if name not in of_model]:
            choice = f"or pass --datasets {' '.join(common)}"
            remedy = choice if common else "since no data set has results of all models"
            raise UserError(
                f"{model} has no result on {', '.join(missing)}, expected those of the other models: evaluate it with "
                f"tools/eval.py, {remedy}"
            )
    chosen = []
    for name in datasets:
        of_set = [of_model[name] for of_model in found.values()]
        shared = [metric for metric in metrics if all(isinstance(one.get(metric), (int, float)) for one in of_set)]
        if not shared:
            numbers = [key for key, value in of_set[0].items() if isinstance(value, float)]
            raise UserError(
                f"a result on {name} has no {' and no '.join(metrics)}, expected it in the results of all models: pass "
                f"--metric, such as one of {', '.join(numbers) or 'none'}"
            )
        metric = shared[0]
        for model, one in zip(found, of_set):
            if not 0 <= one[metric] <= 1:
                raise UserError(
                    f"{metric} of {model} on {name} is {one[metric]:g}, expected a share from 0 to 1: pass another "
                    "--metric"
                )
        chosen.append(metric)
    values = [[100.0 * of_model[name][m] for name, m in zip(datasets, chosen)] for of_model in found.values()]
    return Table(list(found), datasets, chosen, np.array(values))


def radar_figure(table: Table, title: str) -> Figure:
    """One spoke per data set, one line per model, on one scale that begins below the lowest value."""
    figure, axes = new_figure(0.75 * PAGE, 0.62 * PAGE, subplot_kw={"projection": "polar"})
    ax = axes[0, 0]
    angle = 2 * np.pi * np.arange(len(table.datasets)) / len(table.datasets)
    around, lines = np.append(angle, 0.0), {}
    for number, (model, percent) in enumerate(zip(table.models, table.percent)):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        closed = np.append(percent, percent[0])
        (lines[model],) = ax.plot(around, closed, color=colour, marker=marker, markersize=3, linewidth=1.2)
    low = max(0.0, 10 * np.floor((table.percent.min() - 5) / 10))
    high = min(100.0, 10 * np.ceil(table.percent.max() / 10 + 0.01))
    ax.set_theta_zero_location("N")
    ax.set_theta_direction(-1)
    ax.set_xticks(angle, table.names)
    for label, theta in zip(ax.get_xticklabels(), angle):
        side = np.sin(theta)
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    ax.tick_params(axis="x", pad=0)
    ax.set_ylim(low, high)
    step = 10 if high - low <= 60 else 20
    rings = np.arange(low + step, high + 1, step)
    ax.set_yticks(rings, [f"{ring:g}" for ring in rings], fontsize=6, color="#555555")
    ax.set_rlabel_position(180 / len(table.datasets))  # between two spokes
    ax.spines["polar"].set_color("#cccccc")
    ax.grid(color="#cccccc", linewidth=0.5)
    add_legend(figure, lines, "lower", title)
    return figure


def bars_figure(table: Table, title: str) -> Figure:
    """Bars of every data set and model from 0, with their values, and the means over the sets of one metric."""
    names, percent, bars = table.names, table.percent, {}
    of_mean = np.array([metric == table.metric for metric in table.metrics])
    if of_mean.sum() > 1:
        names = [*names, f"mean of {of_mean.sum()}"]
        percent = np.column_stack([percent, percent[:, of_mean].mean(1)])
    models = len(table.models)
    figure, axes = new_figure(0.75 * PAGE, 0.7 + len(names) * (0.125 * models + 0.1))
    ax = axes[0, 0]
    thick = 1 / (models + 0.8)
    for number, model in enumerate(table.models):
        place = np.arange(len(names)) + (number - (models - 1) / 2) * thick
        bars[model] = ax.barh(place, percent[number], thick, color=COLOURS[number % len(COLOURS)])
        ax.bar_label(bars[model], fmt="%.1f", padding=2, fontsize=6)
    ax.set_yticks(np.arange(len(names)), names)
    ax.set_ylim(len(names) - 0.45, -0.55)  # the first set at the top
    ax.set_xlim(0, min(106.0, 1.1 * max(1.0, percent.max())))
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(title)
    add_legend(figure, bars, "upper")
    return figure


def draw(args: argparse.Namespace) -> list[Path]:
    found = read_results(args.results, args.task)
    table = tabulate(found, [args.metric] if args.metric else METRICS[args.task], args.datasets)
    title = f"{TITLES.get(table.metric, table.metric)} (%){_FEATURES_OR_FIT.get(args.task, '')}"
    paths = []
    if len(table.datasets) >= _SPOKES:
        paths += save_figure(radar_figure(table, title), args.out / "fig1a_radar")
    return paths + save_figure(bars_figure(table, title), args.out / "fig1b_bars")
