"""Suite index: CPU time to index tars, per sample, and what it is for LAION-400M on a node.

The tars have the shape of img2dataset's: a JPEG (random bytes), a caption and a json of 0.4 kB per sample. "webdataset"
is the form that its writer gives, where every member has a pax header with its time; "plain" has none. They are read
from memory: the kernel keeps them after the first round, which is not counted.

sha256              the hash of the tars alone, the least that an index with hashes can take
scan                headers and captions, without the hash
index               the whole index, written to the disk, in one process
index, N processes  the same with --workers processes

The rows of a form take turns. CPU time is user and system time of the process and its children.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import shutil
import statistics
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from argtypes import positive
from benchmarks.measure import cpu_seconds
from benchmarks.suite import Limit, Report, Row, make_report, print_table
from megacid.data.index import load_index
from megacid.data.tar_samples import scan_tar
from megacid.distributed.divided_work import Workers
from megacid.errors import UserError
from megacid.storage.atomic import file_sha256

HELP = "CPU time per sample to index tars, and the time for LAION-400M on a node"
FORMS = {"webdataset": tarfile.PAX_FORMAT, "plain": tarfile.USTAR_FORMAT}
LAION_SAMPLES, CORES, LIMIT_US = 414_550_000, 96, 40.0
WORDS = ("photo", "of", "a", "dog", "red", "house", "the", "sea", "with", "people")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tars", type=positive, default=2, help="tars of each form (default 2)")
    parser.add_argument("--samples", type=positive, default=10_000, help="samples of a tar (default 10,000)")
    parser.add_argument("--image-bytes", type=positive, default=20_000, help="mean size of an image (default 20,000)")
    parser.add_argument("--workers", type=positive, default=2, help="processes of the last row (default 2)")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds after the first (default 5)")


def write_tars(folder: Path, form: str, args: argparse.Namespace) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    noise = random.bytes(2 * args.image_bytes + (1 << 20))
    for shard in range(args.tars):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=FORMS[form]) as tar:
            for row in range(args.samples):
                key, caption = f"{shard:05d}{row:04d}", " ".join(random.choice(WORDS, 10))
                size, at = int(random.uniform(0.5, 1.5) * args.image_bytes), int(random.integers(1 << 20))
                fields = {"caption": caption, "url": f"https://example.org/{key * 6}", "key": key, "exif": "{}" * 80}
                members = {"jpg": noise[at : at + size], "json": json.dumps(fields).encode(), "txt": caption.encode()}
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    info.mtime = 1.7e9 + row + 0.123456 if form == "webdataset" else 1  # type: ignore[assignment]
                    tar.addfile(info, io.BytesIO(data))
    return folder


def index(folder: Path, samples: int, processes: int) -> None:
    shutil.rmtree(folder / "index", ignore_errors=True)
    found = load_index(folder, workers=Workers(processes=processes)).num_samples
    if found != samples:
        raise UserError(f"the index of {folder} has {found:,} samples, expected {samples:,}: report this as a bug")


def measure(folder: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds per sample of every round by what was done."""
    tars, samples = sorted(folder.glob("*.tar")), args.tars * args.samples
    runs: dict[str, Callable[[], object]] = {
        "sha256": lambda: [file_sha256(tar) for tar in tars],
        "scan": lambda: [scan_tar(tar) for tar in tars],
        "index": lambda: index(folder, samples, 1),
        f"index, {args.workers} processes": lambda: index(folder, samples, args.workers),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number, name in itertools.product(range(1 + args.rounds), runs):
        before = cpu_seconds()
        runs[name]()
        if number:
            times[name].append((cpu_seconds() - before) / samples * 1e6)
    return times


def run(args: argparse.Namespace) -> Report:
    rows: list[Row] = []
    for form in FORMS:
        with tempfile.TemporaryDirectory(prefix="index-") as name:
            folder = write_tars(Path(name) / "tars", form, args)
            size = sum(tar.stat().st_size for tar in folder.glob("*.tar")) / (args.tars * args.samples)
            for what, times in measure(folder, args).items():
                rows.append({"form": form, "what": what, "bytes_per_sample": size, "us_per_sample": times})
    print_table(rows, COLUMNS)
    return make_report(args, rows)


def _microseconds(row: Row) -> float:
    return statistics.median(row["us_per_sample"])


COLUMNS: dict[str, Callable[[Row], str]] = {
    "tars": lambda row: str(row["form"]),
    "what": lambda row: str(row["what"]),
    "bytes/sample:": lambda row: f"{row['bytes_per_sample']:,.0f}",
    "us/sample, median (least to most):": lambda row: (
        f"{_microseconds(row):.1f} ({min(row['us_per_sample']):.1f} to {max(row['us_per_sample']):.1f})"
    ),
    "LAION-400M, hours of a core:": lambda row: f"{_microseconds(row) * LAION_SAMPLES / 3.6e9:.1f}",
    f"minutes of {CORES} cores:": lambda row: f"{_microseconds(row) * LAION_SAMPLES / 6e7 / CORES:.1f}",
}


def check(report: Report) -> list[Limit]:
    return [
        Limit(f"us/sample, {row['what']}, {row['form']} tars", _microseconds(row), LIMIT_US, at_least=False)
        for row in report["results"]
        if row["what"].startswith("index")
    ]
