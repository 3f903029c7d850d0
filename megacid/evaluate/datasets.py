"""Local classification sets in CLIP_benchmark's webdataset layout.

    root/classnames.txt                          one class per line, line number = class id; may have an empty name
    root/zeroshot_classification_templates.txt   one template per line, with `{c}` for the class name
    root/{train,test}/nshards.txt, 0.tar, 1.tar ...   members <key>.jpg, or another image, and <key>.cls
    root/dataset_type.txt                        may be missing; multilabel: <key>.npy, a 0 or 1 for each class

Text files are UTF-8, or have a byte order mark. Only \\n and \\r\\n end a line: a name may hold other separators of
Unicode, and splitting at them would shift the class ids.

Shapes: B batch, N samples, H x W pixels.
"""

import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from megacid.data.decode import BadSample, decode_image, decode_text
from megacid.data.index import ShardIndex, ShardReader, load_index
from megacid.data.workers import WorkersLost, watched, worker_start
from megacid.errors import UserError
from megacid.models.clip import Transform
from megacid.storage.npy import parse_npy

log = logging.getLogger(__name__)

Sample = tuple[torch.Tensor, int | torch.Tensor]
_BLANK = " \t\r\n"  # str.strip() alone would also strip separators of Unicode


@dataclass(frozen=True)
class Benchmark:
    """A classification set on disk; `split` opens its splits."""

    root: Path
    name: str
    classnames: list[str]
    templates: list[str]
    multilabel: bool = False  # whether an image may have several labels, or none
    indexes: dict[str, ShardIndex] = field(default_factory=dict, repr=False)  # of the splits opened so far

    @property
    def num_classes(self) -> int:
        return len(self.classnames)

    def split(self, name: str, transform: Transform) -> "Split":
        """The samples of `root/name`. Raises UserError if it is missing, incomplete or in another layout."""
        kind = MultiLabelSplit if self.multilabel else ClassSplit
        return kind(self.open(name), transform, self.num_classes)

    def open(self, name: str) -> ShardIndex:
        """The index of a split, which later calls give again. Raises UserError as `split` does."""
        if name not in self.indexes:
            self.indexes[name] = open_split(self.root / name, label="npy" if self.multilabel else "cls")
        return self.indexes[name]

    @property
    def digest(self) -> str:
        """sha256 of the texts and of the content (tar names and keys) of the splits opened so far."""
        splits = [[name, index.digest] for name, index in self.indexes.items()]
        return hashlib.sha256(json.dumps([self.classnames, self.templates, splits]).encode()).hexdigest()


class Split(Dataset[Sample], ABC):
    """Item i: (image uint8 [3, H, W], label). A bad sample raises UserError: a score must cover all samples."""

    def __init__(self, index: ShardIndex, transform: Transform) -> None:
        self.index = index
        self.reader = ShardReader(index)
        self.transform = transform
        self.starts = torch.from_numpy(index.starts)
        self.no_label = torch.empty(0, dtype=torch.int64)  # what `batches` gives for no image

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitems__(self, items: list[int]) -> list[Sample] | UserError:
        """The samples, or the error of one, which raised in a worker would have the worker's traceback as its text."""
        try:
            return [self[item] for item in items]
        except UserError as error:
            return error

    def __getitem__(self, item: int) -> Sample:
        shard = int(torch.searchsorted(self.starts, item, right=True)) - 1
        row = item - int(self.starts[shard])
        name, key = self.index.names[shard], self.index.table(shard).keys[row]
        where = f"{self.index.root / name}.tar, sample {key}"
        try:
            image = decode_image(self.reader.read(shard, row, "image"), shard=name, key=key)
            return self.transform(image), self.label(shard, row, where)
        except BadSample as error:
            raise UserError(f"{where} cannot be evaluated ({error.reason}): repair or replace the tar") from error

    @abstractmethod
    def label(self, shard: int, row: int, where: str) -> int | torch.Tensor:
        """The label of a sample; `where` names it in errors."""

    def batches(
        self, batch_size: int, *, workers: int = 0, rows: range | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches (image uint8 [B, 3, H, W], label [B] int64) in the order of the tars. rows: of these samples."""
        loader: DataLoader[Any] = DataLoader(
            self if rows is None else Subset(self, rows),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=worker_start(),
        )
        try:
            for batch in watched(loader, len(loader), math.inf) if workers else loader:
                if isinstance(batch, UserError):
                    raise batch
                yield batch[0], batch[1]
        except WorkersLost as lost:
            raise UserError(str(lost).replace("data.workers", "--workers")) from None


class ClassSplit(Split):
    """Item i: (image uint8 [3, H, W], class id)."""

    def __init__(self, index: ShardIndex, transform: Transform, num_classes: int) -> None:
        super().__init__(index, transform)
        self.num_classes = num_classes

    def label(self, shard: int, row: int, where: str) -> int | torch.Tensor:
        text = self.reader.read(shard, row, "cls")
        label = _integer(decode_text(text, "replace"))
        if label is None:
            raise UserError(f"{where}: class is {text[:20]!r}, expected a class id such as 3 in the .cls member")
        if label >= self.num_classes:
            raise UserError(
                f"{where}: class id is {label}, expected 0 to {self.num_classes - 1} as classnames.txt names "
                f"{self.num_classes} classes: use files of the same set"
            )
        return label


class MultiLabelSplit(ClassSplit):
    """Item i: (image uint8 [3, H, W], labels int64 [C], 0 or 1)."""

    def __init__(self, index: ShardIndex, transform: Transform, num_classes: int) -> None:
        super().__init__(index, transform, num_classes)
        self.no_label = torch.empty(0, num_classes, dtype=torch.int64)

    def label(self, shard: int, row: int, where: str) -> torch.Tensor:
        data = self.reader.read(shard, row, "text")  # the member that `open_split` names
        label = parse_npy(data, f"{where}: the .npy", "write it with numpy.save")
        if label.shape != (self.num_classes,):
            raise UserError(
                f"{where}: the .npy is of shape {list(label.shape)}, expected {self.num_classes} values of 0 or 1, as "
                f"classnames.txt names {self.num_classes} classes: use files of the same set"
            )
        if label.dtype.kind not in "biuf":
            raise UserError(f"{where}: the .npy is of dtype {label.dtype}, expected numbers: write 0 or 1 per class")
        if len(others := label[(label != 0) & (label != 1)]):
            raise UserError(f"{where}: the .npy has the value {others[0]}, expected 0 or 1: write 0 or 1 per class")
        return torch.from_numpy(label.astype(np.int64))


def _collate(samples: list[Sample] | UserError) -> Any:
    return samples if isinstance(samples, UserError) else default_collate(samples)


def load_benchmark(root: Path | str, name: str | None = None, *, multilabel: bool = False) -> Benchmark:
    """Open a set; `name` (default: the directory's name) identifies it in results. UserError if a file is missing.

    multilabel: whether to accept a set of several labels per image.
    """
    root = Path(root)
    kind = dataset_type(root)
    if kind != "classification" and not (multilabel and kind == "multilabel"):
        raise UserError(f"{root}/dataset_type.txt says {kind[:40]!r}, expected 'classification': use another set")
    classnames = _lines(root / "classnames.txt")
    if unnamed := [number for number, line in enumerate(classnames) if not line]:
        log.warning(
            "%s: the classes %s have an empty name, which is used as it is",
            root / "classnames.txt",
            ", ".join(map(str, unnamed[:5])) + (" ..." if len(unnamed) > 5 else ""),
        )
    templates = _lines(root / "zeroshot_classification_templates.txt")
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            raise UserError(
                f"{root}/zeroshot_classification_templates.txt line {number} is {template!r}, expected the placeholder "
                "{c} for the class name: add it"
            )
    return Benchmark(root, name or root.resolve().name, classnames, templates, kind == "multilabel")


def dataset_type(root: Path) -> str:
    """What dataset_type.txt says; "classification" where it is missing. UserError when there is no such directory."""
    if not root.is_dir():
        raise UserError(f"dataset root {root} is not a directory, expected CLIP_benchmark's webdataset layout")
    file = root / "dataset_type.txt"
    return _read_text(file).strip(_BLANK) if file.is_file() else "classification"


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise UserError(
            f"{file} line {line} holds byte {byte:#04x}, expected UTF-8: convert the file, such as with "
            "iconv -f latin1 -t utf-8"
        ) from None
    if "\0" in text:
        raise UserError(
            f"{file} holds a zero character, expected UTF-8: convert the file, such as with iconv -f utf-16le -t utf-8"
        )
    return text


def _lines(file: Path) -> list[str]:
    """The stripped lines, without empty ones at the end. UserError when there are none."""
    if not file.is_file():
        raise UserError(f"{file} is missing, expected CLIP_benchmark's webdataset layout: add it")
    lines = [line.strip(_BLANK) for line in _read_text(file).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{file} has no lines, expected one entry per line: add them")
    return lines


def _integer(text: str) -> int | None:
    """A number of at most 9 decimal digits; None for other text."""
    digits = text.strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None


def open_split(directory: Path, label: Literal["cls", "npy"] = "cls") -> ShardIndex:
    """The index of a split. Raises UserError if it is missing, incomplete or in another layout.

    label: ending of the members with the labels.
    """
    if not directory.is_dir():
        raise UserError(
            f"split {directory} is missing, but the task needs it (some published sets have no train split)"
        )
    tars = [file.name for file in directory.glob("*.tar")]
    count = directory / "nshards.txt"
    expected = _integer(_read_text(count)) if count.is_file() else None
    if expected is None:
        raise UserError(f"{count} is missing or not a number, expected the number of tars: it may be {len(tars)}")
    if len(tars) != expected:
        raise UserError(f"{directory} holds {len(tars)} tars, {count} says {expected}: download it again")
    # The index has .cls members next to captions; labels of another ending take the place of the captions.
    index = load_index(directory, caption="npy" if label == "npy" else "txt")
    if index.dropped:
        raise UserError(f"{directory} has incomplete samples ({index.dropped}): repair the tars")
    return index
