#!/usr/bin/env python3
"""Measure what the project claims to be fast or small, and check its stated bars.

    tools/bench.py --suite head --check               forward and backward over all classes (CPU, or one GPU and its peers)
    tools/bench.py --suite step --check               a training step with AdamW over 1,000,000 classes, a tenth sampled
    tools/bench.py --suite scale --json scale.json    the step from 10^4 to 10^7 classes at 8192 sampled rows
    tools/bench.py --suite optimizer                  row-sparse optimizers, in bytes per second
    tools/bench.py --suite contrastive                the instance loss of large batches
    tools/bench.py --suite assignment                 the nearest of many centroids
    tools/bench.py --suite kmeans                     one iteration of k-means against faiss
    tools/bench.py --suite levels                     k-means in two levels against flat k-means
    tools/bench.py --suite planted                    planted clusters found again
    tools/bench.py --suite balance                    removing near-duplicates inside clusters

--json writes everything measured, --compare prints ratios to such a file, --check exits with 1 when a bar is missed.
--suite NAME --help lists the options of a suite.
"""

import argparse
import importlib
import sys

import torch

import checkout  # noqa: F401  import paths of a plain checkout
from benchmarks.suite import Suite, add_shared_arguments, describe_machine, print_bars, print_comparison, read_report
from megacid.errors import UserError, run_tool
from megacid.storage.atomic import write_json_atomic

MODULES = {
    "head": "head",
    "step": "step",
    "scale": "step",
    "optimizer": "optimizer",
    "contrastive": "contrastive",
    "assignment": "assignment",
    "kmeans": "kmeans",
    "levels": "levels",
    "planted": "levels",
    "balance": "balance",
}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Suite]:
    """The suite's module is imported only when it is asked for, because some need packages that others do not."""
    only_suite = argparse.ArgumentParser(add_help=False)
    only_suite.add_argument("--suite", choices=tuple(MODULES))
    asked = only_suite.parse_known_args(argv)[0].suite
    suite = importlib.import_module(f"benchmarks.{MODULES[asked]}") if asked else None
    text = __doc__ if suite is None else f"{__doc__}\n{asked}: {suite.HELP}"
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, choices=tuple(MODULES))
    add_shared_arguments(parser)
    if suite is not None:
        suite.add_arguments(parser)
    args = parser.parse_args(argv)
    assert suite is not None  # --suite is required
    if args.threads < 1:
        raise UserError(f"--threads is {args.threads}, expected at least 1: leave it out for the default")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU: use --device cpu, or a torch with CUDA")
    if args.device == "cuda" and args.clock == "cpu":
        raise UserError("--clock is cpu, which does not see a GPU's work: leave it out with --device cuda")
    return args, suite


def main(argv: list[str] | None = None) -> int:
    args, suite = parse(argv)
    torch.set_num_threads(args.threads)
    old = read_report(args.compare, args.suite) if args.compare else None
    print(f"{args.suite}: {', '.join(f'{key} {value}' for key, value in describe_machine(args).items())}", flush=True)
    found = suite.run(args)
    if args.json:
        write_json_atomic(args.json, found)
    if old is not None:
        print_comparison(found, old)
    if not args.check:
        return 0
    bars = suite.check(found)
    if not bars:
        raise UserError(f"--check finds no bar for this run of the suite {args.suite}: leave it out")
    return 0 if print_bars(bars) else 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
