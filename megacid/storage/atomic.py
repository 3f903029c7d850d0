"""Atomic, durable writes of single files; tolerant JSON reads; file hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megacid.errors import UserError
from megacid.failpoints import failpoint

SETTINGS_BYTES = 1 << 24  # largest JSON file of a run's settings that is read
JSON_BYTES = 1 << 30  # of any: metadata may list every shard


def fsync_dir(path: Path) -> None:
    """Make renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block ends without an exception.

    The write is durable. A reader sees the old file or the complete new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several nodes may have the same number. The suffix stays, since numpy appends one to other names.
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}-{path.name}")
    if temporary.is_symlink():
        temporary.unlink()
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Replace a file by `data`, atomic and durable."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Replace a file by `obj` as indented JSON, atomic and durable."""
    write_atomic(path, (json.dumps(obj, indent=2) + "\n").encode())


def file_sha256(path: Path) -> str:
    """Hex sha256 of the whole file. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file; a pipe is empty. Raises OSError, and ValueError beyond `limit` bytes."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def open_owned(path: Path, flags: int = os.O_WRONLY | os.O_CREAT | os.O_APPEND) -> int:
    """A descriptor of a file that only this program writes. Raises OSError for a link, a pipe or a device."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(errno.EINVAL, f"{path.name} is a link or a pipe, remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is not a regular file, remove it")
    return descriptor


def read_json(path: Path) -> Any:
    """The JSON value of a file; None when it is missing, unreadable, not JSON or has more than 1 GiB."""
    try:
        return json.loads(read_bounded(path, JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, such as a full disk, into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error}): free space on that disk or correct its permissions, and run the same "
            "command again to continue"
        ) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`atomic_path` with `disk_errors`: yields the temporary name; no reading inside."""
    with disk_errors(path), atomic_path(path) as temporary:
        yield temporary
        failpoint("offline:file", path=path)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`, atomic and durable. Raises UserError when the disk is full."""
    with writing(path) as temporary:
        temporary.write_text(text)


def remove_temporary_files(out: Path) -> None:
    """Remove the temporary files that a killed run left in a stage directory and the folders in it."""
    for pattern in (".tmp-*", "*/.tmp-*"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)
