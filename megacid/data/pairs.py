"""Image-text pairs as batches: how they are read, and the tensors of a batch, whatever the samples come from.

Shapes: b micro-batch, T tokens, l labels per sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megacid.data.augmentation import Views, drawn_caption, generators_restored, seed_generators
from megacid.data.batch import Batch
from megacid.data.decode import MAX_PIXELS, decode_image
from megacid.data.order import derive_key

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


def other_captions(captions: list[str], embedded: int, teacher: object) -> str | None:
    """Why a sample cannot be used when the teacher has embedded another number of captions; None when it can."""
    if embedded == len(captions):
        return None
    return f"{len(captions)} captions, of which the teacher has embedded {embedded} in {teacher}"


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
