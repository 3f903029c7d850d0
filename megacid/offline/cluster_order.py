"""Embeddings on disk in the order of their clusters, so that the rows of a cluster are read in one piece.

An embedding folder is in the order of its tars, and the rows of a cluster lie all over it. When the machine's memory
cannot hold the folder, every one of them is a random read of the disk. An external sort avoids this: a copy of all rows
is made once, with sequential reads and large writes, and everything that works by cluster then reads the copy.

    cluster-order.json             the arguments of the copy and the sha256 of the places
    cluster-order-place.npy        int [n]: the place of every row in the copy
    cluster-order-00000.part       rows of the first file, unsorted, then the place of each in it (int32)
    cluster-order-read-00000.json  the first block of rows is in the .part files
    cluster-order-00000.npy        the first file of the copy, sorted; replaces its .part

First each block of consecutive rows is read and its rows are appended to the .part files of their places. Where a block
begins in each .part follows from the places, so a repeated block writes the same bytes. Then each .part is sorted in
memory. Ranks divide blocks and files. A file has as many rows as half of the memory bound holds, however large the
clusters are. The copy does not depend on the number of ranks, and its rows have the bits of the originals.

Legend: n rows, D width, S rows of a file, B rows of a block.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacid.distributed.collectives import rank, world_size
from megacid.distributed.consensus import broadcast_json
from megacid.distributed.stopping import Group, Progress, stop_together
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.cluster.cells import group_by_label
from megacid.offline.row_files import RowFiles
from megacid.offline.row_numbers import row_dtype
from megacid.offline.rows import Rows
from megacid.storage.atomic import disk_errors, writing
from megacid.storage.npy import write_npy
from megacid.storage.stage_directory import PartialResults

log = logging.getLogger(__name__)
Places = Callable[[], Iterable[np.ndarray]]  # makes the place of every row, int, in consecutive blocks
_NAME = "cluster-order"
_CACHED_SHARE = 0.5  # of the machine's memory, in which the page cache holds a folder while ranks work
_GAP_BYTES = 1 << 17  # from a disk these take about as long as another read
_MOST_ROWS = 2**31 - 1  # of a file
_SORT_BYTES = 40  # per row on top of its values: places and sorted numbers
_PIECE_ROWS = 4096  # read at once, or gathered for writing
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return memory


class OrderedRows:
    """Rows with the numbers of an original, read from a copy in another order."""

    def __init__(self, original: Rows, copy: RowFiles, place: np.ndarray) -> None:
        """place: int [n], the row of the copy for each row of the original."""
        self.original, self.copy, self.place = original, copy, place
        self.num_rows, self.dim = original.num_rows, original.dim

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.original.read(start, stop)

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.copy.take(self.place[rows].astype(np.int64))

    def name(self, row: int) -> str:
        return self.original.name(row)


def in_cluster_order(
    rows: Rows, places: Places, partial: PartialResults, group: Group, memory_gb: float, progress: Progress
) -> Rows:
    """The same rows, with the same numbers, whose `take` is fast for rows of one cluster. A collective.

    The rows themselves when they have at most half the bytes of the machine's memory: the page cache holds them after a
    first read. Otherwise a copy is made in `partial`, or an interrupted one is continued.

    Args:
        places: The order of the copy, a permutation of 0 ... n - 1; must yield the same when it is called again.
        memory_gb: Bound of the memory of a rank for the copy.
        progress: Called with 0.

    Raises:
        UserError: The disk has too little space, or a row cannot be read.
    """
    file_rows = None
    with stop_together(group):
        dtype = rows.take(np.empty(0, np.int64)).dtype
        row_bytes = rows.dim * dtype.itemsize
        if rank(group) == 0 and rows.num_rows * row_bytes > _CACHED_SHARE * machine_memory():
            most = max(int(memory_gb * 1e9 / 2) // (row_bytes + _SORT_BYTES), 1)
            copy = _Copy(rows, dtype, partial, min(most, rows.num_rows, _MOST_ROWS))
            file_rows = _begin(copy, places, world_size(group)).file_rows
    file_rows = broadcast_json(file_rows, group)
    if file_rows is None:
        return rows
    copy = _Copy(rows, dtype, partial, file_rows)
    with stop_together(group):
        copy.distribute(range(rank(group), copy.files, world_size(group)), progress)
    with stop_together(group):
        for file in range(rank(group), copy.files, world_size(group)):
            copy.sort(file)
            progress(0)
    with stop_together(group):
        return copy.ordered()


@dataclass(frozen=True)
class _Copy:
    """A copy of some rows in progress. file_rows: S, also the rows of a block."""

    rows: Rows
    dtype: np.dtype
    partial: PartialResults
    file_rows: int

    @property
    def files(self) -> int:
        return -(-self.rows.num_rows // self.file_rows)

    @property
    def row_bytes(self) -> int:
        return self.rows.dim * self.dtype.itemsize

    def span(self, file: int) -> tuple[int, int]:
        """[start, stop): the places in a file, or the rows of a block."""
        return file * self.file_rows, min((file + 1) * self.file_rows, self.rows.num_rows)

    def part(self, file: int) -> Path:
        return self.partial.folder / f"{_NAME}-{file:05d}.part"

    def array(self, file: int) -> np.ndarray | None:
        """A file of the copy; None when it is missing or damaged."""
        start, stop = self.span(file)
        array = self.partial.array(f"{_NAME}-{file:05d}", (stop - start, self.rows.dim), "f")
        return array if array is not None and array.dtype == self.dtype else None

    def place(self) -> np.ndarray | None:
        """int [n], the place of every row."""
        return self.partial.array(f"{_NAME}-place", (self.rows.num_rows,), "i")

    def distribute(self, blocks: Iterable[int], progress: Progress) -> None:
        """Write the rows of some blocks, and their places, into the .part files."""
        missing = [block for block in blocks if self.partial.json(f"{_NAME}-read-{block:05d}") is None]
        place = self.place()
        assert place is not None
        begins = self._begins(place) if missing else np.empty((0, 0), np.int64)
        for block in missing:
            self._distribute(block, np.asarray(place[slice(*self.span(block))], np.int64), begins[block], progress)
            self.partial.save_json(f"{_NAME}-read-{block:05d}", {})
            failpoint("cluster_order:block", step=block)

    def _distribute(self, block: int, place_B: np.ndarray, begins: np.ndarray, progress: Progress) -> None:
        start, stop = self.span(block)
        x_BD = np.empty((stop - start, self.rows.dim), self.dtype)
        for low in range(0, stop - start, _PIECE_ROWS):
            progress(0)
            x_BD[low : low + _PIECE_ROWS] = self.rows.read(start + low, min(start + low + _PIECE_ROWS, stop))
        order, bounds = group_by_label(place_B // self.file_rows, self.files)
        with disk_errors(self.partial.folder):
            for file in range(self.files):
                progress(0)
                which = order[bounds[file] : bounds[file + 1]]
                self._write(file, int(begins[file]), x_BD[which], place_B[which] - file * self.file_rows)
            for file in range(self.files):  # the disk is at work since the first one was written
                with _opened(self.part(file)) as descriptor:
                    os.fsync(descriptor)

    def _begins(self, place: np.ndarray) -> np.ndarray:
        """Row of each .part where the rows of each block begin, int64 [blocks, files]."""
        counts = np.stack(
            [
                np.bincount(place[slice(*self.span(block))] // self.file_rows, minlength=self.files)
                for block in range(self.files)
            ]
        )
        return np.cumsum(counts, axis=0) - counts

    def _write(self, file: int, begin: int, x_BD: np.ndarray, place_B: np.ndarray) -> None:
        start, stop = self.span(file)
        with _opened(self.part(file)) as descriptor:
            _write_all(descriptor, x_BD, begin * self.row_bytes)
            _write_all(descriptor, place_B.astype(np.int32), (stop - start) * self.row_bytes + 4 * begin)

    def sort(self, file: int) -> None:
        """Replace a .part file, to which all blocks were written, by the file of the copy."""
        start, stop = self.span(file)
        if self.array(file) is None:
            path, count = self.part(file), stop - start
            values = np.fromfile(path, self.dtype, count * self.rows.dim)
            place_S = np.fromfile(path, np.int32, count, offset=count * self.row_bytes)
            order = np.argsort(place_S)
            if len(values) != count * self.rows.dim or not np.array_equal(place_S[order], np.arange(count)):
                raise UserError(
                    f"{path} is damaged: delete {self.partial.folder / f'{_NAME}.json'} and run the same command again"
                )
            x_SD = values.reshape(-1, self.rows.dim)
            gathered = (x_SD[order[low : low + _PIECE_ROWS]] for low in range(0, count, _PIECE_ROWS))
            with (
                writing(self.partial.folder / f"{_NAME}-{file:05d}.npy") as temporary,
                open(temporary, "wb") as npy,
            ):
                write_npy(npy, self.dtype, (count, self.rows.dim), gathered)
            failpoint("cluster_order:file", step=file)
        self.part(file).unlink(missing_ok=True)

    def ordered(self) -> OrderedRows:
        """The rows, read from the complete copy."""
        arrays, place = [self.array(file) for file in range(self.files)], self.place()
        missing = [self.part(file).with_suffix(".npy") for file, array in enumerate(arrays) if array is None]
        if missing or place is None:
            raise RuntimeError(f"{missing[0] if missing else f'{_NAME}-place.npy'} is missing in {self.partial.folder}")
        rows_of, offsets = zip(*((len(array), array.offset) for array in arrays if isinstance(array, np.memmap)))
        copy = RowFiles(
            [str(self.part(file).with_suffix(".npy")) for file in range(self.files)],
            rows_of,
            offsets,
            [self.dtype] * self.files,
            self.rows.dim,
            "delete it and run the same command again",
            _GAP_BYTES,
        )
        return OrderedRows(self.rows, copy, place)


def _begin(copy: _Copy, places: Places, world: int) -> _Copy:
    """Continue the copy that an interrupted run has left, or start `copy`; for one rank. Returns the one to make."""
    n, folder = copy.rows.num_rows, copy.partial.folder
    dtype = row_dtype(n)
    digest = hashlib.sha256()
    for block in places():
        digest.update(np.ascontiguousarray(block, dtype).data)
    record = {"rows": n, "dim": copy.rows.dim, "dtype": copy.dtype.str, "places_sha256": digest.hexdigest()}
    before = copy.partial.json(_NAME)
    if isinstance(before, dict) and all(before.get(name) == value for name, value in record.items()):
        earlier = _Copy(copy.rows, copy.dtype, copy.partial, int(before["file_rows"]))
        sorted_files = [earlier.array(file) is not None for file in range(earlier.files)]
        whole = all(done or earlier.part(file).exists() for file, done in enumerate(sorted_files))
        # Files of a larger memory bound are only read when they are complete.
        if whole and earlier.place() is not None and (all(sorted_files) or earlier.file_rows <= copy.file_rows):
            if not all(sorted_files):
                _check_space(earlier, dtype, world)
            return earlier
    for path in folder.glob(f"{_NAME}*"):
        path.unlink()
    _check_space(copy, dtype, world)
    with writing(folder / f"{_NAME}-place.npy") as temporary, open(temporary, "wb") as npy:
        write_npy(npy, dtype, (n,), places())
    with disk_errors(folder):
        for file in range(copy.files):
            start, stop = copy.span(file)
            with open(copy.part(file), "wb") as part:
                part.truncate((stop - start) * (copy.row_bytes + 4))
    copy.partial.save_json(_NAME, record | {"file_rows": copy.file_rows})
    return copy


def _check_space(copy: _Copy, place_dtype: np.dtype, world: int) -> None:
    """UserError when the disk cannot hold the copy and the files that are sorted at the same time."""
    n, folder = copy.rows.num_rows, copy.partial.folder
    need = n * (copy.row_bytes + 4 + place_dtype.itemsize) + min(world, copy.files) * copy.file_rows * copy.row_bytes
    written = sum(path.stat().st_blocks * 512 for path in folder.glob(f"{_NAME}*"))
    free = shutil.disk_usage(folder).free
    if need - written > free:
        raise UserError(
            f"{folder} needs {(need - written) / 1e9:.2f} GB for a copy of the embeddings in the order of their "
            f"clusters, the disk has {free / 1e9:.2f} GB free: free space or take another --out"
        )
    log.info(
        "the embeddings are larger than half of the memory of %.1f GB: copying them in the order of their clusters, "
        "%.2f GB on the disk of %s",
        *(machine_memory() / 1e9, need / 1e9, folder),
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor for writing. Write-only: a client of a network file system then sends just the bytes written."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, array: np.ndarray, at: int) -> None:
    view = array.reshape(-1).view(np.uint8).data
    while len(view):
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count
