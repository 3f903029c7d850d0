"""Side tables of the shards: teacher embeddings, cluster labels, and masks of the samples to keep.

They are joined to the samples of one tar at a time, by key: a global dictionary of 400 M keys would cost gigabytes, and
the rows of another file need not be in the order of the tar. The loader reads the result, see `joined.py`.
Shapes: n samples of a tar, d embedding width, l labels per sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megacid.data.augmentation import recorded_views
from megacid.data.captions import COUNT_COLUMN, CaptionSource, recorded_caption
from megacid.data.index import ShardIndex
from megacid.errors import UserError
from megacid.storage.metadata import read_meta, size_field
from megacid.storage.npy import load_npy
from megacid.storage.parquet import count_column, join_by_key, key_column, label_column, read_parquet, row_by_key

EMBED_AGAIN, CLUSTER_AGAIN, BALANCE_AGAIN = (f"run tools/{tool}.py again" for tool in ("embed", "cluster", "balance"))

IMAGE, TEXT = 0, 1  # kinds of embeddings


def _checked_meta(directory: str | Path, index: ShardIndex, made_by: str) -> dict[str, Any]:
    """meta.json of a stage. UserError when it was made from other shards than these or those they are a copy of."""
    meta = read_meta(directory, expect=made_by)
    if made_by == "embed" and (caption := recorded_caption(meta)) != index.caption.spec:
        raise UserError(
            f"{directory} was made from the captions in {caption!r}, this run reads them from {index.caption.spec!r}: "
            f'set data.caption to "{caption}", or run tools/embed.py with --caption {index.caption.spec}'
        )
    # Copied samples keep their tar names and keys, so embeddings and labels can be joined; masks of rows cannot.
    accepted = [index.digest] if made_by == "balance" else [index.digest, _copied_from(index)]
    if meta.get("shards_digest") not in accepted:
        raise UserError(
            f"{directory} was made from other shards (digest {str(meta.get('shards_digest'))[:12]}) than {index.root} "
            f"(digest {index.digest[:12]}): run tools/{made_by}.py again for these shards"
        )
    return meta


def _copied_from(index: ShardIndex) -> str:
    """Digest of the shards that `tools/balance.py --reshard` copied these from; their own digest otherwise."""
    if (index.root / "meta.json").is_file():
        meta = read_meta(index.root)
        if meta.get("made_by") == "reshard" and meta.get("digest") == index.digest:
            return str(meta.get("shards_digest"))
    return index.digest


class TeacherRows(NamedTuple):
    """The embeddings of one tar as they are stored: r rows, one for each sample that was embedded."""

    keys: list[str]
    image: np.ndarray  # [r, d], memory-mapped; with views [r * views, d]
    text: np.ndarray | None  # [r, d]; with several captions [all captions of all rows, d]
    first: np.ndarray | None  # int64 [r + 1], with several captions: row of `text` of the first one of each sample


class TeacherShard(NamedTuple):
    """The embeddings of the samples of one tar, see `TeacherRows`."""

    row_of: np.ndarray  # int64 [n]: row of each sample of the tar, -1 for none
    image: np.ndarray
    text: np.ndarray | None
    first: np.ndarray | None


class TeacherFiles:
    """Teacher embeddings written by `tools/embed.py`, by the name of a tar: float16, L2-normalised.

    Args:
        meta: its meta.json.

    Attributes:
        dim: their width d.
        has_text: whether captions were embedded.
        views: random crops of each image that were embedded; None: the whole images were embedded alone.
    """

    def __init__(self, directory: str | Path, meta: dict[str, Any]) -> None:
        self.directory, self.meta = Path(directory), meta
        self.dim = size_field(self.meta, self.directory, "dim", EMBED_AGAIN)
        self.has_text = (self.directory / "text_emb").is_dir()
        self.views = recorded_views(self.meta, self.directory)
        # Writers of this layout pad the numbers to different widths, so files are found by number.
        image = "img_emb" if self.views is None else "view_emb"
        self._image_files = _by_number(self.directory / image, f"{image}_*.npy")
        self._several_captions = CaptionSource(recorded_caption(self.meta)).several
        text = "caption_emb" if self._several_captions else "text_emb"
        self._text_files = _by_number(self.directory / text, f"{text}_*.npy")
        self._metadata_files = _by_number(self.directory / "metadata", "metadata_*.parquet")
        self._partitions = self._checked_partitions()
        self._empty = frozenset(self.meta.get("empty", ()))  # tars without files, because no sample could be embedded

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
        """The embeddings of a tar. Raises UserError when its files are damaged or disagree."""
        if name in self._empty:
            none = np.empty((0, self.dim), np.float16)
            return TeacherRows([], none, none if self.has_text else None, None)
        number = self._partitions[name]
        image = load_npy(self._image_files[number], EMBED_AGAIN)
        text = load_npy(self._text_files[number], EMBED_AGAIN) if self.has_text else None
        metadata = self.metadata(number)
        columns = ["image_path", *([COUNT_COLUMN] if self._several_captions else [])]
        table = read_parquet(metadata, EMBED_AGAIN, columns)
        keys = key_column(table, "image_path", metadata, EMBED_AGAIN)
        first = None
        if self._several_captions:
            first = np.append(0, np.cumsum(count_column(table, COUNT_COLUMN, metadata, EMBED_AGAIN)))
        images = len(keys) * (self.views.count if self.views else 1)
        texts = len(keys) if first is None else int(first[-1])
        for path, array, rows in (
            (self._image_files[number], image, images),
            (self._text_files.get(number), text, texts),
        ):
            valid = array is None or (array.shape == (rows, self.dim) and array.dtype.kind == "f")
            if array is not None and not (valid and array.flags.c_contiguous):
                raise UserError(
                    f"{path} has shape {array.shape} of {array.dtype}, expected {(rows, self.dim)} of floating point, "
                    f"row by row, to match its metadata: {EMBED_AGAIN}"
                )
        return TeacherRows(keys, image, text, first)

    def metadata(self, number: int) -> Path:
        """The metadata of a partition."""
        return self._metadata_files.get(number, self.directory / "metadata" / f"metadata_{number:05d}.parquet")


class TeacherTable(TeacherFiles):
    """Teacher embeddings of indexed shards."""

    def __init__(self, directory: str | Path, index: ShardIndex) -> None:
        super().__init__(directory, _checked_meta(directory, index, "embed"))
        self.index = index
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

    def file(self, shard: int, kind: int) -> Path:
        """The file with the embeddings of a tar. kind: IMAGE or TEXT."""
        return (self._image_files, self._text_files)[kind][self._partitions[self.index.names[shard]]]

    def join(self, shard: int) -> TeacherShard:
        """Join the embeddings of a tar to its samples. Raises UserError when its files are damaged or disagree."""
        name = self.index.names[shard]
        rows = self.read(name)
        if name in self._empty:
            return TeacherShard(np.full(int(self.index.sizes[shard]), -1), *rows[1:])
        metadata = self.metadata(self._partitions[name])
        row_of = join_by_key(self.index.table(shard).keys, rows.keys, metadata, EMBED_AGAIN)
        lacking, expected = int((row_of < 0).sum()), self.failures(shard)
        # tools/embed.py leaves out samples without a text and does not count them.
        if not self.index.shards[shard]["without_text"] and expected not in (None, lacking):
            raise UserError(
                f"{self.directory}/meta.json counts {expected} samples of {name}.tar without an "
                f"embedding, its metadata {lacking}: {EMBED_AGAIN}"
            )
        return TeacherShard(row_of, *rows[1:])


def _by_number(folder: Path, pattern: str) -> dict[int, Path]:
    """Files of the pattern by the number in their name."""
    stem = pattern.partition("*")[0]
    paths = {}
    for path in folder.glob(pattern) if folder.is_dir() else ():
        digits = path.name[len(stem) :].partition(".")[0]
        if digits.isdigit():
            paths[int(digits)] = path
    return paths


class LabelFiles:
    """Cluster labels written by `tools/cluster.py`, by the name of a tar.

    Args:
        meta: its meta.json.
        first: name of the tar that decides how many labels per sample were written.
        labels_per_sample: number l of nearest clusters to use; None uses all that were written.

    Attributes:
        num_classes: number of clusters.
        labels_per_sample: l.
        stored: number of labels per sample that were written.

    Raises:
        UserError: fewer labels per sample were written.
    """

    def __init__(
        self, directory: str | Path, meta: dict[str, Any], first: str, labels_per_sample: int | None = None
    ) -> None:
        self.directory, self.meta = Path(directory), meta
        self.num_classes = size_field(self.meta, self.directory, "k", CLUSTER_AGAIN)
        self.labels_per_sample, self.stored = labels_per_sample or 1, 0
        keys, labels = self.read(first)
        row_by_key(keys, self.path(first), CLUSTER_AGAIN)
        self.stored = labels.shape[1]
        self.labels_per_sample = labels_per_sample or self.stored

    def path(self, name: str) -> Path:
        """The file with the labels of a tar."""
        return self.directory / "labels" / f"{name}.parquet"

    def read(self, name: str) -> tuple[list[str], np.ndarray]:
        """The labels of a tar as they are stored: r keys, and int64 [r, stored], nearest first, -1 for none."""
        path = self.path(name)
        table = read_parquet(path, CLUSTER_AGAIN)
        names = [name for name in table.column_names if name == "label" or name.removeprefix("label_").isdigit()]
        if "key" not in table.column_names or "label" not in names:
            raise UserError(f"{path} has the columns {table.column_names}, expected `key` and `label`: {CLUSTER_AGAIN}")
        names.sort(key=lambda name: int(name.removeprefix("label_")) if name != "label" else 0)
        if len(names) < (expected := max(self.stored, self.labels_per_sample)):
            raise UserError(
                f"{path} has {len(names)} labels per sample, expected {expected}: "
                f"run tools/cluster.py with --top-labels {expected}, or use fewer"
            )
        names = names[: self.stored or None]
        keys = key_column(table, "key", path, CLUSTER_AGAIN)
        columns = [label_column(table, name, keys, self.num_classes, path, CLUSTER_AGAIN) for name in names]
        return keys, np.stack(columns, axis=1)


class LabelTable(LabelFiles):
    """Cluster labels of indexed shards; labels_per_sample is that of `LabelFiles`."""

    def __init__(self, directory: str | Path, index: ShardIndex, labels_per_sample: int | None = None) -> None:
        self.index = index
        super().__init__(directory, _checked_meta(directory, index, "cluster"), index.names[0], labels_per_sample)

    def join(self, shard: int) -> np.ndarray:
        """The labels of the samples of a tar: int64 [n, stored], nearest first, -1 for none."""
        name = self.index.names[shard]
        keys, stored = self.read(name)
        at = join_by_key(self.index.table(shard).keys, keys, self.path(name), CLUSTER_AGAIN)
        labels = np.full((len(at), stored.shape[1]), -1, np.int64)
        labels[at >= 0] = stored[at[at >= 0]]
        return labels


class KeepTable:
    """Masks of the samples that `tools/balance.py` kept."""

    def __init__(self, directory: str | Path, index: ShardIndex) -> None:
        self.directory, self.index = Path(directory), index
        self.meta = _checked_meta(directory, index, "balance")

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [shards], kept samples per shard. Reads all masks. UserError when one is damaged."""
        return np.array([np.count_nonzero(self._mask(shard)) for shard in range(len(self.index.names))], np.int64)

    def _mask(self, shard: int) -> np.ndarray:
        path = self.directory / "keep" / f"{self.index.names[shard]}.npy"
        mask = load_npy(path, BALANCE_AGAIN)
        if mask.dtype != np.bool_ or mask.shape != (int(self.index.sizes[shard]),):
            raise UserError(
                f"{path} is {mask.dtype} {mask.shape}, "
                f"expected bool ({int(self.index.sizes[shard])},) to match the shard: {BALANCE_AGAIN}"
            )
        return np.array(mask)  # a copy: a mapped file could be cut later

    def kept(self, shard: int) -> np.ndarray:
        """int64, kept rows of the tar, ascending."""
        return np.flatnonzero(self._mask(shard))
