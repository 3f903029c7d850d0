"""Files of one partition of teacher embeddings (one tar) in clip-retrieval's layout.

    img_emb/img_emb_00000.npy            float16 [n, D]
    text_emb/text_emb_00000.npy          float16 [n, D]
    view_emb/view_emb_00000.npy          float16 [n * V, D]: view v of row r is row r * V + v; only with views
    caption_emb/caption_emb_00000.npy    float16 [m, D]: all captions of row 0, of row 1 ...; only with several captions
    metadata/metadata_00000.parquet      image_path (the key), caption, shard, key, uid, url; rows as in the arrays;
                                         with several captions also `captions`, their number, and `caption` is the first
    failures/failures_00000.parquet      shard, key, reason of every skipped sample; only where a sample was skipped

The metadata of the parquet file record where the data of the arrays are, and the sha256 of their files.
Readers of that layout sort file names and pair the i-th metadata file with the i-th array file. So all numbers are
padded to the same number of digits, and a tar of which no sample could be embedded has no arrays and no metadata.

Legend: D width, n samples of one tar that could be embedded, with m captions, V views of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacid.data.captions import COUNT_COLUMN
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.storage.atomic import disk_errors, writing
from megacid.storage.npy import load_npy, write_array
from megacid.storage.parquet import count_column, read_parquet
from megacid.storage.stored_arrays import StoredArray, record_arrays

_DIGITS = 5
_COLUMNS = ("image_path", "caption", "shard", "key", "uid", "url")


class PartitionFiles(NamedTuple):
    image: Path
    text: Path
    metadata: Path
    failures: Path
    views: Path
    captions: Path


def partition_files(folder: Path, number: int, partitions: int) -> PartitionFiles:
    """Paths of one partition. partitions: how many there are in all, which decides the number of digits."""
    name = f"{number:0{max(_DIGITS, len(str(partitions - 1)))}d}"
    return PartitionFiles(
        folder / "img_emb" / f"img_emb_{name}.npy",
        folder / "text_emb" / f"text_emb_{name}.npy",
        folder / "metadata" / f"metadata_{name}.parquet",
        folder / "failures" / f"failures_{name}.parquet",
        folder / "view_emb" / f"view_emb_{name}.npy",
        folder / "caption_emb" / f"caption_emb_{name}.npy",
    )


class Failure(NamedTuple):
    key: str
    reason: str


class Layout(NamedTuple):
    """What a partition holds for each sample.

    Attributes:
        dim: Width.
        views: Number of views; 0: there is no file of views.
        captions: Whether there is a file of all captions.
    """

    dim: int
    views: int = 0
    captions: bool = False


class SampleInfo(NamedTuple):
    """Metadata of one sample, except its shard. uid, url: from the sample's .json, if present there.

    Attributes:
        caption: The first one.
        captions: Number of captions.
    """

    key: str
    caption: str
    uid: str | None = None
    url: str | None = None
    captions: int = 1


def _read_failures(files: PartitionFiles) -> list[Failure]:
    """The skipped samples. UserError when the file is damaged."""
    if not files.failures.exists():
        return []
    table = read_parquet(files.failures, "run tools/embed.py again", ["key", "reason"])
    return [Failure(key, reason) for key, reason in zip(table["key"].to_pylist(), table["reason"].to_pylist())]


def failures_if_complete(files: PartitionFiles, stem: str, keys: list[str], layout: Layout) -> list[Failure] | None:
    """The skipped samples of a complete partition; None when the partition must be written (again).

    Args:
        stem: Name of the tar that the partition must belong to.
        keys: Keys of the tar in its order; each must be either embedded or listed as skipped.
    """
    try:
        failures = _read_failures(files)
        failed = {failure.key for failure in failures}
        embedded = [key for key in keys if key not in failed]
        if len(embedded) + len(failures) != len(keys):
            return None
        if not embedded:
            return failures
        table = read_parquet(files.metadata, "", [*_COLUMNS, *([COUNT_COLUMN] if layout.captions else [])])
        rows = {files.image: len(embedded), files.text: len(embedded)}
        if layout.views:
            rows[files.views] = layout.views * len(embedded)
        if layout.captions:
            rows[files.captions] = int(count_column(table, COUNT_COLUMN, files.metadata, "").sum())
        opened = ((load_npy(path, ""), count) for path, count in rows.items())
        whole = all(array.shape == (count, layout.dim) and array.dtype.kind == "f" for array, count in opened)
        fits = set(table["shard"].to_pylist()) <= {stem} and table["image_path"].to_pylist() == embedded
    except (UserError, ValueError):  # ValueError: a string that is not UTF-8
        return None
    return failures if fits and whole else None


@dataclass
class Partition:
    """The results of one tar so far."""

    image: list[np.ndarray] = field(default_factory=list)  # float16 [B, D] each
    text: list[np.ndarray] = field(default_factory=list)
    views: list[np.ndarray] = field(default_factory=list)  # float16 [B * V, D] each
    captions: list[np.ndarray] = field(default_factory=list)  # float16, all captions of B samples each
    samples: list[SampleInfo] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.samples) + len(self.failures)

    def save(self, files: PartitionFiles, number: int, stem: str) -> None:
        """Write the files, each atomically, the failures last; removes the failures of an earlier attempt."""
        with disk_errors(files.failures):
            files.failures.unlink(missing_ok=True)
        if self.samples:
            arrays = {"image": self.image, "text": self.text, "views": self.views, "captions": self.captions}
            recorded = {}
            for name, parts in arrays.items():
                if parts:
                    path, array = getattr(files, name), np.concatenate(parts)
                    write_array(path, array)
                    recorded[path.parent.name] = StoredArray.of(path, array)
                    failpoint(f"embed:{name}_written", step=number)
            keys, captions, uids, urls, counts = zip(*self.samples)
            columns = dict(zip(_COLUMNS, (keys, captions, [stem] * len(keys), keys, uids, urls)))
            _write(files.metadata, columns, {COUNT_COLUMN: counts} if self.captions else {}, recorded)
            failpoint("embed:metadata_written", step=number)
        if self.failures:
            keys, reasons = zip(*self.failures)
            _write(files.failures, {"shard": [stem] * len(keys), "key": keys, "reason": reasons})


def _write(
    path: Path,
    texts: Mapping[str, Any],
    counts: Mapping[str, Any] = MappingProxyType({}),
    recorded: Mapping[str, StoredArray] = MappingProxyType({}),
) -> None:
    arrays = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    table = pa.table(arrays | {name: pa.array(values, pa.int32()) for name, values in counts.items()})
    if recorded:
        table = record_arrays(table, recorded)
    with writing(path) as temporary:
        pq.write_table(table, temporary)
