"""Embedding of one batch with the teacher: whole images, captions, and views of the images.

Legend: B batch, D width, H x W pixels, V views of each image.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from torch import Tensor

from megacid.data.augmentation import Views
from megacid.data.index import ShardIndex
from megacid.errors import UserError
from megacid.models.clip import LoadedClip, StudentSpec, crops_digest, train_transform
from megacid.offline.embed.input import Batch, Crops, Pairs


class Encoded(NamedTuple):
    """L2-normalised embeddings of a batch, float16."""

    image: np.ndarray  # [B, D]
    text: np.ndarray  # [B, D]
    views: np.ndarray | None  # [B * V, D], the views of a sample are neighbours


def teacher_crops(model: str, pretrained: str | None, count: int, seed: int) -> Crops:
    """Cuts `count` views out of every image. model, pretrained: as for `load_clip`."""
    teacher = StudentSpec(model, pretrained=pretrained)
    return Crops(Views(count, seed, crops_digest(teacher)), train_transform(teacher, "random_resized_crop"))


def encode(clip: LoadedClip, index: ShardIndex, batch: Batch) -> Encoded:
    """Embed the decoded samples. Every view is a batch of its own, so its bits do not depend on the number of views.

    Raises:
        UserError: An embedding is not a finite vector of length 1; the message names the sample.
    """
    image = _checked(clip.encode_image(batch.image), "image", clip, index, batch)
    text = _checked(clip.encode_text(batch.text), "text", clip, index, batch)
    if batch.views is None:
        return Encoded(image, text, None)
    of_views = [
        _checked(clip.encode_image(pixels), f"view {number}", clip, index, batch)
        for number, pixels in enumerate(batch.views)
    ]
    return Encoded(image, text, np.stack(of_views, axis=1).reshape(-1, clip.embed_dim))


def _checked(x_BD: Tensor, what: str, clip: LoadedClip, index: ShardIndex, batch: Batch) -> np.ndarray:
    """The embeddings as float16; UserError unless all have length 1. what: is embedded."""
    emb_BD = x_BD.half().cpu()
    length_B = emb_BD.float().norm(dim=1)
    bad = ~((length_B - 1).abs() < 0.01)  # also true for NaN
    if bad.any():
        at = int(bad.nonzero()[0])
        raise UserError(
            f"model {clip.name} gives the {what} of sample {batch.samples[at].key} (row {batch.rows[at]} of "
            f"{index.tar_path(batch.shard)}) an embedding of length {float(length_B[at]):g}, expected a finite "
            "embedding of length 1: check the weights, or try --precision fp32"
        )
    return emb_BD.numpy()


class SpeedSample(NamedTuple):
    """Seconds per sample on a small batch: decoding in one process, and the model; None when nothing was decoded.

    problem: How many samples could not be decoded, with the first reason; None when all could.
    """

    decoding: float
    model: float | None
    problem: str | None


def measure_speed(clip: LoadedClip, index: ShardIndex, batch_size: int, crops: Crops | None = None) -> SpeedSample:
    """Decode and embed a small batch of the first non-empty shard."""
    shard = int(np.flatnonzero(index.sizes)[0])
    start, count = int(index.starts[shard]), min(batch_size, 32, int(index.sizes[shard]))
    began = time.monotonic()
    batch = Pairs(index, clip.preprocess_eval, clip.tokenizer, crops).__getitems__(list(range(start, start + count)))
    decoding = (time.monotonic() - began) / count
    problem = None
    if batch.failures:
        first = batch.failures[0]
        problem = (
            f"{len(batch.failures)} of the first {count} samples of {index.names[shard]}.tar cannot be decoded, such "
            f"as {first.key}: {first.reason}"
        )
    if not batch.samples:
        return SpeedSample(decoding, None, problem)
    encode(clip, index, batch)  # the first call pays for lazy initialisation
    began = time.monotonic()
    encode(clip, index, batch)
    return SpeedSample(decoding, (time.monotonic() - began) / len(batch.samples), problem)
