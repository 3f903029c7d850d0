"""Paths of files that a stage has written, on a disk or in an object store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megacid.errors import UserError
from megacid.storage import object_store
from megacid.storage.atomic import JSON_BYTES

STAGES = object_store.Purpose(
    "read",
    "put back the file that its stage has written, or run the stage again",
    "free space on the disk of the cache, or lower data.cache_gb",
)


@dataclass(frozen=True)
class RemotePath:
    """A file or a folder of an object store, with the operations of pathlib.Path that readers of stages need."""

    url: str

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    def read(self, remedy: str, limit: int = JSON_BYTES) -> bytes:
        """The content of a file. UserError when it is missing, which ends with `remedy`, or cannot be read."""
        data = object_store.read(self.url, limit, STAGES)
        if data is None:
            raise UserError(f"{self} does not exist in its store, expected a file of a finished stage: {remedy}")
        return data


AnyPath = Path | RemotePath


def any_path(text: str | AnyPath) -> AnyPath:
    """The path that a setting names: of an object store if it is the URL of one."""
    if isinstance(text, str) and object_store.is_url(text) and not os.path.exists(text):
        return RemotePath(text)
    return text if isinstance(text, RemotePath) else Path(text)
