"""Suite loader-tables: CPU time per sample of the training loader without decoding, on many tars with side tables.

One rank of 512 reads micro-batches of 64 in four workers, so that each worker meets every tar of a block once or twice.
The tars have the shape of LAION-400M's (10,000 samples, of which 56 % are kept) and are made in seconds: every tar,
its index and its side tables are links to those of the first one. Decoding, resizing and tokenization are replaced by
constants. The time is that of all processes, as the difference of a long and a short run, which leaves out their start.
The start of the first row makes the joined table; that of the second one finds it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from argtypes import positive
from benchmarks.measure import cpu_seconds
from benchmarks.suite import Limit, Report, Row, make_report, print_table
from benchmarks.synthetic_folders import key, write_embeddings, write_tars
from megacid.data import index_files
from megacid.data.batch import Positions
from megacid.data.ensemble import open_teachers
from megacid.data.index import load_index
from megacid.data.joined import JoinedTable, JoinSources
from megacid.data.joined_build import open_joined
from megacid.data.loader import PairStream
from megacid.data.pairs import PairOptions
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.sources import Source
from megacid.errors import UserError
from megacid.storage.metadata import write_meta

HELP = "CPU time per sample of the loader without decoding: one rank of 512, many tars, teacher, labels and keep masks"
RANKS, MICRO_BATCH, WORKERS = 512, 64, 4
SAMPLES, KEPT, WIDTH, CLASSES = 10_000, 0.56, 512, 1000
BLOCKS = {64: 0.3, 1024: 0.4}  # block_shards -> limit in ms per sample
SHORT, LONG = 16, 112  # batches

# ---- data ------------------------------------------------------------------------------------------------------------


def write_data(folder: Path, tars: int, samples: int) -> None:
    """shards/, teacher/, clusters/ and balance/ of that many tars."""
    random = np.random.default_rng(0)
    write_tars(folder / "shards", samples, 1)
    first = load_index(folder / "shards").shards[0]
    entries = [{**first, "name": f"{number:05d}"} for number in range(tars)]
    digest = index_files.entries_digest(entries)
    index = {"version": index_files.VERSION, "digest": digest, "shards": entries}
    (folder / "shards/index/index.json").write_text(json.dumps(index))

    rows = random.standard_normal((samples, WIDTH), np.float32).astype(np.float16)
    write_embeddings(folder / "teacher", lambda part: rows[part.start : part.stop], samples, 1)
    (folder / "teacher/text_emb").mkdir()
    np.save(folder / "teacher/text_emb/text_emb_00000.npy", rows)
    partitions = {entry["name"]: number for number, entry in enumerate(entries)}
    meta = {"dim": WIDTH, "shards_digest": digest, "partitions": partitions, "failures_by_shard": {}}
    write_meta(folder / "teacher", "embed", {}, **meta)

    for name in ("clusters/labels", "balance/keep"):
        (folder / name).mkdir(parents=True)
    keys, label = [key(sample) for sample in range(samples)], random.integers(0, CLASSES, samples, np.int32)
    table = pa.table({"key": keys, "label": label, "score": np.ones(samples, np.float32)})
    pq.write_table(table, folder / "clusters/labels/00000.parquet")
    write_meta(folder / "clusters", "cluster", {}, k=CLASSES, dim=WIDTH, shards_digest=digest)
    np.save(folder / "balance/keep/00000.npy", random.random(samples) < KEPT)
    write_meta(folder / "balance", "balance", {}, shards_digest=digest)

    for path in sorted(folder.rglob("*00000.*")):
        for number in range(1, tars):
            os.link(path, path.with_name(path.name.replace("00000.", f"{number:05d}.")))


# ---- measurement -----------------------------------------------------------------------------------------------------

_IMAGE = torch.zeros(3, 8, 8, dtype=torch.uint8)


def _read_image(data: bytes, **_: Any) -> bytes:
    return data


def _transform(_: Any) -> Tensor:
    return _IMAGE


def _tokenize(captions: list[str]) -> Tensor:
    return torch.zeros(len(captions), 8, dtype=torch.long)


def read(stream: PairStream, batches: int) -> None:
    """Read all batches. UserError unless each is whole."""
    count = 0
    for batch in stream:
        assert batch.label is not None and batch.teacher_image is not None
        if batch.failure is not None or batch.replaced or not bool((batch.label >= 0).all()):
            raise UserError(f"the loader failed: {batch.failure or batch.replaced or batch.label}: no time is printed")
        count += 1
    if count != batches:
        raise UserError(f"the loader gave {count} batches, expected {batches}: no time is printed")


def open_data(folder: Path) -> JoinSources:
    """The index and the side tables of `write_data`."""
    index = load_index(folder / "shards")
    teacher = open_teachers([folder / "teacher"], index)
    return JoinSources(index, teacher, LabelTable(folder / "clusters", index), KeepTable(folder / "balance", index))


def streams_of(joined: JoinedTable, block_shards: int, ranks: int) -> list[PairStream]:
    """The streams of `plans`, without decoding."""
    options = PairOptions(
        transform=_transform,
        read_image=_read_image,
        tokenize=_tokenize,
        seed=0,
        seeded_transform=True,
        workers=WORKERS,
        block_shards=block_shards,
    )
    return [PairStream([Source(joined)], plan, options) for plan in plans(ranks)]


def plans(ranks: int) -> list[Positions]:
    """A short and a long run of the first of `ranks`, whose global batch is the same for any number of them."""
    micro_batch = RANKS * MICRO_BATCH // ranks
    short = max(SHORT * MICRO_BATCH // micro_batch, WORKERS)
    more = max((LONG - SHORT) * MICRO_BATCH // micro_batch, WORKERS)
    return [Positions(RANKS * MICRO_BATCH, micro_batch, 1, 0, ranks, 0, steps) for steps in (short, short + more)]


def ms_per_sample(streams: list[PairStream], rounds: int) -> list[float]:
    """CPU time per sample of each round, from the streams of a short and a long run."""
    short, long = (len(stream) * stream.plan.micro_batch for stream in streams)
    found = []
    for _ in range(rounds):
        used = []
        for stream in streams:
            before = cpu_seconds()
            read(stream, len(stream))
            used.append(cpu_seconds() - before)
        found.append((used[1] - used[0]) / (long - short) * 1e3)
    return found


def _measure(folder: Path, block_shards: int, args: argparse.Namespace) -> Row:
    tables = open_data(folder)
    before = cpu_seconds()
    streams = streams_of(open_joined(tables, block_shards), block_shards, RANKS)
    start_us = (cpu_seconds() - before) / tables.index.num_samples * 1e6
    times = ms_per_sample(streams, args.rounds)
    return {"tars": args.tars, "block_shards": block_shards, "start_us": start_us, "ms_per_sample": times}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=1, clock="cpu", device="cpu")
    parser.add_argument("--tars", type=positive, default=1024, help="tars (default 1024)")
    parser.add_argument("--samples", type=positive, default=SAMPLES, help=f"samples per tar (default {SAMPLES})")
    parser.add_argument("--rounds", type=positive, default=3, help="measurements of each row (default 3)")


def run(args: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, args.tars, args.samples)
        rows = [_measure(folder, block_shards, args) for block_shards in BLOCKS]
    print_table(rows, COLUMNS)
    return make_report(args, rows)


COLUMNS = {
    "tars": lambda row: str(row["tars"]),
    "block_shards": lambda row: str(row["block_shards"]),
    "start, us per sample:": lambda row: f"{row['start_us']:.2f}",
    "ms of CPU per sample [range]:": lambda row: (
        f"{np.median(row['ms_per_sample']):.3f} [{min(row['ms_per_sample']):.3f}, {max(row['ms_per_sample']):.3f}]"
    ),
}


def check(report: Report) -> list[Limit]:
    """0.3 ms per sample at the default block_shards, 0.4 ms in blocks of 1,024 tars."""
    return [
        Limit(
            f"{row['block_shards']} tars per block: ms of CPU per sample without decoding",
            float(np.median(row["ms_per_sample"])),
            BLOCKS[row["block_shards"]],
            at_least=False,
        )
        for row in report["results"]
    ]
