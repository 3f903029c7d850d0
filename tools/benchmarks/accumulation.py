"""Suite accumulation: a training step on one rank in one batch, and divided into micro-batches.

one-batch        the objective on the whole batch
gradient-cache   the same objective and gradients in micro-batches, as the trainer computes them
averaged         the mean of the micro-batches' objectives: another objective, which needs one forward of each

The student and the objective are those of configs/digits_cpu.json; images, texts and targets are random. The losses of
the first two are compared before they are timed. A step is forward, backward, the guard's decision and both updates.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from argtypes import positive
from benchmarks import measure
from benchmarks.suite import Limit, Report, Row, make_report, print_table
from megacid import train
from megacid.config.load import load_run
from megacid.data.batch import Batch
from megacid.distributed.parallel import Parallel, init, shutdown
from megacid.errors import UserError
from megacid.losses import Objective
from megacid.training.components import Components, make_classifier, make_objective, make_student
from megacid.training.evaluation import Evaluation
from megacid.training.open_data import Data
from megacid.training.state import TrainState, with_engine

HELP = "a training step in one batch and in micro-batches with gradient caching"
RUN_FILE = Path(__file__).resolve().parents[2] / "configs" / "digits_cpu.json"
PROVIDERS = ("one-batch", "gradient-cache", "averaged")
WIDTH, CLASSES, TOKENS, SEED = 64, 64, 49_408, 0
ROUNDS, REPEATS, LIMIT = 5, 5, 1.35


class AveragedObjective(Objective):
    """An objective that the trainer averages over micro-batches."""

    is_mean_over_samples = True


class Timeless:
    """Takes the place of `Metrics` and `Lifecycle` in a step."""

    def waited_for_data(self, seconds: float) -> None:
        """Nothing is logged."""

    def asked_after(self, step: int) -> bool:
        return False


def batches_of(total: int, parts: int, width: int, image_shape: tuple[int, ...], length: int) -> list[Batch]:
    """One random batch, in equal parts."""
    g, size = torch.Generator().manual_seed(SEED), total // parts
    whole = {
        "image": torch.randn(total, *image_shape, generator=g),
        "text": torch.randint(1, TOKENS, (total, length), generator=g),
        "label": torch.randint(CLASSES, (total,), generator=g),
        "teacher_image": F.normalize(torch.randn(total, width, generator=g)),
        "teacher_text": F.normalize(torch.randn(total, width, generator=g)),
        "sample_id": torch.arange(total),
    }
    return [Batch(**dict(zip(whole, part))) for part in zip(*(values.split(size) for values in whole.values()))]


def state_of(settings: list[str], width: int, classes: int, parallel: Parallel) -> TrainState:
    """The state of the run file with `settings`, without data. A collective."""
    run = load_run(RUN_FILE, settings, world=parallel.world)
    data = Data(stream=lambda start: iter(()), teacher_dims=(width,), num_classes=classes)  # type: ignore[arg-type,return-value]
    student = make_student(run, data).to(parallel.device)
    run = run.with_embed_dim(width)
    head, row_optimizer = make_classifier(run, data, width, parallel)
    objective, evaluation = make_objective(run, head, parallel), Evaluation(run, [], student, parallel)
    return with_engine(Components(run, data, student, head, row_optimizer, objective, evaluation), parallel)


def build(provider: str, args: argparse.Namespace, parallel: Parallel) -> Callable[[], float]:
    """A function that takes one training step and returns its loss."""
    parts = 1 if provider == "one-batch" else args.micro_batches
    settings = [f"train_batch_size={args.batch}", f"gradient_accumulation_steps={parts}", "classifier.init=random"]
    state = state_of(settings, WIDTH, CLASSES, parallel)
    if provider == "averaged":
        state.objective.__class__ = AveragedObjective
    on_host = batches_of(args.batch, parts, WIDTH, state.student.image_shape, state.student.text_length)
    batches = [batch.copied(lambda x: x.to(parallel.device)) for batch in on_host]
    return partial(one_step, state, itertools.cycle(batches), itertools.count(), Timeless())


def one_step(state: TrainState, batches: Iterator[Batch], steps: Iterator[int], stand_in: Any) -> float:
    output, _ = train.train_step(next(steps), state, batches, stand_in, lambda phase: None, stand_in)
    return float(output.loss)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, default=256, help="samples per step (default 256)")
    parser.add_argument("--micro-batches", type=positive, default=4, help="micro-batches per step (default 4)")


def run(args: argparse.Namespace) -> Report:
    if args.batch % args.micro_batches:
        raise UserError(f"--batch is {args.batch}, expected a multiple of --micro-batches, {args.micro_batches}")
    parallel = init(always=True)
    try:
        steps = {name: build(name, args, parallel) for name in PROVIDERS}
        first = {name: step() for name, step in steps.items()}
        difference = abs(first["gradient-cache"] / first["one-batch"] - 1)
        if not difference < 1e-5:
            raise UserError(
                f"the loss with gradient caching differs from that of one batch by {difference:.1e} of it, expected "
                "< 1e-5: no time is printed; run tests/training/test_gradient_cache.py"
            )
        seconds = measure.take_turns(steps, measure.timer_of(args), ROUNDS, REPEATS)
    finally:
        shutdown()
    parts = {name: 1 if name == "one-batch" else args.micro_batches for name in PROVIDERS}
    rows: list[Row] = [
        {"provider": name, "batch": args.batch, "micro-batches": parts[name], "loss": first[name], "seconds": times}
        for name, times in seconds.items()
    ]
    for row in rows:
        row["time_over_one_batch"] = measure.ratio(measure.median(row), measure.median(rows[0]))
    print_table(rows, COLUMNS)
    return make_report(args, rows)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "provider": lambda row: str(row["provider"]),
    "batch": lambda row: f"{row['micro-batches']} x {row['batch'] // row['micro-batches']}",
    "first loss:": lambda row: f"{row['loss']:.5f}",
    "ms p50 [p20, p80]:": lambda row: measure.format_ms(row["seconds"]),
    "time over one batch:": lambda row: measure.format_value(row["time_over_one_batch"], unit="x"),
}


def check(report: Report) -> list[Limit]:
    """Gradient caching may take at most 35 % longer than one batch."""
    rows = {row["provider"]: row for row in report["results"]}
    value = rows["gradient-cache"]["time_over_one_batch"]
    return [Limit("gradient caching: time over one batch", value, LIMIT, at_least=False)]
