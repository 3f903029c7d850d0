"""Commands that write the small tars of `pair_data`, and what the offline tools would have made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pair_data import PLAN, SIZES, save, tokenize, transform, write_parquet

from megacid.data.batch import Batch, Positions
from megacid.data.captions import CaptionSource
from megacid.data.pairs import PairOptions
from megacid.data.pipes.commands import StreamPosition, find_pipes
from megacid.data.pipes.reading import PipedPairs
from megacid.data.pipes.side_files import SideFiles
from megacid.data.pipes.stream import PipedStream
from megacid.storage.metadata import write_meta

SKIPPED = 3  # the sample, and its key, that has no embedding
NONE = SideFiles((), None, None)


def cat(folder: Path) -> str:
    return f"pipe:cat {folder}/{{00000..00002}}.tar"


def piped(
    spec: str, sides: SideFiles = NONE, turns: Sequence[int] | None = None, caption: str = "txt", **changes: Any
) -> PipedStream:
    """One rank, batches of 8, 6 steps, a buffer of 5; `changes`: fields of Positions and of PairOptions."""
    plan = Positions(**{name: changes.pop(name, value) for name, value in PLAN.items()})
    buffer = changes.pop("buffer", 5)
    options = PairOptions(**{"transform": transform, "tokenize": tokenize, "seed": 1, **changes})
    tars = find_pipes(spec)
    if turns is None:
        turns = StreamPosition(tars, plan.rank, plan.world, max(1, options.workers)).next_turns
    return PipedStream(PipedPairs(tars, sides, CaptionSource.parse(caption), options, plan, turns, buffer))


def numbers(batch: Batch) -> list[int]:
    """The samples of a batch as their pictures say; the captions must say the same."""
    assert batch.failure is None and batch.text[:, 0].tolist() == batch.image[:, 0, 0, 0].tolist()
    return [int(number) for number in batch.text[:, 0]]


def write_stages(root: Path, digest: str = "elsewhere") -> None:
    """root/teacher, root/labels and root/balance of the tars of `write_shards`, whose rows are in the tars' order.

    Embeddings are [number, 1] and [number, 2], labels number + 100; odd samples are not kept.
    """
    first = 0
    for partition, (name, size) in enumerate(SIZES.items()):
        rows = np.arange(first, first + size)
        embedded = rows[rows != SKIPPED]
        keys = [f"k{row}" for row in embedded]
        for kind, second in (("img", 1), ("text", 2)):
            vectors = np.stack([embedded, np.full(len(embedded), second)], axis=1).astype(np.float16)
            save(root / "teacher" / f"{kind}_emb" / f"{kind}_emb_{partition:05d}.npy", vectors)
        write_parquet(root / "teacher" / "metadata" / f"metadata_{partition:05d}.parquet", image_path=keys)
        write_parquet(root / "labels" / "labels" / f"{name}.parquet", key=keys, label=(embedded + 100).tolist())
        save(root / "balance" / "keep" / f"{name}.npy", (rows % 2 == 0) & (rows != SKIPPED))
        save(root / "balance" / "representative" / f"{name}.npy", np.where(rows == SKIPPED, -1, rows))
        first += size
    partitions = {name: number for number, name in enumerate(SIZES)}
    write_meta(root / "teacher", "embed", {}, shards_digest=digest, dim=2, partitions=partitions)
    write_meta(root / "labels", "cluster", {}, shards_digest=digest, k=200)
    write_meta(root / "balance", "balance", {"embeddings": str(root / "teacher")}, shards_digest=digest)


def open_sides(root: Path, spec: str, **changes: Any) -> SideFiles:
    """The stages of `write_stages`; `changes`: arguments of SideFiles.open."""
    stages: dict[str, Any] = {
        "caption": "txt", "teachers": (str(root / "teacher"),), "labels": str(root / "labels"), "labels_per_sample": 1,
        "keep": str(root / "balance"),
    }  # fmt: skip
    return SideFiles.open(find_pipes(spec), **{**stages, **changes})
