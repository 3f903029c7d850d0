"""Suite student: contrastive training of a student by this trainer and by open_clip_train, on the same batches.

open_clip_train   its train_one_epoch, with DistributedDataParallel on several ranks
bare loop         model, open_clip.ClipLoss, clip_grad_norm_ and torch.optim.AdamW, without anything around them
megacid ZeRO-n    train.train_step: the batch's copy and normalisation, the objective, the guard's decision, the update

Weights, random batches, fp32, AdamW, clipping and learning rate are the same; the losses of the first steps are
compared before any time is printed. All trainers run in the same processes and take turns. open_clip_train gets its
images already normalised. Loading is not part of a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from argtypes import positive
from benchmarks import measure
from benchmarks.ranks import ask_ranks
from benchmarks.student_ranks import PEER, TRAINERS
from benchmarks.suite import Limit, Report, Row, make_report, print_table
from megacid.errors import UserError

HELP = "contrastive training of a student compared with open_clip_train, at 1 and 2 ranks"
MODELS = {"digits-student": 32, "digits-teacher": 112}  # image size by architecture
ROUNDS, REPEATS, TOLERANCE = 7, 3, 1e-4
MIN_SPEED, MAX_ZERO_1 = 1.0, 1.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, default=64, help="samples per rank (default 64)")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2], help="numbers of ranks (default 1 2)")
    parser.add_argument("--models", choices=tuple(MODELS), nargs="+", default=list(MODELS), help="default: all")
    parser.set_defaults(threads=1, clock="cpu")


def check_losses(found: dict[str, Any]) -> None:
    """Raise UserError unless all trainers have the first losses of open_clip_train."""
    for name, values in found.items():
        for step, (loss, expected) in enumerate(zip(values["losses"], found[PEER]["losses"])):
            if not abs(loss / expected - 1) < TOLERANCE:
                raise UserError(
                    f"{name} has loss {loss} at step {step}, expected {expected}, that of {PEER}: no time is printed; "
                    "run tests/training"
                )


def run(args: argparse.Namespace) -> Report:
    if args.device == "cuda":
        raise UserError("--device is cuda, but suite student measures CPUs: use --device cpu")
    rows: list[Row] = []
    for model in args.models:
        for world in args.ranks:
            request = {
                "model": model, "image_size": MODELS[model], "batch": args.batch, "threads": args.threads,
                "rounds": ROUNDS, "repeats": REPEATS, "trainers": list(TRAINERS),
            }  # fmt: skip
            found = ask_ranks("benchmarks.student_ranks", request, world)
            check_losses(found)
            key = f"{args.clock}_s"
            for name, values in found.items():
                row: Row = {"model": model, "pixels": MODELS[model], "ranks": world, "trainer": name}
                row |= {"seconds": values[key], "cpu_s": values["cpu_s"], "wall_s": values["wall_s"]}
                row |= {"operators": values["operators"], "allocated_mib": values["allocated_mib"]}
                row["speed"] = measure.ratio(measure.median({"seconds": found[PEER][key]}), measure.median(row))
                rows.append(row)
    print_table(rows, COLUMNS)
    return make_report(args, rows)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: f"{row['model']}, {row['pixels']} px",
    "ranks": lambda row: str(row["ranks"]),
    "trainer": lambda row: str(row["trainer"]),
    "CPU ms p50 [p20, p80]:": lambda row: measure.format_ms(row["cpu_s"]),
    "wall ms:": lambda row: measure.format_ms(row["wall_s"]),
    "speed:": lambda row: measure.format_value(row["speed"], unit="x"),
    "operators:": lambda row: f"{row['operators']:,.0f}",
    "MiB allocated:": lambda row: f"{row['allocated_mib']:,.0f}",
}


def check(report: Report) -> list[Limit]:
    """At least the speed of open_clip_train; ZeRO-1 at most 5 % over ZeRO-0 at 2 ranks."""
    rows = {(row["model"], row["ranks"], row["trainer"]): row for row in report["results"]}
    limits = []
    for (model, world, name), row in rows.items():
        if name.startswith("megacid"):
            what = f"{model}, {world} ranks, {name}: speed over {PEER}"
            limits.append(Limit(what, row["speed"], MIN_SPEED, at_least=True))
        if world == 2 and name == "megacid ZeRO-1":
            ratio = measure.ratio(measure.median(row), measure.median(rows[model, world, "megacid ZeRO-0"]))
            limits.append(Limit(f"{model}, 2 ranks: ZeRO-1 over ZeRO-0", ratio, MAX_ZERO_1, at_least=False))
    return limits
