#!/usr/bin/env python3
"""Collect the results of tools/demo.sh in one table and DEMO/summary.json.

    tools/summary.py --demo runs/demo

Reads the evaluation's JSON files, the train_summary.json of each run, the balance report and the stage times.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path
from megacid.errors import UserError, run_tool
from megacid.storage.atomic import write_json_atomic
from megacid.storage.metadata import machine, versions

RUNS = {
    "teacher": "teacher (contrastive)",
    "student_plain": "student, plain (contrastive)",
    "student_instance": "student, instance distillation",
    "student_cluster": "student, instance + cluster",
    "student_balanced": "the same on balanced data",
}


def read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path} is missing, so an earlier stage did not finish: run tools/demo.sh again") from None


def run_results(demo: Path, name: str) -> dict[str, Any]:
    """Accuracies, speed and settings of one training run."""
    trained, config = read(demo / name / "train_summary.json"), read(demo / name / "config.json")["resolved"]
    scores: dict[str, float] = {}
    for path in sorted((demo / name / "eval").glob("*.json")):
        scores |= read(path)["metrics"]
    return {
        "zero_shot_top1": scores["acc1"],
        "linear_probe_top1": scores["lp_acc1"],
        "train_seconds": trained["seconds"],
        "samples_per_second": trained["samples_per_second"],
        "steps": trained["steps"],
        "seed": config["megacid"]["run"]["seed"],
        "ranks": trained["world"],
        "zero_stage": config.get("zero_optimization", {}).get("stage", 0),
    }


def table(runs: dict[str, dict[str, Any]]) -> str:
    rows = ["| model | zero-shot top-1 | linear probe top-1 | training | samples/s |", "|---|---:|---:|---:|---:|"]
    for name, run in runs.items():
        accuracies = f"{100 * run['zero_shot_top1']:.1f} % | {100 * run['linear_probe_top1']:.1f} %"
        rows.append(f"| {RUNS[name]} | {accuracies} | {run['train_seconds']:.0f} s | {run['samples_per_second']:.0f} |")
    return "\n".join(rows)


def main() -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--demo", type=local_path, required=True, help="output directory of tools/demo.sh")
    demo = parser.parse_args().demo
    runs = {name: run_results(demo, name) for name in RUNS}
    report = read(demo / "balance" / "report.json")
    times = dict(line.split("\t") for line in (demo / "times.tsv").read_text().splitlines())
    planted = report.get("planted_copies", {})
    inside = report.get("planted_copies_inside_clusters", {})
    summary = {
        "runs": runs,
        "balance": {
            "share_kept": report["share_kept"],
            "share_removed": report["share_removed"],
            "threshold": report["threshold"],
            "removed_across_clusters": report["removed_across_clusters"],
            "planted_copies": planted,
            "planted_copies_inside_clusters": inside,
        },
        "seconds_per_stage": {name: int(seconds) for name, seconds in times.items()},
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_json_atomic(demo / "summary.json", summary)
    print(f"\n{table(runs)}\n")
    removed = f"{100 * report['share_removed']:.1f} % of the pairs removed below distance {report['threshold']:.4f}"
    print(f"balance: {removed}; planted copies: {json.dumps(planted)}")
    if inside:
        print(f"  before the comparison across clusters: {json.dumps(inside)}")
    print("seconds per stage: " + ", ".join(f"{name} {seconds}" for name, seconds in times.items()))
    host = f"{summary['machine']['cpu']}, {summary['machine']['cores']} cores"
    print(f"{host}, {summary['date']}; details: {demo / 'summary.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
