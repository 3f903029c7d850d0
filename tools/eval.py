#!/usr/bin/env python3
"""Evaluate a CLIP on a local classification or retrieval set, or a classification run on a features directory.

A set of images is a directory in CLIP_benchmark's webdataset layout; its tasks are zero_shot, linear_probe and knn, or
retrieval where its dataset_type.txt says so.
A features directory is one of tools/synthesize.py; its tasks, on the test split, are head (nearest class row) and
nearest_class_mean.

    tools/eval.py --run runs/digits --dataset-root data/digits/test --out results
    tools/eval.py --run runs/digits --ema --dataset-root data/digits/test --out results
    tools/eval.py --model local-dir:export/digits --dataset-root data/digits/test --tasks zero_shot --out results
    tools/eval.py --model ViT-B-32 --pretrained laion2b_s34b_b79k --dataset-root wds/cifar10 --out results
    tools/eval.py --run runs/partial_fc_1m --features data/features-1m --limit 10000 --out results

Every task writes one JSON file that `clip_benchmark build` reads. A result file is complete or absent, and the same
command writes the same bytes. SIGTERM stops the tool at once with exit code 143.
"""

import argparse
import sys
from pathlib import Path

import torch

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, natural, positive
from megacid.data.features import FeatureSet
from megacid.distributed.progress import progress_bar
from megacid.distributed.stopping import run_alone
from megacid.errors import UserError, run_tool
from megacid.evaluate.datasets import dataset_type, load_benchmark
from megacid.evaluate.execution import Execution
from megacid.evaluate.export import student_from_run
from megacid.evaluate.features import TASKS as FEATURE_TASKS
from megacid.evaluate.features import accuracy, tasks_for, trained_tower
from megacid.evaluate.knn import NEIGHBORS
from megacid.evaluate.retrieval import retrieval
from megacid.evaluate.tasks import (
    RETRIEVAL_TASKS,
    TASKS,
    evaluate,
    json_file,
    result,
    result_file,
    weights_name,
    write_result,
)
from megacid.models.clip import LoadedClip, load_clip
from megacid.models.student import loaded_student


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="open_clip architecture, local-dir:PATH, or hf-hub:ORG/NAME")
    which.add_argument("--run", type=Path, help="run directory written by train.py")
    parser.add_argument("--pretrained", help="tag or file of the weights, for --model NAME")
    parser.add_argument(
        "--step", type=natural, help="step of the checkpoint, for --run (default: the newest valid one)"
    )
    parser.add_argument(
        "--ema", action="store_true", help="evaluate the moving average of the weights (student.ema_decay), for --run"
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset-root", type=Path, help="directory with classnames.txt, train/, test/")
    data.add_argument("--features", type=Path, help="features directory, for --run")
    parser.add_argument("--dataset-name", help="name of the data in the results (default: the directory's name)")
    parser.add_argument(
        "--tasks",
        help="comma-separated (default: all): zero_shot, linear_probe, knn; of a retrieval set retrieval; with "
        "--features head, nearest_class_mean",
    )
    parser.add_argument(
        "--neighbors", type=positive, default=NEIGHBORS, help=f"k of the task knn (default: {NEIGHBORS})"
    )
    parser.add_argument("--limit", type=positive, help="use only the first LIMIT test rows, for --features")
    parser.add_argument("--out", type=Path, required=True, help="directory for the JSON files")
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
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: cuda if available)",
    )
    args = parser.parse_args(argv)
    if args.features and not args.run:
        raise UserError(f"--features is {args.features} without --run, expected both: add --run DIRECTORY")
    if args.limit is not None and not args.features:
        raise UserError(f"--limit is {args.limit} without --features, expected both: add --features DIRECTORY")
    known = FEATURE_TASKS if args.features else (*TASKS, *RETRIEVAL_TASKS)
    args.tasks = [task.strip() for task in args.tasks.split(",")] if args.tasks else None
    for task in args.tasks or ():
        if task not in known:
            raise UserError(f"--tasks has {task!r}, expected some of {', '.join(known)}")
    if args.run and (args.pretrained or args.precision != "fp32"):
        raise UserError(
            "--pretrained and --precision apply to --model only, a --run has its own fp32 weights: leave them out"
        )
    if args.step is not None and not args.run:
        raise UserError(f"--step is {args.step} without --run, expected both: add --run DIRECTORY")
    if args.ema and not args.run:
        raise UserError("--ema is set without --run, expected both: add --run DIRECTORY")
    return args


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
    return run_alone(lambda: evaluate_features(args) if args.features else evaluate_set(args))


def evaluate_set(args: argparse.Namespace) -> int:
    """Run the tasks on a set of images, by its kind."""
    is_retrieval = dataset_type(args.dataset_root) == "retrieval"
    known = tuple(RETRIEVAL_TASKS if is_retrieval else TASKS)
    for task in args.tasks or ():
        if task not in known:
            kind = "retrieval" if is_retrieval else "classification"
            raise UserError(
                f"--tasks has {task!r}, but {args.dataset_root} is a {kind} set, expected some of {', '.join(known)}"
            )
    return evaluate_retrieval(args) if is_retrieval else evaluate_images(args)


def evaluate_retrieval(args: argparse.Namespace) -> int:
    """Run the task on a retrieval set."""
    clip = load(args)
    name = args.dataset_name or args.dataset_root.resolve().name
    metrics = retrieval(clip, args.dataset_root, Execution(args.batch_size, args.workers))
    scored = result(clip, name, RETRIEVAL_TASKS["retrieval"], metrics)
    file = write_result(result_file(args.out, name, clip.name, clip.pretrained, scored["task"]), scored)
    for metric, value in metrics.items():
        print(f"{metric:30}{value:8.4f}")
    print(f"{name}; {clip.name}, {clip.pretrained}: {file}")
    return 0


def evaluate_images(args: argparse.Namespace) -> int:
    """Run the tasks on a classification set of images."""
    benchmark = load_benchmark(args.dataset_root, args.dataset_name)
    clip = load(args)
    how = Execution(args.batch_size, args.workers)
    rows = [("task", "acc1", "acc5", "mean_per_class_recall", "file")]
    for task in args.tasks or TASKS:
        scored = evaluate(task, clip, benchmark, how, neighbors=args.neighbors)
        file = write_result(result_file(args.out, benchmark.name, clip.name, clip.pretrained, scored["task"]), scored)
        metrics = scored["metrics"]
        prefix = {"linear_probe": "lp_", "knn": "knn_"}.get(task, "")
        rows.append((task, *(f"{metrics[prefix + key]:.4f}" for key in rows[0][1:4]), str(file)))
        if not metrics.get("converged", True):
            print(f"note: the fit has not converged after {metrics['iterations']} iterations")
    print(f"{benchmark.name}: {benchmark.num_classes} classes; {clip.name}, {clip.pretrained}")
    for row in rows:
        print(f"{row[0]:14}{row[1]:>8}{row[2]:>8}{row[3]:>23}  {row[4]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
