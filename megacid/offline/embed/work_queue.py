"""Which rank does which piece of work: a fixed share, or whatever is left when it gets there.

A ledger in the output folder says what is done: one byte per piece, then for every rank the samples it has done so far.
To steal, a rank claims a piece with a POSIX record lock on its byte. The kernel (on a network file system, its lock
service) takes the lock away from a process that ends, however it ends, so that the others take its piece over; no server
and no clock is needed. A claim only saves work: a partition appears whole and with the same bits whoever makes it, so two
ranks that do the same one, because a file system keeps its locks to one host, lose time and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch.distributed as dist

from megacid.distributed.consensus import gather_json
from megacid.distributed.parallel import Parallel
from megacid.storage.stage_files import disk_errors

Split = Literal["steal", "static"]
_TELL_EVERY_S = 1.0
_COUNT = np.dtype("<i8")


def create_ledger(path: Path, done: np.ndarray, world: int) -> None:
    """Write the ledger of `done` (bool [pieces]). One rank, before the others open it. UserError for a full disk."""
    marks = done.astype(np.uint8).tobytes()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a rank of a run that was killed may still have the old one open
        path.write_bytes(marks + bytes(_COUNT.itemsize * world))


class Ledger:
    """An open ledger. `with Ledger(...) as ledger:`; leaving the block gives up every claim.

    Locks belong to a process: one ledger of a path at a time in each.
    """

    def __init__(self, path: Path, pieces: int, parallel: Parallel, split: Split) -> None:
        self.path, self.pieces = path, pieces
        # Alone no locks are needed. May be changed as long as nothing has been taken.
        self.split: Split = split if parallel.world > 1 else "static"
        self.rank, self.world = parallel.rank, parallel.world
        self._file = os.open(path, os.O_RDWR)
        self.mine = 0  # samples that this rank has done
        self._others, self._known, self._told = 0, 0, 0.0

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def take(self) -> Iterator[int]:
        """Claim pieces, one each time: first those of the own share (rank, rank + world, ...), then, to steal, others'
        from the end. Ends when none is left that nobody has claimed; some may still be under way (`finished`)."""
        own = list(range(self.rank, self.pieces, self.world))
        others = [piece for piece in reversed(range(self.pieces)) if piece % self.world != self.rank]
        for piece in own + (others if self.split == "steal" else []):
            if not self._done(piece) and (self.split == "static" or self._claim(piece)):
                yield piece

    def finish(self, piece: int) -> None:
        """The piece is on disk."""
        with disk_errors(self.path):
            os.pwrite(self._file, b"\1", piece)
        if self.split == "steal":
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, piece)

    def finished(self) -> bool:
        """Whether nothing is left for this rank: all pieces are done, or (static) those of its share."""
        marks = np.frombuffer(os.pread(self._file, self.pieces, 0), np.uint8)
        return bool(marks.all() if self.split == "steal" else marks[self.rank :: self.world].all())

    def advance(self, samples: int) -> int:
        """Count samples of this rank; returns how many more than last time all ranks together are known to have done."""
        self.mine += samples
        if self.world > 1 and time.monotonic() - self._told > _TELL_EVERY_S:
            self._told = time.monotonic()
            with disk_errors(self.path):
                os.pwrite(self._file, np.array(self.mine, _COUNT).tobytes(), self.pieces + _COUNT.itemsize * self.rank)
            counts = np.frombuffer(os.pread(self._file, _COUNT.itemsize * self.world, self.pieces), _COUNT)
            self._others = int(counts.sum() - counts[self.rank])
        return self.learn(self.mine + self._others)

    def learn(self, samples: int) -> int:
        """All ranks together have done so many samples; returns how many more than was known."""
        more, self._known = samples - self._known, samples
        return more

    def locks_are_shared(self, group: dist.ProcessGroup | None) -> bool:
        """Whether a lock of one rank keeps the others out, on every rank. A collective; before anything is taken."""
        beyond = self.pieces + _COUNT.itemsize * self.world
        held = self._supported(beyond) if self.rank == 0 else True
        gather_json(None, group)
        if self.rank != 0:
            held = self._supported(beyond) is False
        shared = all(gather_json(held, group))
        if self.rank == 0 and held:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, beyond)
        return shared

    def _supported(self, piece: int) -> bool | None:
        """Whether the lock was to be had; None when the file system has no locks."""
        try:
            return _lock(self._file, piece)
        except OSError:
            return None

    def _done(self, piece: int) -> bool:
        return os.pread(self._file, 1, piece) == b"\1"

    def _claim(self, piece: int) -> bool:
        if not _lock(self._file, piece):
            return False
        if not self._done(piece):  # read again: what it said before the lock may be old
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, piece)
        return False


def _lock(file: int, at: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
