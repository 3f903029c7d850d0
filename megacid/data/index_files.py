"""Reading and writing of the files of a shard index: atomic writes, and validation of everything that is read.

Layout: see `index.py`. Nothing is unpickled. Offsets and sizes are not validated here: `ShardReader` checks them on
use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacid.data.shard_paths import ShardPaths
from megacid.errors import UserError
from megacid.storage.atomic import atomic_path, disk_errors, file_sha256, read_json, write_json_atomic
from megacid.storage.npy import load_npy, write_npy

log = logging.getLogger(__name__)

VERSION = 2  # 1: before captions were read
_ENTRY: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "bytes": int,
    "samples": int,
    "without_text": int,
    "blank": int,
    "blank_kept": bool,
    "sha256": str,
    "keys_sha256": str,
    "dropped": dict,
    "dropped_names": dict,
    "damage": (str, type(None)),
}


@dataclass(frozen=True)
class ShardTable:
    """The samples of one tar, in tar order.

    Attributes:
        keys: the key of every sample.
        members: int64 [n, 8], offset and size in bytes of the image, text, json and cls member; -1 where absent.
    """

    keys: list[str]
    members: np.ndarray

    @property
    def image(self) -> np.ndarray:
        return self.members[:, 0:2]

    @property
    def text(self) -> np.ndarray:
        return self.members[:, 2:4]


def keys_sha256(keys: list[str]) -> str:
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def content_digest(shards: Iterable[tuple[str, str]]) -> str:
    """sha256 of the content of a folder of shards; `shards`: (tar stem, keys_sha256) in order."""
    digest = hashlib.sha256()
    for name, keys in shards:
        digest.update(json.dumps([name, keys]).encode())
    return digest.hexdigest()


def entries_digest(entries: list[dict[str, Any]]) -> str:
    """`content_digest` of the entries of some tars."""
    return content_digest((entry["name"], entry["keys_sha256"]) for entry in entries)


def is_entry(entry: Any) -> bool:
    """Whether a stored entry of a tar has all fields, of the right types."""
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), kind) for name, kind in _ENTRY.items())
        and 0 <= entry["samples"] < 2**31
        and all(isinstance(count, int) for count in entry["dropped"].values())
    )


def is_writable(folder: Path) -> bool:
    """Whether an index directory is there, or was made now, and can be written."""
    try:
        folder.mkdir(exist_ok=True)
        return os.access(folder, os.W_OK)
    except OSError:
        return False


def stored_entries(folder: Path) -> list[dict[str, Any]] | None:
    """The entries of index.json; None when it is missing, damaged or of another version."""
    stored = read_json(folder / "index.json")
    if not isinstance(stored, dict) or stored.get("version") != VERSION:
        return None
    entries = stored.get("shards")
    return entries if isinstance(entries, list) and all(map(is_entry, entries)) else None


def stored_by_tar(folders: list[Path], index_folder: str) -> dict[Path, dict[str, Any]]:
    """The entries in the index.json of each folder; none of a folder where it cannot be used."""
    return {
        folder / f"{entry['name']}.tar": entry
        for folder in folders
        for entry in stored_entries(folder / index_folder) or []
    }


def reusable_entry(
    folder: Path, path: Path, paths: ShardPaths, *, verify: bool, keep_blank: bool | None
) -> dict[str, Any] | None:
    """The entry that an earlier, perhaps interrupted, run stored for this tar, when it still matches.

    keep_blank: the decision on blank captions that it gets, and must have if the tar has some. None: any.
    """
    stored = read_json(folder / f"{path.name.removesuffix('.tar')}.keys.json")
    if not isinstance(stored, dict) or stored.get("version") != VERSION:
        return None
    entry: dict[str, Any] = stored.get("entry", {})
    if not is_entry(entry) or not paths.matches(path, entry):
        return None
    decision = entry["blank_kept"] if keep_blank is None else keep_blank
    if entry["blank"] and entry["blank_kept"] != decision:
        return None
    if verify and path not in paths.remote and entry["sha256"] != file_sha256(path):
        log.warning("%s has the right size but another sha256: indexing it again", path)
        return None
    try:
        load_table(folder, entry)
    except UserError:
        return None
    return {**entry, "blank_kept": decision}


def save_entries(folder: Path, entries: list[dict[str, Any]], *, whole: bool) -> None:
    """Write index.json, which completes an index. whole: they are all of the directory; otherwise stored ones stay."""
    by_name = {entry["name"]: entry for entry in ([] if whole else stored_entries(folder) or []) + entries}
    shards = [by_name[name] for name in sorted(by_name, key=lambda name: f"{name}.tar")]
    with disk_errors(folder):
        write_json_atomic(
            folder / "index.json", {"version": VERSION, "digest": entries_digest(shards), "shards": shards}
        )


def save_table(folder: Path, entry: dict[str, Any], table: ShardTable) -> None:
    with atomic_path(folder / f"{entry['name']}.members.npy") as tmp, open(tmp, "wb") as file:
        write_npy(file, table.members.dtype, table.members.shape, [table.members])
    write_json_atomic(folder / f"{entry['name']}.keys.json", {"version": VERSION, "entry": entry, "keys": table.keys})


def load_table(folder: Path, entry: dict[str, Any]) -> ShardTable:
    """The stored table of a tar. UserError when it is damaged or does not match its entry."""
    remedy = f"the index of {entry['name']}.tar is damaged, delete {folder} and run tools/index_shards.py"
    members = load_npy(folder / f"{entry['name']}.members.npy", remedy)
    stored = read_json(folder / f"{entry['name']}.keys.json")
    keys = stored.get("keys") if isinstance(stored, dict) else None
    valid = (
        isinstance(keys, list)
        and all(isinstance(key, str) for key in keys)
        and len(keys) == entry["samples"]
        and members.dtype == np.int64
        and members.shape == (len(keys), 8)
        and keys_sha256(keys) == entry["keys_sha256"]
    )
    if not isinstance(keys, list) or not valid:
        raise UserError(f"{folder}/{entry['name']}.keys.json and .members.npy do not match: {remedy}")
    return ShardTable(keys, np.array(members))
