"""Where every sample of a folder of tar shards lies, so that it can be read with one `pread`.

Layout (no pickle):

    shards/index/00000.members.npy   int64 [n, 8]: offset and size of the image, text, json, cls member; -1: absent
    shards/index/00000.keys.json     the keys, in tar order, and what was left out
    shards/index/index.json          version, digest, and per tar: bytes, samples, sha256

The index is built on first use and rebuilt, tar by tar, where the size of a file no longer fits. `index.json` is
written last. A sample is a run of regular members that share the name up to the first dot of the basename, as
webdataset groups them; never across tars.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megacid.checkpoint.store import atomic_path, write_json_atomic
from megacid.data.cache import SmallCache
from megacid.data.decode import BadSample
from megacid.data.scan import COLUMN, Kind, scan_tar
from megacid.errors import UserError

log = logging.getLogger(__name__)

VERSION = 1
_NAMED = 20  # dropped samples that are named in full; the others are only counted


@dataclass(frozen=True)
class ShardTable:
    """The samples of one tar, in tar order.

    `image`, `text`, `json`, `cls`: int64 [n, 2] offset and size in bytes; -1 where absent.
    """

    keys: list[str]
    members: np.ndarray

    @property
    def image(self) -> np.ndarray:
        return self.members[:, 0:2]

    @property
    def text(self) -> np.ndarray:
        return self.members[:, 2:4]

    @property
    def json(self) -> np.ndarray:
        return self.members[:, 4:6]

    @property
    def cls(self) -> np.ndarray:
        return self.members[:, 6:8]


@dataclass(frozen=True)
class ShardIndex:
    """A folder of shards.

    `names`: tar stems, sorted; `sizes`: int64 samples per shard; `digest` names the content (tar names and keys).
    """

    root: Path
    names: list[str]
    sizes: np.ndarray
    digest: str
    shards: list[dict[str, Any]]
    in_memory: dict[int, ShardTable] | None = None
    _tables: SmallCache[ShardTable] = field(default_factory=lambda: SmallCache(64), repr=False)

    @property
    def num_samples(self) -> int:
        return int(self.sizes.sum())

    @property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1]: global row number of the first sample of each shard."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @property
    def dropped(self) -> dict[str, int]:
        """How many members and samples were left out, by reason."""
        total: dict[str, int] = {}
        for shard in self.shards:
            for reason, count in shard["dropped"].items():
                total[reason] = total.get(reason, 0) + count
        return total

    def tar_path(self, shard: int) -> Path:
        return self.root / f"{self.names[shard]}.tar"

    def table(self, shard: int) -> ShardTable:
        """The samples of shard number `shard`; the last 64 tables stay in memory."""
        if self.in_memory is not None:
            return self.in_memory[shard]
        return self._tables.get(shard, lambda: _load_table(self.root / "index", self.shards[shard]))


def load_index(
    shards_dir: str | Path,
    *,
    verify: bool = False,
    allow_bad: bool = False,
    on_shard: Callable[[int, int], None] | None = None,
) -> ShardIndex:
    """The index of a folder of tars; built or repaired when it is missing or does not fit.

    Args:
        shards_dir: a directory with `*.tar`.
        verify: also compare the sha256 of every tar (reads everything), not only its size.
        allow_bad: use the intact samples of a cut tar instead of refusing it; the index remembers the decision.
        on_shard: called as (done, total) while building.

    Raises:
        UserError: no such directory, no tar, no sample, or a damaged tar.
    """
    root = _check_root(shards_dir)
    tars = sorted(
        path for path in root.iterdir() if path.name.endswith(".tar") and path.name[0] != "." and path.is_file()
    )
    if not tars:
        raise UserError(f"{root} holds no .tar file: give the directory that img2dataset or tools/synthesize.py wrote")
    entries = None if verify else _load_entries(root, tars)
    if entries is not None:
        index = _assemble(root, entries, None)
    else:
        index = _build(root, tars, verify=verify, allow_bad=allow_bad, on_shard=on_shard)
    if index.num_samples == 0:
        raise UserError(
            f"{root} holds {len(tars)} tars but no complete sample: each needs an image and a .txt (or .cls) of the same name"
        )
    for entry in index.shards:
        if entry["damage"]:
            log.warning(
                "%s.tar is damaged (%s): its %d intact samples are used",
                entry["name"],
                entry["damage"],
                entry["samples"],
            )
    return index


def verify_index(shards_dir: str | Path, on_shard: Callable[[int, int], None] | None = None) -> list[str]:
    """Hash every tar again and compare with the stored index; returns one sentence for each thing that does not
    fit. Changes nothing."""
    root = _check_root(shards_dir)
    stored = _read_json(root / "index" / "index.json")
    if stored is None:
        return [f"{root}/index/index.json is missing or unreadable"]
    on_disk = {path.name.removesuffix(".tar") for path in root.glob("*.tar")}
    problems = [
        f"{name}.tar is not in the index" for name in sorted(on_disk - {entry["name"] for entry in stored["shards"]})
    ]
    for done, entry in enumerate(stored["shards"], 1):
        path = root / f"{entry['name']}.tar"
        if not path.is_file():
            problems.append(f"{path.name} is in the index but not on disk")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{path.name} has {path.stat().st_size} bytes, the index says {entry['bytes']}")
        elif _sha256(path) != entry["sha256"]:
            problems.append(f"{path.name} has the right size but another sha256")
        else:
            try:
                _load_table(root / "index", entry)
            except UserError as error:
                problems.append(str(error))
        if on_shard:
            on_shard(done, len(stored["shards"]))
    return problems


class ShardReader:
    """Reads members by `pread` through at most `max_open` file descriptors.

    `pread` has no file position, so descriptors inherited by a forked worker are safe to use; a spawned
    one opens its own.
    """

    def __init__(self, index: ShardIndex, *, max_member_bytes: int = 64 << 20, max_open: int = 64) -> None:
        self.index = index
        self.max_member_bytes = max_member_bytes
        self.max_open = max_open
        self._open: SmallCache[int] = SmallCache(max_open, os.close)

    def read(self, shard: int, row: int, kind: Kind) -> bytes:
        """One member of one sample.

        Raises BadSample when it is absent, too large, or the file no longer reaches that far.
        """
        table = self.index.table(shard)
        column = COLUMN[kind]
        offset, size = (int(v) for v in table.members[row, column : column + 2])
        if size < 0 or size > self.max_member_bytes:
            reason = f"no {kind} member" if size < 0 else f"{kind} of {size} bytes, more than {self.max_member_bytes}"
            raise BadSample(self.index.names[shard], table.keys[row], reason)
        try:
            descriptor = self._open.get(shard, lambda: os.open(self.index.tar_path(shard), os.O_RDONLY))
            data = os.pread(descriptor, size, offset)
        except OSError as error:
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
        raise UserError(f"shards is {text!r}, but must be a plain local directory: mount or download the data first")
    if not Path(text).is_dir():
        raise UserError(f"shards directory {text} does not exist: make one with img2dataset or tools/synthesize.py")
    return Path(text)


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
            "%s cannot be written: the index of %d tars is kept in memory and made again at every start",
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
                _save_table(folder, entry, table)
        entries.append(entry)
        if on_shard:
            on_shard(number + 1, len(tars))
    index = _assemble(root, entries, in_memory)
    if in_memory is None:
        write_json_atomic(folder / "index.json", {"version": VERSION, "digest": index.digest, "shards": entries})
    dropped = ", ".join(f"{count} x {reason}" for reason, count in index.dropped.items()) or "nothing"
    log.info("indexed %s: %d shards, %d samples, left out: %s", root, len(tars), index.num_samples, dropped)
    return index


def _assemble(root: Path, entries: list[dict[str, Any]], in_memory: dict[int, ShardTable] | None) -> ShardIndex:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps([entry["name"], entry["keys_sha256"]]).encode())
    sizes = np.array([entry["samples"] for entry in entries], np.int64)
    return ShardIndex(root, [entry["name"] for entry in entries], sizes, digest.hexdigest(), entries, in_memory)


def _index_tar(path: Path, *, allow_bad: bool) -> tuple[dict[str, Any], ShardTable]:
    scan = scan_tar(path)
    if scan.damage and not allow_bad:
        raise UserError(
            f"{path} is damaged ({scan.damage}) after {len(scan.keys)} intact samples: fetch it again, "
            f"or run tools/index_shards.py --allow-bad to use the intact ones"
        )
    for reason, names in scan.dropped.items():
        shown = ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")
        log.warning("%s: left out %d (%s): %s", path.name, len(names), reason, shown)
    table = ShardTable(scan.keys, np.array(scan.members, np.int64).reshape(-1, 8))
    entry = {
        "name": path.name.removesuffix(".tar"),
        "bytes": path.stat().st_size,
        "samples": len(scan.keys),
        "without_text": int((table.text[:, 1] < 0).sum()),
        "sha256": _sha256(path),
        "keys_sha256": _keys_sha256(scan.keys),
        "dropped": {reason: len(names) for reason, names in scan.dropped.items()},
        "dropped_names": {reason: names[:_NAMED] for reason, names in scan.dropped.items()},
        "damage": scan.damage,
    }
    return entry, table


# ---- on disk ---------------------------------------------------------------------------------------------


def _keys_sha256(keys: list[str]) -> str:
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _load_entries(root: Path, tars: list[Path]) -> list[dict[str, Any]] | None:
    """The stored entries when they fit the files on disk; None says that (part of) the index must be made."""
    stored = _read_json(root / "index" / "index.json")
    if not isinstance(stored, dict) or stored.get("version") != VERSION:
        return None
    entries = stored.get("shards", [])
    if [(entry["name"], entry["bytes"]) for entry in entries] != [
        (p.name.removesuffix(".tar"), p.stat().st_size) for p in tars
    ]:
        log.warning(
            "the index of %s does not fit its tars (added, removed or changed): making it again where needed", root
        )
        return None
    return list(entries)


def _reusable_entry(folder: Path, path: Path, *, verify: bool, allow_bad: bool) -> dict[str, Any] | None:
    """What an earlier, perhaps interrupted, run stored for this tar, when it still fits."""
    name = path.name.removesuffix(".tar")
    stored = _read_json(folder / f"{name}.keys.json")
    if not isinstance(stored, dict) or stored.get("version") != VERSION:
        return None
    entry: dict[str, Any] = stored["entry"]
    if entry["bytes"] != path.stat().st_size or (entry["damage"] and not allow_bad):
        return None
    if verify and entry["sha256"] != _sha256(path):
        log.warning("%s has the right size but another sha256: indexing it again", path)
        return None
    try:
        _load_table(folder, entry)
    except UserError:
        return None
    return entry


def _save_table(folder: Path, entry: dict[str, Any], table: ShardTable) -> None:
    with atomic_path(folder / f"{entry['name']}.members.npy") as tmp, open(tmp, "wb") as file:
        np.save(file, table.members, allow_pickle=False)
    write_json_atomic(folder / f"{entry['name']}.keys.json", {"version": VERSION, "entry": entry, "keys": table.keys})


def _load_table(folder: Path, entry: dict[str, Any]) -> ShardTable:
    stored = _read_json(folder / f"{entry['name']}.keys.json")
    try:
        members = np.load(folder / f"{entry['name']}.members.npy", allow_pickle=False)
    except (OSError, ValueError):
        members = None
    keys = stored.get("keys") if isinstance(stored, dict) else None
    if keys is None or members is None or members.shape != (len(keys), 8) or _keys_sha256(keys) != entry["keys_sha256"]:
        raise UserError(
            f"the index of {entry['name']}.tar in {folder} is damaged: delete {folder} and run tools/index_shards.py"
        )
    return ShardTable(keys, members)
