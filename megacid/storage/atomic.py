"""Atomic, durable writes of single files; tolerant JSON reads; file hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megacid.errors import UserError
from megacid.failpoints import failpoint


def fsync_dir(path: Path) -> None:
    """Make renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what was written there replaces `path` when the block ends well.

    The temporary file is removed when the block raises. A reader sees the old file or the whole new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending is kept: numpy appends one to names it does not know.
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json_atomic(path: str | Path, obj: Any) -> None:
    write_atomic(path, (json.dumps(obj, indent=2) + "\n").encode())


def file_sha256(path: Path) -> str:
    """Of the whole file, as hex. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """An OSError of the block becomes a UserError that names `path`: the disk is full, or may not be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error}): free space on that disk or correct its permissions, and run the same "
            "command again; what was complete is kept"
        ) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`atomic_path` with `disk_errors`: yields the temporary name; no reading inside."""
    with disk_errors(path), atomic_path(path) as temporary:
        yield temporary
        failpoint("offline:file", path=path)


def write_text(path: Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text)


def remove_temporary_files(out: Path) -> None:
    """Remove the temporary files that a killed run left in a stage directory and the folders in it."""
    for pattern in (".tmp-*", "*/.tmp-*"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)
