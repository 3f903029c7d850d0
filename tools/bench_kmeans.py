#!/usr/bin/env python3
"""Measure k-means in two levels against flat k-means: objective, time, and planted clusters found again.

    tools/bench_kmeans.py --suite levels --n 400000 --dim 64 --k 4096 16384
    tools/bench_kmeans.py --suite planted --k 100 300

levels: rows of a tree (topics of log-normal size, parts of them, noise), or with --data uniform rows without any structure.
The objective is the mean cosine of all rows to their nearest centroid, found without any restriction; the time is that of
the fit, and that of the fit with this last assignment. planted: well separated clusters of unequal size with 1 % outliers;
the adjusted mutual information of labels and truth, without the outliers' own label (needs scikit-learn).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np
import torch

from megacid.checkpoint.store import machine, write_json_atomic
from megacid.errors import UserError, run_tool
from megacid.offline.assign import Assigner, pad_rows, prepare, tile_rows
from megacid.offline.kmeans import KMeansSettings, kmeans
from megacid.offline.rows import ArrayRows
from megacid.offline.two_level import two_level

LEAST_SHARE, MOST_TIME, LEAST_AMI = 0.985, 0.1, 0.95
CPU = torch.device("cpu")


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def tree(n: int, dim: int, seed: int) -> np.ndarray:
    """Rows fp16 [n, D] of topics, of log-normal size, with 20 parts each."""
    rng = np.random.default_rng(seed)
    topics = max(1, n // 1000)
    share = rng.lognormal(0, 1, topics)
    topic = rng.choice(topics, n, p=share / share.sum())
    part = topic * 20 + rng.integers(20, size=n)
    x = rng.normal(size=(topics, dim)).astype(np.float32)[topic]
    x += 0.7 * rng.normal(size=(topics * 20, dim)).astype(np.float32)[part]
    return unit(x + 0.6 * rng.normal(size=(n, dim)).astype(np.float32))


def uniform(n: int, dim: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(n, dim)))


def planted(n: int, dim: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows fp16 [n, D], cluster int64 [n], -1 for one row in a hundred that belongs to none)."""
    rng = np.random.default_rng(seed)
    share = rng.lognormal(0, 0.7, k)
    label = rng.choice(k, n, p=share / share.sum())
    x = unit(rng.normal(size=(k, dim))).astype(np.float32)[label]
    x += rng.normal(size=(n, dim)).astype(np.float32) * (0.35 / dim**0.5)
    outlier = rng.random(n) < 0.01
    x[outlier] = rng.normal(size=(int(outlier.sum()), dim))
    return unit(x), np.where(outlier, -1, label)


def fit(x: np.ndarray, settings: KMeansSettings) -> torch.Tensor:
    """Centroids fp32 [K, D]."""
    with tempfile.TemporaryDirectory() as folder:
        if settings.method == "flat":
            return kmeans(ArrayRows(x), settings).centroids
        return two_level(ArrayRows(x), settings, Path(folder)).centroids


def labels(x: np.ndarray, centroids_KD: torch.Tensor) -> tuple[np.ndarray, float]:
    """(label int64 [n], mean cosine), over all centroids."""
    assigner, tile = Assigner(centroids_KD, "cosine", CPU), tile_rows(CPU)
    found, total = [], 0.0
    for low in range(0, len(x), tile):
        x_TD = prepare(x[low : low + tile], "cosine", CPU)
        value_TL, label_TL = assigner.tile(pad_rows(x_TD, tile))
        found.append(label_TL[: len(x_TD), 0].numpy())
        total += float(value_TL[: len(x_TD)].double().sum())
    return np.concatenate(found), total / len(x)


def levels(args: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, Any]]:
    x = (tree if args.data == "tree" else uniform)(args.n, args.dim, args.seed)
    results = []
    for k in args.k:
        flat = KMeansSettings(k=k, iterations=args.iterations, seed=args.seed, memory_gb=16)
        two = replace(flat, method="hierarchical", init="k-means++", refine=args.refine, refine_cells=args.refine_cells)
        runs = {"flat": flat, "hierarchical": two}
        if args.exact:
            runs["hierarchical, refined without restriction"] = replace(two, refine_cells=0)
        for name, settings in runs.items():
            began = clock()
            centroids_KD = fit(x, settings)
            fitted = clock()
            _, objective = labels(x, centroids_KD)
            row = {"k": k, "run": name, "objective": objective, "fit_s": fitted - began, "all_s": clock() - began}
            results.append(row)
            first = next(r for r in results if r["k"] == k)
            row |= {f"{what}_ratio": row[what] / first[what] for what in ("objective", "fit_s", "all_s")}
            print(
                f"k {k:,} {name}: objective {objective:.5f} ({row['objective_ratio']:.2%} of flat), fit {row['fit_s']:.1f} s "
                f"({row['fit_s_ratio']:.3f}), with labels {row['all_s']:.1f} s ({row['all_s_ratio']:.3f})",
                flush=True,
            )
            if name == "hierarchical":
                good = row["objective_ratio"] >= LEAST_SHARE and row["all_s_ratio"] <= MOST_TIME
                print(
                    f"  {'reached' if good else 'MISSED'}: {LEAST_SHARE:.1%} of the objective in {MOST_TIME:g} of the time"
                )
    return results


def found_again(args: argparse.Namespace) -> list[dict[str, Any]]:
    try:
        from sklearn.metrics import adjusted_mutual_info_score
    except ImportError:
        raise UserError("suite is planted, it needs scikit-learn: pip install scikit-learn") from None
    results = []
    for k in args.k:
        x, truth = planted(args.n, args.dim, k, args.seed)
        for method in ("flat", "hierarchical"):
            for init in ("random", "k-means++"):
                settings = KMeansSettings(k=k, iterations=args.iterations, seed=args.seed, init=init, method=method)
                label, _ = labels(x, fit(x, settings))
                ami = float(adjusted_mutual_info_score(truth[truth >= 0], label[truth >= 0]))
                results.append({"k": k, "method": method, "init": init, "ami": ami})
                verdict = "reached" if ami >= LEAST_AMI else "MISSED"
                print(f"k {k}, {method}, {init}: AMI {ami:.4f}, {LEAST_AMI} {verdict}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, choices=("levels", "planted"))
    parser.add_argument("--n", type=int, default=100_000, help="rows")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[1024])
    parser.add_argument("--data", choices=("tree", "uniform"), default="tree", help="of levels")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--refine", type=int, default=2)
    parser.add_argument("--refine-cells", type=int, default=8)
    parser.add_argument("--exact", action="store_true", help="levels: refine without restriction as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=("cpu", "wall"),
        default="cpu",
        help="cpu: time of this process, for a machine that is not idle",
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    results = levels(args, clock) if args.suite == "levels" else found_again(args)
    if args.json:
        facts = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        write_json_atomic(
            args.json, {"arguments": facts, "machine": machine(), "load": os.getloadavg(), "results": results}
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
