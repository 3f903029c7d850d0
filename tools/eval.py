#!/usr/bin/env python3
"""Evaluate a CLIP on local classification and retrieval sets, or a classification run on a features directory.

A set of images is a directory in CLIP_benchmark's webdataset layout; its tasks are zero_shot, linear_probe and knn.
Where its dataset_type.txt says multilabel they are zero_shot and linear_probe, where it says retrieval, retrieval.
--suite evaluates many sets. One that fails does not stop the others; the exit code is then 2.
A features directory is one of tools/synthesize.py; its tasks, on the test split, are head (nearest class row) and
nearest_class_mean.

    tools/eval.py --run runs/digits --dataset-root data/digits/test --out results
    tools/eval.py --run runs/digits --ema --dataset-root data/digits/test --out results
    tools/eval.py --model local-dir:export/digits --dataset-root data/digits/test --tasks zero_shot --out results
    tools/eval.py --model ViT-B-32 --pretrained laion2b_s34b_b79k --dataset-root wds/cifar10 --out results
    tools/eval.py --run runs/digits --suite wds --tasks zero_shot --out results
    tools/eval.py --run runs/digits --suite clip_cid14 --data wds --out results
    deepspeed tools/eval.py --run runs/digits --suite clip_cid14 --data wds --out results
    tools/eval.py --run runs/partial_fc_1m --features data/features-1m --limit 10000 --out results

Every task writes one JSON file that `clip_benchmark build` reads. A result file is complete or absent, and the same
command writes the same bytes. SIGTERM ends the tool with exit code 143, on several ranks after the batch under way.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path, natural, positive
from megacid.data.features import FeatureSet
from megacid.distributed.collectives import rank
from megacid.distributed.consensus import agree, fail_together
from megacid.distributed.parallel import Parallel, accept_launcher_arguments
from megacid.distributed.progress import progress_bar
from megacid.distributed.stopping import Progress, StopRequest, run_alone, run_stage
from megacid.errors import UserError, printable, run_tool
from megacid.evaluate.datasets import Benchmark
from megacid.evaluate.execution import Execution
from megacid.evaluate.export import student_from_run
from megacid.evaluate.features import TASKS as FEATURE_TASKS
from megacid.evaluate.features import accuracy, tasks_for, trained_tower
from megacid.evaluate.knn import NEIGHBORS
from megacid.evaluate.suite import SUITES, choose_sets, known_tasks, named_tasks, open_set
from megacid.evaluate.tasks import (
    ADAMW,
    RETRIEVAL_TASKS,
    TASKS,
    UNPROJECTED,
    evaluate,
    json_file,
    result_file,
    weights_name,
    write_result,
)
from megacid.models.clip import LoadedClip, load_clip
from megacid.models.student import loaded_student

ACCURACIES = ("acc1", "acc5", "mean_per_class_recall", "mean_average_precision")
COLLECTIVE_TIMEOUT_S = 7200.0  # every rank fits the linear probe, at its own speed


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="open_clip architecture, local-dir:PATH, or hf-hub:ORG/NAME")
    which.add_argument("--run", type=local_path, help="run directory written by train.py")
    parser.add_argument("--pretrained", help="tag or file of the weights, for --model NAME")
    parser.add_argument(
        "--step", type=natural, help="step of the checkpoint, for --run (default: the newest valid one)"
    )
    parser.add_argument(
        "--ema", action="store_true", help="evaluate the moving average of the weights (student.ema_decay), for --run"
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset-root", type=local_path, help="evaluation set in CLIP_benchmark's layout")
    data.add_argument(
        "--suite", help=f"many sets: all in this directory, or those of {', '.join(SUITES)} that are in --data"
    )
    data.add_argument("--features", type=local_path, help="features directory, for --run")
    parser.add_argument("--data", type=local_path, help="directory with the sets of a --suite that has a name")
    parser.add_argument("--dataset-name", help="name of the data in the results (default: the directory's name)")
    parser.add_argument(
        "--tasks",
        help="comma-separated (default: all of the set's kind): zero_shot, linear_probe, knn; retrieval; with "
        f"--features head, nearest_class_mean; by name alone {UNPROJECTED}, {ADAMW}",
    )
    parser.add_argument(
        "--neighbors", type=positive, default=NEIGHBORS, help=f"k of the task knn (default: {NEIGHBORS})"
    )
    parser.add_argument("--limit", type=positive, help="use only the first LIMIT test rows, for --features")
    parser.add_argument("--out", type=local_path, required=True, help="directory for the JSON files")
    parser.add_argument("--batch-size", type=positive, default=256, help="images per forward (default: 256)")
    parser.add_argument(
        "--workers",
        type=natural,
        default=0,
        help="processes that decode images (default: 0, decode in the main process)",
    )
    parser.add_argument(
        "--precision", default="fp32", help="fp32 (default), bf16 or fp16, for --model; --run uses fp32"
    )
    parser.add_argument(
        "--device",
        help="cpu, cuda, cuda:1, ... (default: cuda if available, of a launcher's rank its own)",
    )
    accept_launcher_arguments(parser)
    args = parser.parse_args(argv)
    args.tasks = [task.strip() for task in args.tasks.split(",")] if args.tasks else None
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    if args.features and not args.run:
        raise UserError(f"--features is {args.features} without --run, expected both: add --run DIRECTORY")
    if args.features and (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"--features runs on {world} ranks, expected one: start the tool without a launcher")
    if args.limit is not None and not args.features:
        raise UserError(f"--limit is {args.limit} without --features, expected both: add --features DIRECTORY")
    known = FEATURE_TASKS if args.features else (*TASKS, UNPROJECTED, ADAMW, *RETRIEVAL_TASKS)
    for task in args.tasks or ():
        if task not in known:
            raise UserError(f"--tasks has {task!r}, expected some of {', '.join(known)}")
    if args.run and (args.pretrained or args.precision != "fp32"):
        raise UserError(
            "--pretrained and --precision apply to --model only, a --run has its own fp32 weights: leave them out"
        )
    if args.data and not args.suite:
        raise UserError(f"--data is {args.data} without --suite, expected both: add --suite NAME")
    if args.dataset_name and args.suite:
        raise UserError("--dataset-name names one set, expected none with --suite: leave it out")
    if args.step is not None and not args.run:
        raise UserError(f"--step is {args.step} without --run, expected both: add --run DIRECTORY")
    if args.ema and not args.run:
        raise UserError("--ema is set without --run, expected both: add --run DIRECTORY")


def load(args: argparse.Namespace) -> LoadedClip:
    if args.run:
        student, step = student_from_run(args.run, args.step, ema=args.ema)
        return loaded_student(student, weights_name(args.run, step, ema=args.ema), args.device)
    return load_clip(args.model, args.pretrained, device=args.device, precision=args.precision)


def evaluate_features(args: argparse.Namespace) -> int:
    """Run the tasks on feature vectors; their metric is acc1."""
    train = FeatureSet(args.features)
    trained = trained_tower(args.run, train, args.step, args.device, ema=args.ema)
    name = args.dataset_name or args.features.resolve().name
    run = weights_name(args.run, trained.step, ema=args.ema)
    test = FeatureSet(args.features, "test")
    rows = min(args.limit or test.num_rows, test.num_rows)
    print(f"{name}: {test.classes:,} classes, {rows:,} of {test.num_rows:,} test rows, {run}")
    parameters = sum(p.numel() for p in trained.tower.parameters())
    for task in args.tasks or tasks_for(train):
        embedded = rows + (train.num_rows if task == "nearest_class_mean" else 0)
        flop = 2.0 * (embedded * parameters + rows * test.classes * trained.tower.embed_dim)
        print(f"{task}: {embedded:,} rows to embed, {rows:,} x {test.classes:,} products, {flop:.3g} flop")
        with progress_bar(task, "class", test.classes) as bar:
            metrics = accuracy(task, trained, args.features, limit=args.limit, progress=bar.update)
        scored = {"dataset": name, "model": "feature-mlp", "pretrained": run, "task": task, "metrics": metrics}
        file = write_result(json_file(args.out, name, run, task), {**scored, "language": "en"})
        print(f"{task:20}acc1 {metrics['acc1']:.4f}  {file}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        how = Execution(args.batch_size, args.workers)
        return run_alone(lambda: evaluate_features(args) if args.features else evaluate_sets(args, how))

    def stage(parallel: Parallel, stop: StopRequest) -> None:
        @contextlib.contextmanager
        def images(describe: str, total: int) -> Iterator[Progress]:
            with progress_bar(describe, "img", -(-total // parallel.world), enabled=parallel.is_first) as bar:
                yield stop.polling(bar.update)

        args.device = args.device or parallel.device
        evaluate_sets(args, Execution(args.batch_size, args.workers, parallel.group, images))

    return run_stage(stage, args.out, COLLECTIVE_TIMEOUT_S)


class Report:
    """The results on the terminal of the first rank, and what has failed.

    Args:
        suite: whether a set that fails is left out; otherwise its error ends the tool.
    """

    def __init__(self, *, suite: bool, enabled: bool) -> None:
        self.suite, self.enabled = suite, enabled
        self.failed: list[str] = []
        self.accuracies: dict[str, list[float]] = {}

    def say(self, text: str, file: TextIO | None = None) -> None:
        if self.enabled:
            print(printable(text), file=file, flush=True)

    @contextlib.contextmanager
    def leaving_out(self, what: str) -> Iterator[None]:
        """A block of a suite whose UserError is printed and remembered."""
        try:
            yield
        except UserError as error:
            if not self.suite:
                raise
            self.failed.append(what)
            self.say(f"left out: {what}: {error}", sys.stderr)

    def add(self, task: str, scored: dict[str, Any], file: Path) -> None:
        """Print a result."""
        metrics = scored["metrics"]
        prefix = "lp_" if task.startswith("linear_probe") else "knn_" if task == "knn" else ""
        names = [name for name in metrics if name.removeprefix(prefix) in ACCURACIES or "_recall@" in name]
        values = "  ".join(f"{name.removeprefix(prefix)} {metrics[name]:.4f}" for name in names)
        self.say(f"{scored['dataset']:24}{task:28}{values}  {file}")
        if not metrics.get("converged", True):
            self.say(f"note: the fit has not converged after {metrics['iterations']} iterations")
        if f"{prefix}acc1" in metrics:
            self.accuracies.setdefault(task, []).append(metrics[f"{prefix}acc1"])

    def finish(self) -> None:
        """Print the mean accuracy of a suite. UserError when something was left out."""
        for task, values in self.accuracies.items():
            if len(values) > 1:
                self.say(f"{f'mean of {len(values)} sets':24}{task:28}acc1 {sum(values) / len(values):.4f}")
        if self.failed:
            count = f"{len(self.failed)} result" + "s" * (len(self.failed) > 1)
            raise UserError(f"{count} left out for the reasons above, expected none: {'; '.join(self.failed)}")


def evaluate_sets(args: argparse.Namespace, how: Execution) -> int:
    """Run the tasks on the sets of images, one after another. A collective of the ranks of `how`.

    Raises:
        UserError: a set cannot be evaluated; for a suite, after the other sets.
    """
    report = Report(suite=bool(args.suite), enabled=rank(how.group) == 0)
    sets, missing = {args.dataset_name: args.dataset_root}, []
    if args.suite:
        with fail_together(how.group):
            sets, missing = choose_sets(args.suite, args.data)
        agree(str(list(sets)), "the sets", how.group)
    if missing:
        total = len(missing) + len(sets)
        report.say(f"{args.suite}: {len(missing)} of {total} sets are not in {args.data}: {', '.join(missing)}")
    opened = []
    for name, root in sets.items():
        with report.leaving_out(name):
            benchmark = how.opened(partial(open_set, root, name))
            opened.append((benchmark, tasks_of(benchmark, args, report)))
    agree(str([(benchmark.name, tasks) for benchmark, tasks in opened]), "the sets and their tasks", how.group)
    with fail_together(how.group):
        clip = load(args)
    report.say(f"{clip.name}, {clip.pretrained}")
    for benchmark, tasks in opened:
        for task in tasks:
            with report.leaving_out(f"{benchmark.name}, {task}"):
                scored = evaluate(task, clip, benchmark, how, neighbors=args.neighbors)
                file = result_file(args.out, benchmark.name, clip.name, clip.pretrained, scored["task"])
                with fail_together(how.group):
                    if report.enabled:
                        write_result(file, scored)
                report.add(task, scored, file)
    report.finish()
    return 0


def tasks_of(benchmark: Benchmark, args: argparse.Namespace, report: Report) -> list[str]:
    """The tasks to run on a set. UserError when a task is not one of a single set's kind."""
    known = known_tasks(benchmark)
    no_train = bool(benchmark.classnames) and not (benchmark.root / "train").is_dir()
    if no_train:
        known = ["zero_shot"]
        if args.tasks != known:
            report.say(f"{benchmark.name} has no train split: zero_shot is its only task")
    if args.tasks is None:
        return known
    known += named_tasks(benchmark) if "linear_probe" in known else []
    tasks = [task for task in args.tasks if task in known]
    if len(tasks) < len(args.tasks) and not args.suite:
        other = next(task for task in args.tasks if task not in known)
        kind = "multilabel" if benchmark.multilabel else "classification" if benchmark.classnames else "retrieval"
        raise UserError(
            f"--tasks has {other!r}, but {benchmark.root} is a {kind} set{' without a train split' * no_train}, "
            f"expected some of {', '.join(known)}"
        )
    if not tasks:
        report.say(
            f"{benchmark.name} is left out: its tasks are {', '.join(known)}, --tasks has {', '.join(args.tasks)}"
        )
    return tasks


if __name__ == "__main__":
    sys.exit(run_tool(main))
