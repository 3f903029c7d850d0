"""Local classification sets in CLIP_benchmark's webdataset layout.

    root/classnames.txt                          one class per line, line number = class id
    root/zeroshot_classification_templates.txt   one template per line, with `{c}` for the class name
    root/{train,test}/nshards.txt, 0.tar, 1.tar ...   members <key>.jpg|png|webp and <key>.cls

Shapes: B batch, N samples, H x W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from megacid.data.decode import BadSample, decode_image
from megacid.data.index import ShardIndex, ShardReader, load_index
from megacid.errors import UserError
from megacid.models.clip import Transform

Sample = tuple[torch.Tensor, int]


@dataclass(frozen=True)
class Benchmark:
    """A classification set on disk; `split` opens its splits."""

    root: Path
    name: str
    classnames: list[str]
    templates: list[str]

    @property
    def num_classes(self) -> int:
        return len(self.classnames)

    def split(self, name: str, transform: Transform) -> "Split":
        """The samples of `root/name`. Raises UserError if it is missing, incomplete or in another layout."""
        return Split(_open_split(self.root / name), transform, self.num_classes)


class Split(Dataset[Sample]):
    """Item i: (image [3, H, W] float32, class id). A bad sample raises UserError: a score must cover all samples."""

    def __init__(self, index: ShardIndex, transform: Transform, num_classes: int) -> None:
        self.index = index
        self.reader = ShardReader(index)
        self.transform = transform
        self.num_classes = num_classes
        self.starts = torch.from_numpy(index.starts)

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitem__(self, item: int) -> Sample:
        shard = int(torch.searchsorted(self.starts, item, right=True)) - 1
        row = item - int(self.starts[shard])
        name, key = self.index.names[shard], self.index.table(shard).keys[row]
        where = f"{self.index.root / name}.tar, sample {key}"
        try:
            image = decode_image(self.reader.read(shard, row, "image"), shard=name, key=key)
            text = self.reader.read(shard, row, "cls")
        except BadSample as error:
            raise UserError(f"{where} cannot be evaluated ({error.reason}): repair or replace the tar") from error
        if not text.strip().isdigit():
            raise UserError(f"{where}: class is {text[:20]!r}, expected a class id such as 3 in the .cls member")
        label = int(text)
        if label >= self.num_classes:
            raise UserError(
                f"{where}: class id is {label}, expected 0 to {self.num_classes - 1} as classnames.txt names "
                f"{self.num_classes} classes: use files of the same set"
            )
        return self.transform(image), label

    def batches(
        self, batch_size: int, *, workers: int = 0, describe: str = ""
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches (image [B, 3, H, W], label [B] int64) in the order of the tars, with a progress bar on a terminal."""
        loader: DataLoader[Sample] = DataLoader(self, batch_size=batch_size, num_workers=workers)
        with tqdm(total=len(self), unit="img", desc=describe, disable=None) as bar:
            for image, label in loader:
                yield image, label
                bar.update(len(label))


def load_benchmark(root: Path | str, name: str | None = None) -> Benchmark:
    """Open a set; `name` (default: the directory's name) identifies it in results. UserError if a file is missing."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"dataset root {root} is not a directory, expected CLIP_benchmark's webdataset layout")
    kind = root / "dataset_type.txt"
    if kind.is_file() and kind.read_text().strip() != "classification":
        raise UserError(f"{kind} says {kind.read_text().strip()!r}, expected 'classification': use another set")
    classnames = _lines(root / "classnames.txt")
    templates = _lines(root / "zeroshot_classification_templates.txt")
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"{root}: template {template!r} lacks the placeholder {{c}} for the class name: add it")
    return Benchmark(root, name or root.resolve().name, classnames, templates)


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"{file} is missing, expected CLIP_benchmark's webdataset layout: add it")
    lines = file.read_text(encoding="utf-8").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines or not all(line.strip() for line in lines):
        raise UserError(f"{file} has an empty line or no lines, expected one entry per line")
    return [line.strip() for line in lines]


def _open_split(directory: Path) -> ShardIndex:
    if not directory.is_dir():
        raise UserError(
            f"split {directory} is missing, but the task needs it (some published sets have no train split)"
        )
    tars = [file.name for file in directory.glob("*.tar")]
    count = directory / "nshards.txt"
    if not count.is_file() or not count.read_text().strip().isdigit():
        raise UserError(f"{count} is missing or not a number, expected the number of tars: it may be {len(tars)}")
    if len(tars) != int(count.read_text()):
        raise UserError(
            f"{directory} holds {len(tars)} tars, {count} says {count.read_text().strip()}: download it again"
        )
    index = load_index(directory)
    if index.dropped:
        raise UserError(f"{directory} has incomplete samples ({index.dropped}): repair the tars")
    return index
