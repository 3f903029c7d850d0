"""The shard index: byte offsets of every sample in a folder of tars, so that each member is read with one `pread`.

Layout (no pickle):

    shards/index/00000.members.npy   int64 [n, 8]: offset and size of the image, text, json, cls member; -1 if absent
    shards/index/00000.keys.json     the keys, in tar order, and what was skipped
    shards/index/index.json          version, digest, and per tar: bytes, samples, sha256

The index is built on first use and rebuilt for each tar whose size has changed. `index.json` is written last. A sample
is a sequence of neighbouring regular members that share the name up to the first dot of the basename, as in webdataset;
it never spans tars. Captions that are not in .txt members have an index of their own (`CaptionSource.index_folder`),
whose column `text` is the member that holds the caption.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megacid.data.captions import CaptionError, CaptionSource
from megacid.data.decode import BadSample, decode_caption, decode_text
from megacid.data.index_build import build_entries
from megacid.data.index_files import (
    ShardTable,
    entries_digest,
    load_table,
    stored_by_tar,
)
from megacid.data.index_ranks import agree_on_names, find_shards_once
from megacid.data.index_report import MAX_LOST, check_losses, unused_files
from megacid.data.lru import LRUCache
from megacid.data.remote.cache import ShardCache
from megacid.data.shard_paths import ShardPaths
from megacid.data.tar_samples import COLUMN, Kind
from megacid.distributed.divided_work import ALONE, Workers
from megacid.errors import UserError

log = logging.getLogger(__name__)

_MAX_CLASS_BYTES = 1 << 16


@dataclass(frozen=True)
class ShardIndex:
    """Indexed shards.

    Attributes:
        paths: the tars.
        caption: where their captions are.
        names: tar stems, sorted.
        sizes: int64 [shards], samples per shard.
        digest: sha256 of the content (tar names and keys).
        shards: the entry of each tar in index.json.
        in_memory: by shard number, the tables that could not be written; the others are read from disk.
    """

    paths: ShardPaths
    caption: CaptionSource
    names: list[str]
    sizes: np.ndarray
    digest: str
    shards: list[dict[str, Any]]
    in_memory: dict[int, ShardTable]
    _tables: LRUCache[ShardTable] = field(default_factory=lambda: LRUCache(64), repr=False)

    @property
    def root(self) -> Path:
        """The directory of the shards, or the one above all of them."""
        return self.paths.root

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
                f"caption (.{self.caption.ending}), expected image-text pairs: add a .{self.caption.ending} member to "
                "every sample, or name where the captions are with --caption (data.caption in a run file); classes "
                "alone are for tools/eval.py"
            )

    def tar_path(self, shard: int) -> Path:
        return self.paths.tars[shard]

    def open_tar(self, shard: int) -> int:
        """A descriptor of a tar. Raises OSError, and UserError for a remote tar that cannot be fetched."""
        return self.paths.open(self.paths.tars[shard], self.shards[shard])

    @contextlib.contextmanager
    def local_tar(self, shard: int) -> Iterator[Path]:
        """A path at which a tar can be read during the block."""
        with self.paths.local(self.paths.tars[shard], self.shards[shard]) as (path, _):
            yield path

    def table(self, shard: int) -> ShardTable:
        """The samples of shard number `shard`; the 64 most recently used tables stay in memory."""
        if shard in self.in_memory:
            return self.in_memory[shard]
        folder = self.tar_path(shard).parent / self.caption.index_folder
        return self._tables.get(shard, lambda: load_table(folder, self.shards[shard]))

    def shown_key(self, shard: int, row: int) -> str:
        """For messages: the key of a sample, or its row when the table of its tar cannot be read any more."""
        try:
            return self.table(shard).keys[row]
        except UserError:
            return f"row {row}"


def load_index(
    shards: str | Path,
    *,
    caption: str = "txt",
    keep_blank: bool | None = None,
    verify: bool = False,
    allow_bad: bool = False,
    max_lost: float = MAX_LOST,
    cache: ShardCache | None = None,
    ask: bool = False,
    fetch_limit: int | None = None,
    workers: Workers = ALONE,
) -> ShardIndex:
    """Load the index of some tars; build or repair it when it is missing or does not match the tars.

    Args:
        shards: a directory with `*.tar`, or what else `find_shards` accepts.
        caption: where the captions are, see `CaptionSource`.
        keep_blank: use blank captions instead of leaving them out; stored in the index. None: as stored for each tar;
            new tars as all stored ones if those agree, else False.
        verify: compare the sha256 of every tar (reads all data), not only its size.
        allow_bad: use what can be used of damaged tars, and any share of the samples, instead of refusing them. Tars
            that the index has are accepted until they change.
        max_lost: share of all samples, or of those in tars that were added or changed, that may be lost.
        cache, ask: for remote tars, see `list_remote`.
        fetch_limit: bytes of remote tars that may be fetched to index them; None: any number, and changed ones too.
        workers: the ranks and processes that share the work; with ranks it is a collective.

    Raises:
        UserError: no such directory, no tar, no sample, many lost samples, or a tar that is damaged or cannot be read.
        RanksDisagree: the ranks see tars of different names.
    """
    with workers.together():
        source = CaptionSource.parse(caption)
    paths = find_shards_once(shards, workers, cache, ask=ask)
    with workers.together():
        _check_paths(paths)
    agree_on_names(paths, workers)
    with workers.together():
        stored = stored_by_tar(paths.folders, source.index_folder)
        entries = None if verify else _unchanged(paths, stored, keep_blank)
        if entries is not None:
            check_losses(paths, entries, source)  # the share was judged when the index was written
    in_memory: dict[int, ShardTable] = {}
    if any(workers.gather(entries is None)) or entries is None:
        entries, in_memory = build_entries(
            *(paths, source, stored, workers),
            keep_blank=keep_blank,
            verify=verify,
            allow_bad=allow_bad,
            max_lost=1.0 if allow_bad else max_lost,
            fetch_limit=fetch_limit,
        )
    index = _assemble(paths, source, entries, in_memory)
    for entry in index.shards:
        if entry["damage"]:
            log.warning(
                "%s.tar is damaged (%s): using its %d intact samples", entry["name"], entry["damage"], entry["samples"]
            )
    return index


class ShardReader:
    """Reads members with `pread` through at most `max_open` file descriptors.

    `pread` has no file position, so a forked worker can use inherited descriptors; a spawned one opens its own.
    """

    def __init__(self, index: ShardIndex, *, max_member_bytes: int = 64 << 20, max_open: int = 64) -> None:
        self.index = index
        self.max_member_bytes = max_member_bytes
        self._open: LRUCache[int] = LRUCache(max_open, os.close)

    def read(self, shard: int, row: int, kind: Kind) -> bytes:
        """One member of one sample.

        Raises:
            BadSample: the member is absent or too large (`max_member_bytes`; less for text and cls), or the file is
                shorter than the index says.
        """
        column = COLUMN[kind]
        offset, size = self.index.table(shard).members[row, column : column + 2].tolist()
        return self.read_at(shard, row, kind, offset, size)

    def read_at(self, shard: int, row: int, kind: Kind, offset: int, size: int) -> bytes:
        """`read` of a member whose place is known. The index is opened for the messages only."""
        limits = {"text": self.index.caption.max_bytes, "cls": _MAX_CLASS_BYTES}
        limit = min(self.max_member_bytes, limits.get(kind, self.max_member_bytes))
        if size < 0 or size > limit:
            reason = f"no {kind} member" if size < 0 else f"{kind} of {size} bytes, more than {limit}"
            raise self.bad_sample(shard, row, reason)
        try:
            descriptor = self._open.get(shard, lambda: self._open_tar(shard))
            data = os.pread(descriptor, size, offset)
        except (OSError, OverflowError) as error:  # a manipulated index may hold any offset
            raise self.bad_sample(shard, row, f"cannot be read: {error}") from error
        if len(data) != size:
            raise self.bad_sample(shard, row, f"{len(data)} of {size} bytes of the {kind}: the tar was cut")
        return data

    def _open_tar(self, shard: int) -> int:
        if self.index.paths.remote:  # frees the space of tars that were removed from the cache
            self._open.drop(lambda descriptor: os.fstat(descriptor).st_nlink == 0)
        return self.index.open_tar(shard)

    def bad_sample(self, shard: int, row: int, reason: str) -> BadSample:
        """The error that names a sample."""
        return BadSample(self.index.names[shard], self.index.shown_key(shard, row), reason)

    def caption(self, shard: int, row: int, *, strict: bool = False) -> str:
        """The caption of one sample, the first of several, as in `captions`."""
        return self.captions(shard, row, strict=strict)[0]

    def captions(self, shard: int, row: int, *, strict: bool = False) -> list[str]:
        """All captions of one sample, stripped.

        Args:
            strict: refuse bytes that are not UTF-8 instead of replacing them.

        Raises:
            BadSample: one cannot be read, or has an overlong word.
        """
        return self.decode_captions(shard, row, self.read(shard, row, "text"), strict=strict)

    def decode_captions(self, shard: int, row: int, member: bytes, *, strict: bool = False) -> list[str]:
        """`captions` of a member that was read."""
        try:
            found = self.index.caption.extract(member)
            for data in found if strict else ():
                decode_text(data)
            return [decode_caption(data) for data in found]
        except UnicodeDecodeError as error:
            raise self.bad_sample(shard, row, f"caption is not UTF-8: {error.reason}") from error
        except (CaptionError, BadSample) as error:
            raise self.bad_sample(shard, row, getattr(error, "reason", str(error))) from error

    def close(self) -> None:
        self._open.clear()


def _check_paths(paths: ShardPaths) -> None:
    """Raise UserError without a tar, and warn of files that are not used."""
    unused = unused_files(paths.directory) if paths.directory else ""
    if not paths.tars:
        unused = f" but {unused}" if unused else ": give the directory that img2dataset or tools/synthesize.py wrote"
        raise UserError(f"{paths} has no .tar file{unused}")
    if unused:
        log.warning("%s: not used: %s", paths, unused)


def _unchanged(
    paths: ShardPaths, stored: dict[Path, dict[str, Any]], keep_blank: bool | None
) -> list[dict[str, Any]] | None:
    """The stored entries when they match the files on disk; None when the index has to be (partly) rebuilt."""
    found = [stored[tar] for tar in paths.tars if tar in stored and paths.matches(tar, stored[tar])]
    decided = all(keep_blank in (None, entry["blank_kept"]) for entry in found)
    if decided and len(found) == len(paths.tars) and not (paths.directory and len(stored) > len(found)):
        return found
    if stored:
        log.warning(
            "the index of %s does not match its tars (added, removed or changed) or the decision on blank captions: "
            "rebuilding it where needed",
            paths,
        )
    return None


def _assemble(
    paths: ShardPaths, caption: CaptionSource, entries: list[dict[str, Any]], in_memory: dict[int, ShardTable]
) -> ShardIndex:
    names, sizes = [entry["name"] for entry in entries], np.array([entry["samples"] for entry in entries], np.int64)
    return ShardIndex(paths, caption, names, sizes, entries_digest(entries), entries, in_memory)


def read_sample_json(reader: ShardReader, shard: int, row: int) -> dict[str, Any]:
    """The json member of a sample; {} when it has none or an unreadable one."""
    try:
        value = json.loads(reader.read(shard, row, "json"))
    except (BadSample, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
