"""Embedding of one batch with the teacher: whole images, captions, and views of the images.

Legend: B batch, D width, H x W pixels, R rows, V views of each image.
"""

from __future__ import annotations

import time
from contextlib import closing, suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megacid.data.augmentation import Views
from megacid.data.decode import BadSample
from megacid.data.index import ShardIndex, ShardReader
from megacid.errors import UserError
from megacid.models.clip import LoadedClip, StudentSpec, crops_digest, train_transform
from megacid.offline.embed.input import Batch, Crops, Pairs

_SAMPLED = 32  # samples whose speed and captions are measured


class Encoded(NamedTuple):
    """L2-normalised embeddings of a batch, float16."""

    image: np.ndarray  # [B, D]
    text: np.ndarray  # [B, D], the first captions
    views: np.ndarray | None  # [B * V, D], the views of a sample are neighbours
    captions: np.ndarray | None  # [all captions, D], those of a sample are neighbours; None: a sample has one


def teacher_crops(model: str, pretrained: str | None, count: int, seed: int) -> Crops:
    """Cuts `count` views out of every image. model, pretrained: as for `load_clip`."""
    teacher = StudentSpec(model, pretrained=pretrained)
    return Crops(Views(count, seed, crops_digest(teacher)), train_transform(teacher, "random_resized_crop"))


def encode(clip: LoadedClip, index: ShardIndex, batch: Batch) -> Encoded:
    """Embed the decoded samples. Every view is a batch of its own, so its bits do not depend on the number of views.

    Raises:
        UserError: An embedding is not a finite vector of length 1; the message names the sample.
    """
    counts = np.array([info.captions for info in batch.samples])
    samples = np.arange(len(counts))
    checked = partial(_checked, clip, index, batch)
    image = checked(clip.encode_image(batch.image), "image", samples)
    # At most B captions at once, as many as there are without lists of captions.
    texts = torch.cat([clip.encode_text(tokens) for tokens in batch.text.split(len(counts))])
    text = checked(texts, "text", np.repeat(samples, counts))
    of_views = None
    if batch.views is not None:
        encoded = (clip.encode_image(pixels) for pixels in batch.views)
        each = [checked(x, f"view {number}", samples) for number, x in enumerate(encoded)]
        of_views = np.stack(each, axis=1).reshape(-1, clip.embed_dim)
    if not index.caption.several:
        return Encoded(image, text, of_views, None)
    return Encoded(image, text[np.cumsum(counts) - counts], of_views, text)


def _checked(
    clip: LoadedClip, index: ShardIndex, batch: Batch, x_RD: Tensor, what: str, samples: np.ndarray
) -> np.ndarray:
    """The embeddings as float16; UserError unless all have length 1. what: is embedded; samples: int64 [R], its row."""
    emb_RD = x_RD.half().cpu()
    length_R = emb_RD.float().norm(dim=1)
    bad = ~((length_R - 1).abs() < 0.01)  # also true for NaN
    if bad.any():
        first = int(bad.nonzero()[0])
        at = int(samples[first])
        raise UserError(
            f"model {clip.name} gives the {what} of sample {batch.samples[at].key} (row {batch.rows[at]} of "
            f"{index.tar_path(batch.shard)}) an embedding of length {float(length_R[first]):g}, expected a finite "
            "embedding of length 1: check the weights, or try --precision fp32"
        )
    return emb_RD.numpy()


def rows_per_sample(index: ShardIndex, crops: Crops | None) -> float:
    """Stored embeddings of a sample, with the mean number of captions of the first samples."""
    rows = 2 + (crops.views.count if crops else 0)
    if not index.caption.several:
        return rows
    shard = int(np.flatnonzero(index.sizes)[0])
    with closing(ShardReader(index)) as reader:
        counts = []
        for row in range(min(_SAMPLED, int(index.sizes[shard]))):
            with suppress(BadSample):
                counts.append(len(reader.captions(shard, row)))
    return rows + (sum(counts) / len(counts) if counts else 1)


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
    start, count = int(index.starts[shard]), min(batch_size, _SAMPLED, int(index.sizes[shard]))
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
