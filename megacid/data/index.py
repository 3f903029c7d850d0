"""The shard index: byte offsets of every sample in a folder of tars, so that each member is read with one `pread`.

Layout (no pickle):

    shards/index/00000.members.npy   int64 [n, 8]: offset and size of the image, text, json, cls member; -1 if absent
    shards/index/00000.keys.json     the keys, in tar order, and what was skipped
    shards/index/index.json          version, digest, and per tar: bytes, samples, sha256

The index is built on first use and rebuilt for each tar whose size has changed. `index.json` is written last. A sample
is a sequence of neighbouring regular members that share the name up to the first dot of the basename, as in webdataset;
it never spans tars.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megacid.data.decode import BadSample
from megacid.data.index_files import (
    VERSION,
    ShardTable,
    content_digest,
    is_entry,
    keys_sha256,
    load_table,
    save_table,
    stored_entries,
)
from megacid.data.index_report import check_losses, loses_many, summary, unused_files
from megacid.data.lru import LRUCache
from megacid.data.tar_samples import COLUMN, LOST, Kind, other_format, scan_tar
from megacid.errors import UserError
from megacid.storage.atomic import disk_errors, file_sha256, read_json, write_json_atomic

log = logging.getLogger(__name__)

_LISTED = 20  # dropped samples that are listed by name; the others are only counted
_MAX_TEXT_BYTES = 1 << 16  # a caption has a few hundred


@dataclass(frozen=True)
class ShardIndex:
    """An indexed folder of shards.

    Attributes:
        names: tar stems, sorted.
        sizes: int64 [shards], samples per shard.
        digest: sha256 of the content (tar names and keys).
        shards: the entry of each tar in index.json.
        in_memory: tables by shard number when the index could not be written; None reads them from disk.
    """

    root: Path
    names: list[str]
    sizes: np.ndarray
    digest: str
    shards: list[dict[str, Any]]
    in_memory: dict[int, ShardTable] | None = None
    _tables: LRUCache[ShardTable] = field(default_factory=lambda: LRUCache(64), repr=False)

    @property
    def num_samples(self) -> int:
        return int(self.sizes.sum())

    @property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1], global row of the first sample of each shard."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of skipped members and samples by reason."""
        total: dict[str, int] = {}
        for shard in self.shards:
            for reason, count in shard["dropped"].items():
                total[reason] = total.get(reason, 0) + count
        return total

    @property
    def without_text(self) -> int:
        """Number of samples that have a class but no caption."""
        return sum(shard["without_text"] for shard in self.shards)

    def check_captions(self) -> None:
        """Raise UserError when no sample has a caption, without which there are no pairs."""
        if self.without_text == self.num_samples:
            raise UserError(
                f"{self.root} has {self.num_samples:,} samples with an image and a class (.cls) but none with a "
                "caption (.txt), expected image-text pairs: add a .txt member to every sample; classes alone are for "
                "tools/eval.py"
            )

    def tar_path(self, shard: int) -> Path:
        return self.root / f"{self.names[shard]}.tar"

    def table(self, shard: int) -> ShardTable:
        """The samples of shard number `shard`; the 64 most recently used tables stay in memory."""
        if self.in_memory is not None:
            return self.in_memory[shard]
        return self._tables.get(shard, lambda: load_table(self.root / "index", self.shards[shard]))


def load_index(
    shards_dir: str | Path,
    *,
    verify: bool = False,
    allow_bad: bool = False,
    on_shard: Callable[[int, int], None] | None = None,
) -> ShardIndex:
    """Load the index of a folder of tars; build or repair it when it is missing or does not match the tars.

    Args:
        shards_dir: a directory with `*.tar`.
        verify: compare the sha256 of every tar (reads all data), not only its size.
        allow_bad: use what can be used of damaged tars and of shards that lose more than 5 % of their samples, instead
            of refusing them; stored in the index.
        on_shard: called as (done, total) while building.

    Raises:
        UserError: no such directory, no tar, no sample, many lost samples, or a tar that is damaged or cannot be read.
    """
    root = _check_root(shards_dir)
    tars, unused = _tars(root), unused_files(root)
    if not tars:
        unused = f" but {unused}" if unused else ": give the directory that img2dataset or tools/synthesize.py wrote"
        raise UserError(f"{root} has no .tar file{unused}")
    if unused:
        log.warning("%s: not used: %s", root, unused)
    entries = None if verify else _load_entries(root, tars)
    if entries is not None:
        index = _assemble(root, entries, None)
        check_losses(root, entries, allow_bad=True)  # decided when the index was written
    else:
        index = _build(root, tars, verify=verify, allow_bad=allow_bad, on_shard=on_shard)
    for entry in index.shards:
        if entry["damage"]:
            log.warning(
                "%s.tar is damaged (%s): using its %d intact samples", entry["name"], entry["damage"], entry["samples"]
            )
    return index


def verify_index(shards_dir: str | Path, on_shard: Callable[[int, int], None] | None = None) -> list[str]:
    """Hash every tar and compare it with the stored index. Returns one sentence per mismatch; changes nothing."""
    root = _check_root(shards_dir)
    stored = stored_entries(root)
    if stored is None:
        return [f"{root}/index/index.json is missing or unreadable"]
    on_disk = {path.name.removesuffix(".tar") for path in _tars(root)}
    problems = [f"{name}.tar is not in the index" for name in sorted(on_disk - {entry["name"] for entry in stored})]
    for done, entry in enumerate(stored, 1):
        path = root / f"{entry['name']}.tar"
        if not path.is_file():
            problems.append(f"{path.name} is in the index but not on disk")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{path.name} has {path.stat().st_size} bytes, the index says {entry['bytes']}")
        elif file_sha256(path) != entry["sha256"]:
            problems.append(f"{path.name} has the right size but another sha256")
        else:
            try:
                load_table(root / "index", entry)
            except UserError as error:
                problems.append(str(error))
        if on_shard:
            on_shard(done, len(stored))
    return problems


class ShardReader:
    """Reads members with `pread` through at most `max_open` file descriptors.

    `pread` has no file position, so a forked worker can use inherited descriptors; a spawned one opens its own.
    """

    def __init__(self, index: ShardIndex, *, max_member_bytes: int = 64 << 20, max_open: int = 64) -> None:
        self.index = index
        self.max_member_bytes = max_member_bytes
        self.max_open = max_open
        self._open: LRUCache[int] = LRUCache(max_open, os.close)

    def read(self, shard: int, row: int, kind: Kind) -> bytes:
        """One member of one sample.

        Raises:
            BadSample: the member is absent or too large (`max_member_bytes`; 64 KiB for text and cls), or the file is
                shorter than the index says.
        """
        table = self.index.table(shard)
        column = COLUMN[kind]
        offset, size = (int(v) for v in table.members[row, column : column + 2])
        limit = min(self.max_member_bytes, _MAX_TEXT_BYTES) if kind in ("text", "cls") else self.max_member_bytes
        if size < 0 or size > limit:
            reason = f"no {kind} member" if size < 0 else f"{kind} of {size} bytes, more than {limit}"
            raise BadSample(self.index.names[shard], table.keys[row], reason)
        try:
            descriptor = self._open.get(shard, lambda: os.open(self.index.tar_path(shard), os.O_RDONLY))
            data = os.pread(descriptor, size, offset)
        except (OSError, OverflowError) as error:  # a manipulated index may hold any offset
            raise BadSample(self.index.names[shard], table.keys[row], f"cannot be read: {error}") from error
        if len(data) != size:
            raise BadSample(
                self.index.names[shard], table.keys[row], f"{len(data)} of {size} bytes of the {kind}: the tar was cut"
            )
        return data

    def close(self) -> None:
        self._open.clear()


# ---- building --------------------------------------------------------------------------------------------


def _check_root(shards_dir: str | Path) -> Path:
    text = str(shards_dir)
    if "://" in text or text.startswith("pipe:") or "$" in text:
        raise UserError(f"shards is {text!r}, expected a plain local directory: mount or download the data first")
    if not Path(text).is_dir():
        raise UserError(f"shards directory {text} does not exist: make one with img2dataset or tools/synthesize.py")
    return Path(text)


def _tars(root: Path) -> list[Path]:
    """The shards, sorted. UserError for one that is not a file: skipping it would silently train on less data."""
    tars = sorted(path for path in root.iterdir() if path.name.endswith(".tar") and path.name[0] != ".")
    for path in tars:
        if not path.is_file():
            kind = "a broken link" if path.is_symlink() and not path.exists() else "not a regular file"
            raise UserError(f"{path} is {kind}, expected a tar: restore it, or move it out of {root}")
    return tars


def _build(
    root: Path, tars: list[Path], *, verify: bool, allow_bad: bool, on_shard: Callable[[int, int], None] | None
) -> ShardIndex:
    folder = root / "index"
    in_memory: dict[int, ShardTable] | None = None
    try:
        folder.mkdir(exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        log.warning(
            "%s cannot be written: the index of %d tars stays in memory and is built again at every start",
            folder,
            len(tars),
        )
        in_memory = {}
    entries = []
    for number, path in enumerate(tars):
        entry = _reusable_entry(folder, path, verify=verify, allow_bad=allow_bad)
        if entry is None or in_memory is not None:
            entry, table = _index_tar(path, allow_bad=allow_bad)
            if in_memory is not None:
                in_memory[number] = table
            else:
                with disk_errors(folder):
                    save_table(folder, entry, table)
        entries.append(entry)
        if on_shard:
            on_shard(number + 1, len(tars))
    index = _assemble(root, entries, in_memory)
    check_losses(root, entries, allow_bad=allow_bad, writable=writable)
    if in_memory is None:
        with disk_errors(folder):
            write_json_atomic(folder / "index.json", {"version": VERSION, "digest": index.digest, "shards": entries})
    log.info("indexed %s: %d shards, %s", root, len(tars), summary(entries))
    return index


def _assemble(root: Path, entries: list[dict[str, Any]], in_memory: dict[int, ShardTable] | None) -> ShardIndex:
    digest = content_digest((entry["name"], entry["keys_sha256"]) for entry in entries)
    sizes = np.array([entry["samples"] for entry in entries], np.int64)
    return ShardIndex(root, [entry["name"] for entry in entries], sizes, digest, entries, in_memory)


def _index_tar(path: Path, *, allow_bad: bool) -> tuple[dict[str, Any], ShardTable]:
    try:
        size = path.stat().st_size  # taken before reading: a tar that is still growing will not match the index
        scan = scan_tar(path)
        if scan.damage and not scan.keys and (other := other_format(path)):
            scan.damage = f"it is {other[0]}"
            if not allow_bad:
                raise UserError(f"{path} is {other[0]}, expected a plain tar, whose members have an offset: {other[1]}")
        if scan.damage and not allow_bad:
            raise UserError(
                f"{path} is damaged ({scan.damage}) after {len(scan.keys)} intact samples: fetch it again, "
                "or run tools/index_shards.py --allow-bad to use the intact ones"
            )
        digest = file_sha256(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): correct its permissions, or fetch it again"
        ) from None
    table = ShardTable(scan.keys, np.array(scan.members, np.int64).reshape(-1, 8))
    entry = {
        "name": path.name.removesuffix(".tar"),
        "bytes": size,
        "samples": len(scan.keys),
        "without_text": int((table.text[:, 1] < 0).sum()),
        "sha256": digest,
        "keys_sha256": keys_sha256(scan.keys),
        "dropped": {reason: len(names) for reason, names in scan.dropped.items()},
        "dropped_names": {reason: names[:_LISTED] for reason, names in scan.dropped.items()},
        "damage": scan.damage,
    }
    for reason, names in scan.dropped.items():
        listed = ", ".join(names[:_LISTED]) + (" ..." if len(names) > _LISTED else "")
        rule = f"; {LOST[reason]}" if reason in LOST and loses_many([entry]) else ""
        log.warning("%s: skipped %d (%s): %s%s", path.name, len(names), reason, listed, rule)
    return entry, table


# ---- on disk ---------------------------------------------------------------------------------------------


def _load_entries(root: Path, tars: list[Path]) -> list[dict[str, Any]] | None:
    """The stored entries when they match the files on disk; None when the index has to be (partly) rebuilt."""
    entries = stored_entries(root)
    if entries is None:
        return None
    if [(entry["name"], entry["bytes"]) for entry in entries] != [
        (p.name.removesuffix(".tar"), p.stat().st_size) for p in tars
    ]:
        log.warning(
            "the index of %s does not match its tars (added, removed or changed): rebuilding it where needed", root
        )
        return None
    return entries


def _reusable_entry(folder: Path, path: Path, *, verify: bool, allow_bad: bool) -> dict[str, Any] | None:
    """The entry that an earlier, perhaps interrupted, run stored for this tar, when it still matches."""
    name = path.name.removesuffix(".tar")
    stored = read_json(folder / f"{name}.keys.json")
    if not isinstance(stored, dict) or stored.get("version") != VERSION:
        return None
    entry: dict[str, Any] = stored.get("entry", {})
    if not is_entry(entry) or entry["name"] != name:
        return None
    if entry["bytes"] != path.stat().st_size or (entry["damage"] and not allow_bad):
        return None
    if verify and entry["sha256"] != file_sha256(path):
        log.warning("%s has the right size but another sha256: indexing it again", path)
        return None
    try:
        load_table(folder, entry)
    except UserError:
        return None
    return entry


def read_sample_json(reader: ShardReader, shard: int, row: int) -> dict[str, Any]:
    """The json member of a sample; {} when it has none or an unreadable one."""
    try:
        value = json.loads(reader.read(shard, row, "json"))
    except (BadSample, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
