"""Reads the samples of a tar from a command, through webdataset."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from megacid.data.pipes.commands import PipedTar
from megacid.data.tar_samples import known_format
from megacid.errors import one_line

_BLOCK = 512
_CHUNK = 1 << 16
_EXIT_S = 5.0  # from the end of a command's output to its exit
_SIGPIPE = 141  # a shell's exit code when its output is closed early


class TarFailed(Exception):  # noqa: N818  a fault of the data that the reader handles and counts
    """A tar that cannot be read to its end; the message names it and the reason."""


class _Output:
    """The output of a command: keeps its beginning and its last bytes, which tell a whole tar from a cut one."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.head, self._tail = b"", b""
        self.ended = False

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.stream.read(size)
        self.ended = len(data) < size
        if not self.head:
            self.head = data[:_BLOCK]
        self._tail = (self._tail + data)[-_BLOCK:]
        return data

    def check_end(self) -> None:
        """Read to the end. ValueError unless the archive has its end mark and nothing behind it."""
        while not self.ended:
            if self.read(_CHUNK).strip(b"\0"):
                raise ValueError("data behind the end-of-archive mark")
        if self._tail.strip(b"\0") or len(self._tail) < _BLOCK:
            raise ValueError("no end-of-archive mark: it was cut")


def read_samples(tar: PipedTar, select: Callable[[str], bool], left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """The samples of a tar as webdataset groups them: `__key__`, and the content of the members by their endings.

    Args:
        select: whether a member of that name is read.
        left_out: counts the members that repeat the name of another one of their sample.

    Raises:
        TarFailed: the command cannot be started or failed, or its output is no whole tar.
    """

    def leave_out(error: Exception) -> bool:  # the only error of `group_by_keys`
        left_out["member of a repeated name"] += 1
        return True

    try:
        stream = gopen(tar.url)
    except Exception as error:
        raise TarFailed(f"{tar}: its command cannot be started ({one_line(error)})") from None
    output = _Output(stream)
    try:
        files = tar_file_expander([{"url": str(tar), "stream": output}], select_files=select)
        yield from group_by_keys(files, handler=leave_out)
        output.check_end()
        if (code := _exit_code(stream)) is not None:
            raise TarFailed(f"{tar}: its command ended with exit code {code}")
    except TarFailed:
        raise
    except Exception as error:  # tarfile raises its own errors, and those of the numbers in a damaged header
        raise TarFailed(f"{tar}: {_reason(output, stream, error)}") from None
    finally:
        _stop(stream)


def _reason(output: _Output, stream: Any, error: Exception) -> str:
    """Why a tar cannot be read: the command's exit code says more than the end of its output."""
    if output.ended and (code := _exit_code(stream)) is not None:
        return f"its command ended with exit code {code}"
    if not output.head:
        return "its command has written nothing"
    if (known := known_format(output.head)) is not None:
        return f"its command writes {known[0]} data, expected a tar that is not compressed: {known[1]}"
    # webdataset appends the objects that it has read from.
    text = str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__
    return f"its command writes no whole tar ({text})"


def _exit_code(stream: Any) -> int | None:
    """The exit code of a command whose output has ended; None if it succeeded, or does not end soon."""
    with contextlib.suppress(Exception):
        code: int = stream.proc.wait(_EXIT_S)
        return code if code not in (0, _SIGPIPE) else None
    return None


def _stop(stream: Any) -> None:
    """End a command that is still running, and close its output."""
    with contextlib.suppress(Exception):
        if stream.proc.poll() is None:
            stream.proc.kill()
        stream.close()  # raises for an exit code, which `_exit_code` has judged
