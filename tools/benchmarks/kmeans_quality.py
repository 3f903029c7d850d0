"""Suites levels and planted: the quality of k-means.

levels: two-level k-means compared with a flat fit, on rows of a tree (topics of log-normal size, parts of them, noise)
or, with --data uniform, on rows without structure. The objective is the mean cosine of all rows to their nearest
centroid, found by exhaustive search. Time is that of the fit, and that of the fit and this final assignment.

planted: well separated clusters of unequal size with 1 % outliers; the adjusted mutual information (AMI) of labels and
truth over the rows that are not outliers. Needs scikit-learn.

Legend: n rows, K centroids, D width.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from argtypes import natural, positive, seed_number
from benchmarks.suite import Limit, Report, Row, check_k, clock_of, make_report
from megacid.errors import UserError
from megacid.offline.cluster.hierarchical import two_level
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import Assigner, pad_rows, prepare, tile_rows
from megacid.offline.rows import ArrayRows

HELP = (
    "levels: two-level k-means compared with flat k-means; planted: adjusted mutual information with planted clusters"
)
MIN_OBJECTIVE_RATIO, MAX_TIME_RATIO, MIN_AMI = 0.985, 0.1, 0.95
_CHUNK = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, default=100_000, help="rows of the data")
    parser.add_argument("--dim", type=positive, default=64, help="embedding width")
    parser.add_argument(
        "--k", type=positive, nargs="+", help="centroids (default levels: 1024, planted: 30 100 200 300)"
    )
    parser.add_argument(
        "--seeds", type=seed_number, nargs="+", default=[0], help="of the data and the fit, a run for each"
    )
    parser.add_argument("--iterations", type=positive, default=20, help="iterations of every fit")
    parser.add_argument(
        "--refine", type=natural, default=2, help="final iterations of a two-level fit over all centroids"
    )
    parser.add_argument("--refine-cells", type=natural, default=8, help="cells that such an iteration searches per row")
    parser.add_argument("--data", choices=("tree", "uniform"), default="tree", help="data of levels")
    parser.add_argument("--exact", action="store_true", help="levels: also refine over all cells")


def run(args: argparse.Namespace) -> Report:
    all_k = args.k or ([30, 100, 200, 300] if args.suite == "planted" else [1024])
    check_k(max(all_k), args.rows)
    measure = _planted if args.suite == "planted" else _levels
    return make_report(args, [row for seed in args.seeds for k in all_k for row in measure(args, k, seed)])


def check(report: Report) -> list[Limit]:
    limits = []
    for row in report["results"]:
        if "ami" in row:
            what = f"AMI, k {row['k']}, seed {row['seed']}, {row['method']}, {row['init']}"
            limits.append(Limit(what, row["ami"], MIN_AMI, True))
        elif row["fit"] == "hierarchical":
            what = f"k {row['k']}, {row['data']}, seed {row['seed']}"
            limits.append(Limit(f"objective over flat, {what}", row["objective_ratio"], MIN_OBJECTIVE_RATIO, True))
            limits.append(Limit(f"time with labels over flat, {what}", row["labelled_ratio"], MAX_TIME_RATIO, False))
    return limits


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def tree(n: int, dim: int, seed: int) -> np.ndarray:
    """fp16 [n, D]: topics of log-normal size with 20 parts each."""
    rng = np.random.default_rng(seed)
    topics = max(1, n // 1000)
    share = rng.lognormal(0, 1, topics)
    middle = rng.standard_normal((topics, dim), np.float32)[np.repeat(np.arange(topics), 20)]
    middle += 0.7 * rng.standard_normal(middle.shape, np.float32)
    out = np.empty((n, dim), np.float16)
    for low in range(0, n, _CHUNK):
        part = out[low : low + _CHUNK]
        chosen = rng.choice(topics, len(part), p=share / share.sum()) * 20 + rng.integers(20, size=len(part))
        part[:] = unit(middle[chosen] + 0.6 * rng.standard_normal(part.shape, np.float32))
    return out


def uniform(n: int, dim: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, dim), np.float32))


def planted(n: int, dim: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows fp16 [n, D], cluster int64 [n], -1 for the 1 % outliers)."""
    rng = np.random.default_rng(seed)
    share = rng.lognormal(0, 0.7, k)
    label = rng.choice(k, n, p=share / share.sum())
    x = unit(rng.standard_normal((k, dim)))[label].astype(np.float32)
    x += rng.standard_normal((n, dim), np.float32) * np.float32(0.35 / dim**0.5)
    outlier = rng.random(n) < 0.01
    x[outlier] = rng.standard_normal((int(outlier.sum()), dim))
    return unit(x), np.where(outlier, -1, label)


def fit(x: np.ndarray, settings: KMeansSettings, device: str = "cpu") -> Tensor:
    """Centroids fp32 [K, D]."""
    if settings.method == "flat":
        return kmeans(ArrayRows(x), settings, device=device).centroids
    with tempfile.TemporaryDirectory() as folder:
        return two_level(ArrayRows(x), settings, Path(folder), device=device).centroids


def labels(x: np.ndarray, centroids_KD: Tensor, device: str = "cpu") -> tuple[np.ndarray, float]:
    """(label int64 [n], mean cosine to it), the nearest of all centroids."""
    torch_device = torch.device(device)
    assigner, tile = Assigner(centroids_KD, "cosine", torch_device), tile_rows(torch_device)
    label_tiles, total = [], 0.0
    for low in range(0, len(x), tile):
        x_TD = prepare(x[low : low + tile], "cosine", torch_device)
        value_TL, label_TL = assigner.tile(pad_rows(x_TD, tile))
        label_tiles.append(label_TL[: len(x_TD), 0].cpu().numpy())
        total += float(value_TL[: len(x_TD)].double().sum())
    return np.concatenate(label_tiles), total / len(x)


def _levels(args: argparse.Namespace, k: int, seed: int) -> list[Row]:
    x, clock = (tree if args.data == "tree" else uniform)(args.rows, args.dim, seed), clock_of(args)
    flat = KMeansSettings(k=k, iterations=args.iterations, seed=seed, memory_gb=16)
    two = replace(flat, method="hierarchical", init="k-means++", refine=args.refine, refine_cells=args.refine_cells)
    fits = {"flat": flat, "hierarchical": two}
    if args.exact:
        fits["hierarchical, refined over all cells"] = replace(two, refine_cells=0)
    rows: list[dict[str, Any]] = []
    for name, settings in fits.items():
        began = clock()
        centroids_KD = fit(x, settings, args.device)
        fitted = clock() - began
        _, objective = labels(x, centroids_KD, args.device)
        row = {"k": k, "data": args.data, "seed": seed, "fit": name}
        row |= {"objective": objective, "fitted": fitted, "labelled": clock() - began}
        rows.append(row)
        row |= {f"{what}_ratio": row[what] / rows[0][what] for what in ("objective", "fitted", "labelled")}
        print(
            f"k {k:,}, {args.data}, seed {seed}, {name}: "
            f"objective {objective:.5f} ({row['objective_ratio']:.2%} of flat), "
            f"fit {row['fitted']:.1f} s ({row['fitted_ratio']:.3f}), "
            f"with labels {row['labelled']:.1f} s ({row['labelled_ratio']:.3f})",
            flush=True,
        )
    return rows


def _planted(args: argparse.Namespace, k: int, seed: int) -> list[Row]:
    try:
        from sklearn.metrics import adjusted_mutual_info_score
    except ImportError:
        raise UserError("--suite is planted, which needs scikit-learn: pip install scikit-learn") from None
    x, truth = planted(args.rows, args.dim, k, seed)
    inside, rows = truth >= 0, []
    common = {"iterations": args.iterations, "seed": seed, "refine": args.refine, "refine_cells": args.refine_cells}
    for method in ("flat", "hierarchical"):
        for init in ("random", "k-means++"):
            settings = KMeansSettings(k=k, init=init, method=method, **common)
            label, _ = labels(x, fit(x, settings, args.device), args.device)
            ami = float(adjusted_mutual_info_score(truth[inside], label[inside]))
            rows.append({"k": k, "seed": seed, "method": method, "init": init, "ami": ami})
            print(f"k {k}, seed {seed}, {method}, {init}: AMI {ami:.4f}", flush=True)
    return rows
