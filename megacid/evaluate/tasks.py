"""The tasks on sets of images by name, and their results in CLIP_benchmark's schema."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megacid.evaluate.adamw_probe import adamw
from megacid.evaluate.datasets import Benchmark
from megacid.evaluate.execution import DEFAULT, Execution
from megacid.evaluate.knn import NEIGHBORS, knn
from megacid.evaluate.linear_probe import linear_probe
from megacid.evaluate.retrieval import retrieval
from megacid.evaluate.zero_shot import zero_shot, zero_shot_multilabel
from megacid.failpoints import failpoint
from megacid.models.clip import LoadedClip
from megacid.models.hub import has_own_weights
from megacid.models.unprojected import before_projection
from megacid.storage.atomic import disk_errors, write_json_atomic

_OF_AVERAGE = "-ema"
# Our name -> CLIP_benchmark's, which has no kNN.
TASKS = {"zero_shot": "zeroshot_classification", "linear_probe": "linear_probe", "knn": "knn"}
# linear_probe on other features, and with another fit: tasks of their own, only where they are named.
UNPROJECTED, ADAMW = "linear_probe_pre_projection", "linear_probe_adamw"
MULTILABEL_TASKS = ("zero_shot", "linear_probe")  # of sets whose dataset_type.txt says "multilabel"
RETRIEVAL_TASKS = {"retrieval": "zeroshot_retrieval"}  # of sets whose dataset_type.txt says "retrieval"


def evaluate(
    task: str, clip: LoadedClip, benchmark: Benchmark, how: Execution = DEFAULT, *, neighbors: int = NEIGHBORS
) -> dict[str, Any]:
    """One result in CLIP_benchmark's schema, with its names of the metrics. A collective of the ranks of `how`.

    Args:
        task: a key of TASKS, UNPROJECTED, ADAMW, or a key of RETRIEVAL_TASKS for a retrieval set.

    Raises:
        UserError: the set is incomplete or a sample is bad; the same on every rank.
    """
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "zero_shot": lambda: (zero_shot_multilabel if benchmark.multilabel else zero_shot)(
            clip, benchmark, how
        ).metrics(),
        "linear_probe": lambda: linear_probe(clip, benchmark, how),
        UNPROJECTED: lambda: linear_probe(before_projection(clip), benchmark, how),
        ADAMW: lambda: linear_probe(clip, benchmark, how, recipe=adamw),
        "knn": lambda: knn(clip, benchmark, how, neighbors=neighbors),
        "retrieval": lambda: retrieval(clip, benchmark.root, how),
    }
    model = {"model": clip.name, "pretrained": clip.pretrained, "task": (TASKS | RETRIEVAL_TASKS).get(task, task)}
    return {"dataset": benchmark.name, **model, "metrics": run[task](), "language": "en"}


def weights_name(run: Path, step: int, *, ema: bool = False) -> str:
    """The name in results of a run's weights after `step` steps, or of their moving average."""
    return f"{run.resolve().name}-step-{step}{_OF_AVERAGE if ema else ''}"


def is_of_average(result: dict[str, Any]) -> bool:
    """Whether a result of `evaluate` is that of the moving average of a run's weights."""
    return re.search(rf"-step-\d+{_OF_AVERAGE}\Z", str(result.get("pretrained"))) is not None


def result_file(folder: Path, dataset: str, model: str, pretrained: str, task: str) -> Path:
    """The JSON file of a result of `evaluate`. task: CLIP_benchmark's name."""
    weights = [] if has_own_weights(pretrained) else [pretrained]  # the model's name tells
    return json_file(folder, dataset, model, *weights, task)


def json_file(folder: Path, *names: str) -> Path:
    """The JSON file whose name is made of `names`."""
    return folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', '_'.join(names))}.json"


def write_result(file: Path, result: dict[str, Any]) -> Path:
    """Write a result atomically and remove temporary files of killed runs. UserError if the disk is full."""
    failpoint("eval:before_result")
    with disk_errors(file):
        for path in file.parent.glob(f".tmp-*-{file.name}"):
            path.unlink(missing_ok=True)
        write_json_atomic(file, result)
    failpoint("eval:task_done")
    return file
