"""Suite step-time: fits the costs of the model of a training step (megacid.training.step_time) to measured steps.

A grid of ranks, classes and batches is measured. Each third of it is then predicted by costs that are fitted to the
other two, which gives the error of the model at points that it has not seen. The costs in the --json file, which
tools/estimate.py --costs reads, are fitted to the whole grid.

The student and the objective are those of configs/digits_cpu.json on a CPU, and a ViT-B/32 with the same objective in
bf16 on a GPU, where one rank is measured and the costs of communication are not fitted. Images, texts and targets are
random. Loading is not part of a step.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.accumulation import RUN_FILE
from benchmarks.ranks import ask_ranks
from benchmarks.suite import Limit, Report, Row, make_report, print_table
from megacid.config.load import load_run
from megacid.models.student import Student
from megacid.training.components import make_student
from megacid.training.open_data import Data
from megacid.training.step_time import Costs, Step

HELP = "costs of a training step by the model of tools/estimate.py, and its error at points that were held out"
ROUNDS, REPEATS, FOLDS, MAX_ERROR = 5, 3, 3, 0.25
# Of a step without gradient checkpointing in one precision, on one node.
FITTED = ("tower_flop", "product_flop", "memory_byte", "link_byte", "hop", "step")


class Grid(NamedTuple):
    """What is measured. batches: per rank."""

    settings: tuple[str, ...]
    width: int
    ranks: tuple[int, ...]
    classes: tuple[int, ...]
    batches: tuple[int, ...]


GRIDS = {
    "cpu": Grid(("classifier.sample_rate=0.25",), 64, (1, 2), (32_000, 128_000, 512_000), (32, 128)),
    "cuda": Grid(
        ("classifier.sample_rate=1.0", "student.model=ViT-B-32", "bf16.enabled=true"),
        512, (1,), (100_000, 400_000, 1_600_000), (256, 1024),
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=1, clock="cpu")


def settings_of(grid: Grid, batch: int, world: int) -> list[str]:
    return [*grid.settings, "classifier.init=random", f"train_batch_size={batch * world}"]


def columns_of(grid: Grid, world: int, classes: int, batch: int, device: str) -> list[float]:
    """Units of each of FITTED in a step. The model is linear in them on one node."""
    run = load_run(RUN_FILE, settings_of(grid, batch, world), world=world)
    student = make_student(run, Data(lambda start: iter(()), (grid.width,), classes))  # type: ignore[arg-type,return-value]
    assert isinstance(student, Student)
    step = Step.of(run.with_embed_dim(grid.width), student, classes, world, device)
    return [sum(step.time(replace(Costs(), **{name: 1.0})).values()) for name in FITTED]


def fit(columns: Tensor, seconds: Tensor) -> Tensor:
    """The costs >= 0 with the least squared relative errors of columns @ costs, by trying every set of positive ones.

    Args:
        columns: [n, k] float64.
        seconds: [n] float64, > 0.
    """
    relative = columns / seconds[:, None]
    scale = relative.norm(dim=0).clamp_min(1e-300)
    best, least = torch.zeros(columns.shape[1], dtype=torch.float64), float("inf")
    for flags in itertools.product((False, True), repeat=columns.shape[1]):
        chosen = [i for i, flag in enumerate(flags) if flag and columns[:, i].any()]
        part = relative[:, chosen] / scale[chosen]
        found = torch.linalg.lstsq(part, torch.ones(len(part), 1, dtype=torch.float64)).solution[:, 0]
        error = float((part @ found - 1).square().sum())
        if (found >= 0).all() and error < least:
            best, least = torch.zeros_like(best), error
            best[chosen] = found / scale[chosen]
    return best


def run(args: argparse.Namespace) -> Report:
    grid, key = GRIDS[args.device], f"{args.clock}_s"
    rows: list[Row] = []
    for world in grid.ranks:
        points = {
            f"{classes} {batch}": {"classes": classes, "settings": settings_of(grid, batch, world)}
            for classes, batch in itertools.product(grid.classes, grid.batches)
        }
        request = {"points": points, "width": grid.width, "threads": args.threads, "rounds": ROUNDS, "repeats": REPEATS}
        for name, times in ask_ranks("benchmarks.step_time_ranks", request, world, args.device).items():
            classes, batch = map(int, name.split())
            cpu_s = [seconds / world for seconds in times["cpu_s"]]
            row: Row = {"ranks": world, "classes": classes, "batch": batch, "wall_s": times["wall_s"], "cpu_s": cpu_s}
            rows.append(row | {"seconds": row[key]})
    columns = torch.tensor([columns_of(grid, *point_of(row), args.device) for row in rows], dtype=torch.float64)
    seconds = torch.tensor([measure.median(row) for row in rows], dtype=torch.float64)
    for row, value, predicted in zip(rows, seconds.tolist(), held_out(columns, seconds, folds_of(rows, grid)).tolist()):
        row |= {"predicted_s": predicted, "error": predicted / value - 1}
    print_table(rows, COLUMNS)
    costs = {name: cost for name, cost, used in zip(FITTED, fit(columns, seconds).tolist(), columns.any(0)) if used}
    print(
        "\nseconds per unit, fitted to all points: " + ", ".join(f"{name} {cost:.3g}" for name, cost in costs.items())
    )
    return make_report(args, rows) | {"costs": costs}


def point_of(row: Row) -> tuple[int, int, int]:
    return row["ranks"], row["classes"], row["batch"]


def folds_of(rows: list[Row], grid: Grid) -> Tensor:
    """The third of the grid that each row is in; each has points of all ranks, classes and batches."""
    axes = (grid.ranks, grid.classes, grid.batches)
    return torch.tensor([sum(axis.index(at) for axis, at in zip(axes, point_of(row))) % FOLDS for row in rows])


def held_out(columns: Tensor, seconds: Tensor, folds: Tensor) -> Tensor:
    """The seconds of each row as predicted by costs that are fitted to the rows of the other folds."""
    predicted = torch.empty_like(seconds)
    for fold in folds.unique():
        own = folds == fold
        predicted[own] = columns[own] @ fit(columns[~own], seconds[~own])
    return predicted


COLUMNS: dict[str, Callable[[Row], str]] = {
    "ranks": lambda row: str(row["ranks"]),
    "classes": lambda row: f"{row['classes']:,}",
    "batch per rank": lambda row: str(row["batch"]),
    "CPU ms of a rank p50 [p20, p80]:": lambda row: measure.format_ms(row["cpu_s"]),
    "wall ms:": lambda row: measure.format_ms(row["wall_s"]),
    "predicted ms:": lambda row: f"{1e3 * row['predicted_s']:.1f}",
    "error:": lambda row: f"{100 * row['error']:+.0f} %",
}


def check(report: Report) -> list[Limit]:
    """The largest error at a held-out point."""
    errors = [abs(row["error"]) for row in report["results"] if "error" in row]
    return [Limit("largest relative error at held-out points", max(errors), MAX_ERROR, at_least=False)]
