"""Suite kmeans: an iteration and a fit compared with faiss-cpu; with --memory, the peak memory of a fit from disk.

iteration: ours reads fp16 rows, normalises them, assigns, accumulates and updates; faiss assigns the same rows, held in
fp32, with IndexFlatIP. Both take turns in one process; the limit is on the median of the ratios of neighbouring turns.
fit: the objective (mean cosine to the nearest centroid, computed alike for both) after equally many iterations.
memory: an embedding folder ten times as large as --memory-gb is fitted in a separate process. Anonymous memory
(RssAnon, sampled) above that of the process after importing torch is counted: resident pages of mapped files can be
reclaimed.

Legend: n rows, K centroids, D width.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from argtypes import positive, real, seed_number
from benchmarks.anonymous_memory import PeakAnonymous, anonymous_bytes
from benchmarks.kmeans_quality import fit, labels, tree
from benchmarks.measure import ask_process
from benchmarks.suite import Limit, Report, Row, check_k, clock_of, make_report
from benchmarks.synthetic_folders import write_embeddings
from megacid.distributed.stopping import no_progress
from megacid.errors import UserError
from megacid.offline.cluster.accumulate import one_pass
from megacid.offline.cluster.hierarchical import two_level
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.lloyd import update
from megacid.offline.cluster.memory import block_rows
from megacid.offline.cluster.run import KMeansRun
from megacid.offline.cluster.state import Init, KMeansSettings, KMeansState, Method
from megacid.offline.nearest import chosen_backend
from megacid.offline.rows import ArrayRows, EmbeddingRows

HELP = "an iteration and a fit of k-means compared with faiss-cpu; --memory: peak memory of a fit from disk"
MAX_TIME_RATIO, MIN_OBJECTIVE_RATIO = 1.1, 0.999
FITS: tuple[tuple[Method, Init], ...] = (
    ("flat", "random"),
    ("flat", "k-means++"),
    ("hierarchical", "k-means++"),
)
CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, default=1_000_000, help="rows of the iteration")
    parser.add_argument("--fit-rows", type=positive, default=1_000_000, help="rows of the fit")
    parser.add_argument("--dim", type=positive, default=256, help="embedding width")
    parser.add_argument("--k", type=positive, default=4096, help="centroids")
    parser.add_argument("--iterations", type=positive, default=10, help="iterations of the fit")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of the iteration")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the rows and of the fits")
    parser.add_argument("--memory", action="store_true", help="measure only the memory of a fit from disk")
    parser.add_argument(
        "--memory-gb",
        type=real(0, 1e6, without=(0,)),
        default=0.5,
        help="memory limit; ten times as much data is written",
    )
    parser.add_argument("--method", choices=("flat", "hierarchical"), default="flat", help="fit of --memory")
    parser.add_argument("--folder", type=Path, help="folder for the data of --memory (default: the temporary folder)")


def run(args: argparse.Namespace) -> Report:
    if args.device != "cpu":
        raise UserError(
            f"--device is {args.device}, expected cpu: faiss-cpu needs it; --suite assignment measures a GPU"
        )
    if not args.memory:
        check_k(args.k, min(args.rows, args.fit_rows))
    return make_report(args, [_memory(args)] if args.memory else [*_iteration(args), *_fits(args)])


def check(report: Report) -> list[Limit]:
    limits = []
    for row in report["results"]:
        if row["measured"] == "iteration" and row["backend"] == row["auto"]:
            what, ratio = f"iteration ({row['auto']}): time over faiss's assignment", statistics.median(row["ratio"])
            limits.append(Limit(what, ratio, MAX_TIME_RATIO, at_least=False))
        elif row["measured"] == "fit":
            what = f"{row['method']} fit from {row['init']}: objective over faiss's"
            limits.append(Limit(what, row["objective_ratio"], MIN_OBJECTIVE_RATIO, at_least=True))
        elif row["measured"] == "memory":
            what, bound = "peak GB above that of the libraries", report["arguments"]["memory_gb"]
            limits.append(Limit(what, row.get("peak_gb"), bound, at_least=False))
    return limits


def _faiss(threads: int) -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("--suite is kmeans, which needs faiss: pip install faiss-cpu") from None
    faiss.omp_set_num_threads(threads)
    return faiss


def _unit_fp32(x: np.ndarray) -> np.ndarray:
    out = x.astype(np.float32)
    for low in range(0, len(out), 1 << 16):
        out[low : low + (1 << 16)] /= np.linalg.norm(out[low : low + (1 << 16)], axis=1, keepdims=True)
    return out


def _iteration(args: argparse.Namespace) -> list[Row]:
    faiss, clock = _faiss(args.threads), clock_of(args)
    x = tree(args.rows, args.dim, args.seed)
    wide, rows = _unit_fp32(x), ArrayRows(x)
    start = torch.from_numpy(wide[np.random.default_rng(args.seed).choice(args.rows, args.k, replace=False)])
    index = faiss.IndexFlatIP(args.dim)
    index.add(start.numpy())

    def theirs() -> None:
        index.search(wide, 1)

    def ours(backend: str) -> None:
        settings = KMeansSettings(k=args.k, backend=backend, memory_gb=16)  # type: ignore[arg-type]
        block = block_rows(args.rows, args.dim, settings, CPU)
        run = KMeansRun(rows, settings, block, 1.0, CPU, None, no_progress)
        total = one_pass(run, start, np.full(args.rows, -1, np.int32))
        update(KMeansState(start), total, settings)

    def seconds(backend: str | None) -> float:
        began = clock()
        ours(backend) if backend else theirs()
        return clock() - began

    times: dict[str, list[float]] = {"torch": [], "faiss": []}
    faiss_times: dict[str, list[float]] = {"torch": [], "faiss": []}
    for _ in range(args.rounds):
        for backend in times:
            faiss_times[backend].append(seconds(None))
            times[backend].append(seconds(backend))
    out = []
    for backend in times:
        ratio = [mine / other for mine, other in zip(times[backend], faiss_times[backend])]
        row = {"measured": "iteration", "backend": backend, "auto": chosen_backend("auto", CPU, args.dim)}
        row |= {"rows": args.rows, "k": args.k, "dim": args.dim}
        out.append(row | {"seconds": times[backend], "faiss_assignment": faiss_times[backend], "ratio": ratio})
        print(
            f"iteration, backend {backend}: {statistics.median(times[backend]):.2f} s, faiss's assignment "
            f"{statistics.median(faiss_times[backend]):.2f} s, "
            f"ratio {statistics.median(ratio):.3f} [{min(ratio):.3f}, {max(ratio):.3f}]",
            flush=True,
        )
    return out


def _fits(args: argparse.Namespace) -> list[Row]:
    faiss, clock = _faiss(args.threads), clock_of(args)
    x = tree(args.fit_rows, args.dim, args.seed)
    # All rows: the default would train on 256 rows per centroid.
    options = {"niter": args.iterations, "spherical": True, "seed": args.seed + 1}
    theirs = faiss.Kmeans(args.dim, args.k, max_points_per_centroid=args.fit_rows, **options)
    theirs.cp.min_points_per_centroid = 1
    began = clock()
    theirs.train(_unit_fp32(x))
    faiss_seconds = clock() - began
    reference = labels(x, torch.from_numpy(theirs.centroids))[1]
    out: list[Row] = []
    for method, init in FITS:
        began = clock()
        settings = KMeansSettings(
            k=args.k, iterations=args.iterations, seed=args.seed, init=init, method=method, memory_gb=16
        )
        mine = fit(x, settings)
        seconds = clock() - began
        objective = labels(x, mine)[1]
        row = {"measured": "fit", "method": method, "init": init, "rows": args.fit_rows, "k": args.k, "dim": args.dim}
        row |= {"iterations": args.iterations, "objective": objective, "faiss_objective": reference}
        out.append(row | {"objective_ratio": objective / reference, "seconds": seconds, "faiss_seconds": faiss_seconds})
        print(
            f"{method} fit from {init}, {args.iterations} iterations: objective {objective:.5f}, faiss {reference:.5f} "
            f"({objective / reference:.3%}), {seconds:.1f} s and {faiss_seconds:.1f} s ({seconds / faiss_seconds:.3f})",
            flush=True,
        )
    return out


def _memory(args: argparse.Namespace) -> Row:
    count = int(10 * args.memory_gb * 1e9 / (2 * args.dim))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = write_embeddings(Path(folder) / "emb", lambda part: tree(len(part), args.dim, part.start), count, 16)
        request = {name: getattr(args, name) for name in ("k", "memory_gb", "method", "iterations", "seed", "threads")}
        answer = ask_process("benchmarks.kmeans", request | {"folder": folder}, {})
    row = {"measured": "memory", "method": args.method, "rows": count, "k": args.k, "dim": args.dim} | answer
    if "skipped" not in answer:
        print(
            f"memory, {args.method}: {size / 1e9:.2f} GB of rows, limit {args.memory_gb:g} GB, "
            f"peak {row['peak_gb']:.3f} GB of anonymous memory above {row['own_gb']:.3f} GB of the libraries",
            flush=True,
        )
    return row


def main() -> None:
    """The process that --memory starts: argument 1 is the request, the last line printed is the answer, both JSON."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))  # allocate the library's own buffers before counting
    names = ("k", "memory_gb", "method", "iterations", "seed")
    settings = KMeansSettings(**{name: request[name] for name in names})
    rows = EmbeddingRows(Path(request["folder"]) / "emb")
    own, began = anonymous_bytes(), time.perf_counter()
    with PeakAnonymous() as peak:
        if settings.method == "flat":
            kmeans(rows, settings, checkpoint=Path(request["folder"]) / "state.npz", unit_rows=True)
        else:
            two_level(rows, settings, Path(request["folder"]) / "work", unit_rows=True)
    print(json.dumps({"peak_gb": (peak.bytes - own) / 1e9, "own_gb": own / 1e9, "wall": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
