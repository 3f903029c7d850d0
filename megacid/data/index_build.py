"""Builds what an index lacks: the ranks of a job, and processes of each rank, share the tars.

Each tar's files are written by the process that read the tar; rank 0 writes index.json last. The bytes of an index are
the same for any number of processes and ranks, also when a build was killed and continued.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megacid.data.captions import CaptionSource
from megacid.data.index_files import (
    ShardTable,
    is_writable,
    keys_sha256,
    reusable_entry,
    save_entries,
    save_table,
)
from megacid.data.index_ranks import ranks_that_share
from megacid.data.index_report import MAX_LOST, check_losses, lost_share, summary
from megacid.data.remote.cache import ShardCache
from megacid.data.shard_paths import ShardPaths
from megacid.data.tar_samples import LOST, other_format, remedy, scan_tar
from megacid.distributed.divided_work import Workers
from megacid.distributed.progress import progress_bar
from megacid.errors import UserError
from megacid.storage.atomic import disk_errors

log = logging.getLogger(__name__)

_LISTED = 20  # dropped samples that are listed by name; the others are only counted
_BYTES_PER_S = 5e8  # of tars with samples of 20 kB, by one process from memory
_TABLE_BYTES = 5e6  # of a tar, whose reading takes as long as a check of its stored table
_PROCESS_BYTES = 2.5e8  # of tars that are worth a process
_LONG_S = 10.0  # of an estimate: a shorter build needs no message
_UNKNOWN_BYTES = 2.5e8  # of a remote tar, until its store is asked
_OLD_S = 3600.0  # of a temporary file, which one tar needs for less than a second
_ALONE_S = 60.0  # of an estimate: several ranks must not each build a larger index

T = TypeVar("T")
R = TypeVar("R")
Entry = dict[str, Any]
Table = dict[str, Any]  # JSON-able: "keys" and "members" of a ShardTable


@dataclass(frozen=True)
class _Tar:
    """A tar and how it is read. paths: what is known of it. keep_blank: None while that is not decided."""

    path: Path
    paths: ShardPaths
    bytes: int
    folder: Path  # of its index
    writable: bool
    keep_blank: bool | None


def build_entries(
    paths: ShardPaths,
    caption: CaptionSource,
    stored: dict[Path, Entry],
    workers: Workers,
    *,
    keep_blank: bool | None,
    verify: bool,
    allow_bad: bool,
    max_lost: float,
    fetch_limit: int | None = None,
) -> tuple[list[Entry], dict[int, ShardTable]]:
    """The entries of all tars, and by shard number the tables that could not be written.

    A collective of the ranks of `workers`. stored: the entries of index.json. Other arguments: see `load_index`.
    """
    with workers.together():
        sizes = [paths.size(tar) for tar in paths.tars]
        writable = {folder: is_writable(folder / caption.index_folder) for folder in paths.folders}
    ranks = ranks_that_share({folder / caption.index_folder: ok for folder, ok in writable.items()}, workers)
    for folder in (folder for folder, ok in writable.items() if not ok and workers.rank == ranks[0]):
        log.warning(
            "%s cannot be written: what its index lacks stays in memory and is built again at every start",
            folder / caption.index_folder,
        )
    written = [folder / caption.index_folder for folder, ok in writable.items() if ok]
    decisions = [
        stored[tar]["blank_kept"] if keep_blank is None and tar in stored else keep_blank for tar in paths.tars
    ]
    tars = [
        _Tar(tar, paths.of_tar(tar), size, tar.parent / caption.index_folder, writable[tar.parent], keep)
        for tar, size, keep in zip(paths.tars, sizes, decisions)
    ]
    share = Share(len(tars), ranks, workers)
    entries = share.reuse(tars, verify=verify)
    all_keep = {entry["blank_kept"] for entry in (*stored.values(), *entries.values())} == {True}
    missing = {
        number: replace(tar, keep_blank=all_keep if tar.keep_blank is None else tar.keep_blank)
        for number, tar in enumerate(tars)
        if number not in entries
    }
    with workers.together():
        if fetch_limit is not None and paths.remote and workers.rank == ranks[0]:
            paths.check_fetches([tar.path for tar in missing.values()], stored, fetch_limit)
    tables = {}
    for number, (entry, table) in share.build(missing, paths, caption, allow_bad=allow_bad).items():
        entries[number] = entry
        if table is not None:
            tables[number] = ShardTable(table["keys"], np.array(table["members"], np.int64).reshape(-1, 8))
    ordered = [entries[number] for number in range(len(tars))]
    with workers.together():
        check_losses(paths, ordered, caption, stored, max_lost=max_lost, writable=all(writable.values()))
        for folder in written if ranks[0] == workers.rank else ():
            here = [entry for entry, tar in zip(ordered, tars) if tar.folder == folder]
            save_entries(folder, here, whole=paths.directory is not None)
            remove_old_temporary_files(folder)
    if workers.rank == 0:
        log.info("indexed %s: %d shards, %s", paths, len(ordered), summary(ordered))
    return ordered, tables


def remove_old_temporary_files(folder: Path) -> None:
    """Remove what killed builds left. A young file may be of another job that builds the same index."""
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _OLD_S:
                path.unlink()


class Share:
    """The tars of this rank, and the work on them. Its methods are collectives."""

    def __init__(self, total: int, ranks: list[int], workers: Workers) -> None:
        """total: number of tars. ranks: those that share them."""
        self._all, self._ranks, self._workers = range(total), len(ranks), workers
        self._first = total * ranks[0]  # ranks that share other copies of the tars have other numbers
        # A tar has the same rank for all work: some network file systems remember for a while that a file was missing
        # when a rank looked for it.
        self._own = range(ranks.index(workers.rank), total, len(ranks))
        self._max_processes = workers.max_processes()

    def reuse(self, tars: list[_Tar], *, verify: bool) -> dict[int, Entry]:
        """By shard number, the entries that an earlier, perhaps interrupted, build stored and that can be used."""
        size = _TABLE_BYTES * len(tars) + (sum(tar.bytes for tar in tars) if verify else 0)
        found = self.divide(partial(_reuse, verify=verify), dict(enumerate(tars)), size)
        return {number: entry for number, entry in found.items() if entry is not None}

    def build(
        self, tars: dict[int, _Tar], paths: ShardPaths, caption: CaptionSource, *, allow_bad: bool
    ) -> dict[int, tuple[Entry, Table | None]]:
        """By shard number, the entries of some tars, and the tables that could not be written."""
        sizes = [tar.bytes or (_UNKNOWN_BYTES if paths.remote else 0) for tar in tars.values()]
        size = sum(sizes)
        self.fit(paths.cache, sizes)
        processes = max(1, self._processes(size))
        left = size / _BYTES_PER_S / self._ranks / processes
        what = f"{len(tars):,} of the {len(self._all):,} tars of {paths}, {size / 1e9:,.1f} GB"
        if self._workers.each_alone and left > _ALONE_S:
            raise UserError(
                f"the index lacks {what}, and every rank would index all of them, expected a complete index: run "
                f"tools/index_shards.py {caption.option}{paths.source} first"
            )
        shown = left > _LONG_S and self._workers.rank == 0
        if shown:
            log.info(
                "indexing %s, with %d processes on each of %d ranks: about %.0f min, or as long as the disk needs to "
                "read them",
                *(what, processes, self._ranks, max(1.0, left / 60)),
            )
        with progress_bar("index", "tar", len(tars), enabled=shown) as bar:

            def report(results: dict[int, tuple[Entry, Table | None]]) -> None:
                bar.update(len(results))
                for number, (entry, _) in results.items() if self._workers.rank == 0 else ():
                    _warn_of_dropped(tars[number].path, entry, caption)

            return self.divide(partial(_build, caption=caption, allow_bad=allow_bad), tars, size, report)

    def fit(self, cache: ShardCache | None, sizes: list[int] | list[float]) -> None:
        """Use so few processes that the tars that are read at once fit into a cache. sizes: in bytes."""
        if cache and sizes:
            fit = int(cache.limit / 2 / max(1, *sizes) / self._ranks)
            self._max_processes = max(1, min(self._max_processes, fit))

    def divide(
        self,
        work: Callable[[T], R],
        items: dict[int, T],
        size: float,
        on_done: Callable[[dict[int, R]], object] = lambda results: None,
    ) -> dict[int, R]:
        """The results for all items. size: bytes that are read for them."""

        def here(results: dict[int, R]) -> dict[int, R]:
            return {key - self._first: result for key, result in results.items() if key - self._first in self._all}

        own = {self._first + number: item for number, item in items.items() if number in self._own}
        return here(self._workers.divide(work, own, self._processes(size), lambda new: on_done(here(new))))

    def _processes(self, size: float) -> int:
        """The processes of this rank for work on so many bytes; 0: this one."""
        processes = min(self._max_processes, int(size / self._ranks / _PROCESS_BYTES))
        return processes if processes > 1 else 0


def _reuse(tar: _Tar, *, verify: bool) -> Entry | None:
    return reusable_entry(tar.folder, tar.path, tar.paths, verify=verify, keep_blank=tar.keep_blank)


def _build(tar: _Tar, *, caption: CaptionSource, allow_bad: bool) -> tuple[Entry, Table | None]:
    """Index one tar. Returns its entry, and its table if its folder cannot be written."""
    with tar.paths.local(tar.path, None) as (path, recorded):
        entry, table = _index_tar(path, caption, keep_blank=bool(tar.keep_blank), allow_bad=allow_bad)
    entry |= recorded
    if not tar.writable:
        return entry, {"keys": table.keys, "members": table.members.tolist()}
    with disk_errors(tar.folder):
        save_table(tar.folder, entry, table)
    return entry, None


def _index_tar(path: Path, caption: CaptionSource, *, keep_blank: bool, allow_bad: bool) -> tuple[Entry, ShardTable]:
    try:
        scan = scan_tar(path, caption, keep_blank=keep_blank, hashed=True)
        if scan.damage and not scan.keys and (other := other_format(path)):
            scan.damage = f"it is {other[0]}"
            if not allow_bad:
                raise UserError(f"{path} is {other[0]}, expected a plain tar, whose members have an offset: {other[1]}")
        if scan.damage and not allow_bad:
            raise UserError(
                f"{path} is damaged ({scan.damage}) after {len(scan.keys)} intact samples: fetch it again, "
                f"or run tools/index_shards.py {caption.option}--allow-bad to use the intact ones"
            )
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): correct its permissions, or fetch it again"
        ) from None
    table = ShardTable(scan.keys, np.array(scan.members, np.int64).reshape(-1, 8))
    entry = {
        "name": path.name.removesuffix(".tar"),
        "bytes": scan.bytes,
        "samples": len(scan.keys),
        "without_text": int((table.text[:, 1] < 0).sum()),
        "blank": scan.blank,
        "blank_kept": keep_blank,
        "sha256": scan.sha256,
        "keys_sha256": keys_sha256(scan.keys),
        "dropped": {reason: len(names) for reason, names in scan.dropped.items()},
        "dropped_names": {reason: names[:_LISTED] for reason, names in scan.dropped.items()},
        "damage": scan.damage,
    }
    return entry, table


def _warn_of_dropped(path: Path, entry: Entry, caption: CaptionSource) -> None:
    for reason, count in entry["dropped"].items():
        names = entry["dropped_names"][reason]
        listed = ", ".join(names) + (" ..." if count > len(names) else "")
        rule = f"; {remedy(reason, caption)}" if reason in LOST and lost_share([entry]) > MAX_LOST else ""
        log.warning("%s: skipped %d (%s): %s%s", path.name, count, reason, listed, rule)
