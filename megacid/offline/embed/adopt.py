"""Adopts the embeddings of another tool: joins them with the shards by key and writes them as `tools/embed.py` does.

Every rank looks all keys up (40 bytes per row of the folder) and writes the partitions of its share of the tars. A
partition that is complete is not written again.

Legend: n rows of the foreign folder, m samples of one tar, D width.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacid.data.index import ShardIndex, ShardReader, read_sample_json
from megacid.data.index_report import MAX_LOST, percent
from megacid.distributed.collectives import all_reduce_sum, barrier
from megacid.distributed.consensus import gather_json
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Progress, StartProgress, no_progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.embed.foreign import ForeignFolder, Modality
from megacid.offline.embed.partitions import Failure, Layout, Partition, partition_files
from megacid.offline.embed.stage import failures_of, finish, verify
from megacid.offline.rows import find_invalid_row
from megacid.storage.metadata import read_meta
from megacid.storage.stage_directory import StageDirectory

log = logging.getLogger(__name__)
_UNIT = 1e-3  # rows whose length is this near to 1 keep their bits; float16 changes it by less


def settings_of(folder: ForeignFolder, index: ShardIndex, model: str, pretrained: str | None) -> dict[str, Any]:
    """What decides the result, under the names that `embed` records. The weights are those of the folder."""
    return {
        "model": model,
        "pretrained": pretrained,
        "precision": f"fp{8 * folder.dtype.itemsize}",
        "weights": f"adopted:{folder.digest()}",
        "dim": folder.dim,
        "shards_digest": index.digest,
        **index.caption.setting,
    }


def adopt(
    index: ShardIndex,
    folder: ForeignFolder,
    out: Path,
    parallel: Parallel,
    *,
    settings: dict[str, Any],
    max_lost: float = MAX_LOST,
    start_progress: StartProgress = lambda total: no_progress,
) -> dict[str, Any]:
    """Writes a teacher folder from `folder`; returns its meta.json. A collective.

    Args:
        settings: Of `settings_of`; compared with those of a started folder.
        max_lost: Share of the samples that may lack an embedding.
        start_progress: Called with the samples of all tars; returns the `Progress` that counts them.

    Raises:
        UserError: A key is there twice, more than that share of the samples has no embedding, or an embedding is zero
            or not finite. Nothing is written for wrong keys.
    """
    group = parallel.group
    progress = start_progress(index.num_samples)
    mine = range(parallel.rank, len(index.names), parallel.world)
    used = torch.zeros(folder.num_rows, dtype=torch.int32, device=parallel.device)
    with stop_together(group):
        lookup = _Lookup(folder, index, progress)
        rows_of = {shard: lookup.rows(shard, progress) for shard in mine}
        for rows in rows_of.values():
            used += torch.from_numpy(np.bincount(rows[rows >= 0], minlength=len(used))).to(used)
    all_reduce_sum(used, group)
    with stop_together(group):
        surplus = _check_matches(index, folder, used, max_lost)
    stage = StageDirectory(out, "embed", settings)
    with stop_together(group):
        if parallel.is_first:
            stage.begin()
    scaled = 0
    with stop_together(group):
        for shard, rows in rows_of.items():
            if failures_of(index, out, shard, Layout(folder.dim)) is None:
                scaled += _write(index, folder, out, shard, rows)
                failpoint("adopt:partition", step=shard)
            progress(len(rows))
    with stop_together(group):
        stats = verify(index, out, list(mine), Layout(folder.dim))
    scaled = sum(gather_json(scaled, group))
    all_stats = gather_json(stats, group)
    with stop_together(group):
        if parallel.is_first:
            if scaled:
                log.info("%d embeddings of %s were not of length 1 and are normalised", scaled, folder.path)
            adopted = {"rows": folder.num_rows, "surplus": surplus, "key": folder.key}
            finish(stage, index, all_stats, max_lost, {"adopted": str(folder.path.resolve())}, adopted=adopted)
    barrier(group)
    return read_meta(out, expect="embed")


class _Lookup:
    """Finds the rows of the foreign folder by key."""

    def __init__(self, folder: ForeignFolder, index: ShardIndex, progress: Progress) -> None:
        self.folder, self.index = folder, index
        # Keys may repeat between tars, and an .npz that is named as a tar belongs to it.
        self.by_shard = folder.key != "uid" and all(part.arrays and part.name in index.names for part in folder.parts)
        digests = []
        for number, part in enumerate(folder.parts):
            digests.append(_digests(self._qualified(part.name, folder.keys(number))))
            progress(0)
        digest = np.concatenate(digests)
        self._order = np.argsort(digest, kind="stable")
        self._sorted = digest[self._order]
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twice):
            first, second = (self.describe(int(self._order[twice[0] + i])) for i in (0, 1))
            raise UserError(
                f"{folder.path} has {len(twice):,} keys more than once, such as {first} and {second}, expected one row "
                "per sample: remove the repeated rows"
            )

    def _qualified(self, shard: str, keys: Iterable[str | None]) -> list[str | None]:
        return [f"{shard}/{key}" if self.by_shard and key is not None else key for key in keys]

    def describe(self, row: int) -> str:
        part = int(np.searchsorted(self.folder.starts, row, side="right")) - 1
        at = row - int(self.folder.starts[part])
        return f"{self.folder.keys(part)[at]} (row {at} of {self.folder.parts[part].metadata.name})"

    def rows(self, shard: int, progress: Progress) -> np.ndarray:
        """int64 [m]: the row of each sample of a tar, -1 for none."""
        keys: list[str | None] = list(self.index.table(shard).keys)
        if self.folder.key == "uid":
            with closing(ShardReader(self.index)) as reader:
                fields = [read_sample_json(reader, shard, row) for row in range(len(keys))]
            keys = [uid if isinstance(uid := field.get("uid"), str) else None for field in fields]
        digests = _digests(self._qualified(self.index.names[shard], keys))
        at = np.minimum(np.searchsorted(self._sorted, digests), len(self._sorted) - 1)
        progress(0)
        return np.where(self._sorted[at] == digests, self._order[at], -1).astype(np.int64)


def _digests(keys: Iterable[str | None]) -> np.ndarray:
    """A 16-byte digest of each key: no two keys share one, and strings would take several times the memory."""
    digests = [
        b"" if key is None else hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()
        for key in keys
    ]
    return np.array(digests, "S16")


def _check_matches(index: ShardIndex, folder: ForeignFolder, used: torch.Tensor, max_lost: float) -> int:
    """Number of rows of the folder that belong to no sample. used: int32 [n], how often each row was matched.

    Raises:
        UserError: Too many samples have no row, or a row belongs to several samples.
    """
    total, matched = index.num_samples, int(used.sum())
    key = folder.keys(int(np.flatnonzero(np.diff(folder.starts))[0]))[0]
    example = next(index.table(shard).keys[0] for shard in range(len(index.names)) if index.sizes[shard])
    if not matched:
        raise UserError(
            f"none of the {folder.num_rows:,} samples of {folder.path} is in {index.root}: its column {folder.key} has "
            f"values such as {key}, the shards have keys such as {example}; give the shards that were embedded"
        )
    if int(used.max()) > 1:
        row = int(used.argmax())
        raise UserError(
            f"{int((used > 1).sum()):,} rows of {folder.path} belong to several samples of {index.root}, such as row "
            f"{row}, whose {folder.key} is there {int(used[row])} times, expected unique keys: only in a folder with "
            "one .npz per tar may tars repeat keys"
        )
    missing = total - matched
    if missing > max_lost * total:
        raise UserError(
            f"{missing:,} of {total:,} samples of {index.root} have no embedding in {folder.path} (of whose "
            f"{folder.num_rows:,} rows {folder.num_rows - matched:,} are in no tar), expected at most "
            f"{percent(max_lost)}: embed the others, give the shards that were embedded, or raise --max-lost"
        )
    return folder.num_rows - matched


def _write(index: ShardIndex, folder: ForeignFolder, out: Path, shard: int, rows: np.ndarray) -> int:
    """Writes one partition. rows: int64 [m]. Returns the number of embeddings that were normalised."""
    keys, has = index.table(shard).keys, rows >= 0
    partition = Partition(failures=[Failure(key, "no embedding in the adopted folder")
                                    for key in itertools.compress(keys, ~has)])  # fmt: skip
    scaled = 0
    if has.any():
        found = rows[has]
        partition.samples += folder.samples(found, list(itertools.compress(keys, has)))
        image, scaled_images = _unit_rows(folder, "img", found)
        text, scaled_texts = _unit_rows(folder, "txt", found)
        partition.image.append(image)
        partition.text.append(text)
        scaled = scaled_images + scaled_texts
    partition.save(partition_files(out, shard, len(index.names)), shard, index.names[shard])
    return scaled


def _unit_rows(folder: ForeignFolder, modality: Modality, rows: np.ndarray) -> tuple[np.ndarray, int]:
    """(float16 [m, D] of length 1, the number of rows that were not). UserError names a row without a direction."""
    x = folder.take(modality, rows).astype(np.float64)
    with np.errstate(over="ignore"):
        invalid = find_invalid_row(x.astype(np.float32), allow_zero=False, unit=False)
    if invalid is not None:
        row, problem = invalid
        raise UserError(
            f"{folder.name(modality, int(rows[row]))} {problem}, expected an embedding: remove that sample from the "
            "folder, or embed it again"
        )
    length = np.linalg.norm(x, axis=1)
    off = np.abs(length - 1) > _UNIT
    x[off] /= length[off, None]
    return x.astype(np.float16), int(off.sum())
