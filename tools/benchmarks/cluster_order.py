"""Suite cluster-order: time of a row that is read by cluster, from an embedding folder and from the copy in order.

The folder has as many tars as LAION-400M; the files of all tars are links to one, so they stay in the page cache and no
disk is measured. A cluster is random rows of the folder. The copy is made of fewer tars, since it takes real space.

Legend: n rows, D width.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from argtypes import positive, real, seed_number
from benchmarks.anonymous_memory import PeakAnonymous, anonymous_bytes
from benchmarks.suite import Limit, Report, Row, clock_of, make_report, print_table
from benchmarks.synthetic_folders import EMBEDDING_META, write_embeddings
from megacid.distributed.stopping import no_progress
from megacid.errors import UserError
from megacid.offline import cluster_order
from megacid.offline.balance.clusters import group_by_cluster
from megacid.offline.embed.partitions import partition_files
from megacid.offline.rows import EmbeddingRows, Rows
from megacid.storage.metadata import write_meta
from megacid.storage.stage_directory import PartialResults

HELP = "microseconds per row of reading clusters from a folder of many tars, of the copy in cluster order, and from it"
MAX_FOLDER_US, MAX_COPY_US, MAX_ORDERED_US = 30.0, 20.0, 5.0
T = TypeVar("T")
_READ_ROWS = 8192  # of one sequential read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tars", type=positive, default=41_455, help="tars of the folder that is only read")
    parser.add_argument("--copied-tars", type=positive, default=100, help="tars of the folder that is copied")
    parser.add_argument("--rows", type=positive, default=10_000, help="rows of each tar")
    parser.add_argument("--dim", type=positive, default=1280, help="embedding width")
    parser.add_argument("--cluster-rows", type=positive, default=400, help="rows of a cluster")
    parser.add_argument("--clusters", type=positive, default=200, help="clusters that are read")
    parser.add_argument("--memory-gb", type=real(0, 1e6, without=(0,)), default=0.5, help="memory bound of the copy")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the clusters")
    parser.add_argument("--folder", type=Path, help="folder for the data (default: the temporary folder)")


def run(args: argparse.Namespace) -> Report:
    if args.device != "cpu":
        raise UserError(f"--device is {args.device}, expected cpu: this suite runs on the CPU")
    results = measure(args)
    print_table(
        results,
        {
            "what": lambda row: row["what"],
            "n:": lambda row: f"{row['rows']:,}",
            "us per row:": lambda row: f"{row['us_per_row']:.2f}",
            "peak GiB:": lambda row: f"{row['peak_gib']:.2f}",
        },
    )
    return make_report(args, results)


def measure(args: argparse.Namespace) -> list[Row]:
    """Time and peak of each kind of reading. RuntimeError when the copy has other rows than the folder."""
    clock, rng = clock_of(args), np.random.default_rng(args.seed)
    results: list[Row] = []

    def measured(what: str, rows: Rows, count: int, work: Callable[[], T]) -> T:
        before, began = anonymous_bytes(), clock()
        with PeakAnonymous() as peak:
            result = work()
        us = (clock() - began) / count * 1e6
        gib = max(peak.bytes - before, 0) / 2**30
        results.append({"what": what, "rows": rows.num_rows, "dim": rows.dim, "us_per_row": us, "peak_gib": gib})
        return result

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        for kind, tars in (("many", args.tars), ("copied", args.copied_tars)):
            _linked_folder(folder / kind, tars, args.rows, args.dim)
        rows = EmbeddingRows(folder / "many")
        read = min(rows.num_rows, args.cluster_rows * args.clusters)
        measured("all rows of some tars", rows, read, lambda: _read(rows, read))
        chosen = rng.integers(0, rows.num_rows, (args.clusters, args.cluster_rows))
        measured("clusters, folder of many tars", rows, chosen.size, lambda: _take(rows, chosen))
        few = EmbeddingRows(folder / "copied")
        label = rng.integers(0, -(-few.num_rows // args.cluster_rows), few.num_rows)
        clusters = group_by_cluster(label, rng.random(few.num_rows), int(label.max()) + 1)
        some = [clusters.members(cluster) for cluster in range(min(args.clusters, len(clusters.sizes)))]
        count = sum(map(len, some))
        measured("clusters, folder of few tars", few, count, lambda: _take(few, some))
        partial = PartialResults(folder, {})
        partial.begin()
        copy = measured("copying", few, few.num_rows, lambda: _copy(few, clusters.places, partial, args.memory_gb))
        measured("clusters, copy in their order", few, count, lambda: _take(copy, some))
        if not all(np.array_equal(few.take(cluster), copy.take(cluster)) for cluster in some):
            raise RuntimeError("the copy has other rows than the folder")
    return results


def check(report: Report) -> list[Limit]:
    bounds = {"clusters, folder of many tars": MAX_FOLDER_US, "copying": MAX_COPY_US}
    bounds |= {"clusters, copy in their order": MAX_ORDERED_US}
    rows = {row["what"]: row for row in report["results"]}
    limits = [Limit(f"us per row, {what}", rows[what]["us_per_row"], bound, False) for what, bound in bounds.items()]
    gib = report["arguments"]["memory_gb"] * 1e9 / 2**30
    return [*limits, Limit("peak GiB, copying", rows["copying"]["peak_gib"], gib, False)]


def _linked_folder(folder: Path, tars: int, rows: int, dim: int) -> None:
    """An embedding folder whose tars all have the same files."""
    x = np.random.default_rng(0).standard_normal((rows, dim), np.float32)
    unit = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    write_embeddings(folder / "one", lambda part: unit, rows, 1)
    first = partition_files(folder / "one", 0, 1)
    for number in range(tars):
        files = partition_files(folder, number, tars)
        for source, target in ((first.image, files.image), (first.metadata, files.metadata)):
            target.parent.mkdir(exist_ok=True)
            os.link(source, target)
    shutil.rmtree(folder / "one")
    manifest = {"dim": dim, "num_samples": tars * rows, "shards_digest": "none"} | EMBEDDING_META
    partitions = {f"{number:05d}": number for number in range(tars)}
    write_meta(folder, "embed", source={"shards": "none"}, partitions=partitions, **manifest)


def _read(rows: Rows, count: int) -> None:
    for low in range(0, count, _READ_ROWS):
        rows.read(low, min(low + _READ_ROWS, count))


def _take(rows: Rows, clusters: Iterable[np.ndarray]) -> None:
    for cluster in clusters:
        rows.take(cluster)


def _copy(rows: Rows, places: cluster_order.Places, partial: PartialResults, memory_gb: float) -> Rows:
    before = cluster_order.machine_memory
    cluster_order.machine_memory = lambda: 0  # the folder is smaller than the memory of most machines
    try:
        return cluster_order.in_cluster_order(rows, places, partial, None, memory_gb, no_progress)
    finally:
        cluster_order.machine_memory = before
