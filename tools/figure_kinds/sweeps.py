"""The sweeps in a study file: arms that differ in one setting alone, along r, k, or the share of pairs removed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from megacid.config.schema import defaults
from study_file import LEARNING_RATE, StudyFile, Subset
from study_report import Finished

_LEAST = 3  # values of a sweep
_RATE = "megacid.classifier.sample_rate"


class Axis(NamedTuple):
    """What a sweep varies. title: of the x axis."""

    title: str
    logarithmic: bool


AXES = {
    "r": Axis("share r of the classes sampled per step", True),
    "k": Axis("number of clusters k", True),
    "removed": Axis("pairs removed (%)", False),
}


class Sweep(NamedTuple):
    """A line of a figure: arms by x. name: tells it from the other lines of its axis."""

    name: str
    arms: dict[float, str]


def sweeps(finished: Finished, arms: Iterable[str]) -> dict[str, list[Sweep]]:
    """The sweeps with at least 3 values, by axis, among these arms, which have finished runs.

    On the axis of removed pairs, the arm with all pairs begins the lines of each way to choose the subset.
    """
    file = finished.file
    found: dict[str, dict[Any, dict[float, str]]] = {axis: {} for axis in AXES}
    for name in arms:
        arm = file.arms[name]
        if arm.clusters is None:
            continue
        settings = dict(next(iter(finished.runs[name].values()))["settings"])
        settings.pop(LEARNING_RATE, None)  # each arm has its own
        rate = float(settings.pop(_RATE, defaults()["classifier"]["sample_rate"]))
        clusters = file.clusters[arm.clusters]
        same = (arm.teacher, json.dumps(settings, sort_keys=True))
        points = (
            ("r", rate, (same, arm.clusters, arm.subset)),
            ("k", float(clusters.k), (same, rate, clusters.of, arm.subset)),
            *(("removed", removed, (same, rate, arm.clusters, kind)) for removed, kind in _removed(file, name)),
        )
        for axis, x, key in points:
            found[axis].setdefault(key, {}).setdefault(x, name)
    return {
        axis: _named(axis, {key: line for key, line in lines.items() if len(line) >= _LEAST})
        for axis, lines in found.items()
    }


def _removed(file: StudyFile, arm: str) -> list[tuple[float, str]]:
    """(percent of the pairs removed, how they are chosen) of an arm; one with all pairs begins every line."""
    name = file.subset_of(arm)
    if name is None:
        return [(0.0, kind) for kind in sorted({_choice(file, subset)[1] for subset in file.subsets.values()})]
    return [_choice(file, file.subsets[name])]


def _choice(file: StudyFile, subset: Subset) -> tuple[float, str]:
    """(percent of the pairs removed, how they are chosen) of a subset."""
    like = file.subsets[subset.random_as] if subset.random_as is not None else subset
    assert like.share is not None
    if like.one_of is not None:
        chosen = kind = f"one of each {like.one_of}"
    else:
        chosen = f"balanced in {like.clusters or f'{like.cells} cells'}"
        link = "" if like.link == "components" else f" by {like.link} links"
        kind = f"{chosen}{link}, {like.keep} stays"
    if like is not subset:
        kind = f"random, as many as {chosen}"
    return round(100 * (1 - like.share), 6), kind


def _named(axis: str, lines: dict[Any, dict[float, str]]) -> list[Sweep]:
    """A line has the name of its first arm in the file; on the axis of removed pairs that of the choice of pairs."""
    names = [next(iter(line.values())) for line in lines.values()]
    if axis == "removed":
        several = len(set(names)) > 1
        names = [f"{name}: {key[-1]}" if several else key[-1] for name, key in zip(names, lines)]
    return [Sweep(name, dict(sorted(line.items()))) for name, line in zip(names, lines.values())]
