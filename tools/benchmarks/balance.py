"""Suite balance: time, memory, precision and recall of the balance stage, from folders to keep masks and report.

Rows lie around centroids; one original in five lies between two centroids, so its copies fall into both clusters. A
copy is its original with noise; 15 % of the rows are copies. Labels come from the code of tools/cluster.py; tars,
embeddings and clusters have the layout of the tools. Preparing the data is not timed. With --large a second run has one
cluster that holds everything. Each run is a separate process; its memory is anonymous memory (RssAnon, sampled) above
that after importing the libraries, because pages of mapped files can be reclaimed.

precision: fraction of the removed samples that are surplus (all but one of each group of copies).
recall: fraction of the surplus samples that are removed.

Legend: n rows, K clusters, D width.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from argtypes import natural, positive, real, seed_number
from benchmarks.anonymous_memory import PeakAnonymous, anonymous_bytes
from benchmarks.measure import ask_process
from benchmarks.suite import Limit, Report, Row, check_k, clock_of, make_report
from benchmarks.synthetic_folders import EMBEDDING_META, samples_of_parts, write_embeddings, write_tars
from megacid.data.index import load_index
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import no_progress
from megacid.errors import UserError
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.stage import balance
from megacid.offline.cluster.assign_labels import assign_labels
from megacid.offline.nearest import Assigner
from megacid.offline.rows import EmbeddingRows
from megacid.storage.metadata import write_meta

HELP = "the balance stage with planted near-duplicates within and across clusters, and with one large cluster"
MAX_SECONDS, MIN_FRACTION, MAX_GIB = 180.0, 0.99, 2.0
_COPIES, _BETWEEN = 0.15, 0.2  # of all rows; of the originals
_SPREAD, _COPY_NOISE = 0.75, 0.12  # length of the noise added to a unit centroid, to a unit row
_CHUNK = 1 << 16
ALONE = Parallel(rank=0, world=1, local_rank=0, device=torch.device("cpu"), group=None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, default=1_000_000, help="samples")
    parser.add_argument("--dim", type=positive, default=256, help="embedding width")
    parser.add_argument("--k", type=positive, default=4096, help="clusters")
    parser.add_argument("--tars", type=positive, default=100, help="tars of the samples")
    parser.add_argument("--threshold", type=real(0, 2), default=0.35, help="as in tools/balance.py")
    parser.add_argument(
        "--neighbor-clusters", type=natural, nargs="*", default=[0, 4], help="as in tools/balance.py; a run for each"
    )
    parser.add_argument("--link", choices=("components", "greedy"), default="components", help="as in tools/balance.py")
    parser.add_argument("--keep", choices=("nearest", "medoid"), default="nearest", help="as in tools/balance.py")
    parser.add_argument(
        "--large", type=natural, default=0, help="also run one cluster with this many members (the limit is for 300000)"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the data")
    parser.add_argument("--folder", type=Path, help="folder for the data (default: the temporary folder)")


def run(args: argparse.Namespace) -> Report:
    if args.device != "cpu":
        raise UserError(f"--device is {args.device}, expected cpu: this suite runs on the CPU")
    check_k(args.k, args.rows)
    rows = _stages(args, args.rows, args.k, args.neighbor_clusters) if args.neighbor_clusters else []
    if args.large:
        rows += _stages(args, args.large, 1, [0])
    return make_report(args, rows)


def check(report: Report) -> list[Limit]:
    limits = []
    for row in report["results"]:
        what = f"{row['rows']:,} rows, {row['k']:,} clusters, {row['neighbor_clusters']} neighbor clusters"
        limits.append(Limit(f"precision, {what}", row.get("precision"), MIN_FRACTION, True))
        if row["k"] == 1:
            limits.append(Limit(f"peak GiB, {what}", row.get("peak_gib"), MAX_GIB, False))
        else:
            limits.append(Limit(f"seconds, {what}", row.get("seconds"), MAX_SECONDS, False))
        # Without the second pass, copies in different clusters are not looked for.
        if row["k"] == 1 or row["neighbor_clusters"]:
            limits.append(Limit(f"recall, {what}", row.get("recall"), MIN_FRACTION, True))
    return limits


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rows_with_copies(n: int, dim: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows fp16 [n, D], group int64 [n]: an original and its copies share one, centroids fp32 [K, D])."""
    rng = np.random.default_rng(seed)
    centroids = _unit(rng.standard_normal((k, dim), np.float32))
    place = rng.permutation(n)
    copies, originals = np.sort(place[: int(_COPIES * n)]), np.sort(place[int(_COPIES * n) :])
    x, group = np.empty((n, dim), np.float16), np.arange(n)
    for low in range(0, len(originals), _CHUNK):
        which = originals[low : low + _CHUNK]
        middle = centroids[rng.integers(k, size=len(which))]
        between = rng.random(len(which)) < _BETWEEN
        middle[between] = _unit(middle[between] + centroids[rng.integers(k, size=int(between.sum()))])
        x[which] = _unit(middle + rng.standard_normal(middle.shape, np.float32) * np.float32(_SPREAD / dim**0.5))
    group[copies] = rng.choice(originals, len(copies))
    for low in range(0, len(copies), _CHUNK):
        which = copies[low : low + _CHUNK]
        noise = rng.standard_normal((len(which), dim), np.float32) * np.float32(_COPY_NOISE / dim**0.5)
        x[which] = _unit(x[group[which]].astype(np.float32) + noise)
    return x, group, centroids


def _stages(args: argparse.Namespace, n: int, k: int, neighbor_clusters: list[int]) -> list[Row]:
    x, group, centroids = rows_with_copies(n, args.dim, k, args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        tars, emb, clusters = folder / "tars", folder / "emb", folder / "clusters"
        write_tars(tars, n, args.tars)
        digest = load_index(tars).digest
        write_embeddings(emb, lambda part: x[part.start : part.stop], n, args.tars, str(tars), digest)
        rows = EmbeddingRows(emb)
        assigner = Assigner(torch.from_numpy(centroids), "cosine", ALONE.device)
        assign_labels(clusters, rows, assigner, ALONE, 1, no_progress)
        np.save(clusters / "centroids.npy", centroids)
        manifest = {"shards_digest": digest, "k": k, "metric": "cosine"} | EMBEDDING_META
        write_meta(clusters, "cluster", source={"embeddings": str(emb)}, **manifest)
        rows_of_runs = []
        for neighbors in neighbor_clusters:
            out = folder / f"balance-{neighbors}"
            request = {name: getattr(args, name) for name in ("threshold", "link", "keep", "threads", "clock")}
            request |= {"folder": str(folder), "out": str(out), "neighbor_clusters": neighbors}
            row: Row = {"rows": n, "k": k, "dim": args.dim, "neighbor_clusters": neighbors, "link": args.link}
            row["keep"] = args.keep
            row |= ask_process("benchmarks.balance", request, {})
            if "skipped" not in row:
                masks = [
                    np.load(out / "keep" / f"{number:05d}.npy") for number in range(len(samples_of_parts(n, args.tars)))
                ]
                row |= _accuracy(group, np.concatenate(masks))
                print(
                    f"{n:,} rows, {k:,} clusters, {neighbors} neighbor clusters: {row['seconds']:.1f} s, "
                    f"peak {row['peak_gib']:.2f} GiB, precision {row['precision']:.4f}, recall {row['recall']:.4f}",
                    flush=True,
                )
            else:
                print(f"{n:,} rows, {k:,} clusters, {neighbors} neighbor clusters: {row['skipped']}", flush=True)
            rows_of_runs.append(row)
    return rows_of_runs


def _accuracy(group: np.ndarray, keep: np.ndarray) -> dict[str, float]:
    members, kept = np.bincount(group), np.bincount(group, weights=keep).astype(np.int64)
    filled = members > 0
    correct = int((members - np.maximum(kept, 1))[filled].sum())
    return {"precision": correct / int((~keep).sum()), "recall": correct / int((members - 1)[filled].sum())}


def main() -> None:
    """The process of one run: argument 1 is the request, the last line printed is the answer, both JSON."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))  # allocate the library's own buffers before counting
    names = ("threshold", "link", "keep", "neighbor_clusters")
    settings = BalanceSettings(**{name: request[name] for name in names})
    folder, clock = Path(request["folder"]), clock_of(argparse.Namespace(clock=request["clock"]))
    own, began = anonymous_bytes(), clock()
    with PeakAnonymous() as peak:
        balance(folder / "emb", folder / "clusters", Path(request["out"]), settings, ALONE)
    print(json.dumps({"seconds": clock() - began, "peak_gib": (peak.bytes - own) / 2**30}))


if __name__ == "__main__":
    main()
