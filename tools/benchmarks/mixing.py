"""Suite mixing: how well the order of samples mixes the tars, compared with webdataset's usual pipeline.

Two measures, in the shape of LAION-400M (tars of 10,000 samples, global batches of 32,768):

tars per batch      distinct tars in a global batch: samples of one tar often have the same source
distance            mean distance in the stream, in global batches, of two samples that are neighbours in a tar

megacid             `SampleOrder`, whose global batches do not depend on ranks and workers
webdataset          the stages of open_clip_train: shards are split among the workers, each of which shuffles 5,000
                    samples; a rank's part of a global batch comes from one worker
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator

import numpy as np
import webdataset

from argtypes import positive
from benchmarks.suite import Limit, Report, Row, make_report, print_table
from megacid.data.order import SampleOrder
from megacid.errors import UserError

HELP = "distinct tars per global batch and distance of neighbours: our order and webdataset's shuffle buffers"
SAMPLES, GLOBAL_BATCH, WORKERS = 10_000, 32_768, 4
BLOCKS, RANKS = (16, 64, 256, 1024), (8, 64, 512)
BUFFER, INITIAL = 5000, 1000  # of open_clip_train


def our_order(block_shards: int, batches: int) -> tuple[float, float]:
    """(tars per batch, distance) of the first block of an epoch of 2,048 tars."""
    order = SampleOrder(np.full(2048, SAMPLES), seed=0, block_shards=block_shards)
    size = block_shards * SAMPLES
    position = np.empty(size, np.int64)  # by tar of the block and row
    tars: list[int] = []
    numbers: dict[int, int] = {}
    for start in range(0, size, GLOBAL_BATCH):
        here = np.arange(start, min(start + GLOBAL_BATCH, size))
        _, shard, row = order.locate_many(here)
        if len(here) == GLOBAL_BATCH and len(tars) < batches:
            tars.append(len(np.unique(shard)))
        tar = np.array([numbers.setdefault(number, len(numbers)) for number in shard.tolist()])
        position[tar * SAMPLES + row] = here
    distance = np.abs(np.diff(position.reshape(block_shards, SAMPLES), axis=1)).mean()
    return float(np.mean(tars)), float(distance) / GLOBAL_BATCH


def webdataset_order(ranks: int, tars: int) -> tuple[float, float]:
    """The same of webdataset's buffer, from the stream of one worker that reads that many tars."""

    def source() -> Iterator[tuple[int, int]]:
        return itertools.product(range(tars), range(SAMPLES))

    stream = list(webdataset.shuffle(bufsize=BUFFER, initial=INITIAL, rng=random.Random(0))(source()))
    if len(stream) != tars * SAMPLES:
        raise UserError(
            f"webdataset's buffer gave {len(stream)} samples, expected {tars * SAMPLES}: nothing is printed"
        )
    tar, row = np.array(stream).T
    position = np.empty((tars, SAMPLES), np.int64)
    position[tar, row] = np.arange(len(tar))
    part = GLOBAL_BATCH // ranks
    parts = tar[: len(tar) // part * part].reshape(-1, part)
    distinct = np.mean([len(np.unique(each)) for each in parts[len(parts) // 10 :]])  # after the buffer has filled
    # All workers' streams advance together, so a distance in one is that many times longer in the whole.
    distance = np.abs(np.diff(position, axis=1)).mean() * ranks * WORKERS
    return float(distinct) * ranks, float(distance) / GLOBAL_BATCH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=1, device="cpu")
    parser.add_argument("--tars", type=positive, default=20, help="tars of a worker of webdataset (default 20)")


def run(args: argparse.Namespace) -> Report:
    rows: list[Row] = []
    for block_shards in BLOCKS:
        tars, distance = our_order(block_shards, 8)
        rows.append(
            {"order": f"megacid, block_shards {block_shards}", "ranks": "any", "tars": tars, "distance": distance}
        )
    for ranks in RANKS:
        tars, distance = webdataset_order(ranks, args.tars)
        rows.append(
            {"order": f"webdataset, {WORKERS} workers", "ranks": str(ranks), "tars": tars, "distance": distance}
        )
    print_table(rows, COLUMNS)
    return make_report(args, rows)


COLUMNS = {
    "order": lambda row: str(row["order"]),
    "ranks": lambda row: str(row["ranks"]),
    "tars per global batch:": lambda row: f"{row['tars']:.0f}",
    "distance of neighbours, global batches:": lambda row: f"{row['distance']:.2g}",
}


def check(report: Report) -> list[Limit]:
    """No limits: the figures are properties of the orders, not of the code's speed."""
    return []
