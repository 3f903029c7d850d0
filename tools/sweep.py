#!/usr/bin/env python3
"""Train one run per sampling rate r and per number of clusters k, and compare accuracy, time and memory.

    tools/sweep.py --deepspeed_config configs/partial_fc_sweep.json --rates 0.01 0.1 1.0 --out runs/sweep
    tools/sweep.py --deepspeed_config configs/partial_fc_sweep.json --clusters 1000 5000 --seeds 0 1 2 --out runs/sweep

The run file trains on features (tools/synthesize.py features). A run with --clusters k trains on the labels of a
k-means with k clusters, at the sampling rate of the run file. Every run is evaluated on the true classes of the test
split, by the nearest mean of the trained embeddings of the training rows. Writes OUT/sweep.json, sweep.md and
sweep.png. After an interruption run the same command again: finished runs are kept, an interrupted one resumes.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, integer, local_path, positive, seed_number, share_of_all
from launching import run_logged, training_command
from megacid.config.load import load_run
from megacid.data.features import FeatureSet
from megacid.distributed.progress import progress_bar
from megacid.errors import UserError, run_tool
from megacid.evaluate.features import accuracy, tasks_for, trained_tower, untrained_accuracy
from megacid.offline.cluster.features import cluster_features
from megacid.offline.cluster.state import KMeansSettings
from megacid.storage.atomic import atomic_path, write_atomic, write_json_atomic
from megacid.storage.metadata import machine, versions
from megacid.training.run_settings import check_same_settings

AXES = {"rate": "sampling rate r", "clusters": "number of clusters k"}
OWN_KEYS = ("run.name", "run.dir", "run.seed", "data.features", "classifier.sample_rate")


@dataclass(frozen=True)
class Point:
    """One training run: a value on one of AXES, and a seed."""

    axis: str
    value: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.axis}-{self.value:g}-seed-{self.seed}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--deepspeed_config", "--deepspeed-config", required=True, metavar="RUN.json")
    parser.add_argument("--features", type=local_path, help="features (default: those of the run file)")
    parser.add_argument(
        "--rates", type=share_of_all, nargs="+", default=[], metavar="R", help="sampling rates, above 0 to 1"
    )
    parser.add_argument("--clusters", type=integer(2), nargs="+", default=[], metavar="K", help="numbers of clusters")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0], help="one run per seed (default: 0)")
    parser.add_argument(
        "--ranks", type=positive, default=1, help="GPUs per run; above 1 starts deepspeed --num_gpus (default 1)"
    )
    parser.add_argument("--iterations", type=positive, default=10, help="k-means iterations (default 10)")
    parser.add_argument("--limit", type=positive, help="evaluate on the first LIMIT test rows (default: all)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value of the run file"
    )
    parser.add_argument("--out", type=local_path, required=True, help="directory for the runs and the results")
    args = parser.parse_args(argv)
    if not args.rates and not args.clusters:
        raise UserError("neither --rates nor --clusters is given: name the values to compare")
    for assignment in args.set:
        key = assignment.partition("=")[0].removeprefix("megacid.")
        if key in OWN_KEYS:
            raise UserError(f"--set {assignment}: the sweep sets {key} itself: use the options of this tool")
    return args


def assignments(args: argparse.Namespace, point: Point, features: Path) -> list[str]:
    """Overrides of the run file for this point."""
    own = [f"run.name={json.dumps(point.name)}", f"run.dir={json.dumps(str(args.out))}", f"run.seed={point.seed}"]
    own.append(f"data.features={json.dumps(str(features))}")
    if point.axis == "rate":
        own.append(f"classifier.sample_rate={point.value}")
        if point.value == 1:  # these have no effect when every class is used, which is an error
            own += ["classifier.log_q=null", "classifier.lazy=null"]
    return [*args.set, *own]


# ---- one point ------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, point: Point, features: Path) -> dict[str, Any]:
    """Train and evaluate one point, or read its result when it is complete. UserError when training fails."""
    changes = assignments(args, point, features)
    run = load_run(args.deepspeed_config, changes, world=args.ranks)
    check_same_settings(run, run.directory)
    made_from = {"features": FeatureSet(features).digest, "ranks": args.ranks, "limit": args.limit}
    record = run.directory / "sweep_point.json"
    if record.exists():
        stored: dict[str, Any] = json.loads(record.read_text())
        if stored["made_from"] != made_from:
            raise UserError(
                f"{record} was made with {stored['made_from']}, expected {made_from}: choose another --out, or remove "
                f"{run.directory}"
            )
        return stored
    command = training_command(args.deepspeed_config, changes, args.ranks)
    run_logged(command, args.out / f"{point.name}.out", f"training of {point.name}")
    trained = trained_tower(run.directory, FeatureSet(features), device="cuda" if torch.cuda.is_available() else "cpu")
    scores = {
        task: accuracy(task, trained, features, limit=args.limit)["acc1"] for task in tasks_for(FeatureSet(features))
    }
    result = {
        "axis": point.axis,
        "value": point.value,
        "seed": point.seed,
        **scores,
        **curves(run.directory),
        "made_from": made_from,
    }
    write_json_atomic(record, result)
    return result


def curves(run: Path) -> dict[str, float]:
    """Time, memory and loss of a run from its tensorboard events, which cover a resumed run as a whole."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    values = {
        name: [event.value for event in events.Scalars(f"train/{name}")]
        for name in ("batch_time", "peak_memory_mib", "loss")
    }
    summary = json.loads((run / "train_summary.json").read_text())  # covers the last checkpoint, too
    return {
        "seconds_per_step": statistics.median(values["batch_time"]),
        "peak_memory_mib": max(*values["peak_memory_mib"], summary["peak_memory_mib"]),
        "final_loss": values["loss"][-1],
    }


# ---- the result -----------------------------------------------------------------------------------------------------


def summarise(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per value: means over the seeds and the standard deviation of the accuracy (None for a single seed)."""
    rows = []
    for value in sorted({point["value"] for point in points}):
        same = [point for point in points if point["value"] == value]
        accuracies = [point["nearest_class_mean"] for point in same]
        rows.append(
            {
                "value": value,
                "seeds": len(same),
                "accuracy": statistics.mean(accuracies),
                "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "head_accuracy": statistics.mean(p["head"] for p in same) if "head" in same[0] else None,
                "seconds_per_step": statistics.median(point["seconds_per_step"] for point in same),
                "peak_memory_mib": max(point["peak_memory_mib"] for point in same),
                "final_loss": statistics.mean(point["final_loss"] for point in same),
            }
        )
    return rows


def table(axis: str, rows: list[dict[str, Any]]) -> str:
    names = ["top-1, nearest class mean", "time per step", "peak memory of rank 0", "final loss"]
    with_head = rows[0]["head_accuracy"] is not None
    if with_head:
        names.insert(1, "top-1, nearest class row")
    lines = [f"| {AXES[axis]} | {' | '.join(names)} |", "|---:" * (len(names) + 1) + "|"]
    for row in rows:
        std = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.1f}"
        head = f"| {100 * row['head_accuracy']:.1f} % " if with_head else ""
        lines.append(
            f"| {row['value']:g} | {100 * row['accuracy']:.1f}{std} % {head}| {1000 * row['seconds_per_step']:.1f} ms "
            f"| {row['peak_memory_mib']:,.0f} MiB | {row['final_loss']:.3f} |"
        )
    return "\n".join(lines)


def report(sweep: dict[str, Any]) -> str:
    """The text of sweep.md."""
    host, data = sweep["machine"], sweep["features"]
    parts = [f"# Sweep of {sweep['run_file']}"]
    parts += [table(axis, sweep[axis]) for axis in AXES if sweep[axis]]
    seeds = ", ".join(map(str, sweep["seeds"]))
    parts.append(
        f"{data['classes']:,} classes, {data['rows']:,} training rows of width {data['dim']}, "
        f"{data['test_rows']:,} test rows; "
        f"{sweep['steps']:,} steps of {sweep['batch']:,} rows, embedding width {sweep['embed_dim']}; "
        f"ranks: {sweep['ranks']}; "
        + (f"seeds {seeds}, ± is the standard deviation over them. " if len(sweep["seeds"]) > 1 else f"seed {seeds}. ")
        + f"The features themselves, without a tower: {100 * sweep['untrained_accuracy']:.1f} % nearest class mean."
    )
    if sweep["rate"]:
        parts.append("The loss covers the sampled classes only, so it cannot be compared between sampling rates.")
    if sweep["clusters"]:
        parts.append(
            f"Runs on clusters sample at r = {sweep['sample_rate']:g}; only the evaluation uses the true classes."
        )
    memory = "allocated on the GPU" if host["accelerator"] else "resident, including the interpreter and its libraries"
    where = host["accelerator"] or f"{host['cpu']}, {host['cores']} cores, OMP_NUM_THREADS {sweep['omp_num_threads']}"
    parts.append(f"{sweep['date']}, {where}. Memory: {memory}.")
    return "\n\n".join(parts) + "\n"


def plot(sweep: dict[str, Any], path: Path) -> None:
    """Three panels per axis: accuracy, time, memory."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "matplotlib is not installed, so only sweep.json and sweep.md were written: pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = [axis for axis in AXES if sweep[axis]]
    figure, panels = pyplot.subplots(len(axes), 3, figsize=(13, 3.9 * len(axes)), squeeze=False, layout="constrained")
    for axis, (left, middle, right) in zip(axes, panels):
        rows = sweep[axis]
        x = [row["value"] for row in rows]
        spread = [100 * (row["accuracy_std"] or 0.0) for row in rows]
        percent = [100 * row["accuracy"] for row in rows]
        left.errorbar(x, percent, spread, marker="o", capsize=3, label="nearest class mean")
        if rows[0]["head_accuracy"] is not None:
            left.plot(x, [100 * row["head_accuracy"] for row in rows], marker="s", label="nearest class row")
        left.axhline(100 * sweep["untrained_accuracy"], color="grey", linestyle="--", label="features without a tower")
        left.legend(fontsize=8)
        middle.plot(x, [1000 * row["seconds_per_step"] for row in rows], marker="o")
        right.plot(x, [row["peak_memory_mib"] for row in rows], marker="o")
        for panel, label in (
            (left, "top-1 accuracy (%)"),
            (middle, "time per step (ms)"),
            (right, "peak memory of rank 0 (MiB)"),
        ):
            panel.set_xscale("log")
            panel.set_xticks(x, [f"{value:g}" for value in x])
            panel.minorticks_off()
            panel.set_xlabel(AXES[axis])
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
        for panel, key, unit in ((middle, "seconds_per_step", 1000), (right, "peak_memory_mib", 1)):
            panel.set_ylim(0, 1.1 * unit * max(row[key] for row in rows))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    base = load_run(args.deepspeed_config, args.set, world=args.ranks)
    if base.megacid.data.features is None:
        raise UserError(
            f"{args.deepspeed_config} has no data.features, expected a run file that trains on features: set it"
        )
    features = args.features or Path(base.megacid.data.features)
    source, test = FeatureSet(features, true_labels=True), FeatureSet(features, "test")
    points = [
        Point(axis, value, seed)
        for axis, values in (("rate", args.rates), ("clusters", args.clusters))
        for value in sorted(set(values))
        for seed in sorted(set(args.seeds))
    ]
    results = []
    with progress_bar("sweep", "run", len(points)) as bar:
        for point in points:
            bar.desc = point.name
            where = features
            if point.axis == "clusters":
                where = args.out / f"features-k-{point.value:g}"
                settings = KMeansSettings(k=int(point.value), iterations=args.iterations)
                cluster_features(features, where, settings, device="cuda" if torch.cuda.is_available() else "cpu")
            results.append(measure(args, point, where))
            print(
                f"{point.name}: top-1 {100 * results[-1]['nearest_class_mean']:.1f} %, "
                f"{1000 * results[-1]['seconds_per_step']:.1f} ms per step, {results[-1]['peak_memory_mib']:,.0f} MiB"
            )
            bar.update()
    sweep = {
        "run_file": str(args.deepspeed_config),
        "set": args.set,
        "features": {"directory": str(features), "classes": test.classes, "dim": test.dim, "rows": source.num_rows,
                     "test_rows": min(args.limit or test.num_rows, test.num_rows)},
        "steps": base.megacid.run.total_steps,
        "batch": base.global_batch,
        "embed_dim": base.megacid.student.embed_dim,
        "sample_rate": base.megacid.classifier.sample_rate,
        "ranks": args.ranks,
        "seeds": sorted(set(args.seeds)),
        "untrained_accuracy": untrained_accuracy(features, limit=args.limit)["acc1"],
        **{axis: summarise([r for r in results if r["axis"] == axis]) for axis in AXES},
        "points": [{key: value for key, value in result.items() if key != "made_from"} for result in results],
        "machine": {**machine(), "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    write_json_atomic(args.out / "sweep.json", sweep)
    write_atomic(args.out / "sweep.md", report(sweep).encode())
    print(f"\n{report(sweep)}")
    plot(sweep, args.out / "sweep.png")
    print(", ".join(str(args.out / name) for name in ("sweep.json", "sweep.md", "sweep.png")))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
