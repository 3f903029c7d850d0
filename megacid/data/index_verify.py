"""Comparison of tars with their stored index."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from megacid.data.captions import CaptionSource
from megacid.data.index_build import Share
from megacid.data.index_files import load_table, stored_by_tar, stored_entries
from megacid.data.index_ranks import find_shards_once, ranks_that_share
from megacid.data.shard_paths import ShardPaths
from megacid.distributed.divided_work import ALONE, Workers
from megacid.distributed.progress import progress_bar
from megacid.errors import UserError
from megacid.storage.atomic import file_sha256


def verify_index(shards: str | Path, *, caption: str = "txt", workers: Workers = ALONE) -> list[str]:
    """Hash every tar and compare it with the stored index. Returns one sentence per mismatch; changes nothing.

    workers: the ranks and processes that share the work; with ranks it is a collective. Ranks that read other copies of
        the tars verify those, and all get the mismatches of all.

    Raises:
        UserError: the tars cannot be found, or a remote one cannot be fetched.
    """
    with workers.together():
        source = CaptionSource.parse(caption)
    paths = find_shards_once(shards, workers, ask=True)
    with workers.together():
        stored = stored_by_tar(paths.folders, source.index_folder)
        folders = [folder / source.index_folder for folder in paths.folders]
        problems = [f"{each}/index.json is missing or unreadable" for each in folders if stored_entries(each) is None]
        if problems:
            stored = {}
        else:
            problems = [f"{path.name} is not in the index" for path in paths.tars if path not in stored]
        if paths.directory is None:
            stored = {path: stored[path] for path in paths.tars if path in stored}
        writable = {folder: os.access(folder, os.W_OK) for folder in folders}
    ranks = ranks_that_share(writable, workers)
    share = Share(max(workers.gather(len(stored))), ranks, workers)
    share.fit(paths.cache, [entry["bytes"] for entry in stored.values()])
    items = {number: (path, entry, paths.of_tar(path)) for number, (path, entry) in enumerate(stored.items())}
    size = sum(entry["bytes"] for entry in stored.values())
    with progress_bar("verify", "tar", len(stored), enabled=workers.rank == 0) as bar:
        work = partial(_problem, index_folder=source.index_folder)
        found = share.divide(work, items, size, lambda results: bar.update(len(results)))
    problems += [problem for _, problem in sorted(found.items()) if problem]
    by_rank = workers.gather([ranks[0], problems if workers.rank == ranks[0] else []])
    several = any(first != 0 for first, _ in by_rank)
    return [f"rank {first}: {problem}" if several else problem for first, own in by_rank for problem in own]


def _problem(tar: tuple[Path, dict[str, Any], ShardPaths], *, index_folder: str) -> str | None:
    path, entry, paths = tar
    problem = paths.remote_problem(path, entry) if path in paths.remote else _local_problem(path, entry)
    return problem or _table_problem(path.parent / index_folder, entry)


def _local_problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is in the index but not on disk"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, the index says {entry['bytes']}"
    if file_sha256(path) != entry["sha256"]:
        return f"{path.name} has the right size but another sha256"
    return None


def _table_problem(folder: Path, entry: dict[str, Any]) -> str | None:
    try:
        load_table(folder, entry)
    except UserError as error:
        return str(error)
    return None
