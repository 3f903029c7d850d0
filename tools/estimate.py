#!/usr/bin/env python3
"""Estimate the memory, the communication and the time of a step, by part, for one or several numbers of ranks.

    tools/estimate.py --deepspeed_config configs/partial_fc_1m.json --ranks 2
    tools/estimate.py --deepspeed_config configs/vit_l14_zero3.json --ranks 8 64 --num-classes 1000000 --embed-dim 1280

The number of classes and the widths are read from the data, or given as options before the data exist. Activations are
counted by a forward and backward on fake tensors. On a CPU the interpreter and its libraries are included, as measured
in this process. The time is that of a model (docs/scaling.md), for H100 or for the CPU of docs/benchmarks.md; --costs
takes what `tools/bench.py --suite step-time --json FILE` fitted on another machine.
"""

import argparse
import sys
from dataclasses import replace

import torch

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path, positive
from benchmarks.suite import read_report
from megacid.config.conditions import compares_with_teacher, terms_with_teacher
from megacid.config.load import load_run
from megacid.config.schema import RunFile
from megacid.distributed.parallel import init
from megacid.errors import UserError, run_tool
from megacid.training.classifier_plan import plan_classifier
from megacid.training.communication import communication_estimate
from megacid.training.components import make_student
from megacid.training.memory import memory_estimate, memory_warning, shared_memory, student_bytes
from megacid.training.metrics import resident_memory_mib
from megacid.training.open_data import Data, open_data
from megacid.training.step_time import COSTS, Costs, Step


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", required=True, metavar="RUN.json", help="the run file"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the run file; may be repeated",
    )
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=[1], help="numbers of ranks to estimate for (default: 1)"
    )
    parser.add_argument("--num-classes", type=positive, help="number of classes, instead of reading it from the data")
    parser.add_argument(
        "--embed-dim",
        type=positive,
        help="width of all teachers together, instead of reading it; also the student's if student.embed_dim is null",
    )
    parser.add_argument("--feature-dim", type=positive, help="feature width, instead of reading it from the features")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--costs", type=local_path, metavar="FILE.json", help="costs fitted by suite step-time on this device"
    )
    return parser.parse_args(argv)


def describe_data(run: RunFile, args: argparse.Namespace) -> Data:
    """The sizes of the data: from the options where they suffice, else from the data."""
    loss = run.megacid.loss
    clusters = loss.cluster > 0
    features = run.megacid.data.features is not None
    known = args.num_classes if clusters else 0
    width = args.embed_dim
    if compares_with_teacher(loss) or not terms_with_teacher(loss):  # else the teachers may have another width
        width = width or run.megacid.student.embed_dim
    if known is not None and (args.feature_dim if features else width):
        teacher_dims = () if features else (width,)
        return Data(lambda _: iter(()), teacher_dims, known, feature_dim=args.feature_dim)  # type: ignore[arg-type,return-value]
    try:
        return open_data(run, init())
    except UserError as error:
        missing = "--num-classes and " + ("--feature-dim" if features else "--embed-dim")
        raise UserError(f"{error}; or pass {missing} to estimate without the data") from error


def print_table(table: dict[int, dict[str, float]]) -> None:
    """Print a line for each part and their total, with a column for each number of ranks."""
    for name in next(iter(table.values())):
        print_row(name, [f"{column[name]:.1f}" for column in table.values()])
    print_row("total", [f"{sum(column.values()):.1f}" for column in table.values()])


def print_row(name: str, cells: list[str]) -> None:
    print(f"{name:<38}" + "".join(f"{cell:>24}" for cell in cells))


def costs_of(args: argparse.Namespace) -> Costs:
    """The costs of the device, with those of --costs in place of the stated ones."""
    if args.costs is None:
        return COSTS[args.device]
    report = read_report(args.costs, "step-time")
    if report["arguments"]["device"] != args.device:
        raise UserError(
            f"{args.costs} is of device {report['arguments']['device']}, expected {args.device}: pass another --device"
        )
    return replace(COSTS[args.device], source=str(args.costs), **report["costs"])


def print_times(steps: dict[int, Step], costs: Costs) -> None:
    """Print the predicted time of a step by part, with its share."""
    times = {ranks: step.time(costs) for ranks, step in steps.items()}
    totals = {ranks: sum(parts.values()) for ranks, parts in times.items()}
    print(f"\nTime of a step in ms: the prediction of a model with the costs of {costs.source}; not a measurement\n")
    for name in next(iter(times.values())):
        cells = [f"{1e3 * parts[name]:,.1f} ({parts[name] / totals[ranks]:.0%})" for ranks, parts in times.items()]
        print_row(name, cells)
    print_row("total", [f"{1e3 * total:,.1f}" for total in totals.values()])
    print_row(
        "samples per second", [f"{steps[ranks].run.global_batch / total:,.0f}" for ranks, total in totals.items()]
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    costs = costs_of(args)
    runs = {ranks: load_run(args.deepspeed_config, args.set, world=ranks) for ranks in args.ranks}
    first = load_run(args.deepspeed_config, args.set, world=1)  # one process reads the data
    data = describe_data(first, args)
    base = 0.0
    if args.device == "cpu":
        import megacid.distributed.engine  # noqa: F401  (the trainer's largest import)

        base = resident_memory_mib()
    student = make_student(first, data)
    parameters = sum(p.numel() for p in student.parameters())
    estimates = {
        ranks: memory_estimate(run, student, data.num_classes or 0, ranks, args.device, data.teacher_dim)
        for ranks, run in runs.items()
    }
    print(f"{args.deepspeed_config}: student {parameters / 1e6:.2f} M parameters, width {student.embed_dim}, "
          f"{data.num_classes or 0:,} classes; MiB of rank 0 on {args.device}\n")  # fmt: skip
    print_row("ranks", [f"{ranks}" for ranks in args.ranks])
    print_row("global batch", [f"{run.global_batch}" for run in runs.values()])
    print_row("process", [f"{base:.1f}"] * len(runs))
    first_estimate = estimates[args.ranks[0]]
    for name in first_estimate.always:
        print_row(name, [f"{estimate.always[name]:.1f}" for estimate in estimates.values()])
    print("\nin addition, one at a time:")
    for name in first_estimate.phases:
        print_row(name, [f"{estimate.phases[name]:.1f}" for estimate in estimates.values()])
    print()
    print_row("peak", [f"{base + estimate.peak:.1f}" for estimate in estimates.values()])
    print_row("largest phase", [estimate.largest_phase for estimate in estimates.values()])
    print_row("host, for a checkpoint", [f"{estimate.checkpoint:.1f}" for estimate in estimates.values()])
    print_row("host, offloaded optimizer", [f"{estimate.offloaded:.1f}" for estimate in estimates.values()])
    print_row("host, prefetched images", [f"{shared_memory(run, student):.1f}" for run in runs.values()])
    for ranks, estimate in estimates.items():
        if warning := memory_warning(estimate.peak, data.num_classes or 0, args.device):
            print(f"\n{ranks} rank{'s' * (ranks > 1)}: {warning}")
    if data.num_classes:
        print("\nClassifier, a step of rank 0\n")
        for ranks, run in runs.items():
            reserved = student_bytes(run, student, ranks, args.device)
            plan = plan_classifier(run, data.num_classes, student.embed_dim, ranks, args.device, reserved)
            print(f"{ranks} rank{'s' * (ranks > 1)}: {plan}")
    steps = {
        ranks: Step.of(run, student, data.num_classes or 0, ranks, args.device, data.teacher_dim)
        for ranks, run in runs.items()
    }
    numbers = (sum(one.number for one in step.collectives) for step in steps.values())
    print("\nCommunication of a step; MiB that a rank sends in a ring\n")
    print_row("collectives", [f"{number}" for number in numbers])
    print_table({ranks: communication_estimate(step.collectives, ranks) for ranks, step in steps.items()})
    print_times(steps, costs)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
