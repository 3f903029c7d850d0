"""A copy of the shards that holds only what was kept: tars of the same names, members byte for byte, sizes.json.

Embeddings and labels of the whole set join it by key as they are: its meta.json says which shards it was made from. A tar
of which nothing was kept has no copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megacid.data.index import ShardIndex
from megacid.data.index_files import content_digest, keys_sha256
from megacid.data.side_tables import KeepTable
from megacid.data.tar_headers import TarDamage
from megacid.data.tar_samples import Scan, runs
from megacid.distributed.collectives import barrier
from megacid.distributed.consensus import broadcast_json
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Progress, StartProgress, no_progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.storage.atomic import write_json_atomic
from megacid.storage.metadata import read_meta, write_meta
from megacid.storage.stage_files import WORK, PartialResults, disk_errors, remove_temporary_files, writing

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
    """Write OUT/<tar>.tar, sizes.json and, last, meta.json; returns it. balance: a complete folder of this stage.

    Tars are shared out to the ranks and appear whole; those an interrupted run wrote are not written again. A folder that
    is complete is left as it is; with other masks or shards it is made afresh. UserError when OUT holds something else.
    """
    keep = KeepTable(balance, index)
    wanted = {"shards_digest": index.digest, "keep": _masks_digest(keep, len(index.names))}
    work = PartialResults(out, wanted)
    with stop_together(parallel.group):
        done = parallel.is_first and _complete(out, wanted)
        if parallel.is_first and not done:
            _claim(out, index, work)
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
            _finish(balance, index, keep, out, wanted)
    barrier(parallel.group)
    return read_meta(out)


def copy_rows(index: ShardIndex, shard: int, rows: np.ndarray, target: Path, progress: Progress = no_progress) -> None:
    """Write a tar with these samples (rows of the index, int64 [m]) of one shard: all members of each, headers too.

    UserError when the tar is not what was indexed.
    """
    source, table = index.tar_path(shard), index.table(shard)
    row_at = {int(table.image[row, 0]): row for row in rows.tolist()}
    spans: list[list[int]] = []
    found = 0
    # A run that the index left out (no image, a key for the second time) has no row there.
    with contextlib.suppress(TarDamage), _reading(source):
        for run in runs(source, Scan()):
            row = row_at.get(run.found.get("image", (-1, -1))[0])
            if row is None or table.keys[row] != run.key:
                continue
            found += 1
            for start, stop in run.spans:
                if spans and spans[-1][1] == start:
                    spans[-1][1] = stop
                else:
                    spans.append([start, stop])
    if found != len(rows):
        raise _changed(source, f"{found} of {len(rows)} kept samples are where they were")
    with writing(target) as temporary, open(source, "rb", buffering=0) as tar, open(temporary, "wb") as copy:
        for start, stop in spans:
            _copy(tar, copy, start, stop, source, progress)
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
    """An OSError of the block becomes a UserError that names the tar that is read, not the one that is written."""
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


def _complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether OUT is whole and was made from these masks. UserError when its meta.json is that of another tool."""
    if not (out / "meta.json").exists():
        return False
    try:
        meta = json.loads((out / "meta.json").read_text())
    except (OSError, ValueError, RecursionError):
        log.warning("%s is damaged: making the copy again where needed", out / "meta.json")
        return False
    if not isinstance(meta, dict) or meta.get("made_by") != "reshard":
        raise UserError(f"{out} was not made by --reshard: give it an empty directory")
    if meta.get("arguments") != wanted:
        log.warning("%s was made from other masks or shards: making it afresh", out)
        return False
    if not (out / "sizes.json").is_file():
        return False
    sizes = {path.name: path.stat().st_size for path in out.glob("*.tar")}
    for name, size in meta["bytes"].items():
        if sizes.get(name) != size:
            log.warning("%s is damaged or missing: making it again", out / name)
            (out / name).unlink(missing_ok=True)
            return False
    return True


def _claim(out: Path, index: ShardIndex, work: PartialResults) -> None:
    """Make OUT ours; tars stay only where they were made from the same masks."""
    if out.resolve() == index.root.resolve():
        raise UserError(f"--reshard is {out}, where the shards are: give it another, empty directory")
    ours = any((out / name).exists() for name in (WORK, "meta.json"))
    if not ours and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and was not made by --reshard: give it an empty directory")
    # A finished copy has no partial results any more, but says what it was made from.
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_temporary_files(out)
        if not _made_from(out, work.fingerprint):
            for path in out.glob("*.tar"):
                path.unlink()
            shutil.rmtree(out / "index", ignore_errors=True)
        # Before meta.json goes: whoever looks in between finds one of the two.
        work.begin()
        for name in ("meta.json", "sizes.json"):
            (out / name).unlink(missing_ok=True)


def _made_from(out: Path, wanted: dict[str, Any]) -> bool:
    for path, name in ((out / "meta.json", "arguments"), (out / WORK / "settings.json", None)):
        try:
            found = json.loads(path.read_text())
            return bool((found[name] if name else found) == wanted)
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            continue
    return False


def _finish(balance: Path, index: ShardIndex, keep: KeepTable, out: Path, wanted: dict[str, Any]) -> None:
    written = [shard for shard in range(len(index.names)) if keep.counts[shard]]
    names = [index.names[shard] for shard in written]
    # One shard at a time: a hundred million keys are not held.
    hashes = [keys_sha256([index.table(s).keys[row] for row in keep.kept(s).tolist()]) for s in written]
    with disk_errors(out):
        write_json_atomic(out / "sizes.json", {f"{index.names[s]}.tar": int(keep.counts[s]) for s in written})
        failpoint("reshard:before_meta")
        write_meta(
            out,
            "reshard",
            source={"shards": str(index.root.resolve()), "balance": str(balance.resolve())},
            shards_digest=index.digest,
            digest=content_digest(zip(names, hashes)),
            kept=int(keep.counts.sum()),
            bytes={f"{name}.tar": (out / f"{name}.tar").stat().st_size for name in names},
            arguments=wanted,
        )
    PartialResults(out, {}).remove()
    remove_temporary_files(out)
