"""How an evaluation runs: images per forward, loader processes, progress, and the ranks that share the work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megacid.data.copied_ahead import copied_ahead
from megacid.distributed.collectives import Group, gather_plain, group_device, rank, world_size
from megacid.distributed.consensus import fail_together
from megacid.distributed.parallel import shard_range
from megacid.distributed.progress import progress_bar
from megacid.distributed.stopping import Progress, stop_together
from megacid.evaluate.datasets import Split
from megacid.failpoints import failpoint
from megacid.models.clip import LoadedClip

T = TypeVar("T")


@contextlib.contextmanager
def image_bar(describe: str, total: int) -> Iterator[Progress]:
    """A progress bar of images."""
    with progress_bar(describe, "img", total) as bar:
        yield bar.update


@dataclass(frozen=True)
class Execution:
    """How an evaluation runs. The ranks of the group share images and captions: each has a contiguous slice.

    Args:
        batch_size: images, or about as many captions, per forward.
        workers: processes that decode images, per rank.
        progress: called with a description and a number of images, shows the progress of a task.
    """

    batch_size: int = 256
    workers: int = 0
    group: Group = None
    progress: Callable[[str, int], AbstractContextManager[Progress]] = image_bar

    def own(self, total: int) -> range:
        """The numbers of this rank's items."""
        return range(*shard_range(total, rank(self.group), world_size(self.group)))

    def together(self, batches: Iterator[T], total: int, batch_size: int) -> Iterator[T]:
        """This rank's batches, in rounds of all ranks: an error or a request to stop on one rank is raised on each.

        Args:
            batches: of the rank's own items, computed without a collective.
            total: number of items of all ranks.
            batch_size: number of items of a batch.
        """
        largest = -(-total // world_size(self.group))
        for _ in range(-(-largest // batch_size)):
            with stop_together(self.group):
                failpoint("eval:batch")
                batch = next(batches, None)
            if batch is not None:
                yield batch

    def opened(self, opening: Callable[[], T]) -> T:
        """What `opening` gives on this rank. The first rank opens before the others, which load the indexes it builds.

        A collective. An error of one rank is raised on each.
        """
        found: list[T] = []
        for turn in (True, False):
            with fail_together(self.group):
                if (rank(self.group) == 0) == turn:
                    found.append(opening())
        return found[0]

    def gather(self, part: Tensor) -> Tensor:
        """The rows of all ranks, in the order of the ranks, on the device of `part`."""
        if world_size(self.group) == 1:
            return part
        return gather_plain(part.to(group_device(self.group)), self.group).to(part.device)

    def own_images(
        self, split: Split, compute: Callable[[Tensor], Tensor], device: torch.device, progress: Progress
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(compute(images uint8 [B, 3, H, W] on `device`), labels [B] int64 on the CPU) of this rank's images.

        In rounds of all ranks, so every rank must take all of its batches.
        """

        def batches() -> Generator[tuple[Tensor, Tensor], None, None]:
            loaded = split.batches(self.batch_size, workers=self.workers, rows=self.own(len(split)))
            for image, label in copied_ahead(loaded, lambda batch, copy: (copy(batch[0]), batch[1]), device):
                result = compute(image)
                progress(len(label))
                yield result, label

        with contextlib.closing(batches()) as own:
            yield from self.together(own, len(split), self.batch_size)

    def all_images(
        self,
        split: Split,
        compute: Callable[[Tensor], Tensor],
        device: torch.device,
        progress: Progress,
        *,
        empty: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(compute(images), labels int64 [N], or [N, C], on the CPU) of all ranks' images, in the split's order.

        A collective.

        Args:
            empty: what `compute` gives for no image, for a rank without images.
        """
        parts = [(empty, split.no_label), *self.own_images(split, compute, device, progress)]
        result, label = (torch.cat(column) for column in zip(*parts, strict=True))
        return self.gather(result), self.gather(label)


DEFAULT = Execution()


def image_features(clip: LoadedClip, split: Split, how: Execution, progress: Progress) -> tuple[Tensor, Tensor]:
    """Features [N, D] fp32 on the model's device and labels [N] int64 on the CPU, of all ranks, in the split's order.

    A collective.
    """
    empty = torch.empty(0, clip.embed_dim, device=clip.device)
    return how.all_images(split, clip.encode_image, clip.device, progress, empty=empty)
