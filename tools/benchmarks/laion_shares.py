"""The share of one rank of many, for the suite laion: what the other suites do not measure.

Legend: n samples, T tars, W ranks, K centroids, D width.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import loader_tables
from benchmarks.anonymous_memory import PeakAnonymous, anonymous_bytes
from benchmarks.measure import cpu_seconds
from benchmarks.suite import Row
from megacid.checkpoint import store, verification
from megacid.checkpoint.store import WrittenFile
from megacid.data import joined_build
from megacid.data.joined import PART, JoinedTable, JoinSources, header_of, rows_path
from megacid.data.order import SampleOrder
from megacid.distributed.divided_work import Workers
from megacid.errors import UserError
from megacid.offline.cluster.merging import NEIGHBOURS, merge_nearest
from megacid.offline.cluster.seeding import seed_count
from megacid.storage.atomic import file_sha256

STUDENT_BYTES = 12 * 151_000_000  # parameters and moments of ViT-B/32
_MANIFEST_FIELDS = {"world": 1, "num_classes": 1, "embed_dim": 1, "samples_seen": 0}


@dataclass(frozen=True)
class OneOf(Workers):
    """The first of `ranks`, alone: what it gathers from the others is what it has itself."""

    ranks: int = 1

    @property
    def rank(self) -> int:
        return 0

    @property
    def world(self) -> int:
        return self.ranks

    def together(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.ranks

    def broadcast(self, value: Any) -> Any:
        return value


# ---- tars and side tables ----------------------------------------------------------------------------------------


def start(folder: Path) -> dict[str, float]:
    """Opening index and side tables at the start of a run, which every rank does for all tars."""
    before, began = anonymous_bytes(), cpu_seconds()
    sources = loader_tables.open_data(folder)
    assert len(sources.digest) == 64
    return {"start_s": cpu_seconds() - began, "start_mb": (anonymous_bytes() - before) / 1e6}


def join(folder: Path, ranks: int) -> Row:
    """The join of the first of some ranks, in one process. UserError unless it has made all of its parts."""
    sources, out = loader_tables.open_data(folder), folder / f"join-{ranks}"
    out.mkdir()
    began = cpu_seconds()
    joined_build._make_parts(sources, out, list(range(ranks)), OneOf(processes=1, ranks=ranks))
    seconds, made = cpu_seconds() - began, len(list(out.glob("tars-*")))
    expected = len(range(0, sources.parts, ranks))
    if made != expected:
        raise UserError(f"{made} parts of the joined table were made, expected {expected}: no time is printed")
    return {"ranks": ranks, "join_s": seconds}


def loader(folder: Path, block_shards: int, ranks: int, rounds: int) -> Row:
    """CPU time per sample of the loader of the first of some ranks.

    Its joined table has the tars that it reads; the others are holes in the files, or missing.
    """
    positions = np.concatenate(list(loader_tables.plans(ranks)[-1]))
    out = folder / f"table-{block_shards}-{ranks}"
    table = _table_of(loader_tables.open_data(folder), out, block_shards, positions)
    found = loader_tables.ms_per_sample(loader_tables.streams_of(table, block_shards, ranks), rounds)
    return {"ranks": ranks, "block_shards": block_shards, "ms_per_sample": found}


def _table_of(sources: JoinSources, folder: Path, block_shards: int, positions: np.ndarray) -> JoinedTable:
    """A joined table with the rows of the tars that some positions are in; all tars must have the same content."""
    folder.mkdir()
    first, entry = joined_build.join_tar(sources, 0)
    tars, dtype = np.repeat(entry, len(sources.index.names)), sources.row_dtype
    order = SampleOrder(tars["usable"], seed=0, block_shards=block_shards)
    read = np.unique(order.locate_many(positions)[1])
    for part in np.unique(read // PART).tolist():
        count = len(first) * len(tars[part * PART : (part + 1) * PART])
        header = header_of(dtype, count)
        with open(rows_path(folder, part), "wb") as file:
            file.write(header)
            for tar in read[read // PART == part].tolist():
                file.seek(len(header) + tar % PART * first.nbytes)
                file.write(joined_build.join_tar(sources, tar)[0].tobytes())
            file.truncate(len(header) + count * dtype.itemsize)
    return JoinedTable(sources, folder, tars, block_shards)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def resume(folder: Path, classes: int, dim: int, ranks: int) -> Row:
    """Verification of the first of some ranks of a checkpoint that as many ranks have written.

    The files of all ranks are links to one of zeros, which takes no space on the disk.
    """
    stage, files = store.make_stage(folder, 1), []
    for kind, size in (("classifier", 12 * classes * dim), ("student", STUDENT_BYTES)):
        path = stage / f"{kind}-00000.safetensors"
        with open(path, "wb") as file:
            file.truncate(size // ranks)
        digest = file_sha256(path)
        for rank in range(ranks):
            name = f"{kind}-{rank:05d}.safetensors"
            if rank:
                os.link(path, stage / name)
            files.append(WrittenFile(name, size // ranks, digest))
    directory = store.publish(folder, stage, 1, files, _MANIFEST_FIELDS)
    workers = OneOf(processes=1, ranks=ranks)
    began = cpu_seconds()
    problem = verification.find_problem(directory, workers)
    seconds = cpu_seconds() - began
    if problem is not None:
        raise UserError(f"the checkpoint does not verify ({problem}): no time is printed")
    total = sum(file.bytes for file in files)
    own = sum(files[number].bytes for number in verification.share_of_files([vars(file) for file in files], workers))
    store.remove(directory)
    return {"ranks": ranks, "classes": classes, "gb": total / 1e9, "hash_s": seconds, "share": own * ranks / total}


# ---- merging -----------------------------------------------------------------------------------------------------


def merging(k: int, dim: int) -> dict[str, float]:
    """Peak of anonymous memory while the centroids of two levels are merged to k.

    The search for neighbours is left out, but for its copy of the centroids.
    """
    count, generator = seed_count(k), torch.Generator().manual_seed(0)
    before = anonymous_bytes()
    with PeakAnonymous() as peak:
        centroids_KD = torch.randn(count, dim, generator=generator)
        centroids_KD /= centroids_KD.norm(dim=1, keepdim=True)
        merged = merge_nearest(centroids_KD, torch.ones(count, dtype=torch.float64), k, "cosine", _neighbours)
    assert merged.shape == (k, dim)
    return {"gb": (peak.bytes - before) / 1e9}


def _neighbours(centroids_KD: torch.Tensor) -> torch.Tensor:
    """Neighbours by number, int64 [K, M]."""
    searched_KD = centroids_KD.clone()
    count = len(searched_KD)
    return (torch.arange(count)[:, None] + torch.arange(NEIGHBOURS + 1)) % count


def answer(request: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(1)
    if request["what"] == "start":
        return start(Path(request["folder"]))
    return merging(request["k"], request["dim"])


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
