"""Suite seeding: the cost of k-means++ in iterations, and the objective of the fit, against the greedy form and faiss.

Every fit is flat and has the same rows and iterations; the seed of the fit differs. "one by one" draws and compares the
candidates of each step alone, "batches" is the default of this size. The objective is the mean cosine of all rows to
their nearest centroid. faiss starts from random rows.

Legend: n rows, K centroids, D width.
"""

from __future__ import annotations

import argparse
import statistics
from unittest import mock

import numpy as np
import torch

from argtypes import positive, seed_number
from benchmarks.kmeans_quality import labels, tree, uniform
from benchmarks.suite import Limit, Report, Row, check_k, clock_of, make_report
from megacid.errors import UserError
from megacid.offline.cluster import seeding
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.seeding import BATCHED_STEPS, SEEDING_ITERATIONS, initial_centroids
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.rows import ArrayRows

HELP = "k-means++: its time in iterations and the objective of the fit, in batches, one by one, and with faiss"
MIN_OBJECTIVE_RATIO = 0.9995
CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, default=100_000, help="rows of the data")
    parser.add_argument("--dim", type=positive, default=64, help="embedding width")
    parser.add_argument("--k", type=positive, default=1000, help=f"centroids (in batches from about {BATCHED_STEPS})")
    parser.add_argument("--iterations", type=positive, default=10, help="iterations of every fit")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2, 3, 4], help="of the fits")
    parser.add_argument("--data", choices=("tree", "uniform"), default="tree", help="rows as in the suite levels")


def run(args: argparse.Namespace) -> Report:
    if args.device != "cpu":
        raise UserError(f"--device is {args.device}, expected cpu: faiss-cpu needs it")
    check_k(args.k, args.rows)
    x, rows = (tree if args.data == "tree" else uniform)(args.rows, args.dim, 0), []
    for name, batched_steps in (("one by one", args.rows + 1), ("batches", BATCHED_STEPS)):
        with mock.patch.object(seeding, "BATCHED_STEPS", batched_steps):
            rows.append(_fits(args, x, name))
    rows.append(_faiss(args, x))
    for row in rows:
        row["objective_ratio"] = [mine / other for mine, other in zip(row["objective"], rows[0]["objective"])]
        spread = statistics.stdev(row["objective"]) if len(args.seeds) > 1 else 0.0
        print(
            f"{row['fit']}: objective {statistics.mean(row['objective']):.5f} (standard deviation {spread:.5f}), "
            f"{statistics.mean(row['objective_ratio']):.3%} of one by one"
            + (f", {statistics.median(row['seeding_iterations']):.1f} iterations" if "seconds" in row else ""),
            flush=True,
        )
    return make_report(args, rows)


def check(report: Report) -> list[Limit]:
    ratio = {row["fit"]: statistics.mean(row["objective_ratio"]) for row in report["results"]}
    what = f"objective in batches (at most {SEEDING_ITERATIONS} iterations of comparisons) over one by one"
    return [Limit(what, ratio["batches"], MIN_OBJECTIVE_RATIO, at_least=True)]


def _fits(args: argparse.Namespace, x: np.ndarray, name: str) -> Row:
    """Fits from every seed; the time of an iteration is what the fit takes in addition to its seeding."""
    clock, objective, seconds, cost = clock_of(args), [], [], []
    for seed in args.seeds:
        settings = KMeansSettings(
            k=args.k, iterations=args.iterations, seed=seed, init="k-means++", backend="torch", memory_gb=16
        )
        began = clock()
        initial_centroids(ArrayRows(x), settings, CPU)
        seconds.append(clock() - began)
        began = clock()
        centroids_KD = kmeans(ArrayRows(x), settings).centroids
        cost.append(seconds[-1] * args.iterations / max(clock() - began - seconds[-1], 1e-9))
        objective.append(labels(x, centroids_KD)[1])
    return _row(args, name) | {"objective": objective, "seconds": seconds, "seeding_iterations": cost}


def _faiss(args: argparse.Namespace, x: np.ndarray) -> Row:
    try:
        import faiss
    except ImportError:
        raise UserError("--suite is seeding, which needs faiss: pip install faiss-cpu") from None
    faiss.omp_set_num_threads(args.threads)
    objective = []
    for seed in args.seeds:
        options = {"niter": args.iterations, "spherical": True, "seed": seed + 1}
        theirs = faiss.Kmeans(args.dim, args.k, max_points_per_centroid=args.rows, **options)
        theirs.cp.min_points_per_centroid = 1
        theirs.train(x.astype(np.float32))
        objective.append(labels(x, torch.from_numpy(theirs.centroids))[1])
    return _row(args, "faiss") | {"objective": objective}


def _row(args: argparse.Namespace, name: str) -> Row:
    return {"fit": name, "data": args.data, "rows": args.rows, "k": args.k, "dim": args.dim}
