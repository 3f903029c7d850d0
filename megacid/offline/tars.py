"""The tars that embeddings were made from, joined with the embeddings by key.

Legend: m samples of one tar with an embedding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from megacid.data.captions import recorded_caption
from megacid.data.index import ShardIndex, load_index
from megacid.data.side_tables import KeepTable
from megacid.distributed.collectives import gather_plain
from megacid.distributed.divided_work import Workers
from megacid.distributed.parallel import Parallel, shard_range
from megacid.distributed.stopping import stop_together
from megacid.errors import UserError
from megacid.offline.rows import EmbeddingRows
from megacid.storage.metadata import read_meta
from megacid.storage.parquet import join_by_key


def load_tars(
    rows: EmbeddingRows,
    shards: str | Path | None = None,
    *,
    parallel: Parallel | None = None,
    poll: Callable[[], object] = lambda: None,
    remedy: str = "give the shards it was made from with --shards",
) -> ShardIndex:
    """The index of the tars of some embeddings.

    Args:
        shards: the tars; None: those recorded by tools/embed.py.
        parallel: the ranks that share the work if the index has to be built, which makes it a collective.
        poll: called about twice a second while the index is built; may raise Stopped.
        remedy: of the message when the tars are others.

    Raises:
        UserError: the tars cannot be read, or are others.
    """
    folder = shards or rows.meta["source"]["shards"]
    index = load_index(folder, caption=recorded_caption(rows.meta), workers=Workers(parallel, poll=poll))
    with nullcontext() if parallel is None else stop_together(parallel.group):
        if index.digest != rows.meta["shards_digest"]:
            raise UserError(
                f"{rows.directory} was made from other shards than {folder}: {remedy}, or run tools/embed.py again"
            )
    return index


def rows_in_tar(rows: EmbeddingRows, index: ShardIndex, partition: int) -> tuple[int, np.ndarray]:
    """(the tar of a partition, int64 [m]: the row in it of each embedding). UserError when a key is missing there."""
    shard = bisect_left(index.names, rows.stems[partition])
    remedy = f"run tools/embed.py again for {rows.directory}"
    keys = index.table(shard).keys
    return shard, join_by_key(rows.keys(partition), keys, index.tar_path(shard), remedy, require_all=True)


def kept_rows(
    rows: EmbeddingRows, keep: Path, parallel: Parallel, poll: Callable[[], object] = lambda: None
) -> np.ndarray:
    """The embedding rows that balance kept, int64, ascending. A collective: ranks divide the partitions.

    Args:
        keep: folder written by tools/balance.py; the tars are read where it read them, or else where tools/embed.py
            did.
        poll: as of `load_tars`.

    Raises:
        UserError: a file is damaged, or the folders were made from different tars.
    """
    masks = [np.empty(0, bool)]
    with stop_together(parallel.group):
        meta = read_meta(keep, expect="balance")
        if meta.get("shards_digest") != rows.meta["shards_digest"]:
            raise UserError(
                f"{keep} was made from other shards than {rows.directory}: run tools/balance.py on {rows.directory}"
            )
    index = _recorded_tars(rows, meta["source"]["shards"], parallel, poll)
    with stop_together(parallel.group):
        table = KeepTable(keep, index)
        for partition in range(*shard_range(len(rows.stems), parallel.rank, parallel.world)):
            shard, row = rows_in_tar(rows, index, partition)
            masks.append(np.isin(row, table.kept(shard)))
    mask = torch.from_numpy(np.concatenate(masks)).to(torch.uint8).to(parallel.device)
    return np.flatnonzero(gather_plain(mask, parallel.group).cpu().numpy())


def _recorded_tars(rows: EmbeddingRows, shards: str, parallel: Parallel, poll: Callable[[], object]) -> ShardIndex:
    """The tars that were recorded by balance, or else by embed. A collective. UserError when neither can be read."""
    problems = {}
    for folder in dict.fromkeys((shards, rows.meta["source"]["shards"])):
        try:
            return load_tars(rows, folder, parallel=parallel, poll=poll, remedy="put those back")
        except UserError as error:
            problems[folder] = str(error)
    raise UserError(
        f"the tars of {rows.directory} cannot be read from {' or '.join(problems)} ({next(iter(problems.values()))}): "
        "move them back, or put a link to them there"
    )
