"""Synthetic embedding folders in the layout of tools/embed.py, and matching tars, for the benchmarks.

Legend: n samples, D width.
"""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megacid.offline.embed.partitions import partition_files
from megacid.storage.metadata import write_meta

EMBEDDING_META = {"model": "benchmark", "weights": "none", "precision": "fp16"}


def samples_of_parts(count: int, parts: int) -> list[range]:
    """The samples of every partition: `count` of them in `parts` nearly equal ranges."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in itertools.pairwise(bounds)]


def key(sample: int) -> str:
    return f"{sample:09d}"


def write_embeddings(
    folder: Path,
    rows: Callable[[range], np.ndarray],
    count: int,
    parts: int,
    shards: str = "none",
    digest: str = "none",
) -> int:
    """Write an embedding folder.

    Args:
        rows: returns the fp16 [n, D] rows of a range of samples.
        count: samples in all.
        parts: partitions.
        shards, digest: path and digest of the tars, recorded as the source of the samples.

    Returns:
        Bytes of the rows.
    """
    size, dim = 0, 0
    for number, part in enumerate(samples_of_parts(count, parts)):
        files = partition_files(folder, number, parts)
        for path in (files.image, files.metadata):
            path.parent.mkdir(parents=True, exist_ok=True)
        x = rows(part)
        np.save(files.image, x)
        pq.write_table(pa.table({"image_path": [key(sample) for sample in part]}), files.metadata)
        size, dim = size + x.nbytes, x.shape[1]
    partitions = {f"{number:05d}": number for number in range(parts)}
    manifest = {"dim": dim, "num_samples": count, "shards_digest": digest, "partitions": partitions}
    write_meta(folder, "embed", source={"shards": shards}, **(manifest | EMBEDDING_META))
    return size


def write_tars(folder: Path, count: int, parts: int) -> None:
    """Write tars of `count` samples, each the same 8 x 8 image and a caption."""
    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 150)).save(buffer, "PNG")
    members = [("png", buffer.getvalue()), ("txt", b"a picture")]
    for number, part in enumerate(samples_of_parts(count, parts)):
        with open(folder / f"{number:05d}.tar", "wb", buffering=1 << 20) as file:
            for sample in part:
                for ending, data in members:
                    info = tarfile.TarInfo(f"{key(sample)}.{ending}")
                    info.size = len(data)
                    file.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
            file.write(bytes(2 * tarfile.BLOCKSIZE))
