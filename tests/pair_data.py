"""Small shards of pairs whose pictures and captions tell which sample they are, so that a mixture would be seen."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from megacid.data.batch import Batch, Positions
from megacid.data.ensemble import TeacherEnsemble
from megacid.data.index import ShardIndex, load_index
from megacid.data.joined import JoinSources
from megacid.data.joined_build import open_joined
from megacid.data.loader import PairStream
from megacid.data.pairs import PairOptions
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.sources import Source
from megacid.data.teacher_table import TeacherTable
from megacid.storage.metadata import write_meta

SIZES = {"00000": 9, "00001": 7, "00002": 8}


def put(tar: tarfile.TarFile, name: str, data: bytes = b"x", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def make_tar(path: Path, keys: list[str], ending: str = "jpg") -> None:
    """A tar whose images are no pictures: for tests that read bytes only."""
    with tarfile.open(path, "w") as tar:
        for key in keys:
            put(tar, f"{key}.{ending}", f"image of {key}".encode())
            put(tar, f"{key}.txt", f"text of {key}".encode())
            put(tar, f"{key}.json", b'{"key": 1}')


def picture(number: int) -> bytes:
    """A PNG of one colour that says which sample it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(
    folder: Path,
    damaged: frozenset[int] | set[int] = frozenset(),
    without_text: frozenset[int] | set[int] = frozenset(),
    sizes: dict[str, int] = SIZES,
) -> ShardIndex:
    """Every image has one colour, its global row number, so that a batch shows what was really read."""
    folder.mkdir()
    number = 0
    for name, size in sizes.items():
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for _ in range(size):
                data = picture(number)
                put(tar, f"k{number}.png", data[:40] if number in damaged else data)
                put(tar, f"k{number}.cls", b"0")
                if number not in without_text:
                    put(tar, f"k{number}.txt", f"{number}".encode())
                number += 1
    return load_index(folder)


def transform(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1)


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[int(caption or 0)] for caption in captions])


PLAN = dict(global_batch=8, micro_batch=8, accumulation=1, rank=0, world=1, start_step=0, total_steps=6)


def source(
    index: ShardIndex,
    name: str = "",
    weight: float = 1.0,
    *,
    teacher: TeacherTable | TeacherEnsemble | None = None,
    labels: LabelTable | None = None,
    keep: KeepTable | None = None,
    block_shards: int = 16,
) -> Source:
    return Source(open_joined(JoinSources(index, teacher, labels, keep), block_shards), name, weight)


def stream_of(*sources: Source, **changes: Any) -> PairStream:
    """One rank, batches of 8, 6 steps; `changes`: fields of Positions and of PairOptions."""
    plan = Positions(**{name: changes.pop(name, value) for name, value in PLAN.items()})
    options = PairOptions(**{"transform": transform, "tokenize": tokenize, "seed": 1, **changes})
    return PairStream(sources, plan, options)


def stream(index: ShardIndex, **changes: Any) -> PairStream:
    """`stream_of` one source; `changes`: its side tables, too."""
    tables = {name: changes.pop(name) for name in ("teacher", "labels", "keep") if name in changes}
    index.check_captions()
    return stream_of(source(index, **tables, block_shards=changes.get("block_shards", 16)), **changes)


def teacher_rows(
    teacher: TeacherTable | TeacherEnsemble, shard: int, rows: np.ndarray, drawn: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """(image, text) embeddings of rows of a tar as the loader reads them; drawn: numbers of view and caption."""
    joined = open_joined(JoinSources(teacher.tables[0].index, teacher))
    usable = joined.tar(shard)
    at = np.searchsorted(usable["row"], rows)
    assert usable["row"][at].tolist() == rows.tolist(), "a row has no embedding"
    drawn = np.zeros((len(rows), 2), np.int64) if drawn is None else drawn
    return joined.embeddings(np.full(len(rows), shard), usable[at], drawn)


def remove_joined(index: ShardIndex) -> None:
    """Forget the joined tables: for tests that change a side table without its meta.json."""
    for folder in index.root.glob("index*/joined-*"):
        shutil.rmtree(folder)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("image", "text", "sample_id"))


def peak_mib(reset: bool = False) -> float:
    """Most resident memory of this process so far; reset: forget what was before now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def write_parquet(path: Path, **columns: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def teacher_dir(folder: Path, digest: str, width: int = 2, pad: int = 5, text: bool = True) -> Path:
    """Rows in another order than the tars, partition numbers in another order than the shards, and no row for "b"."""
    for number, keys in ((1, ["c", "a"]), (0, ["e", "d"])):
        rows = np.array([[ord(key), number] for key in keys], np.float16)
        save(folder / "img_emb" / f"img_emb_{number:0{pad}d}.npy", rows)
        if text:
            save(folder / "text_emb" / f"text_emb_{number:0{pad}d}.npy", -rows)
        write_parquet(folder / "metadata" / f"metadata_{number:0{pad}d}.parquet", image_path=keys, caption=keys)
    write_meta(folder, "embed", {}, shards_digest=digest, dim=width, partitions={"00000": 1, "00001": 0})
    return folder


def label_dir(folder: Path, digest: str, k: int = 10, **extra: object) -> Path:
    write_parquet(folder / "labels" / "00000.parquet", key=["c", "a"], label=pa.array([7, 3], pa.int32()), **extra)
    write_parquet(folder / "labels" / "00001.parquet", key=["d", "e"], label=pa.array([-1, 9], pa.int32()))
    write_meta(folder, "cluster", {}, shards_digest=digest, k=k, dim=2)
    return folder


def keep_dir(folder: Path, digest: str) -> Path:
    save(folder / "keep" / "00000.npy", np.array([True, False, True]))
    save(folder / "keep" / "00001.npy", np.array([False, False]))
    write_meta(folder, "balance", {}, shards_digest=digest, kept=2, total=5)
    return folder


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 6, y * 10, x + y], axis=2).astype(np.uint8))
