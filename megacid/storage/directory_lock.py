"""An exclusive lock on an output directory, held by one process and released by the kernel when it ends.

The lock is a POSIX record lock: unlike `flock`, forked data workers do not inherit it, so it ends with its holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import weakref
from pathlib import Path

from megacid.errors import UserError, printable
from megacid.storage.atomic import open_owned

log = logging.getLogger(__name__)
_HOLDER = b"process"


class DirectoryLock:
    """An exclusive lock between processes, in a hidden file that is removed on release and at the process's exit."""

    def __init__(self, path: Path, subject: str, remedy: str) -> None:
        """
        Args:
            path: The lock file. A killed process leaves it behind, unlocked.
            subject: What is locked, for the message.
            remedy: What to do instead of waiting, for the message.

        Raises:
            UserError: another process holds the lock, which the message names; or the file is something else.
            OSError: the file cannot be created, or is a link or a pipe.
        """
        while True:
            file = open_owned(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = printable(os.pread(file, 200, 0).decode(errors="replace").strip()) or "another process"
                os.close(file)
                raise UserError(f"{subject} is in use by {holder}: wait for it, or {remedy}") from None
            except OSError as error:  # a file system without locks
                log.warning("%s cannot be locked (%s): do not start a second process on it", subject, error.strerror)
            if _is_same_file(path, file):
                break
            os.close(file)  # its holder removed it between open and lock
        if os.pread(file, len(_HOLDER), 0) not in (b"", _HOLDER):  # a hard link to a file of something else
            os.close(file)
            raise UserError(f"{path} was not written by a run: remove it")
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the name of its holder
            os.ftruncate(file, 0)
            os.pwrite(file, _HOLDER + f" {os.getpid()} on {socket.gethostname()}".encode(), 0)
        # Also called at the exit of the process and when the lock is garbage.
        self.release = weakref.finalize(self, _release, path, file, os.getpid())


def _is_same_file(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except FileNotFoundError:
        return False


def _release(path: Path, file: int, pid: int) -> None:
    if os.getpid() != pid:  # a forked process has a copy of the object, but not the lock
        return
    if _is_same_file(path, file):
        path.unlink(missing_ok=True)
    os.close(file)
