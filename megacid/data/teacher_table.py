"""Teacher embeddings of the shards, a side table of them.

Shapes: n samples of a tar, r rows of its embeddings, d embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megacid.data.augmentation import recorded_views
from megacid.data.captions import COUNT_COLUMN, CaptionSource, recorded_caption
from megacid.data.index import ShardIndex
from megacid.data.remote.cache import CachedFile, ShardCache
from megacid.data.side_tables import EMBED_AGAIN, checked_meta
from megacid.errors import UserError
from megacid.storage.metadata import size_field
from megacid.storage.npy import load_npy
from megacid.storage.parquet import count_column, join_by_key, key_column, read_parquet
from megacid.storage.remote_path import STAGES, AnyPath, RemotePath, any_path
from megacid.storage.stored_arrays import StoredArray, recorded_arrays

IMAGE, TEXT = 0, 1  # kinds of embeddings
_DIGITS = 5  # least, of the numbers in the names of the files of embeddings


class TeacherRows(NamedTuple):
    """The embeddings of one tar as they are stored: r rows, one for each sample that was embedded."""

    keys: list[str]
    image: np.ndarray  # [r, d], memory-mapped; with views [r * views, d]
    text: np.ndarray | None  # [r, d]; with several captions [all captions of all rows, d]
    first: np.ndarray | None  # int64 [r + 1], with several captions: row of `text` of the first one of each sample


class TeacherShard(NamedTuple):
    """Where the embeddings of the samples of one tar are."""

    row_of: np.ndarray  # int64 [n]: row of each sample of the tar, -1 for none
    first: np.ndarray | None  # as of `TeacherRows`
    image: StoredArray | None  # None: no sample of the tar was embedded
    text: StoredArray | None  # None also without embeddings of captions


class TeacherFiles:
    """Teacher embeddings written by `tools/embed.py`, by the name of a tar: float16, L2-normalised.

    Args:
        meta: its meta.json.

    Attributes:
        dim: their width d.
        has_text: whether captions were embedded.
        views: random crops of each image that were embedded; None: the whole images were embedded alone.
    """

    def __init__(self, directory: AnyPath, meta: dict[str, Any]) -> None:
        self.directory, self.meta = directory, meta
        self.dim = size_field(self.meta, self.directory, "dim", EMBED_AGAIN)
        self.views = recorded_views(self.meta, self.directory)
        self._several_captions = CaptionSource(recorded_caption(self.meta)).several
        self._partitions = self._checked_partitions()
        self._empty = frozenset(self.meta.get("empty", ()))  # tars without files, because no sample could be embedded
        self._folders = (
            "img_emb" if self.views is None else "view_emb",
            "caption_emb" if self._several_captions else "text_emb",
        )
        self._image_files, self._text_files = (self._by_number(name, f"{name}_*.npy") for name in self._folders)
        self._metadata_files = self._by_number("metadata", "metadata_*.parquet")
        self.has_text = self._has_text()

    def _has_text(self) -> bool:
        if isinstance(self.directory, Path):
            return (self.directory / "text_emb").is_dir()
        number = next((number for name, number in self._partitions.items() if name not in self._empty), None)
        return number is not None and "text_emb" in self._read_metadata(number).arrays

    def _by_number(self, folder: str, pattern: str) -> dict[int, AnyPath]:
        """Files of the pattern by the number in their name.

        On a disk those that are there, since writers of this layout pad the numbers to different widths. In an object
        store those that tools/embed.py writes, since to list them would take many requests of every rank.
        """
        if isinstance(self.directory, RemotePath):
            width, remote = max(_DIGITS, len(str(len(self._partitions) - 1))), self.directory / folder
            return {n: remote / pattern.replace("*", f"{n:0{width}d}") for n in self._partitions.values()}
        paths: dict[int, AnyPath] = {}
        stem = pattern.partition("*")[0]
        for path in (self.directory / folder).glob(pattern):
            digits = path.name[len(stem) :].partition(".")[0]
            if digits.isdigit():
                paths[int(digits)] = path
        return paths

    def check_names(self, names: Iterable[str]) -> None:
        """Raise UserError unless the tars of these names have embeddings."""
        required = [self._image_files] + [self._text_files] * self.has_text
        missing = [
            name
            for name in names
            if name not in self._empty and any(self._partitions.get(name) not in files for files in required)
        ]
        if missing:
            raise UserError(
                f"{self.directory} has no embeddings of {len(missing)} shards ({', '.join(missing[:5])}): {EMBED_AGAIN}"
            )

    def _checked_partitions(self) -> dict[str, int]:
        partitions = self.meta.get("partitions")
        if not isinstance(partitions, dict) or not all(isinstance(number, int) for number in partitions.values()):
            raise UserError(
                f"{self.directory}/meta.json has partitions {str(partitions)[:40]!r}, expected a number for every "
                f"shard: {EMBED_AGAIN}"
            )
        return partitions

    def read(self, name: str) -> TeacherRows:
        """The embeddings of a tar, from a disk. Raises UserError when its files are damaged or disagree."""
        if name in self._empty:
            none = np.empty((0, self.dim), np.float16)
            return TeacherRows([], none, none if self.has_text else None, None)
        number = self._partitions[name]
        found = self._read_metadata(number)
        image = self._map(number, IMAGE, found.rows[IMAGE])
        text = self._map(number, TEXT, found.rows[TEXT]) if self.has_text else None
        return TeacherRows(found.keys, image, text, found.first)

    def _read_metadata(self, number: int) -> _Metadata:
        path = self.metadata(number)
        columns = ["image_path", *([COUNT_COLUMN] if self._several_captions else [])]
        table = read_parquet(path, EMBED_AGAIN, columns)
        keys = key_column(table, "image_path", path, EMBED_AGAIN)
        first = None
        if self._several_captions:
            first = np.append(0, np.cumsum(count_column(table, COUNT_COLUMN, path, EMBED_AGAIN)))
        images = len(keys) * (self.views.count if self.views else 1)
        texts = len(keys) if first is None else int(first[-1])
        return _Metadata(keys, first, (images, texts), recorded_arrays(table, path, EMBED_AGAIN))

    def _map(self, number: int, kind: int, rows: int) -> np.ndarray:
        """The memory-mapped embeddings of a partition on a disk."""
        path = (self._image_files, self._text_files)[kind][number]
        assert isinstance(path, Path)
        array = load_npy(path, EMBED_AGAIN)
        self._check_shape(path, array.shape, array.dtype, rows, by_row=array.flags.c_contiguous)
        return array

    def _check_shape(self, path: AnyPath, shape: object, dtype: np.dtype, rows: int, *, by_row: bool = True) -> None:
        if shape != (rows, self.dim) or dtype.kind != "f" or not by_row:
            raise UserError(
                f"{path} has shape {shape} of {dtype}, expected {(rows, self.dim)} of floating point, row by row, to "
                f"match its metadata: {EMBED_AGAIN}"
            )

    def metadata(self, number: int) -> AnyPath:
        """The metadata of a partition."""
        return self._metadata_files.get(number, self.directory / "metadata" / f"metadata_{number:05d}.parquet")


class _Metadata(NamedTuple):
    """The metadata of a partition."""

    keys: list[str]
    first: np.ndarray | None  # as of `TeacherRows`
    rows: tuple[int, int]  # of the image and the text embeddings
    arrays: dict[str, StoredArray]  # by the name of their folder; none if an earlier version wrote it


class TeacherTable(TeacherFiles):
    """Teacher embeddings of indexed shards.

    Args:
        cache: for embeddings in an object store; None: the one that the environment names.

    Attributes:
        cache: None for embeddings on a disk.
    """

    def __init__(self, directory: str | AnyPath, index: ShardIndex, cache: ShardCache | None = None) -> None:
        directory = any_path(directory)
        super().__init__(directory, checked_meta(directory, index, "embed"))
        self.index, self.cache = index, None
        if isinstance(directory, RemotePath):
            self.cache = cache or ShardCache.of_environment(str(directory))
        self._failures = self._checked_failures()
        self.check_names(index.names)

    @property
    def tables(self) -> tuple[TeacherTable, ...]:
        """Itself, as an ensemble of one."""
        return (self,)

    def _checked_failures(self) -> dict[str, int] | None:
        failures = self.meta.get("failures_by_shard")
        valid = isinstance(failures, dict) and all(isinstance(count, int) and count >= 0 for count in failures.values())
        if failures is not None and not valid:
            raise UserError(
                f"{self.directory}/meta.json has failures_by_shard {str(failures)[:40]!r}, expected a number for every "
                f"shard: {EMBED_AGAIN}"
            )
        return failures

    def failures(self, shard: int) -> int | None:
        """Number of samples of a tar that `tools/embed.py` skipped, from meta.json; None when it does not say.

        For shards that `tools/balance.py --reshard` copied only 0 is known: the copy may lack the skipped samples.
        """
        if self._failures is None:
            return None
        count = self._failures.get(self.index.names[shard], 0)
        same = self.meta.get("shards_digest") == self.index.digest and count <= self.index.sizes[shard]
        return count if same or not count else None

    def file(self, shard: int, kind: int) -> AnyPath:
        """The file with the embeddings of a tar. kind: IMAGE or TEXT."""
        return (self._image_files, self._text_files)[kind][self._partitions[self.index.names[shard]]]

    def cached(self, shard: int, kind: int, size: int, sha256: str) -> CachedFile | None:
        """The file with the embeddings of a tar as the cache knows it; None for one on a disk."""
        path = self.file(shard, kind)
        if isinstance(path, Path):
            return None
        if not sha256:
            raise self._without_record(path)
        return CachedFile(path.url, size, sha256, STAGES)

    def _without_record(self, path: AnyPath) -> UserError:
        return UserError(
            f"the metadata of {path} have no record of its sha256, which is needed to read it from a store, since an "
            "earlier version of megacid wrote them: copy the embeddings to a disk, or run tools/embed.py into another "
            "directory"
        )

    def _stored(self, shard: int, kind: int, found: _Metadata) -> StoredArray:
        """Where the embeddings of a tar are. Raises UserError when they do not match their metadata."""
        path, recorded, rows = self.file(shard, kind), found.arrays.get(self._folders[kind]), found.rows[kind]
        if isinstance(path, Path):
            array = self._map(self._partitions[self.index.names[shard]], kind, rows)
            assert isinstance(array, np.memmap)
            sha256 = recorded.sha256 if recorded else ""
            return StoredArray(array.shape, array.dtype.str, array.offset, path.stat().st_size, sha256)
        if recorded is None:
            raise self._without_record(path)
        self._check_shape(path, recorded.shape, np.dtype(recorded.dtype), rows)
        return recorded

    def join(self, shard: int) -> TeacherShard:
        """Join the embeddings of a tar to its samples. Raises UserError when its files are damaged or disagree."""
        name = self.index.names[shard]
        if name in self._empty:
            return TeacherShard(np.full(int(self.index.sizes[shard]), -1), None, None, None)
        found = self._read_metadata(self._partitions[name])
        metadata = self.metadata(self._partitions[name])
        row_of = join_by_key(self.index.table(shard).keys, found.keys, metadata, EMBED_AGAIN)
        lacking, expected = int((row_of < 0).sum()), self.failures(shard)
        # tools/embed.py leaves out samples without a text and does not count them.
        if not self.index.shards[shard]["without_text"] and expected not in (None, lacking):
            raise UserError(
                f"{self.directory}/meta.json counts {expected} samples of {name}.tar without an "
                f"embedding, its metadata {lacking}: {EMBED_AGAIN}"
            )
        text = self._stored(shard, TEXT, found) if self.has_text else None
        return TeacherShard(row_of, found.first, self._stored(shard, IMAGE, found), text)
