"""Training curves of several runs, from their TensorBoard files, one panel per scalar.

Writes curves. A run without a scalar, such as the loss of a term that it lacks, has no line in that panel.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from figure_kinds.labels import check_distinct, source
from megacid.errors import UserError, nearest
from megacid.offline.figure_style import COLOURS, DASHES, PAGE, add_legend, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TAGS = {  # TensorBoard tag -> title of its panel
    "train/contrastive": "contrastive loss",
    "train/instance": "instance loss",
    "train/cluster/student_ce": "CE(student, pseudo label)",
    "train/cosine_image": "cosine to the teacher's image",
    "classifier/target_cosine": "cosine to the own cluster",
    "train/grad_norm": "joint gradient norm",
}
Curve = tuple[np.ndarray, np.ndarray]  # steps, values
Curves = dict[str, Curve]  # by tag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=source, nargs="+", metavar="[LABEL=]RUN", help="run directory written by train.py")
    parser.add_argument(
        "--tags", nargs="+", metavar="TAG", help=f"scalars (default: those of {', '.join(TAGS)} that occur)"
    )


def read_curves(run: Path) -> Curves:
    """All scalars of a run, by tag. Raises UserError when it has none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})  # 0: all of them
    if (run / "tensorboard").is_dir():
        events.Reload()
    tags = events.Tags()["scalars"]
    if not tags:
        raise UserError(
            f'{run / "tensorboard"} has no scalars, expected those of a run whose trackers include "tensorboard": '
            "pass a directory that train.py wrote"
        )
    points = {tag: events.Scalars(tag) for tag in tags}
    return {
        tag: (np.array([p.step for p in of_tag]), np.array([p.value for p in of_tag])) for tag, of_tag in points.items()
    }


def choose_tags(runs: Mapping[str, Curves], tags: list[str] | None) -> dict[str, str]:
    """Tags to show and their titles. Raises UserError when one is in no run."""
    known = sorted({tag for curves in runs.values() for tag in curves})
    for tag in tags or ():
        if tag not in known:
            raise UserError(f"--tags has {tag!r}, which no run has: {nearest(tag, known)}")
    chosen = {tag: TAGS.get(tag, tag) for tag in tags or TAGS if tag in known}
    if not chosen:
        raise UserError(f"no run has {', '.join(TAGS)}, expected one of them: pass --tags, some of {', '.join(known)}")
    return chosen


def curves_figure(runs: Mapping[str, Curves], titles: Mapping[str, str]) -> Figure:
    """One panel per tag, one line per run. titles: by tag."""
    columns = min(len(titles), 3 if len(titles) > 4 else 2)
    rows = -(-len(titles) // columns)
    figure, axes = new_figure(PAGE, 1.75 * rows + 0.4, rows, columns)
    lines = {}
    for ax, (tag, title) in zip(axes.flat, titles.items()):
        for number, (label, curves) in enumerate(runs.items()):
            if tag in curves:
                steps, values = curves[tag]
                dashes = DASHES[number // len(COLOURS) % len(DASHES)]
                options = {"marker": "o", "markersize": 2.5} if len(steps) == 1 else {}
                colour = COLOURS[number % len(COLOURS)]
                (lines[label],) = ax.plot(steps, values, color=colour, linestyle=dashes, linewidth=1.1, **options)
        ax.set_title(title)
        ax.grid(alpha=0.3, linewidth=0.5)
    for ax in axes.flat[len(titles) :]:
        ax.axis("off")
    for column in range(columns):
        shown = [ax for ax in axes[:, column] if ax.axison]
        shown[-1].set_xlabel("step")
    add_legend(figure, {label: lines[label] for label in runs if label in lines}, "lower")
    return figure


def draw(args: argparse.Namespace) -> list[Path]:
    labels = [run.label or Path(run.text).resolve().name for run in args.runs]
    check_distinct(labels)
    runs = {label: read_curves(Path(run.text)) for label, run in zip(labels, args.runs)}
    titles = choose_tags(runs, args.tags)
    return save_figure(curves_figure(runs, titles), args.out / "curves")
