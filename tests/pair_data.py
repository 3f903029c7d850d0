"""Small shards of pairs whose pictures and captions tell which sample they are, so that a mixture would be seen."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megacid.data.batch import Batch
from megacid.data.index import ShardIndex, load_index
from megacid.data.loader import PairStream

SIZES = {"00000": 9, "00001": 7, "00002": 8}


def put(tar: tarfile.TarFile, name: str, data: bytes = b"x", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


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
    return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1).float()


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[int(caption or 0)] for caption in captions])


def stream(index: ShardIndex, **changes: Any) -> PairStream:
    options: dict[str, Any] = dict(
        transform=transform, tokenize=tokenize, global_batch=8, micro_batch=8, accumulation=1, rank=0, world=1,
        seed=1, start_step=0, total_steps=6,
    )  # fmt: skip
    return PairStream(index, **{**options, **changes})


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("image", "text", "sample_id"))


def peak_mib(reset: bool = False) -> float:
    """Most resident memory of this process so far; reset: forget what was before now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
