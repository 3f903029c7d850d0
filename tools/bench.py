#!/usr/bin/env python3
"""Measure the speed and memory of megacid's parts against other implementations, and check the stated limits.

    tools/bench.py --suite head --check               forward and backward over all classes (CPU, or one GPU)
    tools/bench.py --suite step --check               a training step with AdamW over 1,000,000 classes, 10 % sampled
    tools/bench.py --suite scale --json scale.json    the step from 10^4 to 10^7 classes with 8192 sampled rows
    tools/bench.py --suite accumulation --check       a step in one batch and in micro-batches (gradient caching)
    tools/bench.py --suite step-time --check          the model of a step's time, fitted and tested on held-out points
    tools/bench.py --suite loader --check             the training loader compared with webdataset's pipeline
    tools/bench.py --suite loader-tables --check      the loader without decoding, one rank of 512 on many tars
    tools/bench.py --suite mixing                     tars per global batch, compared with webdataset's buffers
    tools/bench.py --suite index --check              CPU time to index tars, and what it is for LAION-400M
    tools/bench.py --suite student --check            contrastive training compared with open_clip_train
    tools/bench.py --suite first-start                embed, cluster, train, stop and resume, as on a new machine
    tools/bench.py --suite optimizer                  row-sparse optimizers, in bytes per second
    tools/bench.py --suite contrastive                the instance loss of large batches
    tools/bench.py --suite assignment                 the nearest of many centroids
    tools/bench.py --suite kmeans                     one iteration of k-means compared with faiss
    tools/bench.py --suite levels                     two-level k-means compared with flat k-means
    tools/bench.py --suite seeding                    k-means++ in batches: its cost in iterations, and the objective
    tools/bench.py --suite cluster-stages             time and memory of every stage of clustering, and the estimate
    tools/bench.py --suite planted                    how well k-means recovers planted clusters
    tools/bench.py --suite balance                    removal of near-duplicates within and across clusters
    tools/bench.py --suite balance-bookkeeping        the balance stage without products, and its laws at a large size
    tools/bench.py --suite cluster-order --check      rows read by cluster, from a folder and from a copy in order
    tools/bench.py --suite laion --check              LAION-400M on 8, 64 and 512 ranks, by fitted laws
    tools/bench.py --suite machine-code               registers, instructions and predicted times of the kernels; no GPU

--json writes all measurements, --compare prints the ratios to such a file, --check exits with 1 if a limit is not met.
--suite NAME --help lists the options of a suite.
"""

import argparse
import importlib
import sys

import torch

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser
from benchmarks.suite import Suite, add_shared_arguments, describe_machine, print_comparison, print_limits, read_report
from megacid.errors import UserError, run_tool
from megacid.storage.atomic import write_json_atomic

MODULES = {
    "head": "head",
    "step": "training_step",
    "scale": "training_step",
    "accumulation": "accumulation",
    "step-time": "step_time",
    "loader": "loader",
    "loader-tables": "loader_tables",
    "mixing": "mixing",
    "index": "index",
    "student": "student",
    "first-start": "first_start",
    "optimizer": "optimizer",
    "contrastive": "contrastive",
    "assignment": "assignment",
    "kmeans": "kmeans",
    "levels": "kmeans_quality",
    "planted": "kmeans_quality",
    "seeding": "kmeans_seeding",
    "cluster-stages": "kmeans_stages",
    "balance": "balance",
    "balance-bookkeeping": "balance_bookkeeping",
    "cluster-order": "cluster_order",
    "laion": "laion",
    "machine-code": "machine_code",
}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Suite]:
    """(arguments, suite). Only the chosen suite is imported: some need packages that others do not."""
    only_suite = ToolParser(add_help=False)
    only_suite.add_argument("--suite", choices=tuple(MODULES))
    name = only_suite.parse_known_args(argv)[0].suite
    suite = importlib.import_module(f"benchmarks.{MODULES[name]}") if name else None
    text = __doc__ if suite is None else f"{__doc__}\n{name}: {suite.HELP}"
    parser = ToolParser(description=text)
    parser.add_argument("--suite", required=True, choices=tuple(MODULES))
    add_shared_arguments(parser)
    if suite is not None:
        suite.add_arguments(parser)
    args = parser.parse_args(argv)
    assert suite is not None  # --suite is required
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU: use --device cpu, or a torch with CUDA")
    if args.device == "cuda" and args.clock == "cpu":
        raise UserError("--clock is cpu, which does not measure a GPU: leave it out with --device cuda")
    return args, suite


def main(argv: list[str] | None = None) -> int:
    args, suite = parse(argv)
    torch.set_num_threads(args.threads)
    old = read_report(args.compare, args.suite) if args.compare else None
    print(f"{args.suite}: {', '.join(f'{key} {value}' for key, value in describe_machine(args).items())}", flush=True)
    report = suite.run(args)
    if args.json:
        write_json_atomic(args.json, report)
    if old is not None:
        print_comparison(report, old)
    if not args.check:
        return 0
    limits = suite.check(report)
    if not limits:
        raise UserError(f"--check is given, but suite {args.suite} has no limit for this run: leave it out")
    return 0 if print_limits(limits) else 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
