"""Positions of the stream to batches of pairs: what runs in a loader worker.

Shapes: b micro-batch, T tokens, Dt teacher width, l labels per sample.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from megacid.data.batch import Batch
from megacid.data.decode import BadSample, decode_caption, decode_image
from megacid.data.index import ShardIndex, ShardReader
from megacid.data.lru import LRUCache
from megacid.data.order import SampleOrder, derive_key
from megacid.data.side_tables import KeepTable, LabelTable, TeacherTable
from megacid.errors import UserError

_BLACK = (64, 64)  # pixels of the image that a dummy batch is made of


class Pairs(Dataset[Any]):
    """Positions to a Batch; lives in the worker."""

    def __init__(
        self,
        index: ShardIndex,
        order: SampleOrder,
        rows_of: Callable[[int], np.ndarray],
        *,
        transform: Callable[[Image.Image], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        seeded: bool,
        seed: int,
        probe_stride: int,
        max_probes: int,
        max_pixels: float,
        teacher: TeacherTable | None,
        labels: LabelTable | None,
    ) -> None:
        self.index, self.order, self.rows_of = index, order, rows_of
        self.transform, self.tokenize, self.seeded, self.seed = transform, tokenize, seeded, seed
        self.probe_stride, self.max_probes, self.max_pixels = probe_stride, max_probes, max_pixels
        self.teacher, self.labels = teacher, labels
        self.reader = ShardReader(index)
        self.starts = index.starts

    def __getitems__(self, positions: list[int]) -> Batch | str:
        """A Batch, or the reason why the run has to stop (an exception would lose its text on the way to the
        trainer)."""
        try:
            return self._batch(positions)
        except (UserError, OSError) as error:  # a side table, opened only now, that is damaged or was cut
            return str(error)

    def _batch(self, positions: list[int]) -> Batch | str:
        located = list(zip(*(part.tolist() for part in self.order.locate_many(np.array(positions, np.int64)))))
        replaced: list[str] = []
        images, captions, used = [], [], []
        for position, (epoch, shard, nth) in zip(positions, located):
            failures = 0
            while True:
                row = int(self.rows_of(shard)[nth])
                try:
                    image, caption = self._read(epoch, shard, row)
                    break
                except BadSample as bad:
                    replaced.append(str(bad))
                    failures += 1
                    if failures >= self.max_probes:
                        return (
                            f"{failures} bad samples in a row, the last one {bad}: the data is damaged, see "
                            f"tools/index_shards.py --verify {self.index.root}"
                        )
                    epoch, shard, nth = self.order.locate(self._probe(position, failures))
            images.append(image)
            captions.append(caption)
            used.append((shard, row))
        shards, rows = np.array(used, np.int64).T
        teacher_image, teacher_text = self._teacher(shards, rows)
        return Batch(
            image=torch.stack(images),
            text=self.tokenize(captions),
            label=self._labels(shards, rows),
            teacher_image=teacher_image,
            teacher_text=teacher_text,
            sample_id=torch.from_numpy(self.starts[shards] + rows),
            replaced=tuple(replaced),
        )

    def dummy(self, size: int, failure: str) -> Batch:
        """A batch of that many samples with nothing in it: black images, empty captions, labels and ids -1, one unit
        vector for all teacher embeddings."""
        image = self._augmented(Image.new("RGB", _BLACK), 0)
        width = 0 if self.labels is None else self.labels.labels_per_sample
        dim = 0 if self.teacher is None else self.teacher.dim
        unit = torch.full((size, dim), max(dim, 1) ** -0.5)
        return Batch(
            image=image.expand(size, *image.shape).contiguous(),
            text=self.tokenize([""] * size),
            label=None if self.labels is None else torch.full((size, width) if width > 1 else (size,), -1),
            teacher_image=None if self.teacher is None else unit,
            teacher_text=unit.clone() if self.teacher is not None and self.teacher.has_text else None,
            sample_id=torch.full((size,), -1),
            failure=failure,
        )

    def _probe(self, position: int, attempt: int) -> int:
        """The stand-in for a bad sample: a fixed walk through its own epoch that meets every sample once, and begins
        about one global batch further on, so that no sample is likely to appear twice in a batch."""
        epoch, offset = divmod(position, self.order.num_samples)
        return epoch * self.order.num_samples + (offset + attempt * self.probe_stride) % self.order.num_samples

    def _read(self, epoch: int, shard: int, row: int) -> tuple[Tensor, str]:
        name, key = self.index.names[shard], self.index.table(shard).keys[row]
        if self.teacher is not None and not self.teacher.has(shard, np.array([row])).all():
            raise BadSample(name, key, "no teacher embedding")
        data = self.reader.read(shard, row, "image")
        image = decode_image(data, max_pixels=self.max_pixels, shard=name, key=key)
        caption = decode_caption(self.reader.read(shard, row, "text"), shard=name, key=key)
        return self._augmented(image, derive_key(self.seed, epoch, int(self.starts[shard]) + row) >> 1), caption

    def _augmented(self, image: Image.Image, seed: int) -> Tensor:
        if not self.seeded:
            return self.transform(image)
        # Only the CPU generator: torch.manual_seed would also reset the generators of the devices.
        python_state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            random.seed(seed)
            try:
                return self.transform(image)
            finally:
                random.setstate(python_state)

    def _labels(self, shards: np.ndarray, rows: np.ndarray) -> Tensor | None:
        if self.labels is None:
            return None
        width = self.labels.labels_per_sample
        out = np.empty((len(rows), width) if width > 1 else len(rows), np.int64)
        for shard in np.unique(shards):
            out[shards == shard] = self.labels.rows(int(shard), rows[shards == shard])
        return torch.from_numpy(out)

    def _teacher(self, shards: np.ndarray, rows: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
        if self.teacher is None:
            return None, None
        image = np.empty((len(rows), self.teacher.dim), np.float32)
        text = np.empty_like(image) if self.teacher.has_text else None
        for shard in np.unique(shards):
            here = shards == shard
            image[here], text_rows = self.teacher.rows(int(shard), rows[here])
            if text is not None:
                text[here] = text_rows
        return torch.from_numpy(image), None if text is None else torch.from_numpy(text)


class UsableRows:
    """Rows of a shard that take part: kept, and with a text.

    A class, not a closure, so that spawned workers can have it.
    """

    def __init__(self, index: ShardIndex, keep: KeepTable | None) -> None:
        self.index, self.keep = index, keep
        self._rows: LRUCache[np.ndarray] = LRUCache(64)

    def __call__(self, shard: int) -> np.ndarray:
        return self._rows.get(shard, lambda: self._find(shard))

    def _find(self, shard: int) -> np.ndarray:
        rows = np.arange(int(self.index.sizes[shard])) if self.keep is None else self.keep.kept(shard)
        if self.index.shards[shard]["without_text"]:
            rows = rows[self.index.table(shard).text[rows, 1] >= 0]
        return rows

    def count(self, shard: int) -> int:
        """How many; without opening the shard where that can be avoided."""
        if self.index.shards[shard]["without_text"]:
            return len(self(shard))
        return int(self.index.sizes[shard] if self.keep is None else self.keep.counts[shard])
