"""A cache of whole remote files in a local directory, which the processes of all ranks and runs of a node share.

    cache_dir/shard_cache.json                     marks the directory as a cache
    cache_dir/s3-bucket-laion-1f0c.../             one folder per remote folder, named by its URL
        index/                                     as next to local tars
        00000-SHA256.tar                           a tar, or another file, named by its content
        .00000-SHA256.BYTES.lock, .part            a file that is being fetched

A file is fetched under a file lock, checked against its recorded size and sha256, and renamed into place. Before a
fetch, the files whose modification time is oldest are removed until the new one fits. The time is that of the last use;
that of a prefetched file lies in the future. A file that a process holds is never removed or replaced. Locks end with
their holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megacid.errors import UserError
from megacid.storage import object_store
from megacid.storage.atomic import disk_errors, open_owned, read_json, write_json_atomic
from megacid.storage.object_store import TARS, Purpose, RemoteError, RemoteObject

GB = 10**9
DIRECTORY_VARIABLE, SIZE_VARIABLE = "MEGACID_CACHE_DIR", "MEGACID_CACHE_GB"
ROOM_S = 30.0  # longest wait for other processes to release files
_POLL_S = 0.05
_MARKER, _KIND = "shard_cache.json", {"made_by": "megacid", "kind": "shard cache", "version": 1}
_LOCK_NAME = re.compile(r"\.(?P<name>.+)\.(?P<bytes>\d+)\.lock")
_HASH_CHARACTERS = 32
_ENDINGS = (".tar", ".npy")
_PREFETCHED_S = 1800.0  # how long a prefetched file is kept for its run without a new mark
_PLACE_S = 0.1  # in the order of the prefetched files


@dataclass(frozen=True)
class CachedFile:
    """A remote file as the index of its shards, or its stage, knows it; size in bytes, purpose for messages."""

    url: str
    size: int
    sha256: str
    purpose: Purpose = TARS


@dataclass(frozen=True)
class ShardCache:
    """Fetches remote files into `directory`, and keeps at most `limit` bytes of them."""

    directory: Path
    limit: int

    @classmethod
    def open(cls, directory: str | Path, gigabytes: float) -> ShardCache:
        """The cache in a directory, which is created when it is missing.

        Raises:
            UserError: the directory holds something else, or cannot be written.
        """
        cache = cls(Path(directory).absolute(), int(gigabytes * GB))
        with disk_errors(cache.directory):
            cache.directory.mkdir(parents=True, exist_ok=True)
            others = sorted(path.name for path in cache.directory.iterdir() if not path.name.startswith(".tmp-"))
            marker = read_json(cache.directory / _MARKER)
            if marker is None and not others:
                write_json_atomic(cache.directory / _MARKER, _KIND)
            elif marker != _KIND:
                raise UserError(
                    f"{cache.directory} is not a cache of shards, it has {', '.join(others[:3])}: name an empty "
                    "directory, or one that is not there"
                )
        if not os.access(cache.directory, os.W_OK):
            raise UserError(f"{cache.directory} cannot be written: correct its permissions, or name another cache")
        return cache

    @classmethod
    def of_environment(cls, url: str) -> ShardCache:
        """The cache that MEGACID_CACHE_DIR and MEGACID_CACHE_GB name. UserError, which names `url`, without them."""
        directory, gigabytes = os.environ.get(DIRECTORY_VARIABLE), os.environ.get(SIZE_VARIABLE, "100")
        if not directory:
            raise UserError(
                f"{url[:200]} is remote and has no cache: set {DIRECTORY_VARIABLE}, or data.cache_dir of a run file, to"
                " a directory on a local disk"
            )
        try:
            size = float(gigabytes)
        except ValueError:
            size = 0.0
        if not 0 < size <= 1e9:
            raise UserError(f"{SIZE_VARIABLE} is {gigabytes[:40]!r}, expected a number of GB above 0: correct it")
        return cls.open(directory, size)

    def folder(self, url: str) -> Path:
        """The local folder of the files in the same remote folder as `url`; it may not be there yet."""
        parent = url.rpartition("/")[0]
        readable = re.sub(r"[^A-Za-z0-9._]+", "-", parent)[-80:].strip("-.")
        return self.directory / f"{readable}-{hashlib.sha256(parent.encode()).hexdigest()[:16]}"

    def path(self, file: CachedFile) -> Path:
        """Where a file is when it is in the cache."""
        name = PurePosixPath(file.url)
        return self.folder(file.url) / f"{name.stem}-{file.sha256[:_HASH_CHARACTERS]}{name.suffix}"

    def open_file(self, file: CachedFile) -> int:
        """A descriptor of a file, which is fetched when it is not in the cache. It stays valid if the file is removed.

        Raises:
            RemoteError: the file cannot be fetched, there is no space for it, or the cache cannot be used.
        """
        with self._errors():
            while (descriptor := self._open_cached(file)) is None:
                self._fetch_needed(file)
        self.mark(file)
        return descriptor

    def hold(self, file: CachedFile) -> int | None:
        """A descriptor of a file that keeps it in the cache until it is closed; None when it is not there.

        Raises:
            OSError: the cache cannot be used.
        """
        descriptor = self._open_cached(file)
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink == 0:  # removed between the two
                os.close(descriptor)
                return None
        return descriptor

    @contextlib.contextmanager
    def local(self, file: CachedFile) -> Iterator[Path]:
        """The path of a file, which is fetched when it is not in the cache and kept there during the block.

        Raises:
            RemoteError: as `open_file`.
        """
        with self._errors():
            while (descriptor := self.hold(file)) is None:
                self._fetch_needed(file)
        try:
            yield self.path(file)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def added(self, url: str) -> Iterator[tuple[Path, RemoteObject]]:
        """Fetch a file that is not indexed. Yields a path, which is valid during the block, and the file's version.

        The file is in the cache after the block. In the block no other process knows it, so none sets its time.

        Raises:
            RemoteError: it cannot be fetched, changes meanwhile, there is no space for it, or the cache cannot be used.
        """
        before = object_store.stat(url)
        with self._errors(), self._fetching(url, PurePosixPath(url).stem, before.size or 0) as lock:
            assert lock is not None
            sha256 = object_store.download(url, lock.part, before.size, None)
            if object_store.stat(url, again=True).version != before.version:
                raise RemoteError(f"{url} changed while it was read: run the same command when it is complete")
            yield lock.part, before
            self._place(lock.part, CachedFile(url, lock.part.stat().st_size, sha256))

    def fetch(self, file: CachedFile, *, remove_prefetched: bool) -> bool:
        """Fetch a file ahead. False, without waiting, when another process fetches it or there is no room.

        Args:
            remove_prefetched: make room also by removing prefetched files, first those that are needed last.

        Raises:
            UserError: the file cannot be fetched, or the cache cannot be used.
        """
        with self._errors():
            lock = self._lock(file)
            if not lock.acquire():
                return False
            try:
                if not (there := self.path(file).exists()) and self._make_room(remove_prefetched=remove_prefetched):
                    self._download(file, lock.part)
                    there = True
                return there
            finally:
                lock.release()

    def mark(self, file: CachedFile, place: int | None = None) -> bool:
        """Note that a file is used now, or with a place that it is prefetched. False when it is not in the cache.

        Args:
            place: in the order in which a run will need its prefetched tars. The note holds for half an hour.
        """
        path, at = self.path(file), time.time() + (0 if place is None else _PREFETCHED_S - place * _PLACE_S)
        with contextlib.suppress(OSError):  # only the owner of a file may set its time
            os.utime(path, (at, at))
        return os.path.exists(path)

    def _open_cached(self, file: CachedFile) -> int | None:
        path = self.path(file)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size == file.size:
            return descriptor
        os.close(descriptor)  # cut by somebody
        path.unlink(missing_ok=True)
        return None

    def _lock(self, file: CachedFile) -> _FetchLock:
        return _FetchLock(self.folder(file.url), self.path(file).stem, file.size)

    def _fetch_needed(self, file: CachedFile) -> None:
        """Fetch a file, or wait until another process has fetched it."""
        with self._fetching(file.url, self.path(file).stem, file.size, self.path(file)) as lock:
            if lock is not None:
                # The process that was waited for has tried long enough, if it was not killed.
                self._download(file, lock.part, object_store.RETRY_S / 4 if lock.waited else None)

    def _download(self, file: CachedFile, part: Path, retry_s: float | None = None) -> None:
        object_store.download(file.url, part, file.size, file.sha256, retry_s, file.purpose)
        self._place(part, file)

    @contextlib.contextmanager
    def _fetching(self, url: str, name: str, size: int, path: Path | None = None) -> Iterator[_FetchLock | None]:
        """The lock for fetching a file for which there is room; None when `path` is there, also after a wait.

        Raises:
            RemoteError: there is no room for it.
        """
        lock, deadline = _FetchLock(self.folder(url), name, size), time.monotonic() + ROOM_S
        while path is None or not path.exists():
            if not lock.acquire():
                deadline = time.monotonic() + ROOM_S
            else:
                try:
                    if (path is None or not path.exists()) and self._make_room(remove_prefetched=True):
                        yield lock
                        return
                finally:
                    lock.release()  # while it waits for room, the file takes none
                if time.monotonic() > deadline or size > self.limit:
                    raise self._too_small(url, size)
            time.sleep(_POLL_S)
        yield None

    def _place(self, part: Path, file: CachedFile) -> None:
        """Move a fetched file to its path, unless another process was faster, whose file may be held."""
        with disk_errors(part), open(part, "rb+") as fetched:
            os.fsync(fetched.fileno())
        with self._exclusively():
            if (descriptor := self._open_cached(file)) is None:
                os.replace(part, self.path(file))
            else:
                os.close(descriptor)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn an OSError into a RemoteError, which ends the run: a fault of the node is no bad sample."""
        try:
            yield
        except OSError as error:
            raise RemoteError(
                f"{self.directory} cannot be used ({error}), expected a cache that this process can read, write and "
                "lock: check its disk, its permissions and the limit on open files"
            ) from None

    # ---- space -----------------------------------------------------------------------------------------------

    def _too_small(self, url: str, size: int) -> RemoteError:
        used = sum(entry.size for entry in self._files())
        return RemoteError(
            f"{self.directory} is too small: {url} has {size:,} bytes, and {used:,} are in use; expected a cache of at "
            f"least {(used + size) / GB:.3g} GB: raise data.cache_gb or MEGACID_CACHE_GB, now {self.limit / GB:.3g}"
        )

    def _make_room(self, *, remove_prefetched: bool) -> bool:
        """Remove old files until those that are there or being fetched fit. False if too few may be removed."""
        with self._exclusively():
            being_fetched = self._being_fetched()  # first: a file that arrives now is counted twice rather than never
            files = sorted(self._files(), key=lambda entry: entry.used)
            over = sum(entry.size for entry in files) + being_fetched - self.limit
            newest = float("inf") if remove_prefetched else time.time()
            for entry in files:
                if over <= 0 or entry.used > newest:
                    break
                if _remove_unless_held(entry.path):
                    over -= entry.size
            return over <= 0

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        descriptor = _open_to_lock(self.directory / _MARKER)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _folders(self) -> Iterator[Path]:
        return (path for path in self.directory.iterdir() if path.is_dir())

    def _files(self) -> list[_Entry]:
        entries = []
        for path in (path for folder in self._folders() for path in folder.glob("[!.]*") if path.suffix in _ENDINGS):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                entries.append(_Entry(path, status.st_size, status.st_mtime))
        return entries

    def _being_fetched(self) -> int:
        """Bytes of the files that are being fetched; removes what killed processes left."""
        total = 0
        for path in (path for folder in self._folders() for path in folder.glob(".*.lock")):
            if (match := _LOCK_NAME.fullmatch(path.name)) is None:
                continue
            lock = _FetchLock(path.parent, match["name"], int(match["bytes"]))
            if lock.acquire():
                lock.release()
            else:
                total += int(match["bytes"])
        return total


@dataclass(frozen=True)
class _Entry:
    """A file in the cache; `used`: when it was used last, or will be."""

    path: Path
    size: int
    used: float


def _open_to_lock(path: Path) -> int:
    """A descriptor for an exclusive lock, for which NFS demands write access."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:  # a file of another user; local file systems lock it nevertheless
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _remove_unless_held(path: Path) -> bool:
    try:
        descriptor = _open_to_lock(path)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(descriptor)
    return True


class _FetchLock:
    """The right to fetch one file, and the file that it is fetched into. The name of the lock has the file's size."""

    def __init__(self, folder: Path, name: str, size: int) -> None:
        self.path, self.part = folder / f".{name}.{size}.lock", folder / f".{name}.{size}.part"
        self.waited = False
        self._descriptor = -1

    def acquire(self) -> bool:
        """Whether no other process has it. A file that a killed process left is taken over."""
        while True:
            with disk_errors(self.path):
                self.path.parent.mkdir(exist_ok=True)
                descriptor = open_owned(self.path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                self.waited = True
                return False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(descriptor)):
                    self._descriptor = descriptor
                    return True
            os.close(descriptor)  # its holder removed it between open and lock

    def release(self) -> None:
        self.part.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
