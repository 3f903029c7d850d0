"""What the teacher is fed: pairs of a tar, decoded and put together in the workers.

Legend: B samples of a batch that could be decoded, T tokens, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megacid.data.decode import BadSample, decode_caption, decode_image
from megacid.data.index import ShardIndex, ShardReader, read_sample_json
from megacid.offline.embed.partitions import About, Failure


class Batch(NamedTuple):
    """Neighbours of one tar. Two tensors, not two for each sample: each tensor that leaves a worker is an open file."""

    shard: int
    image: Tensor  # float32 [B, 3, H, W]
    text: Tensor  # int64 [B, T]
    about: list[About]  # of the B samples
    rows: list[int]  # of the B samples, in their tar
    failures: list[Failure]  # the others

    @property
    def size(self) -> int:
        """Samples, also those that could not be decoded."""
        return len(self.about) + len(self.failures)


class Pairs(Dataset[Batch]):
    """Pairs of all shards by their number in the index, many at a time: only `__getitems__` is there to be used."""

    def __init__(
        self, index: ShardIndex, transform: Callable[[Any], Tensor], tokenizer: Callable[[list[str]], Tensor]
    ) -> None:
        self.index, self.reader, self.starts = index, ShardReader(index), index.starts
        self.transform, self.tokenizer = transform, tokenizer

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitems__(self, numbers: list[int]) -> Batch:
        """numbers: of samples of one shard, ascending, at least one."""
        shard = int(self.starts.searchsorted(numbers[0], side="right")) - 1
        keys = self.index.table(shard).keys
        images: list[Tensor] = []
        batch = Batch(shard, torch.empty(0), torch.empty(0), [], [], [])
        for row in (number - int(self.starts[shard]) for number in numbers):
            try:
                image, about = self._read(shard, row, keys[row])
            except BadSample as error:
                batch.failures.append(Failure(keys[row], error.reason))
            except UnicodeDecodeError as error:
                batch.failures.append(Failure(keys[row], f"caption is not UTF-8: {error.reason}"))
            else:
                images.append(image)
                batch.about.append(about)
                batch.rows.append(row)
        if not images:
            return batch
        return batch._replace(image=torch.stack(images), text=self.tokenizer([about.caption for about in batch.about]))

    def _read(self, shard: int, row: int, key: str) -> tuple[Tensor, About]:
        data = self.reader.read(shard, row, "text")
        data.decode("utf-8")  # a caption is written to the metadata, where replaced bytes would pass for its words
        caption = decode_caption(data)
        image = self.transform(decode_image(self.reader.read(shard, row, "image")))
        facts = read_sample_json(self.reader, shard, row)
        return image, About(key, caption, _word(facts.get("uid")), _word(facts.get("url")))


def _word(value: Any) -> str | None:
    """A string that can be written as UTF-8: JSON can also hold halves of surrogate pairs."""
    return value if isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value) else None


def as_is(batch: Any) -> Any:
    """collate_fn: `__getitems__` has made the batch already."""
    return batch
