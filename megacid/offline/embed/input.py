"""Dataset of image-text pairs for the teacher, decoded and batched in the data workers.

Legend: B samples of a batch that could be decoded, T tokens, H x W pixels, V views of each image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from megacid.data.augmentation import Views, generators_restored, seed_generators
from megacid.data.decode import BadSample, decode_image
from megacid.data.index import ShardIndex, ShardReader, read_sample_json
from megacid.offline.embed.partitions import Failure, SampleInfo


class Batch(NamedTuple):
    """Consecutive samples of one tar, stacked in the worker: every tensor sent from a worker is an open file."""

    shard: int
    image: Tensor  # uint8 [B, 3, H, W]
    text: Tensor  # int64 [all captions, T], those of a sample are neighbours
    samples: list[SampleInfo]  # [B]
    rows: list[int]  # [B] row of each sample in the tar
    failures: list[Failure]  # samples that could not be decoded
    views: Tensor | None = None  # uint8 [V, B, 3, H, W]

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with copies of its tensors."""
        views = None if self.views is None else copy(self.views)
        return self._replace(image=copy(self.image), text=copy(self.text), views=views)

    @property
    def size(self) -> int:
        """Number of samples, including those that could not be decoded."""
        return len(self.samples) + len(self.failures)


@dataclass(frozen=True)
class Crops:
    """Cuts the views out of an image. transform: PIL RGB image -> uint8 [3, H, W], a random crop."""

    views: Views
    transform: Callable[[Any], Tensor]

    def __call__(self, image: Any, key: str) -> Tensor:
        """uint8 [V, 3, H, W]. key: of the sample."""
        crops = []
        with generators_restored():
            for view in range(self.views.count):
                seed_generators(self.views.seed_of(key, view))
                crops.append(self.transform(image))
        return torch.stack(crops)


class Pairs(Dataset[Batch]):
    """Pairs of all shards by their number in the index; fetched by the batch, so only `__getitems__` is implemented."""

    def __init__(
        self,
        index: ShardIndex,
        transform: Callable[[Any], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        crops: Crops | None = None,
    ) -> None:
        self.index, self.reader, self.starts = index, ShardReader(index), index.starts
        self.transform, self.tokenizer, self.crops = transform, tokenizer, crops

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitems__(self, numbers: list[int]) -> Batch:
        """Decode one batch. numbers: one or more samples of one shard, ascending."""
        shard = int(self.starts.searchsorted(numbers[0], side="right")) - 1
        keys = self.index.table(shard).keys
        images: list[Tensor] = []
        captions: list[str] = []
        views: list[Tensor] = []
        batch = Batch(shard, torch.empty(0), torch.empty(0), [], [], [])
        for row in (number - int(self.starts[shard]) for number in numbers):
            try:
                picture, texts, info = self._read(shard, row, keys[row])
            except BadSample as error:
                batch.failures.append(Failure(keys[row], error.reason))
            else:
                images.append(self.transform(picture))
                if self.crops is not None:
                    views.append(self.crops(picture, keys[row]))
                captions += texts
                batch.samples.append(info)
                batch.rows.append(row)
        if not images:
            return batch
        return batch._replace(
            image=torch.stack(images),
            text=self.tokenizer(captions),
            views=torch.stack(views, dim=1) if views else None,
        )

    def _read(self, shard: int, row: int, key: str) -> tuple[Image.Image, list[str], SampleInfo]:
        texts = self.reader.captions(shard, row, strict=True)  # replaced bytes would end up in the metadata as text
        image = decode_image(self.reader.read(shard, row, "image"))
        fields = read_sample_json(self.reader, shard, row)
        uid, url = (_encodable(fields.get(name)) for name in ("uid", "url"))
        return image, texts, SampleInfo(key, texts[0], uid, url, len(texts))


def _encodable(value: Any) -> str | None:
    """The value if it is a string that UTF-8 can encode, else None: JSON may contain unpaired surrogates."""
    return value if isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value) else None


def as_is(batch: Any) -> Any:
    """collate_fn that does nothing: `__getitems__` returns a whole batch."""
    return batch
