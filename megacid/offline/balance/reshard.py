"""Copies the kept samples to new tars of the same names, members byte for byte.

Embeddings and labels of the whole set can be used with the copy: they are joined by key, and its meta.json records the
shards it was made from. A tar without kept samples has no copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megacid.data.index import ShardIndex
from megacid.data.index_files import content_digest, keys_sha256
from megacid.data.side_tables import KeepTable
from megacid.data.tar_bytes import TarBytes
from megacid.data.tar_headers import TarDamage
from megacid.data.tar_samples import TarScan, member_groups
from megacid.distributed.collectives import barrier
from megacid.distributed.consensus import broadcast_json
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Progress, StartProgress, no_progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.storage.atomic import disk_errors, write_json_atomic, writing
from megacid.storage.metadata import read_meta
from megacid.storage.stage_directory import StageDirectory

log = logging.getLogger(__name__)
_RECORD = 10240  # tars end on a whole record
_CHUNK = 1 << 22


def reshard(
    balance: Path,
    index: ShardIndex,
    out: Path,
    parallel: Parallel,
    *,
    start_progress: StartProgress = lambda total: no_progress,
) -> dict[str, Any]:
    """Writes OUT/<tar>.tar, sizes.json and, last, meta.json, or continues. A collective: ranks divide the tars.

    Args:
        balance: folder of a finished balance stage.
        index: of the shards it was made from.

    Returns:
        meta.json.

    Raises:
        UserError: an input is damaged, or `out` was made with other masks or shards, or by another tool.
    """
    keep = KeepTable(balance, index)
    arguments = {"shards_digest": index.digest, "keep": _masks_digest(keep, len(index.names))}
    stage = StageDirectory(out, "reshard", arguments, command="tools/balance.py --reshard")
    with stop_together(parallel.group):
        if out.resolve() in [folder.resolve() for folder in index.paths.folders]:
            raise UserError(f"--reshard is {out}, the directory of the shards: give it another, empty directory")
        done = parallel.is_first and _complete(stage)
        if parallel.is_first:
            (stage.remove_partial_results if done else stage.begin)()
    if broadcast_json(done, parallel.group):
        log.info("%s is complete", out)
        return read_meta(out)
    progress = start_progress(int(keep.counts.sum()))
    with stop_together(parallel.group):
        for shard in range(parallel.rank, len(index.names), parallel.world):
            rows = keep.kept(shard)
            target = out / f"{index.names[shard]}.tar"
            if len(rows) and not target.exists():
                copy_rows(index, shard, rows, target, progress)
                failpoint("reshard:tar", step=shard)
            progress(len(rows))
    barrier(parallel.group)
    with stop_together(parallel.group):
        if parallel.is_first:
            _finish(stage, balance, index, keep)
    barrier(parallel.group)
    return read_meta(out)


def copy_rows(index: ShardIndex, shard: int, rows: np.ndarray, target: Path, progress: Progress = no_progress) -> None:
    """Writes a tar of some samples of one shard: all members of each, with their headers.

    Args:
        rows: int64 [m], rows of the shard's index.

    Raises:
        UserError: the tar cannot be read or has changed since it was indexed.
    """
    with index.local_tar(shard) as source:
        _copy_samples(index, shard, rows, source, target, progress)


def _copy_samples(
    index: ShardIndex, shard: int, rows: np.ndarray, source: Path, target: Path, progress: Progress
) -> None:
    table = index.table(shard)
    row_at = {int(table.image[row, 0]): row for row in rows.tolist()}
    spans: list[list[int]] = []
    copied = 0
    # A group of members that the index skipped (no image, a repeated key) has no row.
    with contextlib.suppress(TarDamage), _reading(source), TarBytes(source) as tar:
        for group in member_groups(tar, TarScan(index.caption)):
            row = row_at.get(group.members.get("image", (-1, -1))[0])
            if row is None or table.keys[row] != group.key:
                continue
            copied += 1
            for start, stop in group.spans:
                if spans and spans[-1][1] == start:
                    spans[-1][1] = stop
                else:
                    spans.append([start, stop])
    if copied != len(rows):
        raise _changed(source, f"{copied} of {len(rows)} kept samples are at their place")
    with writing(target) as temporary, open(source, "rb", buffering=0) as original, open(temporary, "wb") as copy:
        for start, stop in spans:
            _copy(original, copy, start, stop, source, progress)
        copy.write(bytes(1024))
        copy.write(bytes(-copy.tell() % _RECORD))


def _copy(tar: FileIO, copy: BinaryIO, start: int, stop: int, source: Path, progress: Progress) -> None:
    for low in range(start, stop, _CHUNK):
        progress(0)
        size = min(_CHUNK, stop - low)
        with _reading(source):
            data = os.pread(tar.fileno(), size, low)
        if len(data) != size:
            raise _changed(source, f"it ends at byte {low + len(data)}")
        copy.write(data)


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Turns an OSError of the block into a UserError about the tar that is read, not the one that is written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error}): correct its permissions, or fetch it again") from None


def _changed(source: Path, what: str) -> UserError:
    return UserError(f"{source} is not the tar that was indexed: {what}; restore it, or run the stages again")


def _masks_digest(keep: KeepTable, shards: int) -> str:
    digest = hashlib.sha256()
    for shard in range(shards):
        rows = keep.kept(shard)
        digest.update(len(rows).to_bytes(8, "little") + rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _complete(stage: StageDirectory) -> bool:
    """Whether the copy is finished and every tar has its size. Removes a tar that has not."""
    meta, out = stage.finished(), stage.path
    if meta is None or not (out / "sizes.json").is_file():
        return False
    sizes = {path.name: path.stat().st_size for path in out.glob("*.tar")}
    for name, size in meta["bytes"].items():
        if sizes.get(name) != size:
            log.warning("%s is damaged or missing: making it again", out / name)
            (out / name).unlink(missing_ok=True)
            return False
    return True


def _finish(stage: StageDirectory, balance: Path, index: ShardIndex, keep: KeepTable) -> None:
    out = stage.path
    written = [shard for shard in range(len(index.names)) if keep.counts[shard]]
    names = [index.names[shard] for shard in written]
    # One shard at a time: a hundred million keys are not held.
    hashes = [keys_sha256([index.table(s).keys[row] for row in keep.kept(s).tolist()]) for s in written]
    with disk_errors(out):
        write_json_atomic(out / "sizes.json", {f"{index.names[s]}.tar": int(keep.counts[s]) for s in written})
    stage.commit(
        {"shards": index.paths.source, "balance": str(balance.resolve())},
        shards_digest=index.digest,
        digest=content_digest(zip(names, hashes)),
        kept=int(keep.counts.sum()),
        bytes={f"{name}.tar": (out / f"{name}.tar").stat().st_size for name in names},
        arguments=stage.arguments,
    )
