"""Comparison of tars with their stored index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megacid.data.captions import CaptionSource
from megacid.data.index_files import load_table, stored_entries
from megacid.data.shard_paths import find_shards
from megacid.errors import UserError
from megacid.storage.atomic import file_sha256


def verify_index(
    shards: str | Path, on_shard: Callable[[int, int], None] | None = None, *, caption: str = "txt"
) -> list[str]:
    """Hash every tar and compare it with the stored index. Returns one sentence per mismatch; changes nothing."""
    source, paths = CaptionSource.parse(caption), find_shards(shards, ask=True)
    stored: dict[Path, dict[str, Any]] = {}
    for folder in paths.folders:
        entries = stored_entries(folder / source.index_folder)
        if entries is None:
            return [f"{folder / source.index_folder}/index.json is missing or unreadable"]
        stored |= {folder / f"{entry['name']}.tar": entry for entry in entries}
    problems = [f"{path.name} is not in the index" for path in paths.tars if path not in stored]
    if paths.directory is None:
        stored = {path: stored[path] for path in paths.tars if path in stored}
    for done, (path, entry) in enumerate(stored.items(), 1):
        problem = paths.remote_problem(path, entry) if path in paths.remote else _local_problem(path, entry)
        problem = problem or _table_problem(path.parent / source.index_folder, entry)
        problems += [problem] if problem else []
        if on_shard:
            on_shard(done, len(stored))
    return problems


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
