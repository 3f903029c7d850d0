"""Reading of the pairs of indexed sources: positions of the stream to batches, in the loader workers.

Shapes: b micro-batch, p samples of one source in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from megacid.data.batch import Batch
from megacid.data.decode import BadSample
from megacid.data.index import ShardIndex, ShardReader
from megacid.data.lru import open_file_budget
from megacid.data.mixture import Mixture
from megacid.data.order import SampleOrder
from megacid.data.pairs import PairBatches, PairOptions, other_captions
from megacid.data.sources import Source
from megacid.errors import UserError


@dataclass(frozen=True)
class _Key:
    """The key of a sample, which is looked up in the index only when a message is made."""

    index: ShardIndex
    shard: int
    row: int

    def __str__(self) -> str:
        return self.index.shown_key(self.shard, self.row)


class SourceReader:
    """Reads the samples of one source, in an order of its own.

    Args:
        seed: decides the order of this source.
        first_id: sample id of its first sample.
        replaced_after: least distance, in positions of this source, of a bad sample and the first that replaces it.
        readers: number of sources that share the limit on open files.
    """

    def __init__(
        self, source: Source, options: PairOptions, *, seed: int, first_id: int, replaced_after: int, readers: int
    ) -> None:
        self.source, self.index, self.joined = source, source.index, source.joined
        self.order = SampleOrder(self.joined.counts[:, 0], seed=seed, block_shards=options.block_shards)
        self.first_ids = first_id + self.index.starts
        self._options = options
        self._stride = _coprime(replaced_after, self.order.num_samples)
        tars = min(options.block_shards, len(self.index.names))
        self._reader = ShardReader(self.index, max_open=open_file_budget(tars, readers))

    def replacement(self, place: int, attempt: int) -> int:
        """The position that replaces a bad sample: a fixed walk through its own epoch that visits every sample once.

        It begins about one global batch ahead, so a sample is unlikely to appear twice in a batch.
        """
        epoch, offset = divmod(place, self.order.num_samples)
        return epoch * self.order.num_samples + (offset + attempt * self._stride) % self.order.num_samples

    def name_of(self, shard: int, row: int) -> str:
        """For messages: source, tar and key of a row of the index."""
        return self.source.full_name(f"{self.index.names[shard]}/{self.index.shown_key(shard, row)}")

    def read(self, shard: int, sample: np.void) -> tuple[Any, list[str]]:
        """The decoded image and all captions of a sample, a row of the joined table. Raises BadSample."""
        row = int(sample["row"])
        data = self._reader.read_at(shard, row, "image", *sample["image"].tolist())
        name, key = self.index.names[shard], _Key(self.index, shard, row)
        image = self._options.read_image(data, max_pixels=self._options.max_image_pixels, shard=name, key=key)
        member = self._reader.read_at(shard, row, "text", *sample["text"].tolist())
        captions = self._reader.decode_captions(shard, row, member)
        for count, teacher in zip(sample["captions"].tolist(), self.joined.sources.teachers):
            if (reason := other_captions(captions, count, teacher.directory)) is not None:
                raise self._reader.bad_sample(shard, row, reason)
        return image, captions


class _Part:
    """The samples of a batch that one source gives.

    Args:
        number: of the source.
        at: int64 [p], their places in the batch.
        positions: int64 [p], in the stream of the source.
    """

    def __init__(self, reader: SourceReader, number: int, at: np.ndarray, positions: np.ndarray) -> None:
        self.reader, self.number, self.at, self._positions = reader, number, at, positions
        self.epochs, self.shards, numbers = reader.order.locate_many(positions)
        self.rows = reader.joined.rows(self.shards, numbers)
        self.drawn = np.zeros((len(at), 2), np.int64)  # view and caption

    @property
    def sample_ids(self) -> np.ndarray:
        """int64 [p]."""
        ids: np.ndarray = self.reader.first_ids[self.shards] + self.rows["row"]
        return ids

    def replace(self, i: int, attempt: int) -> None:
        """Take another sample in place of sample i."""
        position = np.array([self.reader.replacement(int(self._positions[i]), attempt)])
        self.epochs[i], self.shards[i], number = (int(part[0]) for part in self.reader.order.locate_many(position))
        self.rows[i] = self.reader.joined.rows(self.shards[i : i + 1], np.array([number]))[0]


class Pairs(PairBatches, Dataset[Any]):
    """Maps a list of positions to a Batch; runs in the loader workers.

    mixture: divides the positions among the sources of `readers`, which have the same teachers and clusters.
    """

    def __init__(self, readers: Sequence[SourceReader], mixture: Mixture, options: PairOptions) -> None:
        teacher, labels = readers[0].source.teacher, readers[0].source.labels
        dtype = np.result_type(*(reader.joined.teacher_dtype for reader in readers))
        super().__init__(options, teacher, dtype, labels.labels_per_sample if labels else 0)
        self.readers, self.mixture = readers, mixture
        # Source, shard and row that each worker is reading, row -1 for none: in shared memory, for messages about lost
        # workers.
        self._reading = RawArray("q", [-1] * 3 * max(1, options.workers))

    def being_read(self) -> str:
        """The samples that the workers are reading, as text; "" for none."""
        names = []
        for number, shard, row in zip(self._reading[::3], self._reading[1::3], self._reading[2::3]):
            if row >= 0:
                names.append(self.readers[number].name_of(shard, row))
        return ", ".join(names)

    def __getitems__(self, positions: list[int]) -> Batch | str:
        """The batch, or the reason why the run has to stop (an exception would lose its text between processes)."""
        try:
            with self.generators():
                return self._batch(positions)
        except (UserError, OSError) as error:  # the joined table or embeddings are damaged or were cut
            return str(error)
        finally:
            self._note(-1, -1, -1)

    def _note(self, number: int, shard: int, row: int) -> None:
        worker = get_worker_info()
        slot = 0 if worker is None else 3 * worker.id
        self._reading[slot : slot + 3] = (number, shard, row)

    def _batch(self, positions: list[int]) -> Batch | str:
        parts = self._parts(positions)
        members = {place: (part, i) for part in parts for i, place in enumerate(part.at.tolist())}
        replaced: list[str] = []
        images, captions = [], []
        for place in range(len(positions)):
            (part, i), failures = members[place], 0
            while True:
                try:
                    image, caption = self._read(part, i)
                    break
                except BadSample as bad:
                    replaced.append(part.reader.source.full_name(str(bad)))
                    failures += 1
                    if failures >= self.options.max_consecutive_errors:
                        return (
                            f"{failures} bad samples in a row, the last one {replaced[-1]}: the data is damaged, see "
                            f"tools/index_shards.py --verify {part.reader.index.root}"
                        )
                    part.replace(i, failures)
            images.append(image)
            captions.append(caption)
        used = self.labels_per_sample
        labels = _in_order(parts, [part.rows["labels"][:, :used] for part in parts], np.int64) if used else None
        sample_ids = _in_order(parts, [part.sample_ids for part in parts], np.int64)
        return self.batch(images, captions, labels, self._embeddings(parts), sample_ids, replaced)

    def _parts(self, positions: list[int]) -> list[_Part]:
        sources, places = self.mixture.locate(np.array(positions, np.int64))
        numbers = np.unique(sources).tolist()
        at = {number: np.flatnonzero(sources == number) for number in numbers}
        return [_Part(self.readers[number], number, at[number], places[at[number]]) for number in numbers]

    def _read(self, part: _Part, i: int) -> tuple[Tensor, str]:
        """Image and caption of sample i of a part."""
        shard, sample = int(part.shards[i]), part.rows[i]
        self._note(part.number, shard, int(sample["row"]))
        image, captions = part.reader.read(shard, sample)
        number = int(part.reader.first_ids[shard]) + int(sample["row"])
        choice = self.choose(int(part.epochs[i]), number, len(captions), lambda view: int(sample["seeds"][view]))
        part.drawn[i] = choice.view, choice.caption
        return self.transformed(image, choice.seed), captions[choice.caption]

    def _embeddings(self, parts: list[_Part]) -> tuple[np.ndarray | None, np.ndarray | None]:
        if self.teacher_dim is None:
            return None, None
        images, texts = zip(*(part.reader.joined.embeddings(part.shards, part.rows, part.drawn) for part in parts))
        text = _in_order(parts, texts, self.teacher_dtype) if self.has_teacher_text else None
        return _in_order(parts, images, self.teacher_dtype), text


def _in_order(parts: list[_Part], values: Sequence[np.ndarray], dtype: npt.DTypeLike) -> np.ndarray:
    """[b, ...]: the values [p, ...] of all parts at their places in the batch."""
    out = np.empty((sum(len(part.at) for part in parts), *values[0].shape[1:]), dtype)
    for part, value in zip(parts, values):
        out[part.at] = value
    return out


def _coprime(at_least: int, n: int) -> int:
    """The smallest number >= at_least that is coprime to n: a walk with this stride visits all of range(n)."""
    while math.gcd(at_least, n) != 1:
        at_least += 1
    return at_least
