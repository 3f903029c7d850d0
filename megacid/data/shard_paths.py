"""The tars that a setting or an option names: directories, tars, globs, brace patterns and URLs, joined by `::`."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from megacid.data.remote.cache import DIRECTORY_VARIABLE, GB, CachedFile, ShardCache
from megacid.errors import UserError
from megacid.storage import object_store
from megacid.storage.atomic import file_sha256
from megacid.storage.object_store import ObjectDiffers, RemoteObject

_MAX_TARS = 1_000_000
_FEW = 100  # more remote tars are not indexed at the start of a run
_URL = re.compile(r"pipe:|file:|[a-z][a-z0-9+.-]*://?", re.IGNORECASE)
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True)
class ShardPaths:
    """The tars that were named.

    Attributes:
        tars: sorted by name, which is unique. The path of a remote one is where its index is, without a file.
        source: what was given, with absolute paths.
        directory: the directory when all tars of one are meant; None otherwise.
        remote: what is known of the remote ones.
        cache: where those are read; None without any.
    """

    tars: list[Path]
    source: str
    directory: Path | None
    remote: dict[Path, RemoteObject] = field(default_factory=dict)
    cache: ShardCache | None = None

    @property
    def root(self) -> Path:
        """The directory, or the one above all tars."""
        return self.directory or Path(os.path.commonpath([tar.absolute().parent for tar in self.tars]))

    @property
    def folders(self) -> list[Path]:
        """The directories of the tars; an empty one, too, when it was named alone."""
        return [self.directory] if self.directory else list(dict.fromkeys(tar.parent for tar in self.tars))

    @property
    def tool(self) -> str:
        """For messages: tools/index_shards.py, with the cache that remote tars need."""
        cache = f"{DIRECTORY_VARIABLE}={shlex.quote(str(self.cache.directory))} " if self.cache else ""
        return f"{cache}tools/index_shards.py"

    def of_tar(self, tar: Path) -> ShardPaths:
        """What is known of one tar, for another process."""
        remote = {tar: self.remote[tar]} if tar in self.remote else {}
        return ShardPaths([tar], self.source, None, remote, self.cache)

    def size(self, tar: Path) -> int:
        """Bytes of a tar, 0 while that of a remote one is not known. Raises OSError."""
        return (self.remote[tar].size or 0) if tar in self.remote else tar.stat().st_size

    def matches(self, tar: Path, entry: dict[str, Any]) -> bool:
        """Whether an entry of the index is of this tar, by name and size, and by the store's version of a remote one.

        What a store was not asked for, or does not tell, is not compared: the content is checked by every fetch.
        """
        if entry["name"] != tar.name.removesuffix(".tar"):
            return False
        if tar not in self.remote:
            return bool(entry["bytes"] == tar.stat().st_size)
        known = self.remote[tar]
        return known.size in (None, entry["bytes"]) and known.version in (None, entry.get("version"))

    def cached(self, tar: Path, entry: dict[str, Any]) -> CachedFile | None:
        """The tar of an entry as the cache knows it; None for a local one."""
        known = self.remote.get(tar)
        return None if known is None else CachedFile(known.url, entry["bytes"], entry["sha256"])

    def open(self, tar: Path, entry: dict[str, Any]) -> int:
        """A descriptor of a tar. Raises OSError for a local one, UserError for a remote one that cannot be fetched."""
        cached = self.cached(tar, entry)
        if cached is None or self.cache is None:
            return os.open(tar, os.O_RDONLY)
        return self.cache.open_file(cached)

    def remote_problem(self, tar: Path, entry: dict[str, Any]) -> str | None:
        """What differs between an entry of the index and the remote tar, which is fetched when it is not cached.

        Raises:
            RemoteError: it cannot be fetched now, so nothing is known of it.
        """
        known = self.remote[tar]
        if not self.matches(tar, entry):
            return (
                f"{known.url} has {known.size} bytes and version {known.version}, the index says {entry['bytes']} and "
                f"{entry.get('version')}"
            )
        try:
            with self.local(tar, entry) as (path, _):
                if file_sha256(path) != entry["sha256"]:
                    return f"{path} has the right size but another sha256, remove it: {known.url} is fetched again"
        except (ObjectDiffers, OSError) as error:
            return str(error)
        return None

    @contextlib.contextmanager
    def local(self, tar: Path, entry: dict[str, Any] | None) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A path at which a tar can be read during the block, and what the index records of it if it is remote.

        entry: of the index; None: the tar is not indexed yet.
        """
        known = self.remote.get(tar)
        if known is None or self.cache is None:
            yield tar, {}
        elif entry is not None:
            with self.cache.local(CachedFile(known.url, entry["bytes"], entry["sha256"])) as path:
                yield path, {}
        else:
            with self.cache.added(known.url) as (path, found):
                name = tar.name.removesuffix(".tar")
                try:
                    yield path, {"name": name, "url": known.url, "version": found.version}
                except UserError as error:
                    raise UserError(str(error).replace(str(path), known.url)) from None

    def check_fetches(self, tars: list[Path], stored: dict[Path, dict[str, Any]], limit: int) -> None:
        """Refuse to index remote tars of more than `limit` bytes, or ones that have changed.

        Args:
            tars: those that are to be indexed.
            stored: the entries of an earlier index, by tar.

        Raises:
            UserError: names a tar, and the command that indexes it.
        """
        missing = [self.remote[tar] for tar in tars if tar in self.remote]
        command = f"run {self.tool} {self.source}"
        for tar in tars:
            if tar in self.remote and tar in stored and not self.matches(tar, stored[tar]):
                raise UserError(f"{self.remote[tar].url} has changed since it was indexed: put it back, or {command}")
        few = object_store.stat_all(missing[:_FEW])
        size = sum(known.size or 0 for known in few)
        if size > limit or len(missing) > _FEW:
            raise UserError(
                f"{len(missing):,} remote tars of {self} are not indexed, of at least {size / GB:.3g} GB, which would "
                f"take long: {command}"
            )

    def __str__(self) -> str:
        """For messages."""
        text = str(self.directory or self.source)
        return text if len(text) <= 200 else f"{text[:200]} ..."


Listed = dict[str, list[tuple[str, int | None, str | None]]]  # of URLs: url, size and version of each tar


def list_remote(spec: str | Path, cache: ShardCache | None = None, *, ask: bool = False) -> Listed:
    """What the stores tell of the URLs in `spec`, for `find_shards`.

    Args:
        cache: as of `find_shards`.
        ask: ask the stores for the size and version of every remote tar; False: only those that a listing tells.

    Raises:
        UserError: there is no cache, or a store cannot be read.
    """
    parts = [part for part in _split(str(spec)) if _is_remote(part)]
    if parts and cache is None:
        ShardCache.of_environment(parts[0])
    urls = [url for part in parts for url in expand_braces(part)]
    found = {url: [RemoteObject(url)] if _names_tar(url) else object_store.list_tars(url) for url in urls}
    if ask:
        known = iter(object_store.stat_all([tar for tars in found.values() for tar in tars]))
        found = {url: [next(known) for _ in tars] for url, tars in found.items()}
    return {
        url: [(tar.url, tar.size, tar.version) for tar in tars]
        for url, tars in found.items()
        if ask or not _names_tar(url)
    }


def find_shards(spec: str | Path, cache: ShardCache | None = None, listed: Listed | None = None) -> ShardPaths:
    """The tars of one or more directories, .tar files, globs, brace patterns or URLs of these.

    Args:
        cache: for remote tars; None: the one that the environment names.
        listed: of `list_remote`; None: ask the stores now.

    Raises:
        UserError: one does not exist or cannot be read, or two tars have the same name.
    """
    parts = _split(str(spec))
    if len(parts) == 1 and os.path.isdir(parts[0]):
        directory = Path(parts[0])
        return ShardPaths(tars_of(directory), str(directory.resolve()), directory)
    remote: dict[Path, RemoteObject] = {}
    if any(map(_is_remote, parts)):
        cache = cache or ShardCache.of_environment(next(filter(_is_remote, parts)))
        listed = list_remote(spec, cache) if listed is None else listed
    by_name: dict[str, Path] = {}
    for part in parts:
        found = _remote_tars(part, cache, listed or {}, remote) if cache and _is_remote(part) else _tars_of_part(part)
        for tar in found:
            if (other := by_name.setdefault(tar.name, tar)) is not tar:
                both = " and ".join(remote[path].url if path in remote else str(path) for path in (other, tar))
                raise UserError(
                    f"{both} have the same name, expected unique ones, which samples are known by: rename one of them, "
                    "or name it once"
                )
    tars = [by_name[name] for name in sorted(by_name)]
    source = "::".join(part if _is_remote(part) else os.path.abspath(part) for part in parts)
    return ShardPaths(tars, source, None, remote, cache if remote else None)


def _is_remote(part: str) -> bool:
    return object_store.is_url(part) and not os.path.exists(part)


def _names_tar(url: str) -> bool:
    """Whether a URL names one tar, and not what has to be listed."""
    return url.endswith(".tar") and not object_store.has_magic(url)


def _remote_tars(part: str, cache: ShardCache, listed: Listed, remote: dict[Path, RemoteObject]) -> Iterator[Path]:
    """Where the indexes of the tars of a URL are; adds the tars to `remote`."""
    for url in expand_braces(part):
        tars = [RemoteObject(*known) for known in listed.get(url, [(url, None, None)])]
        if not tars:
            raise UserError(
                f"shards {url[:200]} has no .tar file that its store lists: correct it, or name the tars, such as "
                "https://example.org/laion/{00000..00099}.tar"
            )
        for tar in tars:
            path = cache.folder(tar.url) / tar.url.rpartition("/")[2]
            path.parent.mkdir(exist_ok=True)
            remote[path] = tar
            yield path


def tars_of(directory: Path) -> list[Path]:
    """The tars of a directory, sorted. UserError for one that is not a file: less data would be used without notice."""
    tars = sorted(path for path in directory.iterdir() if path.name.endswith(".tar") and path.name[0] != ".")
    for path in tars:
        if not path.is_file():
            kind = "a broken link" if path.is_symlink() and not path.exists() else "not a regular file"
            raise UserError(f"{path} is {kind}, expected a tar: restore it, or move it out of {directory}")
    return tars


def _split(text: str) -> list[str]:
    """The parts between `::`, with ~ expanded. UserError for what is neither a local path nor a URL that is read."""
    if "\0" in text:
        raise UserError(f"shards is {text[:80]!r}, expected a path without zero characters: correct it")
    parts = [text] if os.path.exists(text) else [part for part in text.split("::") if part]
    if not parts:
        raise UserError(f"shards is {text[:80]!r}, expected a directory with .tar files: name it")
    for part in parts:
        if os.path.exists(part):
            continue
        if _URL.match(part):
            if part.lower().startswith("file:"):
                raise UserError(f"shards is {part[:200]!r}, a URL of local files: write the path alone")
            if not object_store.is_url(part):
                raise UserError(
                    f"shards is {part[:200]!r}, expected a path or a URL with s3://, gs://, hf:// or https://: copy "
                    "the tars to a disk and give that directory"
                )
            continue
        if "$" in part:
            raise UserError(f"shards is {part[:200]!r}, and variables are not expanded: write the whole path")
    return [part if os.path.exists(part) else os.path.expanduser(part) for part in parts]


def _tars_of_part(part: str) -> Iterator[Path]:
    """The tars of a directory, a file, a glob or a brace pattern. UserError when one is missing."""
    names, missing = [part] if os.path.exists(part) else expand_braces(part), []
    for name in names:
        paths = [Path(name)] if os.path.exists(name) else _matches(name)
        if not paths:
            missing.append(name)
        for path in paths:
            tars = tars_of(path) if path.is_dir() else [path]
            if not tars or not path.exists() or not tars[0].name.endswith(".tar"):
                raise UserError(f"{path} is neither a .tar file nor a directory with some: rename it, or leave it out")
            yield from tars
    if len(names) == 1 and missing:
        what = "matches no .tar file" if glob.has_magic(part) else "does not exist"
        raise UserError(f"shards {part[:200]} {what}: correct it, or make one with img2dataset or tools/synthesize.py")
    if missing:
        raise UserError(
            f"{len(missing):,} of the {len(names):,} shards of {part[:200]} do not exist, the first is {missing[0]}: "
            "correct the numbers, or fetch them"
        )


def _matches(pattern: str) -> list[Path]:
    """What a glob matches, without other files than tars."""
    paths = (Path(name) for name in sorted(glob.glob(pattern, recursive=True)))
    return [path for path in paths if (path.is_dir() and tars_of(path)) or path.name.endswith(".tar")]


def expand_braces(part: str) -> list[str]:
    """The names that a brace pattern stands for. UserError for unmatched braces, or too many names."""
    ranges = [abs(int(stop[:19]) - int(start[:19])) for start, stop in _RANGE.findall(part)]
    try:
        names = [] if max(ranges, default=0) >= _MAX_TARS else list(islice(braceexpand(part), _MAX_TARS + 1))
    except ValueError:
        raise UserError(
            f"shards is {part[:200]}, whose braces do not match: write for example {{00000..00099}}.tar"
        ) from None
    if not 0 < len(names) <= _MAX_TARS:
        raise UserError(f"shards {part[:200]} names more than {_MAX_TARS:,} tars: correct the numbers")
    return names
