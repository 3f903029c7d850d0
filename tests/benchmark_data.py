"""Small sets in the layout of `tools/eval.py --dataset-root`: pictures of five colours with noise, captioned ones."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "red": (200, 0, 0),
    "green": (0, 200, 0),
    "blue": (0, 0, 200),
    "yellow": (200, 200, 0),
    "white": (230, 230, 230),
}
TRAIN, TEST = 31, 23  # images
CAPTIONS = [["red"], ["green", "leaf green"], ["blue"], ["yellow", "sun", "gold"], ["white"], ["grey"], ["black"]]


def _png(label: int, random: np.random.Generator) -> bytes:
    noise = 70 * random.standard_normal((8, 8, 3)) + 70 * random.standard_normal(3)
    pixels = (list(COLOURS.values())[label] + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32)).save(buffer, "png")
    return buffer.getvalue()


def write_split(folder: Path, images: int, tars: int, random: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(images), tars)):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for row in rows:
                label = int(row) % len(COLOURS)
                for ending, data in (("png", _png(label, random)), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"s{row:04d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "nshards.txt").write_text(f"{tars}\n")


def write_benchmark(root: Path) -> Path:
    """Write the set and return its directory."""
    random = np.random.default_rng(0)
    write_split(root / "train", TRAIN, 3, random)
    write_split(root / "test", TEST, 2, random)
    (root / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of something {c}.\na {c} thing\n")
    return root


def write_retrieval_set(root: Path, captions: list[list[str]] = CAPTIONS) -> Path:
    """Write a retrieval set, which has several captions of some images, and return its directory."""
    random = np.random.default_rng(1)
    (root / "test").mkdir(parents=True)
    (root / "dataset_type.txt").write_text("retrieval\n")
    (root / "test" / "nshards.txt").write_text("2\n")
    for number, rows in enumerate((range(3), range(3, len(captions)))):
        with tarfile.open(root / "test" / f"{number}.tar", "w") as tar:
            for row in rows:
                buffer = io.BytesIO()
                Image.fromarray(random.integers(0, 255, (8, 8, 3)).astype(np.uint8)).resize((32, 32)).save(
                    buffer, "png"
                )
                for ending, data in (("png", buffer.getvalue()), ("txt", "\n".join(captions[row]).encode())):
                    info = tarfile.TarInfo(f"s{row}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return root


def break_image(tar: Path) -> None:
    """Overwrite the first image of a tar, whose header stays."""
    with open(tar, "r+b") as file:
        file.seek(512)
        file.write(b"not a picture")
