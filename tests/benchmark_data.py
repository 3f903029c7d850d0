"""A small classification set in the layout of `tools/eval.py --dataset-root`: pictures of five colours with noise."""

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


def break_image(tar: Path) -> None:
    """Overwrite the first image of a tar, whose header stays."""
    with open(tar, "r+b") as file:
        file.seek(512)
        file.write(b"not a picture")
