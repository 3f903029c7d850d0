"""Suite balance-bookkeeping: CPU time and memory of the balance stage per sample, without products of embeddings.

Runs the stage's own functions on labels, groups, candidate clusters and links in the numbers of a large set: 400
samples per cluster, 44 % of the samples removed, M candidates per sample of which none is ruled out, a link across
clusters for every tenth sample. What reads and multiplies embeddings is replaced by functions that return these. Files
are the real ones: metadata, keep masks, representatives.

Memory is the peak of the resident memory above that before the first phase: what a rank holds and what the phase needs
for a while. Both are fitted by a + n (w + s / ranks): w is per sample on every rank, s is shared.

Legend: n samples, k clusters, M candidate clusters of a sample, D width.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from argtypes import natural, positive
from benchmarks.laws import fit
from benchmarks.measure import RETURN_FREED, proc_bytes
from benchmarks.ranks import ask_ranks
from benchmarks.suite import Limit, Report, Row, make_report, print_table
from megacid.distributed.array_exchange import Ranks
from megacid.distributed.parallel import init, shard_range, shutdown
from megacid.distributed.stopping import no_progress
from megacid.errors import UserError
from megacid.offline.balance import cross_cluster, medoids, within_cluster
from megacid.offline.balance.clusters import group_by_cluster
from megacid.offline.balance.context import BalanceContext, BalanceSettings
from megacid.offline.balance.cross_cluster import Pairs, find_candidates, link_neighbors
from megacid.offline.balance.deduplicate import Decision
from megacid.offline.balance.groups import sample_groups
from megacid.offline.balance.linking import find
from megacid.offline.balance.medoids import represent_by_medoids
from megacid.offline.balance.outputs import write_tars
from megacid.offline.balance.preference import preference
from megacid.offline.balance.report import decision_report
from megacid.offline.balance.within_cluster import link_clusters
from megacid.offline.nearest import Assigner
from megacid.offline.row_numbers import row_dtype
from megacid.storage.parquet import join_by_key, key_column, read_parquet

HELP = "CPU time and memory per sample of the balance stage without products, by phase"
LAION, LAION_RANKS = 414_551_190, 8
MAX_GB, MAX_MINUTES = 16.0, 180.0
_PER_CLUSTER, _PER_TAR = 400, 10_000
_REMOVED, _LINKS = 0.44, 3  # of the samples, by links inside clusters; links of a pair of clusters
_DIM = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, nargs="+", default=[1_000_000, 4_000_000], help="samples")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2], help="processes")
    parser.add_argument("--neighbor-clusters", type=natural, default=4, help="as in tools/balance.py")
    parser.add_argument("--link", choices=("components", "greedy"), default="components", help="as in tools/balance.py")
    parser.add_argument("--folder", type=Path, help="folder for the files (default: the temporary folder)")


def run(args: argparse.Namespace) -> Report:
    if args.device != "cpu":
        raise UserError(f"--device is {args.device}, expected cpu: this suite runs on the CPU")
    rows = measure(args)
    columns = {
        "phase": lambda row: row["phase"],
        "samples": lambda row: f"{row['n']:,}",
        "ranks": lambda row: str(row["ranks"]),
        "CPU s:": lambda row: f"{row['cpu_s']:.2f}",
        "peak MB:": lambda row: f"{row['peak_mb']:.0f}",
    }
    print_table(rows, columns)
    if len(set(args.rows)) > 1 and len(set(args.ranks)) > 1:
        _print_laws(rows)
    return make_report(args, rows)


def measure(args: argparse.Namespace) -> list[Row]:
    """CPU time and peak of every phase, for every number of samples and of ranks."""
    rows: list[Row] = []
    for n, world in itertools.product(args.rows, args.ranks):
        request = {"n": n, "neighbor_clusters": args.neighbor_clusters, "link": args.link}
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, mock.patch.dict(os.environ, RETURN_FREED):
            answer = ask_ranks("benchmarks.balance_bookkeeping", request | {"folder": folder}, world)
        for phase, (seconds, peak) in answer.items():
            rows.append({"phase": phase, "n": n, "ranks": world, "cpu_s": seconds, "peak_mb": peak / 1e6})
    return rows


def laws(rows: list[Row], value: str) -> dict[str, tuple[float, float]]:
    """{phase: (w, s)} of a measured value, in its unit per million samples; see the module."""
    found: dict[str, tuple[float, float]] = {}
    for phase in dict.fromkeys(row["phase"] for row in rows):
        own = [row for row in rows if row["phase"] == phase]
        terms = [(1.0, row["n"] / 1e6, row["n"] / 1e6 / row["ranks"]) for row in own]
        _, everywhere, shared = fit(terms, [row[value] for row in own])
        found[phase] = (everywhere, shared)
    return found


def _print_laws(rows: list[Row]) -> None:
    seconds, memory = laws(rows, "cpu_s"), laws(rows, "peak_mb")
    table = [{"phase": phase, "cpu": seconds[phase], "memory": memory[phase]} for phase in seconds]
    columns = {
        "phase": lambda row: row["phase"],
        "CPU us per sample of every rank:": lambda row: f"{row['cpu'][0]:.2f}",
        "shared:": lambda row: f"{row['cpu'][1]:.2f}",
        f"minutes at LAION on {LAION_RANKS} ranks:": lambda row: f"{at_laion(row['cpu']) / 60:.1f}",
        "peak bytes per sample of every rank:": lambda row: f"{row['memory'][0]:.1f}",
        "shared bytes:": lambda row: f"{row['memory'][1]:.1f}",
        f"GB at LAION on {LAION_RANKS} ranks:": lambda row: f"{at_laion(row['memory']) / 1e3:.1f}",
    }
    print_table(table, columns)


def at_laion(law: tuple[float, float], ranks: int = LAION_RANKS) -> float:
    """The value of a law of `laws` on one of some ranks."""
    return (law[0] + law[1] / ranks) * LAION / 1e6


def check(report: Report) -> list[Limit]:
    rows = report["results"]
    minutes = sum(map(at_laion, laws(rows, "cpu_s").values())) / 60
    peak = max(map(at_laion, laws(rows, "peak_mb").values())) / 1e3
    where = f"at LAION's size on {LAION_RANKS} ranks"
    return [Limit(f"CPU minutes {where}", minutes, MAX_MINUTES, False), Limit(f"GB {where}", peak, MAX_GB, False)]


class _NoRows:
    """n rows of which only a few are read."""

    def __init__(self, n: int) -> None:
        self.num_rows, self.dim = n, _DIM

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.take(np.arange(start, stop))

    def take(self, rows: np.ndarray) -> np.ndarray:
        angle = rows % 997 / 997
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    def name(self, row: int) -> str:
        return f"row {row}"


class _Phases:
    """Seconds of CPU and peak bytes of each phase of this rank."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}
        self._own = proc_bytes("/proc/self/status", "VmRSS")

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak; samples would miss it on a busy machine
        began = time.process_time()
        yield
        peak = proc_bytes("/proc/self/status", "VmHWM") - self._own
        self.found[name] = (time.process_time() - began, float(peak))


def _linked(context: BalanceContext, cluster: int, options: object) -> np.ndarray:
    """Representatives as products would give them: 44 % of the samples follow the one before."""
    local = np.arange(int(context.clusters.sizes[cluster]))
    local[1:] -= local[1:] * 7919 % 100 < 100 * _REMOVED
    return find(local, slice(0, len(local)))


def _candidates(context: BalanceContext, rows: np.ndarray, label: np.ndarray, threshold: float) -> np.ndarray:
    """Candidate clusters, each one of 24 around a sample's own."""
    k, m = len(context.clusters.sizes), context.settings.neighbor_clusters
    step = np.random.default_rng(int(rows[0])).integers(1, 13, (len(rows), m))
    other = (label[:, None] + step * np.where(np.arange(m) % 2, 1, -1)) % k
    return np.stack([np.repeat(rows, m), other.reshape(-1)], axis=1)


def _links(
    context: BalanceContext, pairs: Pairs, low: int, high: int, representative: np.ndarray, options: object
) -> np.ndarray:
    """A few links of every pair of clusters, as products would give them."""
    ends = [
        representative[pairs.rows[np.concatenate([side[low:high] + at for at in range(_LINKS)])]]
        for side in (pairs.starts[:-1], pairs.middles)
    ]
    return np.stack(ends, axis=1)


def answer(request: dict[str, Any]) -> dict[str, tuple[float, float]]:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    parallel = init(always=True)
    try:
        return phases_of(request, Ranks(parallel.group))
    finally:
        shutdown()


def phases_of(request: dict[str, Any], ranks: Ranks) -> dict[str, tuple[float, float]]:
    """{phase: (seconds of CPU, bytes of its peak)} of this rank. A collective."""
    n, m = request["n"], request["neighbor_clusters"]
    k = max(n // _PER_CLUSTER, 2)
    rng = np.random.default_rng(0)
    settings = BalanceSettings(threshold=0.1, neighbor_clusters=m, link=request["link"])
    rows, phase = _NoRows(n), _Phases()
    with phase("labels"):
        label, score = rng.integers(0, k, n, dtype=np.int32), rng.random(n, dtype=np.float32)
    with phase("order of the samples"):
        priority = preference("nearest", score, 0, rows, None)
        del score
        clusters = group_by_cluster(label, priority, k)
    assigner = Assigner(torch.zeros(2, _DIM), "cosine", torch.device("cpu"), "torch")
    context = BalanceContext(rows, clusters, settings, torch.device("cpu"), assigner, ranks.group)

    with (
        mock.patch.object(within_cluster, "link_cluster", _linked),
        mock.patch.object(cross_cluster, "candidate_clusters", _candidates),
        mock.patch.object(cross_cluster, "_link_pairs", _links),
        mock.patch.object(medoids, "_medoids", lambda context, groups: np.array([group[-1] for group in groups])),
    ):
        with phase("links inside clusters"):
            first_pass = representative = link_clusters(context, 0.1)
        if m:
            with phase("links across clusters"):
                entries = [find_candidates(context, clusters.rows, 0.1)]
                representative = link_neighbors(context, representative, 0.1, entries.pop())
        with phase("medoids"):
            represent_by_medoids(context, representative)
    with phase("keep flags"):
        keep = clusters.keep_mask(representative, None)
    decision = Decision(keep, representative, 0.1, [], 0, first_pass)
    del context, clusters, priority
    _outputs(Path(request["folder"]), rows, label, k, decision, ranks, phase)
    return phase.found


def _outputs(
    folder: Path, rows: _NoRows, label: np.ndarray, k: int, decision: Decision, ranks: Ranks, phase: _Phases
) -> None:
    n = rows.num_rows
    sizes = np.array([min(_PER_TAR, n - low) for low in range(0, n, _PER_TAR)])
    starts, names = np.concatenate([[0], np.cumsum(sizes)]), [f"{number:05d}" for number in range(len(sizes))]
    keys = [f"{number:09d}" for number in range(_PER_TAR)]
    metadata = folder / f"metadata-{ranks.rank}.parquet"
    pq.write_table(pa.table({"image_path": keys}), metadata)
    tars = range(*shard_range(len(sizes), ranks.rank, ranks.world))
    with phase("places in the tars"):
        parts = [np.empty(0, row_dtype(n))]
        for tar in tars:
            own = key_column(read_parquet(metadata, "", ["image_path"]), "image_path", metadata, "")[: sizes[tar]]
            parts.append((starts[tar] + join_by_key(own, keys, metadata, "", require_all=True)).astype(row_dtype(n)))
        number = ranks.concatenate(np.concatenate(parts))
    inputs: Any = SimpleNamespace(
        index=SimpleNamespace(names=names, sizes=sizes, starts=starts), rows=SimpleNamespace(stems=names, starts=starts)
    )
    with phase("masks and representatives"):
        write_tars(folder, inputs, decision, number, tars, no_progress)
    with phase("report"):
        decision_report(decision, label, k, None, ranks)
    with phase("groups of the gallery"):
        if ranks.rank == 0:
            sample_groups(rows, decision.representative)


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
