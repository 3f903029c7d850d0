"""Suite laion: what LAION-400M costs one rank of 8, 64 and 512, from laws that are fitted to measurements here.

Tars and side tables have LAION's shape (41,455 tars of 10,000 samples, 56 % of them kept) and are links to those of one
tar, which takes seconds. Index, joined table, start of a run, loader, balance without products, reads by cluster,
merging of centroids and verification of a checkpoint run as on one of these ranks, at several sizes and, where the
machine can, at LAION's. Times are CPU times. The last columns are the law at n = 414,551,190 samples, T = 41,455 tars
and 1,000,000 clusters of width 1280. The defaults take about 10 minutes of CPU in all, at most 4 GB of memory and 8 GB
of disk.

Legend: n samples, T tars, W ranks, k clusters, M = 4 neighbor clusters.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from argtypes import natural, positive
from benchmarks import balance_bookkeeping, cluster_order, index, laion_shares, loader_tables
from benchmarks.balance_bookkeeping import LAION
from benchmarks.laws import fit
from benchmarks.measure import RETURN_FREED, ask_process
from benchmarks.suite import Limit, Report, Row, make_report, print_table
from megacid.errors import UserError

HELP = "LAION-400M on 8, 64 and 512 ranks: index, joins, loader, balance, clusters and resume, by fitted laws"
TARS, CLASSES, DIM = 41_455, 1_000_000, 1280
RANKS, RANKS_PER_NODE, CORES_PER_RANK = (8, 64, 512), 8, 12
_MASKS = ("keep flags", "places in the tars", "masks and representatives", "report", "groups of the gallery")
_SHOWN = 3  # of the measured sizes, the largest; --json has all
# What is promised, without the loader: (ranks, most). Other rows have no limit.
LIMITS = {
    "index, us per sample": (8, 40.0),
    "index, 12 processes per rank, min": (8, 10.0),
    "balance without products, min": (8, 180.0),
    "balance, peak of a rank, GB": (8, 16.0),
    "keep masks and report, min": (8, 2.0),
    "merging, peak of the first rank, GB": (8, 64.0),  # --memory-gb of the recipe
    "resume, bytes a rank hashes, in equal shares": (8, 1.1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=1, clock="cpu", device="cpu")
    parser.add_argument("--tars", type=positive, nargs="+", default=[1024, 8192, TARS], help="numbers of linked tars")
    parser.add_argument("--samples", type=positive, default=10_000, help="samples of a tar")
    parser.add_argument("--index-tars", type=positive, nargs="+", default=[1, 2], help="real tars that are indexed")
    parser.add_argument("--balance-rows", type=positive, nargs="+", default=[2_000_000, 8_000_000], help="samples")
    parser.add_argument("--balance-ranks", type=positive, nargs="+", default=[2, 8], help="processes")
    parser.add_argument("--neighbor-clusters", type=natural, default=4, help="as in tools/balance.py")
    parser.add_argument("--copied-tars", type=positive, default=40, help="tars whose embeddings are copied")
    parser.add_argument("--merged", type=positive, nargs="+", default=[25_000, 100_000], help="clusters of merging")
    parser.add_argument("--classes", type=positive, nargs="+", default=[250_000, CLASSES], help="of the checkpoints")
    parser.add_argument("--dim", type=positive, default=DIM, help="width of embeddings, centroids and class rows")
    parser.add_argument("--rounds", type=positive, default=2, help="measurements of index and loader")
    parser.add_argument("--folder", type=Path, help="folder for the data (default: the temporary folder)")


def run(args: argparse.Namespace) -> Report:
    if args.device != "cpu" or args.clock != "cpu":
        raise UserError(f"--device is {args.device} and --clock {args.clock}, expected cpu: leave them out")
    rows: list[Row] = []
    for measure in (_index, _tables, _balance, _clusters, _merging, _resume):
        for row in measure(args):
            rows.append(row)
            print(f"{row['what']}: {_measured(row)}", flush=True)
    print_table(rows, _columns())
    print("\nn samples, T tars, W ranks, k clusters")
    return make_report(args, rows)


# ---- rows --------------------------------------------------------------------------------------------------------


def _row(
    what: str, suite: str, points: Mapping[str, float], law: Mapping[str, float], at_laion: Mapping[int, float]
) -> Row:
    """A row of the table.

    Args:
        what: ends with the unit.
        suite: the suite that measures this alone.
        points: measured values by size.
        law: coefficients by term; those that are 0 are left out.
        at_laion: the value by number of ranks.
    """
    row: Row = {"what": what, "suite": suite}
    row |= {f"at {size}": float(value) for size, value in points.items()}
    row |= {f"law {term}": float(value) for term, value in law.items() if value}
    return row | {f"{ranks} ranks": float(value) for ranks, value in at_laion.items()}


def _ask(request: dict[str, Any]) -> dict[str, float]:
    """The answer of a process of its own, since the allocator keeps what was freed."""
    answer = ask_process("benchmarks.laion_shares", request, RETURN_FREED)
    if "skipped" in answer:
        raise UserError(f"{request['what']} failed ({answer['skipped']}): see the message")
    return answer


def _everywhere(value: float) -> dict[int, float]:
    return dict.fromkeys(RANKS, value)


def _index(args: argparse.Namespace) -> Iterator[Row]:
    options = {"samples": args.samples, "image_bytes": 20_000, "workers": 1, "rounds": args.rounds}
    seconds: dict[int, float] = {}
    for tars in args.index_tars:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            one = argparse.Namespace(tars=tars, **options)
            times = index.measure(index.write_tars(Path(name) / "tars", "webdataset", one), one)["index"]
        seconds[tars * args.samples] = float(np.median(times)) * tars * args.samples / 1e6
    per_sample = fit([(1.0, n) for n in seconds], list(seconds.values()))[1]
    points = {f"{n:,} samples": value / n * 1e6 for n, value in seconds.items()}
    yield _row("index, us per sample", "index", points, {"us": per_sample * 1e6}, _everywhere(per_sample * 1e6))
    minutes = {ranks: per_sample * LAION / CORES_PER_RANK / ranks / 60 for ranks in RANKS}
    law = {f"us n / ({CORES_PER_RANK} W)": per_sample * 1e6}
    yield _row(f"index, {CORES_PER_RANK} processes per rank, min", "index", {}, law, minutes)


def _tables(args: argparse.Namespace) -> Iterator[Row]:
    starts: list[Row] = []
    joins: list[Row] = []
    loads: list[Row] = []
    for tars in args.tars:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            loader_tables.write_data(folder, tars, args.samples)
            starts.append(_ask({"what": "start", "folder": name}) | {"tars": tars})
            joins += [laion_shares.join(folder, ranks) | {"tars": tars} for ranks in RANKS]
            for block_shards in loader_tables.BLOCKS:
                for ranks in RANKS if tars == max(args.tars) else RANKS[-1:]:
                    loads.append(laion_shares.loader(folder, block_shards, ranks, args.rounds) | {"tars": tars})
    yield from _starts(starts)
    yield from _joins(joins, args.samples)
    yield from _loads(loads)


def _joins(joins: list[Row], samples: int) -> Iterator[Row]:
    terms = [(1.0, row["tars"], row["tars"] * samples / row["ranks"]) for row in joins]
    constant, per_tar, per_sample = fit(terms, [row["join_s"] for row in joins])
    minutes = {ranks: (constant + per_tar * TARS + per_sample * LAION / ranks) / 60 for ranks in RANKS}
    points = {f"{row['tars']:,} tars, {row['ranks']} ranks": row["join_s"] / 60 for row in joins}
    law = {"s": constant, "ms T": per_tar * 1e3, "us n / W": per_sample * 1e6}
    yield _row("joined table, one process per rank, min", "loader-tables", points, law, minutes)


def _loads(loads: list[Row]) -> Iterator[Row]:
    for block_shards in dict.fromkeys(row["block_shards"] for row in loads):
        own = [row for row in loads if row["block_shards"] == block_shards]
        values = [float(np.median(row["ms_per_sample"])) for row in own]
        constant, per_tar, per_rank = fit([(1.0, row["tars"], row["ranks"]) for row in own], values)
        ms = {ranks: constant + per_tar * TARS + per_rank * ranks for ranks in RANKS}
        points = {f"{row['tars']:,} tars, {row['ranks']} ranks": value for row, value in zip(own, values)}
        law = {"ms": constant, "ns T": per_tar * 1e6, "us W": per_rank * 1e3}
        yield _row(_loader_row(block_shards), "loader-tables", points, law, ms)


def _starts(starts: list[Row]) -> Iterator[Row]:
    terms = [(1.0, row["tars"]) for row in starts]
    constant, per_tar = fit(terms, [row["start_s"] for row in starts])
    points = {f"{row['tars']:,} tars": row["start_s"] for row in starts}
    law = {"s": constant, "ms T": per_tar * 1e3}
    yield _row("opening index and side tables, s", "laion", points, law, _everywhere(constant + per_tar * TARS))
    constant, per_tar = fit(terms, [row["start_mb"] for row in starts])
    points = {f"{row['tars']:,} tars": row["start_mb"] * RANKS_PER_NODE / 1e3 for row in starts}
    law = {"MB": constant * RANKS_PER_NODE, "kB T": per_tar * 1e3 * RANKS_PER_NODE}
    gb = (constant + per_tar * TARS) * RANKS_PER_NODE / 1e3
    yield _row("index and side tables, a node of 8 ranks, GB", "laion", points, law, _everywhere(gb))


def _balance(args: argparse.Namespace) -> Iterator[Row]:
    options = {"neighbor_clusters": args.neighbor_clusters, "link": "components", "folder": args.folder}
    rows = balance_bookkeeping.measure(argparse.Namespace(rows=args.balance_rows, ranks=args.balance_ranks, **options))
    suite, sizes = "balance-bookkeeping", dict.fromkeys((row["n"], row["ranks"]) for row in rows)

    def points(key: str, phases: Iterable[str], total: Callable[[list[float]], float]) -> dict[str, float]:
        return {
            f"{n / 1e6:g}M samples, {ranks} ranks": total(
                [row[key] for row in rows if (row["n"], row["ranks"]) == (n, ranks) and row["phase"] in phases]
            )
            for n, ranks in sizes
        }

    seconds, memory = balance_bookkeeping.laws(rows, "cpu_s"), balance_bookkeeping.laws(rows, "peak_mb")
    for what, phases in (("balance without products, min", list(seconds)), ("keep masks and report, min", _MASKS)):
        whole = [sum(seconds[phase][part] for phase in phases) for part in (0, 1)]
        minutes = {ranks: balance_bookkeeping.at_laion((whole[0], whole[1]), ranks) / 60 for ranks in RANKS}
        values = {size: value / 60 for size, value in points("cpu_s", phases, sum).items()}
        yield _row(what, suite, values, {"us n": whole[0], "us n / W": whole[1]}, minutes)
    peaks = {ranks: max(balance_bookkeeping.at_laion(law, ranks) for law in memory.values()) / 1e3 for ranks in RANKS}
    largest = max(memory.values(), key=balance_bookkeeping.at_laion)
    values = {size: value / 1e3 for size, value in points("peak_mb", list(memory), max).items()}
    law = {"B n": largest[0], "B n / W": largest[1]}
    yield _row("balance, peak of a rank, GB", suite, values, law, peaks)
    node = {ranks: peak * RANKS_PER_NODE for ranks, peak in peaks.items()}
    law = {term: coefficient * RANKS_PER_NODE for term, coefficient in law.items()}
    yield _row(f"balance, a node of {RANKS_PER_NODE} ranks, GB", suite, {}, law, node)


def _clusters(args: argparse.Namespace) -> Iterator[Row]:
    options = {"rows": args.samples, "dim": args.dim, "cluster_rows": 400, "clusters": 200, "memory_gb": 0.5}
    options |= {"seed": 0, "clock": args.clock, "folder": args.folder, "copied_tars": args.copied_tars}
    measured = {
        tars: {
            row["what"]: row["us_per_row"] for row in cluster_order.measure(argparse.Namespace(tars=tars, **options))
        }
        for tars in args.tars
    }
    for what, kind in (
        ("rows by cluster, from the folder, min", "clusters, folder of many tars"),
        ("copying rows in the order of clusters, min", "copying"),
        ("rows by cluster, from the copy, min", "clusters, copy in their order"),
    ):
        points = {f"{tars:,} tars, us per row": rows[kind] for tars, rows in measured.items()}
        if kind.startswith("copy") or kind.endswith("order"):  # of as many tars each time
            constant, per_tar = float(np.median(list(points.values()))), 0.0
        else:
            constant, per_tar = fit([(1.0, tars) for tars in measured], list(points.values()))
        law = {"us n / W": constant, "ns T n / W": per_tar * 1e3}
        minutes = {ranks: (constant + per_tar * TARS) * LAION / ranks / 6e7 for ranks in RANKS}
        yield _row(what, "cluster-order", points, law, minutes)


def _merging(args: argparse.Namespace) -> Iterator[Row]:
    found = {k: _ask({"what": "merging", "k": k, "dim": args.dim})["gb"] for k in args.merged}
    constant, per_cluster = fit([(1.0, k) for k in found], list(found.values()))
    points = {f"k = {k:,}": gb for k, gb in found.items()}
    law = {"MB": constant * 1e3, "kB k": per_cluster * 1e6}
    at_laion = _everywhere(constant + per_cluster * CLASSES)
    yield _row("merging, peak of the first rank, GB", "cluster-stages", points, law, at_laion)


def _resume(args: argparse.Namespace) -> Iterator[Row]:
    rows: list[Row] = []
    for classes in args.classes:
        for ranks in RANKS:
            with tempfile.TemporaryDirectory(dir=args.folder) as name:
                rows.append(laion_shares.resume(Path(name), classes, args.dim, ranks))
    constant, per_gb = fit([(1.0, row["gb"] / row["ranks"]) for row in rows], [row["hash_s"] for row in rows])
    whole = (12 * CLASSES * DIM + laion_shares.STUDENT_BYTES) / 1e9
    points = {f"{row['gb']:.3g} GB, {row['ranks']} ranks": row["hash_s"] for row in rows}
    law = {"s": constant, "s GB / W": per_gb}
    seconds = {ranks: constant + per_gb * whole / ranks for ranks in RANKS}
    yield _row(f"resume, hashing {whole:.0f} GB, s", "laion", points, law, seconds)
    shares = {ranks: max(row["share"] for row in rows if row["ranks"] == ranks) for ranks in RANKS}
    yield _row("resume, bytes a rank hashes, in equal shares", "laion", {}, {}, shares)


# ---- table -------------------------------------------------------------------------------------------------------


def _loader_row(block_shards: int) -> str:
    return f"loader without decoding, blocks of {block_shards:,} tars, ms per sample"


def limits() -> dict[str, tuple[int, float]]:
    """By row, the number of ranks and the largest value there that is promised."""
    return LIMITS | {_loader_row(block): (512, limit) for block, limit in loader_tables.BLOCKS.items()}


def _limit(row: Row) -> str:
    limit = limits().get(row["what"])
    return f"<= {limit[1]:g} at {limit[0]}" if limit else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _figures(row: Row, kind: str) -> list[tuple[str, str]]:
    """(size or term, value) of the figures whose names begin with `kind`."""
    return [(name.removeprefix(kind), _number(value)) for name, value in row.items() if name.startswith(kind)]


def _measured(row: Row) -> str:
    return "; ".join(f"{size}: {value}" for size, value in _figures(row, "at ")[-_SHOWN:])


def _law(row: Row) -> str:
    return " + ".join(f"{value} {term}" for term, value in _figures(row, "law "))


def _columns() -> dict[str, Callable[[Row], str]]:
    def at(ranks: int) -> Callable[[Row], str]:
        return lambda row: _number(row[f"{ranks} ranks"])

    return {
        "what": lambda row: str(row["what"]),
        "limit": _limit,
        "measured": _measured,
        "law": _law,
        **{f"{ranks} ranks:": at(ranks) for ranks in RANKS},
        "suite": lambda row: str(row["suite"]),
    }


def check(report: Report) -> list[Limit]:
    """Every value that is promised, at the number of ranks that it is promised for."""
    found = {row["what"]: row for row in report["results"]}
    return [
        Limit(f"{what}, {ranks} ranks", found.get(what, {}).get(f"{ranks} ranks"), most, at_least=False)
        for what, (ranks, most) in limits().items()
    ]
