"""Reading of image-text pairs: positions of the stream to batches, in the loader workers.

Shapes: b micro-batch, T tokens, l labels per sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from megacid.data.augmentation import Views, drawn_caption, generators_restored, seed_generators
from megacid.data.batch import Batch
from megacid.data.decode import MAX_PIXELS, BadSample, decode_image
from megacid.data.ensemble import TeacherEnsemble
from megacid.data.index import ShardIndex, ShardReader
from megacid.data.joined import JoinedTable
from megacid.data.lru import open_file_budget
from megacid.data.order import SampleOrder, derive_key
from megacid.data.side_tables import KeepTable, LabelTable, TeacherTable
from megacid.errors import UserError

_BLACK = (64, 64)  # pixels of the image in a dummy batch


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How pairs are ordered, read and joined with the side tables; the same on every rank.

    Args:
        transform: PIL RGB image, or what read_image returns, -> uint8 [3, H, W].
        read_image: takes the arguments of `decode_image`, the default, and raises BadSample as it does.
        tokenize: list of b captions -> int64 [b, T].
        seed: decides the order and, with seeded_transform, the augmentation.
        seeded_transform: the transform is random. The global generators of torch and Python are seeded for every sample
            from (seed, epoch, sample), so the result does not depend on rank or worker, and restored after the batch.
            If the teacher has views, (seed, epoch, sample) draws one of them, and its own seed takes that place; of
            several captions it draws one, too.
        workers: processes that read and decode; 0 reads in this process.
        worker_timeout_s: seconds without a batch after which the workers count as lost.
        prefetch: batches that each worker prepares ahead.
        teacher, labels: side tables; None leaves their fields of the batch None.
        keep: side table of the samples to use; None uses all.
        error_budget: tolerated share of bad samples on a rank (of at least 10,000 samples).
        max_consecutive_errors: bad samples in a row, while looking for one replacement, that end the run.
        max_image_pixels: largest width x height that is decoded.
        block_shards: number of shards that are shuffled with each other, see `SampleOrder`, and whose files stay open.
        pin_memory: return batches in page-locked memory, for asynchronous copies to a GPU.
    """

    transform: Callable[[Any], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    seed: int
    read_image: Callable[..., Any] = decode_image
    seeded_transform: bool = False
    workers: int = 0
    worker_timeout_s: float = 120.0
    prefetch: int = 2
    teacher: TeacherTable | TeacherEnsemble | None = None
    labels: LabelTable | None = None
    keep: KeepTable | None = None
    error_budget: float = 0.001
    max_consecutive_errors: int = 100
    max_image_pixels: float = MAX_PIXELS
    block_shards: int = 64
    pin_memory: bool = False


class Choice(NamedTuple):
    """What an epoch reads of a sample: the seed of its transform, its view (0 without views) and its caption."""

    seed: int
    view: int
    caption: int


def other_captions(captions: list[str], embedded: int, teacher: Path) -> str | None:
    """Why a sample cannot be used when the teacher has embedded another number of captions; None when it can."""
    if embedded == len(captions):
        return None
    return f"{len(captions)} captions, of which the teacher has embedded {embedded} in {teacher}"


@dataclass(frozen=True)
class _Key:
    """The key of a sample, which is looked up in the index only when a message is made."""

    index: ShardIndex
    shard: int
    row: int

    def __str__(self) -> str:
        return self.index.shown_key(self.shard, self.row)


class Teacher(Protocol):
    """What a batch takes from a teacher, or from several: see `TeacherTable`."""

    @property
    def dim(self) -> int: ...
    @property
    def has_text(self) -> bool: ...
    @property
    def views(self) -> Views | None: ...


class PairBatches:
    """Turns decoded pairs into tensors: augmentation, and the fields of a batch, also of one without samples.

    Args:
        teacher: None: no teacher.
        teacher_dtype: of the embeddings in a batch.
        labels_per_sample: 0: no labels.
    """

    def __init__(
        self, options: PairOptions, teacher: Teacher | None, teacher_dtype: np.dtype, labels_per_sample: int
    ) -> None:
        self.options, self.teacher_dtype, self.labels_per_sample = options, teacher_dtype, labels_per_sample
        self.teacher_dim = None if teacher is None else teacher.dim
        self.has_teacher_text = teacher is not None and teacher.has_text
        self.views = None if teacher is None else teacher.views

    def dummy(self, size: int, failure: str) -> Batch:
        """A batch of `size` placeholders: black images, empty captions, labels and ids -1, unit teacher embeddings."""
        with self.generators():
            image = self.transformed(Image.new("RGB", _BLACK), 0)
        width, dim = self.labels_per_sample, self.teacher_dim or 0
        unit = torch.from_numpy(np.full((size, dim), max(dim, 1) ** -0.5, self.teacher_dtype))
        return Batch(
            image=image.expand(size, *image.shape).contiguous(),
            text=self.options.tokenize([""] * size),
            label=None if width == 0 else torch.full((size, width) if width > 1 else (size,), -1),
            teacher_image=None if self.teacher_dim is None else unit,
            teacher_text=unit.clone() if self.has_teacher_text else None,
            sample_id=torch.full((size,), -1),
            failure=failure,
        )

    def batch(
        self,
        images: list[Tensor],
        captions: list[str],
        labels: np.ndarray | None,
        embeddings: tuple[np.ndarray | None, np.ndarray | None],
        sample_id: np.ndarray,
        replaced: list[str],
    ) -> Batch:
        """The batch of b pairs. labels: [b, l or more]; embeddings: of the teacher, image and text, [b, Dt] each."""
        teacher_image, teacher_text = embeddings
        return Batch(
            image=torch.stack(images),
            text=self.options.tokenize(captions),
            label=self._label(labels),
            teacher_image=None if teacher_image is None else torch.from_numpy(teacher_image),
            teacher_text=None if teacher_text is None else torch.from_numpy(teacher_text),
            sample_id=torch.from_numpy(sample_id),
            replaced=tuple(replaced),
        )

    def being_read(self) -> str:
        """The samples that the workers are reading, as text; "" for none."""
        return ""

    def choose(self, epoch: int, sample: int, captions: int, seed_of: Callable[[int], int]) -> Choice:
        """What an epoch reads of a sample, which has so many captions. seed_of: the seed of a view."""
        draw = self.options.seed, epoch, sample
        seed, view, caption = derive_key(*draw) >> 1, 0, drawn_caption(*draw, captions)
        if self.views is not None:
            view = self.views.drawn(*draw)
            seed = seed_of(view)
        return Choice(seed, view, caption)

    def generators(self) -> contextlib.AbstractContextManager[None]:
        """Restores the global generators, which are seeded for every sample of a batch."""
        return generators_restored() if self.options.seeded_transform else contextlib.nullcontext()

    def transformed(self, image: Any, seed: int) -> Tensor:
        """A decoded image as uint8 [3, H, W]; seed: of a random transform."""
        if self.options.seeded_transform:
            seed_generators(seed)
        return self.options.transform(image)

    def _label(self, labels: np.ndarray | None) -> Tensor | None:
        if labels is None:
            return None
        labels = labels[:, : self.labels_per_sample].astype(np.int64)
        return torch.from_numpy(labels[:, 0] if labels.shape[1] == 1 else labels)


class Pairs(PairBatches, Dataset[Any]):
    """Maps a list of positions to a Batch; runs in the loader workers.

    replacement_stride: coprime to the number of samples.
    """

    def __init__(
        self, index: ShardIndex, order: SampleOrder, joined: JoinedTable, options: PairOptions, replacement_stride: int
    ) -> None:
        teacher, labels = joined.sources.teacher, joined.sources.labels
        super().__init__(options, teacher, joined.teacher_dtype, labels.labels_per_sample if labels else 0)
        self.index, self.order, self.joined, self.teacher = index, order, joined, teacher
        self.replacement_stride = replacement_stride
        self.reader = ShardReader(index, max_open=open_file_budget(min(options.block_shards, len(index.names))))
        self.starts = index.starts
        # Shard and row that each worker is reading, row -1 for none: in shared memory, for messages about lost workers.
        self._reading = RawArray("q", [-1] * 2 * max(1, options.workers))

    def being_read(self) -> str:
        """The samples that the workers are reading, as text; "" for none."""
        names = []
        for shard, row in zip(self._reading[::2], self._reading[1::2]):
            if row >= 0:
                names.append(f"{self.index.names[shard]}/{self.index.shown_key(shard, row)}")
        return ", ".join(names)

    def __getitems__(self, positions: list[int]) -> Batch | str:
        """The batch, or the reason why the run has to stop (an exception would lose its text between processes)."""
        try:
            with self.generators():
                return self._batch(positions)
        except (UserError, OSError) as error:  # the joined table or embeddings are damaged or were cut
            return str(error)
        finally:
            self._note(-1, -1)

    def _note(self, shard: int, row: int) -> None:
        worker = get_worker_info()
        slot = 0 if worker is None else 2 * worker.id
        self._reading[slot : slot + 2] = (shard, row)

    def _batch(self, positions: list[int]) -> Batch | str:
        epochs, shards, numbers = self.order.locate_many(np.array(positions, np.int64))
        rows = self.joined.rows(shards, numbers)
        replaced: list[str] = []
        images, captions, drawn = [], [], []
        for at, position in enumerate(positions):
            failures = 0
            while True:
                try:
                    image, caption, choice = self._read(int(epochs[at]), int(shards[at]), rows[at])
                    break
                except BadSample as bad:
                    replaced.append(str(bad))
                    failures += 1
                    if failures >= self.options.max_consecutive_errors:
                        return (
                            f"{failures} bad samples in a row, the last one {bad}: the data is damaged, see "
                            f"tools/index_shards.py --verify {self.index.root}"
                        )
                    other = np.array([self._replacement(position, failures)])
                    epochs[at], shards[at], numbers[at] = (int(part[0]) for part in self.order.locate_many(other))
                    rows[at] = self.joined.rows(shards[at : at + 1], numbers[at : at + 1])[0]
            images.append(image)
            captions.append(caption)
            drawn.append((choice.view, choice.caption))
        embeddings: tuple[np.ndarray | None, np.ndarray | None] = None, None
        if self.teacher is not None:
            embeddings = self.joined.embeddings(shards, rows, np.array(drawn, np.int64))
        labels = rows["labels"] if self.labels_per_sample else None
        return self.batch(images, captions, labels, embeddings, self.starts[shards] + rows["row"], replaced)

    def _replacement(self, position: int, attempt: int) -> int:
        """The position that replaces a bad sample: a fixed walk through its own epoch that visits every sample once.

        It begins about one global batch ahead, so a sample is unlikely to appear twice in a batch.
        """
        epoch, offset = divmod(position, self.order.num_samples)
        return epoch * self.order.num_samples + (offset + attempt * self.replacement_stride) % self.order.num_samples

    def _read(self, epoch: int, shard: int, sample: np.void) -> tuple[Tensor, str, Choice]:
        """Image and caption of a sample, a row of the joined table, in an epoch."""
        row = int(sample["row"])
        self._note(shard, row)
        data = self.reader.read_at(shard, row, "image", *sample["image"].tolist())
        name, key = self.index.names[shard], _Key(self.index, shard, row)
        image = self.options.read_image(data, max_pixels=self.options.max_image_pixels, shard=name, key=key)
        member = self.reader.read_at(shard, row, "text", *sample["text"].tolist())
        captions = self.reader.decode_captions(shard, row, member)
        for count, teacher in zip(sample["captions"].tolist(), self.joined.sources.teachers):
            if (reason := other_captions(captions, count, teacher.directory)) is not None:
                raise self.reader.bad_sample(shard, row, reason)
        number = int(self.starts[shard]) + row
        choice = self.choose(epoch, number, len(captions), lambda view: int(sample["seeds"][view]))
        return self.transformed(image, choice.seed), captions[choice.caption], choice
