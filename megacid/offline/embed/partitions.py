"""The files of one partition of teacher embeddings: one tar, in clip-retrieval's layout.

    img_emb/img_emb_00000.npy            float16 [n, D]
    text_emb/text_emb_00000.npy          float16 [n, D]
    metadata/metadata_00000.parquet      image_path (the key), caption, shard, key, uid, url; row by row as the arrays
    failures/failures_00000.parquet      shard, key, reason: what was left out; only where something was

Readers of that layout sort names, take the i-th metadata file for the i-th file that has rows, and find the arrays by
their ending. So all numbers have the same number of digits, and a tar of which nothing could be embedded has no arrays.

Legend: D width, n samples of one tar that could be embedded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.storage.npy import load_npy
from megacid.storage.parquet import read_parquet
from megacid.storage.stage_files import disk_errors, write_array, writing

_DIGITS = 5
_ABOUT = ("image_path", "caption", "shard", "key", "uid", "url")


class PartitionFiles(NamedTuple):
    image: Path
    text: Path
    metadata: Path
    failures: Path


def partition_files(folder: Path, number: int, partitions: int) -> PartitionFiles:
    """The files of partition `number` of so many."""
    name = f"{number:0{max(_DIGITS, len(str(partitions - 1)))}d}"
    return PartitionFiles(
        folder / "img_emb" / f"img_emb_{name}.npy",
        folder / "text_emb" / f"text_emb_{name}.npy",
        folder / "metadata" / f"metadata_{name}.parquet",
        folder / "failures" / f"failures_{name}.parquet",
    )


class Failure(NamedTuple):
    key: str
    reason: str


class About(NamedTuple):
    """What the metadata says of a sample besides its shard. uid, url: of its .json, when that has them."""

    key: str
    caption: str
    uid: str | None = None
    url: str | None = None


def stored_failures(files: PartitionFiles) -> list[Failure]:
    """What was left out of a partition. UserError when the file is damaged."""
    if not files.failures.exists():
        return []
    table = read_parquet(files.failures, "run tools/embed.py again", ["key", "reason"])
    return [Failure(key, reason) for key, reason in zip(table["key"].to_pylist(), table["reason"].to_pylist())]


def left_out(files: PartitionFiles, stem: str, keys: list[str], dim: int) -> list[Failure] | None:
    """What was left out of a partition that is complete and belongs to this tar; None when it has to be made (again).

    keys: of the tar, in its order; each is either embedded or named as left out.
    """
    try:
        failures = stored_failures(files)
        failed = {failure.key for failure in failures}
        wanted = [key for key in keys if key not in failed]
        if len(wanted) + len(failures) != len(keys):
            return None
        if not wanted:
            return failures
        shapes = [(array.shape, array.dtype.kind) for array in (load_npy(path, "") for path in files[:2])]
        table = read_parquet(files.metadata, "", list(_ABOUT))
        fits = set(table["shard"].to_pylist()) <= {stem} and table["image_path"].to_pylist() == wanted
    except (UserError, ValueError):  # ValueError: a string that is not UTF-8
        return None
    return failures if fits and shapes == [((len(wanted), dim), "f")] * 2 else None


@dataclass
class Partition:
    """What has been done of one tar so far."""

    image: list[np.ndarray] = field(default_factory=list)  # float16 [B, D] each
    text: list[np.ndarray] = field(default_factory=list)
    about: list[About] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def seen(self) -> int:
        return len(self.about) + len(self.failures)

    def save(self, files: PartitionFiles, number: int, stem: str) -> None:
        """Write the files, each atomically; the table of failures comes last, and none of an earlier attempt stays."""
        with disk_errors(files.failures):
            files.failures.unlink(missing_ok=True)
        if self.about:
            for name, path, parts in (("image", files.image, self.image), ("text", files.text, self.text)):
                write_array(path, np.concatenate(parts))
                failpoint(f"embed:{name}_written", step=number)
            keys, captions, uids, urls = zip(*self.about)
            _write(files.metadata, zip(_ABOUT, (keys, captions, [stem] * len(keys), keys, uids, urls)))
            failpoint("embed:metadata_written", step=number)
        if self.failures:
            keys, reasons = zip(*self.failures)
            _write(files.failures, zip(("shard", "key", "reason"), ([stem] * len(keys), keys, reasons)))


def _write(path: Path, columns: Iterable[tuple[str, Any]]) -> None:
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns})
    with writing(path) as temporary:
        pq.write_table(table, temporary)
