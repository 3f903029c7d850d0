"""Suite cluster-stages: time and memory of every stage of tools/cluster.py, next to the estimate that it prints.

An embedding folder of unit rows of a topic tree is written and clustered in a separate process. Anonymous memory
(RssAnon, sampled) above that of the process after importing torch is counted, as in the suite kmeans. With --label-rows
the labels of that many rows are written in place of all: searched among all k, they take most of the time of a million
clusters on a CPU.

Legend: n rows, K clusters, D width.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from argtypes import natural, positive, real, seed_number
from benchmarks.anonymous_memory import PeakAnonymous, anonymous_bytes
from benchmarks.kmeans_quality import tree
from benchmarks.measure import ask_process
from benchmarks.suite import Limit, Report, check_k, make_report, print_table
from benchmarks.synthetic_folders import write_embeddings
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import no_progress
from megacid.failpoints import hooks
from megacid.offline.cluster.assign_labels import assign_labels
from megacid.offline.cluster.cost import estimate_stages, measure_rates
from megacid.offline.cluster.hierarchical import two_level
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.run import begin_stage
from megacid.offline.cluster.state import KMeansSettings, default_settings
from megacid.offline.nearest import Assigner
from megacid.offline.rows import EmbeddingRows
from megacid.storage.npy import write_array

HELP = "time and memory of every stage of tools/cluster.py, next to its estimate"
PARTS = 64
MAX_MEMORY_RATIO = 1.1
_SETTINGS = ("k", "method", "iterations", "refine", "memory_gb", "seed")  # of tools/cluster.py
_MIN_BYTES = 64e6  # stages below are not compared: the libraries' own buffers are as large
CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, default=200_000, help="rows of the data")
    parser.add_argument("--dim", type=positive, default=256, help="embedding width")
    parser.add_argument("--k", type=positive, default=2000, help="clusters")
    parser.add_argument("--method", choices=("flat", "hierarchical"), help="default: that of tools/cluster.py")
    parser.add_argument("--iterations", type=positive, default=20, help="as of tools/cluster.py")
    parser.add_argument("--refine", type=natural, default=6, help="as of tools/cluster.py")
    parser.add_argument("--memory-gb", type=real(0, 1e6, without=(0,)), default=4.0, help="as of tools/cluster.py")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the rows and of the clustering")
    parser.add_argument("--label-rows", type=positive, help="rows whose labels are written (default: all)")
    parser.add_argument("--folder", type=Path, help="folder for the data (default: the temporary folder)")


def run(args: argparse.Namespace) -> Report:
    def rows(part: range) -> np.ndarray:
        return tree(len(part), args.dim, args.seed + part.start)

    check_k(args.k, args.rows)
    names = (*_SETTINGS, "dim", "rows", "threads", "clock", "label_rows")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_embeddings(Path(folder) / "emb", rows, args.rows, PARTS)
        if args.label_rows:
            few = min(args.label_rows, args.rows)
            write_embeddings(Path(folder) / "few", rows, few, 1)
        request = {name: getattr(args, name) for name in names} | {"folder": folder}
        answer = ask_process("benchmarks.kmeans_stages", request, {}, show_progress=True)
    if "skipped" in answer:
        return make_report(args, [answer])
    stages = [row | {"rows": args.rows, "k": args.k, "dim": args.dim} for row in answer["stages"]]
    print_table(
        stages,
        {
            "stage": lambda row: str(row["stage"]),
            "s:": lambda row: f"{row['seconds']:,.1f}",
            "estimated s:": lambda row: f"{row['estimated_s']:,.1f}",
            "peak GB:": lambda row: f"{row['gb']:.2f}",
            "estimated GB:": lambda row: f"{row['estimated_gb']:.2f}",
        },
    )
    return make_report(args, stages)


def check(report: Report) -> list[Limit]:
    limits = []
    for row in report["results"]:
        if row.get("gb", 0.0) * 1e9 > _MIN_BYTES:
            what = f"{row['stage']}: peak memory over the estimate"
            limits.append(Limit(what, row["gb"] / row["estimated_gb"], MAX_MEMORY_RATIO, at_least=False))
    bound = report["arguments"]["memory_gb"]
    peak = max((row["gb"] for row in report["results"] if "gb" in row), default=None)
    return [*limits, Limit("peak GB above that of the libraries", peak, bound, at_least=False)]


class _Observer:
    """Time and peak of anonymous memory of every stage; the parts of the coarse clusters count as one stage."""

    def __init__(self, clock: str) -> None:
        self.clock = time.process_time if clock == "cpu" else time.perf_counter
        self.own, self.stage, self.began = anonymous_bytes(), "start", self.clock()
        self.found: dict[str, list[float]] = {}
        self.peak = PeakAnonymous()
        self.peak.__enter__()

    def begin(self, stage: str) -> None:
        if self.stage == "coarse clusters" and stage in ("check", "seeding", "iterations"):
            return
        self.peak.__exit__()
        seconds, bytes_ = self.found.setdefault(self.stage, [0.0, 0.0])
        self.found[self.stage] = [seconds + self.clock() - self.began, max(bytes_, self.peak.bytes - self.own)]
        print(f"{self.stage}: {self.found[self.stage][0]:.1f} s", file=sys.stderr, flush=True)
        self.stage, self.began = stage, self.clock()
        if stage != "end":
            self.peak = PeakAnonymous()
            self.peak.__enter__()


def _estimates(settings: KMeansSettings, request: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Stage -> (seconds, bytes)."""
    clock = time.process_time if request["clock"] == "cpu" else time.perf_counter
    rates = measure_rates(settings, request["dim"], CPU, clock)
    labelled = (request["label_rows"] or request["rows"]) / request["rows"]
    stages = estimate_stages(settings, request["rows"], request["dim"], 1, CPU, rates)
    return {one.stage: (one.seconds * (labelled if one.stage == "labels" else 1), one.bytes) for one in stages}


def _cluster(folder: Path, labelled: Path, settings: KMeansSettings) -> None:
    """What tools/cluster.py does, with the labels of the rows of `labelled`."""
    rows, out = EmbeddingRows(folder / "emb"), folder / "clusters"
    if settings.method == "flat":
        state = kmeans(rows, settings, checkpoint=out / "state.npz", unit_rows=True)
    else:
        state = two_level(rows, settings, out, unit_rows=True)
    begin_stage("labels")
    assigner = Assigner(state.centroids, settings.metric, CPU, settings.backend)
    assign_labels(out, EmbeddingRows(labelled), assigner, Parallel(0, 1, 0, CPU, None), 1, no_progress)
    begin_stage("writing")
    write_array(out / "centroids.npy", state.centroids.numpy())
    begin_stage("end")


def main() -> None:
    """The process that is measured: argument 1 is the request, the last line printed is the answer, both JSON."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))  # allocate the library's own buffers before counting
    folder = Path(request["folder"])
    settings = default_settings(**{name: request[name] for name in _SETTINGS})
    estimates = _estimates(settings, request)
    for stage, (seconds, _) in estimates.items():
        print(f"estimate: {stage}: {seconds:.1f} s", file=sys.stderr, flush=True)
    observer = _Observer(request["clock"])
    hooks["cluster:stage"] = observer.begin
    _cluster(folder, folder / ("few" if request["label_rows"] else "emb"), settings)
    stages = []
    for stage, (estimated_s, estimated_bytes) in estimates.items():
        seconds, peak = observer.found[stage]
        row = {"stage": stage, "seconds": seconds, "estimated_s": estimated_s}
        stages.append(row | {"gb": peak / 1e9, "estimated_gb": estimated_bytes / 1e9})
    print(json.dumps({"stages": stages}))


if __name__ == "__main__":
    main()
