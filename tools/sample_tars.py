"""Writes tars of samples: pairs, and classification and retrieval sets in CLIP_benchmark's webdataset layout."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

BENCHMARK_TAR = 10_000  # samples in one tar of an evaluation set


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member without date and owner, so that the bytes of the tar depend on its content only."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))


def write_split(folder: Path, samples: Iterable[tuple[bytes, str]], text: str) -> None:
    """Write 0.tar, 1.tar, ... and nshards.txt of samples (PNG, text); `text` is the extension of the text member."""
    folder.mkdir(parents=True)
    shards = 0
    tar: tarfile.TarFile | None = None
    for number, (image, content) in enumerate(samples):
        if tar is None or number % BENCHMARK_TAR == 0:
            if tar is not None:
                tar.close()
            tar = tarfile.open(folder / f"{shards}.tar", "w")  # noqa: SIM115  closed at the next one
            shards += 1
        add_member(tar, f"s{number:07d}.{text}", content.encode())
        add_member(tar, f"s{number:07d}.png", image)
    if tar is not None:
        tar.close()
    (folder / "nshards.txt").write_text(f"{shards}\n")


def write_classification(
    folder: Path, names: list[str], templates: list[str], splits: dict[str, Iterable[tuple[bytes, int]]]
) -> None:
    """Write a classification set; every split has samples (PNG, class)."""
    folder.mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    (folder / "dataset_type.txt").write_text("classification\n")
    for split, samples in splits.items():
        write_split(folder / split, ((image, str(label)) for image, label in samples), "cls")


def write_retrieval(folder: Path, samples: Iterable[tuple[bytes, str]]) -> None:
    """Write a retrieval set of samples (PNG, caption), as the split `test`."""
    folder.mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    write_split(folder / "test", samples, "txt")
