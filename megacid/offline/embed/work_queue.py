"""Static or work-stealing assignment of shards to ranks, using POSIX record locks.

A queue file in the output folder records progress: one byte per shard (1 when it is done), then one int64 per rank, the
samples that the rank has embedded. With dynamic sharding a rank claims a shard with a record lock on the shard's byte.
The kernel (on a network file system, its lock service) releases the locks of a process when that process ends for any
reason, so other ranks can take its shard over; no server and no clock is needed. A claim only avoids duplicate work: a
partition is written atomically and has the same bits whichever rank writes it. Two ranks that embed the same shard,
because a file system keeps its locks to one host, lose time and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist

from megacid.distributed.consensus import gather_json
from megacid.distributed.parallel import Parallel
from megacid.storage.atomic import disk_errors

Sharding = Literal["dynamic", "static"]
_PUBLISH_EVERY_S = 1.0
_COUNT = np.dtype("<i8")


def create_queue(path: Path, done: np.ndarray, world: int) -> None:
    """Write the queue file on one rank, before any rank opens it.

    Args:
        done: bool [shards], the shards that need no work.

    Raises:
        UserError: The disk is full or not writable.
    """
    marks = done.astype(np.uint8).tobytes()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a rank of a killed run may still have the old file open
        path.write_bytes(marks + bytes(_COUNT.itemsize * world))


class WorkQueue:
    """An open queue file, used as a context manager; leaving the block releases every claim.

    POSIX locks belong to a process: a process may have one queue of a path open at a time.

    Attributes:
        sharding: "dynamic" or "static"; may be changed before the first claim. One rank alone is always static.
        samples_done: Samples that this rank has finished.
    """

    def __init__(self, path: Path, shards: int, parallel: Parallel, sharding: Sharding) -> None:
        self.path, self.shards = path, shards
        self.sharding: Sharding = sharding if parallel.world > 1 else "static"
        self.rank, self.world = parallel.rank, parallel.world
        self._file = os.open(path, os.O_RDWR)
        self.samples_done = 0
        self._others, self._total, self._published = 0, 0, 0.0

    def __enter__(self) -> WorkQueue:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def claim(self) -> Iterator[int]:
        """Claim shards one at a time: first this rank's own (rank, rank + world, ...), then, with dynamic sharding,
        those of other ranks from the end. Ends when no unclaimed shard is left; some may not be finished yet."""
        own = list(range(self.rank, self.shards, self.world))
        others = [shard for shard in reversed(range(self.shards)) if shard % self.world != self.rank]
        for shard in own + (others if self.sharding == "dynamic" else []):
            if not self._done(shard) and (self.sharding == "static" or self._claim(shard)):
                yield shard

    def finish(self, shard: int) -> None:
        """Mark a shard as done, once its files are on disk, and release the claim."""
        with disk_errors(self.path):
            os.pwrite(self._file, b"\1", shard)
        if self.sharding == "dynamic":
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, shard)

    def finished(self) -> bool:
        """Whether all shards are done, or with static sharding all shards of this rank."""
        marks = np.frombuffer(os.pread(self._file, self.shards, 0), np.uint8)
        return bool(marks.all() if self.sharding == "dynamic" else marks[self.rank :: self.world].all())

    def note_progress(self, samples: int) -> int:
        """Count samples of this rank; returns how many more all ranks together have done since the last call."""
        self.samples_done += samples
        if self.world > 1 and time.monotonic() - self._published > _PUBLISH_EVERY_S:
            self._published = time.monotonic()
            at = self.shards + _COUNT.itemsize * self.rank
            with disk_errors(self.path):
                os.pwrite(self._file, np.array(self.samples_done, _COUNT).tobytes(), at)
            counts = np.frombuffer(os.pread(self._file, _COUNT.itemsize * self.world, self.shards), _COUNT)
            self._others = int(counts.sum() - counts[self.rank])
        return self.note_total(self.samples_done + self._others)

    def note_total(self, samples: int) -> int:
        """Set the samples that all ranks together have done; returns the increase."""
        increase, self._total = samples - self._total, samples
        return increase

    def locks_are_shared(self, group: dist.ProcessGroup | None) -> bool:
        """Whether a lock held by rank 0 excludes every other rank. A collective, called before the first claim."""
        unused = self.shards + _COUNT.itemsize * self.world
        works = self._try_lock(unused) if self.rank == 0 else True
        gather_json(None, group)
        if self.rank != 0:
            works = self._try_lock(unused) is False
        shared = all(gather_json(works, group))
        if self.rank == 0 and works:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, unused)
        return shared

    def _try_lock(self, at: int) -> bool | None:
        """Whether the lock was acquired; None when the file system has no locks."""
        try:
            return _lock(self._file, at)
        except OSError:
            return None

    def _done(self, shard: int) -> bool:
        return os.pread(self._file, 1, shard) == b"\1"

    def _claim(self, shard: int) -> bool:
        if not _lock(self._file, shard):
            return False
        if not self._done(shard):  # read again: the value read before the lock may be stale
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, shard)
        return False


def _lock(file: int, at: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
