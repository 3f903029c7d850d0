"""The joined table: all that the loader needs to read a sample, in one row of fixed width.

It joins the index with the teachers' embeddings, the labels and the keep masks by key, once and ahead of training
(`joined_build.py`). It has a row for every usable sample: kept, with a caption, with an embedding of every teacher.
Reading a sample needs no JSON, no parquet and no key. Layout:

    shards/index/joined-<digest>/made_from.json    what the digest is of
    shards/index/joined-<digest>/rows-00000.npy    the rows of tars 0 to 15, in tar order
    shards/index/joined-<digest>/tars-00000.npy    one entry for each of these tars; completes rows-00000.npy
    shards/index/joined-<digest>/tars.npy          the entries of all tars; completes the folder

The digest is over the content of the tars and the meta.json of every stage, so a table never applies to other tars or
to another run of a stage. Every row and entry has a check value that depends on the digest and its place.

Shapes: m requested rows, K teachers, d width of a teacher, l labels per sample.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megacid.data import index_files
from megacid.data.ensemble import TeacherEnsemble, normalized_concatenation
from megacid.data.index import ShardIndex
from megacid.data.lru import LRUCache, open_file_budget
from megacid.data.order import splitmix64
from megacid.data.remote.cache import CachedFile, ShardCache
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import IMAGE, TEXT, TeacherTable
from megacid.errors import UserError
from megacid.storage.remote_path import AnyPath

VERSION = 2
PART = 16  # tars per file of rows
# Of a file of embeddings: first byte of the data, size, type of the elements, and what is known of the sha256.
_FILE = np.dtype([("start", "<i8"), ("bytes", "<i8"), ("dtype", "S4"), ("sha256", "S64")])


@dataclass(frozen=True)
class JoinSources:
    """What is joined. None for a side table that is not used."""

    index: ShardIndex
    teacher: TeacherTable | TeacherEnsemble | None = None
    labels: LabelTable | None = None
    keep: KeepTable | None = None

    @property
    def teachers(self) -> tuple[TeacherTable, ...]:
        return () if self.teacher is None else self.teacher.tables

    @property
    def cache(self) -> ShardCache | None:
        """Of the files that are in an object store; None: all are on a disk. All sources of a run have the same."""
        caches = [self.index.paths.cache, *(table.cache for table in self.teachers)]
        return next((cache for cache in caches if cache is not None), None)

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """All that decides the content of the table."""
        # A sample that has a class stays in the index with or without its blank caption.
        tars = [[entry["sha256"], entry["blank_kept"] and entry["blank"] > 0] for entry in self.index.shards]
        return {
            "version": [VERSION, index_files.VERSION],
            "shards": self.index.digest,
            "tars": _identity(tars),
            "caption": self.index.caption.spec,
            "teachers": [_identity(table.meta) for table in self.teachers],
            "labels": None if self.labels is None else _identity(self.labels.meta),
            "keep": None if self.keep is None else _identity(self.keep.meta),
        }

    @cached_property
    def digest(self) -> str:
        return _identity(self.made_from)

    @property
    def parts(self) -> int:
        """Number of files of rows."""
        return -(-len(self.index.names) // PART)

    @cached_property
    def row_dtype(self) -> np.dtype:
        count, several = len(self.teachers), self.index.caption.several
        views = self.teacher.views if self.teacher else None
        return np.dtype(
            [
                ("row", "<i4"),  # in the tar
                ("image", "<i8", (2,)),  # offset and size of the member
                ("text", "<i8", (2,)),
                ("labels", "<i4", (self.labels.stored if self.labels else 0,)),  # nearest first, -1 for none
                ("teacher", "<i4", (count,)),  # row in the partition of each teacher
                ("caption", "<i8", (count * several,)),  # row of the first of several captions in each teacher's texts
                ("captions", "<i4", (count * several,)),  # number of captions that each teacher embedded
                ("seeds", "<u8", (views.count if views else 0,)),  # `Views.seed_of` of every view
                ("check", "<u4"),
            ]
        )

    @cached_property
    def tar_dtype(self) -> np.dtype:
        return np.dtype(
            [
                ("usable", "<i8"),  # rows
                ("lacking", "<i8"),  # samples that only lack an embedding
                ("files", _FILE, (len(self.teachers), 2)),  # image and text embeddings of each teacher
                ("check", "<u4"),
            ]
        )

    @property
    def command(self) -> str:
        """The command that makes the table ahead of training."""
        paths = self.index.paths
        words = [str(paths.directory or paths.source), "--join"]
        words += ["--caption", self.index.caption.spec] if self.index.caption.setting else []
        words += ["--teacher", *(str(table.directory) for table in self.teachers)] if self.teachers else []
        words += ["--labels", str(self.labels.directory)] if self.labels else []
        words += ["--keep", str(self.keep.directory)] if self.keep else []
        return f"{paths.tool} {shlex.join(words)}"

    def checks(self, rows: np.ndarray, shard: np.ndarray | int, number: np.ndarray | int = -1) -> np.ndarray:
        """uint32 [m]: the check values of rows; number: of each among the usable rows of its tar. Or of entries."""
        words = np.ascontiguousarray(rows).view(np.uint32).reshape(len(rows), rows.itemsize // 4)[:, :-1]
        odd = splitmix64(np.arange(words.shape[1], dtype=np.uint64)) | np.uint64(1)
        place = (np.atleast_1d(shard).astype(np.int64) << 32) + number
        seed = splitmix64(place.astype(np.uint64) ^ np.uint64(int(self.digest[:16], 16)))
        total = splitmix64((words * odd).sum(axis=1, dtype=np.uint64) ^ seed)
        return (total >> np.uint64(32)).astype(np.uint32)


def _identity(facts: dict[str, Any] | list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def rows_path(folder: Path, part: int) -> Path:
    return folder / f"rows-{part:05d}.npy"


def header_of(dtype: np.dtype, rows: int) -> bytes:
    """The bytes before the rows of a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    )
    return file.getvalue()


class JoinedTable:
    """Reads rows of a complete joined table, and the embeddings that they point to.

    Files are read through read calls, as `memmap.gather_rows` does: a file that is cut is an error instead of a dead
    process.

    Args:
        folder: made by `joined_build.py`.
        tars: [shards] of `tar_dtype`.
        block_shards: tars whose files are kept open.
        tables: number of joined tables that share the limit on open files.

    Attributes:
        counts: int64 [shards, 2]: usable rows of each tar, and samples that only lack an embedding.
        teacher_dtype: float16, or float32 if the embeddings of any teacher and tar are wider. Ranks exchange embeddings
            in this dtype, so it is the same for all tars.
    """

    def __init__(
        self, sources: JoinSources, folder: Path, tars: np.ndarray, block_shards: int, tables: int = 1
    ) -> None:
        self.sources, self.folder = sources, folder
        self.counts = np.stack([tars["usable"], tars["lacking"]], axis=1)
        self._files = tars["files"]
        first = np.concatenate([[0], np.cumsum(tars["usable"])])
        parts = first[::PART] if len(tars) % PART == 0 else np.append(first[::PART], first[-1])
        self._part_rows = np.diff(parts)
        self._first = first[:-1] - parts[np.arange(len(tars)) // PART]  # row of each tar in its file
        stored = {name for name in np.unique(self._files["dtype"]) if name}
        self.teacher_dtype = np.dtype(np.float32 if stored - {b"<f2"} else np.float16)
        count = 2 * len(sources.teachers) + 1
        budget = open_file_budget(min(block_shards, len(tars)) * count, tables)
        self._open: LRUCache[tuple[int, int]] = LRUCache(budget, _close)

    def rows(self, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """[m] of `row_dtype`: usable rows by tar and number among the usable rows of that tar, int64 [m] each.

        Raises:
            UserError: a file cannot be read or was cut, or a row is not what was written.
        """
        rows = np.zeros(len(shards), self.sources.row_dtype)
        for at, (shard, number) in enumerate(zip(shards.tolist(), numbers.tolist())):
            self._read_rows(rows[at : at + 1], shard, number)
        self._check(rows, shards, numbers)
        return rows

    def tar(self, shard: int) -> np.ndarray:
        """All usable rows of a tar, by one read. Raises UserError as `rows` does."""
        rows = np.zeros(int(self.counts[shard, 0]), self.sources.row_dtype)
        self._read_rows(rows, shard, 0)
        self._check(rows, np.full(len(rows), shard), np.arange(len(rows)))
        return rows

    def _read_rows(self, rows: np.ndarray, shard: int, number: int) -> None:
        """Fill `rows` with the neighbouring rows of a tar that begin at `number`."""
        part = shard // PART
        try:
            file, start = self._rows_file(part)
            os.preadv(file, [rows.view(np.uint8).data], start + (int(self._first[shard]) + number) * rows.itemsize)
        except OSError as error:
            raise _unreadable(rows_path(self.folder, part), error) from None

    def _check(self, rows: np.ndarray, shards: np.ndarray, numbers: np.ndarray) -> None:
        wrong = rows["check"] != self.sources.checks(rows, shards, numbers)
        if wrong.any():
            shard = int(shards[wrong][0])
            raise self._damaged(shard // PART, f"its row {numbers[wrong][0]} of {self.sources.index.names[shard]}.tar")

    def embeddings(
        self, shards: np.ndarray, rows: np.ndarray, drawn: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(image, text) embeddings of rows, [m, sum of d] each; text is None without `has_text`.

        Of several teachers a row is [t_1, ..., t_K] / sqrt(K), which has length 1 like each t_k.

        Args:
            drawn: int64 [m, 2], numbers of view and caption of each row. No effect where a sample has one embedding.

        Raises:
            UserError, OSError: a file of embeddings is missing, was replaced or was cut.
        """
        teacher = self.sources.teacher
        assert teacher is not None
        images, texts = [], []
        for number, table in enumerate(self.sources.teachers):
            at = rows["teacher"][:, number].astype(np.int64)
            image = at if table.views is None else at * table.views.count + drawn[:, 0]
            images.append(self._gather(number, IMAGE, shards, image))
            if teacher.has_text:
                several = rows["caption"].shape[1] > 0
                text = rows["caption"][:, number] + drawn[:, 1] if several else at
                texts.append(self._gather(number, TEXT, shards, text))
        image = normalized_concatenation(images, self.teacher_dtype)
        return image, normalized_concatenation(texts, self.teacher_dtype) if texts else None

    def _gather(self, number: int, kind: int, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """[m, d] embeddings of a teacher."""
        table = self.sources.teachers[number]
        stored = {shard: np.dtype(self._files["dtype"][shard, number, kind].decode()) for shard in set(shards.tolist())}
        out = np.empty((len(rows), table.dim), np.result_type(*stored.values()))
        for at, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist())):
            size = table.dim * stored[shard].itemsize
            try:
                file, start = self._embedding_file(number, kind, shard)
                data = os.pread(file, size, start + row * size)
            except OSError as error:
                raise _unreadable(table.file(shard, kind), error) from None
            if len(data) != size:
                raise OSError(f"{table.file(shard, kind)} ends before row {row}: it was cut off after it was opened")
            out[at] = np.frombuffer(data, stored[shard])
        return out

    def _embedding_file(self, number: int, kind: int, shard: int) -> tuple[int, int]:
        """(descriptor, first byte of the data)."""

        def opened() -> tuple[int, int]:
            entry, path = self._files[shard, number, kind], self.sources.teachers[number].file(shard, kind)
            file = self._open_embeddings(number, kind, shard)
            if (size := os.fstat(file).st_size) != entry["bytes"]:
                os.close(file)
                raise UserError(
                    f"{path} has {size} bytes, expected {entry['bytes']} as when it was joined with the shards: "
                    "run tools/embed.py again"
                )
            return file, int(entry["start"])

        return self._open.get((number, kind, shard), opened)

    def _open_embeddings(self, number: int, kind: int, shard: int) -> int:
        teacher, file = self.sources.teachers[number], self._cached_embeddings(number, kind, shard)
        if file is not None and teacher.cache is not None:
            return teacher.cache.open_file(file)
        path = teacher.file(shard, kind)
        assert isinstance(path, Path)
        return _open(path, "run tools/embed.py again")

    def _cached_embeddings(self, number: int, kind: int, shard: int) -> CachedFile | None:
        entry = self._files[shard, number, kind]
        return self.sources.teachers[number].cached(shard, kind, int(entry["bytes"]), entry["sha256"].decode())

    def remote_files(self) -> dict[int, tuple[CachedFile, ...]]:
        """Shard -> its tar and its files of embeddings, those that are in an object store.

        Raises:
            UserError: the sha256 of one is not known.
        """
        index, files = self.sources.index, {}
        for shard, tar in enumerate(index.paths.tars) if self.sources.cache else ():
            found = [index.paths.cached(tar, index.shards[shard])]
            for number in range(len(self.sources.teachers)):
                kinds = np.flatnonzero(self._files["bytes"][shard, number])
                found += [self._cached_embeddings(number, int(kind), shard) for kind in kinds]
            files[shard] = tuple(file for file in found if file is not None)
        return files

    def _rows_file(self, part: int) -> tuple[int, int]:
        """(descriptor, first byte of the data)."""

        def opened() -> tuple[int, int]:
            header = header_of(self.sources.row_dtype, int(self._part_rows[part]))
            file = _open(rows_path(self.folder, part), f"run {self.sources.command}")
            expected = len(header) + int(self._part_rows[part]) * self.sources.row_dtype.itemsize
            if os.pread(file, len(header), 0) != header or os.fstat(file).st_size != expected:
                os.close(file)
                raise self._damaged(part, f"its header, or its size of expected {expected} bytes")
            return file, len(header)

        return self._open.get(part, opened)

    def _damaged(self, part: int, what: str) -> UserError:
        return UserError(
            f"{rows_path(self.folder, part)} is damaged, {what} is not as written: delete {self.folder} and start again"
        )


def _open(path: Path, remedy: str) -> int:
    """remedy: for a missing file."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, expected it since the shards were joined: {remedy}") from None


def _unreadable(path: AnyPath, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read ({error.strerror}): correct its permissions, raise ulimit -n or check that disk, and "
        "start again"
    )


def _close(opened: tuple[int, int]) -> None:
    os.close(opened[0])
