"""Suite first-start: the method's first start on a machine, each stage in a process of its own as a user starts it.

Synthetic scenes, embeddings of a teacher with random weights, clusters, then a student trained with the instance and
the cluster term: it is stopped after half of the steps by --stop-after, and the same command resumes it. The trainer
itself compares the first loss after the resume with the one before.

Rates and times are those of a short run, which compiles its kernels, and no measure of training at full speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from argtypes import positive
from benchmarks.suite import Limit, Report, Row, make_report, print_table
from checkout import ROOT
from megacid.errors import EXIT_STOPPED, UserError
from megacid.evaluate.export import export_student
from megacid.models.student import build_student
from megacid.storage.atomic import write_json_atomic

HELP = "a first start: embed, cluster, train a student, stop and resume it; times of every stage, samples/s, memory"
_LAST_LINES = 12  # of the output of a stage that fails


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ViT-B-32", help="architecture of teacher and student (default ViT-B-32)")
    parser.add_argument("--samples", type=positive, default=4096, help="image-text pairs (default 4096)")
    parser.add_argument("--size", type=positive, default=256, help="side of the images (default 256)")
    parser.add_argument("--clusters", type=positive, default=64, help="classes of the cluster term (default 64)")
    parser.add_argument("--batch", type=positive, default=512, help="samples per step (default 512)")
    parser.add_argument("--steps", type=positive, default=50, help="steps, with a stop after half (default 50)")


def run_file(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run file of the student. Its classifier runs on the GPU in the fused kernels."""
    return {
        "train_batch_size": args.batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        **({"bf16": {"enabled": True}} if args.device == "cuda" else {}),
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "weight_decay": 0.1}},
        "megacid": {
            "run": {"name": "student", "dir": str(folder), "total_steps": args.steps, "log_every": 1},
            "student": {"model": args.model},
            "data": {
                "shards": str(folder / "scenes" / "train"),
                "teacher": str(folder / "teacher"),
                "labels": str(folder / "clusters"),
                "workers": 8 if args.device == "cuda" else 0,
            },
            "loss": {"instance": 1.0, "cluster": 0.1, "alpha": 1.0, "beta": 1.0, "gamma": 1.0},
            "classifier": {"sample_rate": 0.5},
            "schedule": {"warmup_steps": max(1, args.steps // 5)},
        },
    }


def stages(args: argparse.Namespace, folder: Path) -> dict[str, tuple[list[str], int]]:
    """{stage: (script and options, expected exit code)}"""
    shards, teacher, clusters = str(folder / "scenes" / "train"), str(folder / "teacher"), str(folder / "clusters")
    model = f"local-dir:{folder / 'model'}"
    sizes = ["--num", str(args.samples), "--clusters", str(args.clusters), "--size", str(args.size)]
    train = ["megacid/train.py", "--deepspeed_config", str(folder / "run.json")]
    return {
        "synthesize": (["tools/synthesize.py", "scenes", "--out", str(folder / "scenes"), *sizes], 0),
        "embed": (["tools/embed.py", "--shards", shards, "--out", teacher, "--model", model], 0),
        "cluster": (["tools/cluster.py", "--embeddings", teacher, "--out", clusters, "--k", str(args.clusters)], 0),
        "train": ([*train, "--stop-after", str(args.steps // 2)], EXIT_STOPPED),
        "resume": (train, 0),
    }


def run(args: argparse.Namespace) -> Report:
    if args.steps < 2:
        raise UserError(f"--steps is {args.steps}, expected at least 2: one before the stop and one after")
    with tempfile.TemporaryDirectory(prefix="first-start-") as name:
        folder = Path(name)
        write_json_atomic(folder / "run.json", run_file(args, folder))
        export_student(build_student(args.model, embed_dim=None, seed=0), folder / "model", name="teacher", source={})
        rows = [run_stage(stage, *command, folder) for stage, command in stages(args, folder).items()]
    (last,) = (row for row in rows if row["stage"] == "resume")
    if last["start_step"] != args.steps // 2 or last["steps"] != args.steps - args.steps // 2:
        raise UserError(f"the resumed run made {last['steps']} steps from step {last['start_step']}, of {args.steps}")
    print_table(rows, COLUMNS)
    return make_report(args, rows)


def run_stage(stage: str, words: list[str], expected: int, folder: Path) -> Row:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-W", "ignore", *words], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != expected:
        lines = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_LAST_LINES:])
        raise UserError(f"exit code of {' '.join(words)} is {done.returncode}, expected {expected}:\n{lines}")
    row: Row = {"stage": stage, "seconds": [seconds]}
    if stage in ("train", "resume"):
        summary = json.loads((folder / "student" / "train_summary.json").read_text())
        row |= {key: summary[key] for key in ("start_step", "steps")}
        row |= {key: float(summary[key]) for key in ("samples_per_second", "peak_memory_mib", "last_loss")}
    return row


COLUMNS: dict[str, Callable[[Row], str]] = {
    "stage": lambda row: str(row["stage"]),
    "s:": lambda row: f"{row['seconds'][0]:.1f}",
    "steps:": lambda row: str(row.get("steps", "-")),
    "samples/s:": lambda row: f"{row['samples_per_second']:.0f}" if "steps" in row else "-",
    "peak MiB:": lambda row: f"{row['peak_memory_mib']:,.0f}" if "steps" in row else "-",
    "last loss:": lambda row: f"{row['last_loss']:.3f}" if "steps" in row else "-",
}


def check(report: Report) -> list[Limit]:
    """None: a stage that fails ends the suite."""
    return []
