"""The bytes of a tar: reads at an offset, and the sha256 of the whole file without a second pass over it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

_WINDOW = 1 << 18  # bytes kept in memory, which are hashed while they are in the cache of a core


class TarBytes:
    """An open tar. A context manager.

    Attributes:
        size: bytes of the file when it was opened.
    """

    def __init__(self, path: Path, *, hashed: bool = False) -> None:
        """Open a tar. hashed: read all of it, for `sha256`; otherwise only what is asked for. Raises OSError."""
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._opened = os.fstat(self._file)
        self.size = self._opened.st_size
        self._digest = hashlib.sha256() if hashed else None
        self._window, self._start, self._stop = b"", 0, 0  # the bytes [start, stop) of the file; all before are hashed

    def __enter__(self) -> TarBytes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def read(self, at: int, size: int) -> bytes:
        """The bytes [at, at + size), fewer at the end of the file. Raises OSError."""
        while at >= self._stop and self._advance():
            pass
        begin = at - self._start
        if begin >= 0 and at + size <= self._stop:
            return self._window[begin : begin + size]
        return os.pread(self._file, size, at)

    def sha256(self) -> str | None:
        """Hex sha256 of the whole file; None when it was written to since it was opened. Raises OSError."""
        assert self._digest is not None
        while self._advance():
            pass
        now = os.fstat(self._file)
        unchanged = self._stop == self.size == now.st_size and self._opened.st_mtime_ns == now.st_mtime_ns
        return self._digest.hexdigest() if unchanged else None

    def _advance(self) -> bool:
        """Read and hash the next window. Returns False at the end of the file, or when nothing is hashed."""
        if self._digest is None or not (window := os.pread(self._file, _WINDOW, self._stop)):
            return False
        self._digest.update(window)
        self._window, self._start, self._stop = window, self._stop, self._stop + len(window)
        return True
