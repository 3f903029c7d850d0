"""Reading of image-text pairs: positions of the stream to batches, in the loader workers.

Shapes: b micro-batch, T tokens, Dt teacher width, l labels per sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from megacid.data.augmentation import drawn_caption, generators_restored, seed_generators
from megacid.data.batch import Batch
from megacid.data.decode import MAX_PIXELS, BadSample, decode_image
from megacid.data.ensemble import TeacherEnsemble
from megacid.data.index import ShardIndex, ShardReader
from megacid.data.lru import LRUCache
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
        block_shards: number of shards that are shuffled with each other, see `SampleOrder`.
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
    block_shards: int = 16
    pin_memory: bool = False


class Pairs(Dataset[Any]):
    """Maps a list of positions to a Batch; runs in the loader workers.

    usable_rows: shard -> int64 usable rows; replacement_stride: coprime to the number of samples.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: SampleOrder,
        usable_rows: Callable[[int], np.ndarray],
        options: PairOptions,
        replacement_stride: int,
    ) -> None:
        self.index, self.order, self.usable_rows, self.options = index, order, usable_rows, options
        self.replacement_stride = replacement_stride
        self.teacher, self.labels = options.teacher, options.labels
        self.reader = ShardReader(index)
        self.starts = index.starts
        # Shard and row that each worker is reading, row -1 for none: in shared memory, for messages about lost workers.
        self._reading = RawArray("q", [-1] * 2 * max(1, options.workers))

    def being_read(self) -> str:
        """The samples that the workers are reading, as text; "" for none."""
        names = []
        for shard, row in zip(self._reading[::2], self._reading[1::2]):
            if row >= 0:
                with contextlib.suppress(UserError):  # this process may not have read that table before
                    names.append(f"{self.index.names[shard]}/{self.index.table(shard).keys[row]}")
        return ", ".join(names)

    def __getitems__(self, positions: list[int]) -> Batch | str:
        """The batch, or the reason why the run has to stop (an exception would lose its text between processes)."""
        try:
            with self._generators():
                return self._batch(positions)
        except (UserError, OSError) as error:  # a side table, opened only now, is damaged or was cut
            return str(error)
        finally:
            self._note(-1, -1)

    def _note(self, shard: int, row: int) -> None:
        worker = get_worker_info()
        slot = 0 if worker is None else 2 * worker.id
        self._reading[slot : slot + 2] = (shard, row)

    def _batch(self, positions: list[int]) -> Batch | str:
        located = list(zip(*(part.tolist() for part in self.order.locate_many(np.array(positions, np.int64)))))
        replaced: list[str] = []
        images, captions, used, drawn = [], [], [], []
        for position, (epoch, shard, number) in zip(positions, located):
            failures = 0
            while True:
                row = int(self.usable_rows(shard)[number])
                try:
                    image, caption, draw = self._read(epoch, shard, row)
                    break
                except BadSample as bad:
                    replaced.append(str(bad))
                    failures += 1
                    if failures >= self.options.max_consecutive_errors:
                        return (
                            f"{failures} bad samples in a row, the last one {bad}: the data is damaged, see "
                            f"tools/index_shards.py --verify {self.index.root}"
                        )
                    epoch, shard, number = self.order.locate(self._replacement(position, failures))
            images.append(image)
            captions.append(caption)
            used.append((shard, row))
            drawn.append(draw)
        shards, rows = np.array(used, np.int64).T
        teacher_image, teacher_text = self._teacher_rows(shards, rows, np.array(drawn, np.int64))
        return Batch(
            image=torch.stack(images),
            text=self.options.tokenize(captions),
            label=self._label_rows(shards, rows),
            teacher_image=teacher_image,
            teacher_text=teacher_text,
            sample_id=torch.from_numpy(self.starts[shards] + rows),
            replaced=tuple(replaced),
        )

    def dummy(self, size: int, failure: str) -> Batch:
        """A batch of `size` placeholders: black images, empty captions, labels and ids -1, unit teacher embeddings."""
        with self._generators():
            image = self._transform(Image.new("RGB", _BLACK), 0)
        width = 0 if self.labels is None else self.labels.labels_per_sample
        dim, dtype = (0, np.dtype(np.float16)) if self.teacher is None else (self.teacher.dim, self.teacher.dtype)
        unit = torch.from_numpy(np.full((size, dim), max(dim, 1) ** -0.5, dtype))
        return Batch(
            image=image.expand(size, *image.shape).contiguous(),
            text=self.options.tokenize([""] * size),
            label=None if self.labels is None else torch.full((size, width) if width > 1 else (size,), -1),
            teacher_image=None if self.teacher is None else unit,
            teacher_text=unit.clone() if self.teacher is not None and self.teacher.has_text else None,
            sample_id=torch.full((size,), -1),
            failure=failure,
        )

    def _replacement(self, position: int, attempt: int) -> int:
        """The position that replaces a bad sample: a fixed walk through its own epoch that visits every sample once.

        It begins about one global batch ahead, so a sample is unlikely to appear twice in a batch.
        """
        epoch, offset = divmod(position, self.order.num_samples)
        return epoch * self.order.num_samples + (offset + attempt * self.replacement_stride) % self.order.num_samples

    def _read(self, epoch: int, shard: int, row: int) -> tuple[Tensor, str, tuple[int, int]]:
        """Image and caption of a sample in an epoch, and the numbers of its view (0 without views) and its caption."""
        self._note(shard, row)
        name, key = self.index.names[shard], self.index.table(shard).keys[row]
        teachers = () if self.teacher is None else self.teacher.tables
        for teacher in teachers:
            if not teacher.has(shard, np.array([row])).all():
                raise BadSample(name, key, f"no teacher embedding in {teacher.directory}")
        data = self.reader.read(shard, row, "image")
        image = self.options.read_image(data, max_pixels=self.options.max_image_pixels, shard=name, key=key)
        captions = self.reader.captions(shard, row)
        for teacher in teachers:
            if (count := teacher.captions(shard, row)) not in (None, len(captions)):
                reason = f"{len(captions)} captions, of which the teacher has embedded {count} in {teacher.directory}"
                raise BadSample(name, key, reason)
        draw = self.options.seed, epoch, int(self.starts[shard]) + row
        seed, view, caption = derive_key(*draw) >> 1, 0, drawn_caption(*draw, len(captions))
        if self.teacher is not None and (views := self.teacher.views) is not None:
            view = views.drawn(*draw)
            seed = views.seed_of(key, view)
        return self._transform(image, seed), captions[caption], (view, caption)

    def _transform(self, image: Any, seed: int) -> Tensor:
        if self.options.seeded_transform:
            seed_generators(seed)
        return self.options.transform(image)

    def _generators(self) -> contextlib.AbstractContextManager[None]:
        """Restores the global generators, which are seeded for every sample of a batch."""
        return generators_restored() if self.options.seeded_transform else contextlib.nullcontext()

    def _label_rows(self, shards: np.ndarray, rows: np.ndarray) -> Tensor | None:
        if self.labels is None:
            return None
        width = self.labels.labels_per_sample
        out = np.empty((len(rows), width) if width > 1 else len(rows), np.int64)
        for shard in np.unique(shards):
            out[shards == shard] = self.labels.rows(int(shard), rows[shards == shard])
        return torch.from_numpy(out)

    def _teacher_rows(
        self, shards: np.ndarray, rows: np.ndarray, drawn: np.ndarray
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.teacher is None:
            return None, None
        image = np.empty((len(rows), self.teacher.dim), self.teacher.dtype)
        text = np.empty_like(image) if self.teacher.has_text else None
        for shard in np.unique(shards):
            here = shards == shard
            image[here], text_rows = self.teacher.rows(int(shard), rows[here], drawn[here])
            if text is not None:
                text[here] = text_rows
        return torch.from_numpy(image), None if text is None else torch.from_numpy(text)


class UsableRows:
    """Rows of a shard that are kept, have a text, and have an embedding of each teacher.

    A class because spawned workers cannot unpickle a closure.
    """

    def __init__(
        self, index: ShardIndex, keep: KeepTable | None, teacher: TeacherTable | TeacherEnsemble | None = None
    ) -> None:
        self.index, self.keep = index, keep
        self._rows: LRUCache[np.ndarray] = LRUCache(64)
        tables = () if teacher is None else teacher.tables
        # tools/balance.py keeps no sample without an embedding.
        self.teachers = [t for t in tables if keep is None or keep.embeddings != t.directory.resolve()]

    def __call__(self, shard: int) -> np.ndarray:
        """int64 rows of the tar, ascending. UserError when a teacher's files disagree about the skipped samples."""
        return self._rows.get(shard, lambda: self._checked(shard))

    def _checked(self, shard: int) -> np.ndarray:
        rows = self._find(shard)
        if len(rows) != self.counts[shard, 0]:  # the order of all samples was derived from that number
            raise UserError(
                f"{self.index.names[shard]}.tar has {len(rows)} usable samples by the metadata/ of its teachers, "
                f"expected {self.counts[shard, 0]} by their failures/: run tools/embed.py again for "
                f"{', '.join(str(teacher.directory) for teacher in self.teachers)}"
            )
        return rows

    def _find(self, shard: int) -> np.ndarray:
        rows = self._rows_with_text(shard)
        usable = np.ones(len(rows), bool)
        for teacher in self.teachers:
            if (failures := teacher.failures(shard)) == 0:
                continue
            has = teacher.has(shard, rows)
            if self._is_whole(shard) and failures is not None and has.sum() != len(rows) - failures:
                raise UserError(
                    f"{teacher.directory}/meta.json counts {failures} samples of {self.index.names[shard]}.tar "
                    f"without an embedding, its metadata {np.sum(~has)}: run tools/embed.py again"
                )
            usable &= has
        return rows[usable]

    def _rows_with_text(self, shard: int) -> np.ndarray:
        rows = np.arange(int(self.index.sizes[shard])) if self.keep is None else self.keep.kept(shard)
        if self.index.shards[shard]["without_text"]:
            rows = rows[self.index.table(shard).text[rows, 1] >= 0]
        return rows

    def _is_whole(self, shard: int) -> bool:
        """Whether all samples of the tar are kept and have a text."""
        return self.keep is None and not self.index.shards[shard]["without_text"]

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [shards, 2]: usable rows of each tar, and rows that only lack an embedding."""
        return np.array([self._count(shard) for shard in range(len(self.index.names))], np.int64)

    def _count(self, shard: int) -> tuple[int, int]:
        if self.index.shards[shard]["without_text"]:
            with_text = len(self._rows_with_text(shard))
        else:
            with_text = int(self.index.sizes[shard] if self.keep is None else self.keep.counts[shard])
        lacking = self._count_lacking(shard, with_text)
        return with_text - lacking, lacking

    def _count_lacking(self, shard: int, with_text: int) -> int:
        """Rows that only lack an embedding. Opens the least that tells: runs have tens of thousands of tars."""
        short = [teacher for teacher in self.teachers if teacher.failures(shard) != 0]
        if not short:
            return 0
        if self._is_whole(shard) and len(short) == 1 and (count := short[0].failures(shard)) is not None:
            return count
        failed = [keys for teacher in short if (keys := teacher.failed_keys(shard)) is not None]
        if len(failed) < len(short):
            return with_text - len(self._find(shard))
        lacking = set.union(*failed)
        if self._is_whole(shard):
            return len(lacking)
        names = self.index.table(shard).keys
        return sum(names[row] in lacking for row in self._rows_with_text(shard))
