"""Retrieval of images by captions and of captions by images, on sets in CLIP_benchmark's webdataset layout.

    root/dataset_type.txt                 retrieval
    root/test/nshards.txt, 0.tar, 1.tar ...   members <key>.jpg, or another image, and <key>.txt: one caption per line

Shapes: N images, M captions, D embedding, B rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megacid.data.decode import BadSample
from megacid.data.index import ShardIndex
from megacid.distributed.stopping import Progress, no_progress, stop_together
from megacid.errors import UserError
from megacid.evaluate.datasets import Split, open_split
from megacid.evaluate.execution import DEFAULT, Execution, image_features
from megacid.models.clip import LoadedClip, Transform

TOP_K = (1, 5, 10)
CHUNK_SCORES = 1 << 24  # scores of a chunk of rows with all columns that are in memory at once, 64 MiB


class CaptionedSplit(Split):
    """Item i: (image uint8 [3, H, W], i), with the captions of all images in `captions`."""

    def __init__(self, index: ShardIndex, transform: Transform) -> None:
        super().__init__(index, transform)
        self.captions = [
            self._captions(shard, row) for shard, size in enumerate(index.sizes) for row in range(int(size))
        ]

    def label(self, shard: int, row: int, where: str) -> int:
        return int(self.starts[shard]) + row

    def _captions(self, shard: int, row: int) -> list[str]:
        try:
            return [line for line in self.reader.caption(shard, row, strict=True).splitlines() if line.strip()]
        except BadSample as error:
            where = f"{self.index.tar_path(shard)}, sample {self.index.table(shard).keys[row]}"
            raise UserError(f"{where} cannot be evaluated ({error.reason}): repair or replace the tar") from error


def load_retrieval(root: Path, transform: Transform) -> CaptionedSplit:
    """The test split of a retrieval set. Raises UserError when it is missing or incomplete."""
    return CaptionedSplit(open_split(root / "test"), transform)


def retrieval(clip: LoadedClip, root: Path, how: Execution = DEFAULT) -> dict[str, float]:
    """Recall at k in CLIP_benchmark's names: the share of captions (images) with their image (a caption) in the top k.

    A collective.
    """
    split = how.opened(lambda: load_retrieval(root, clip.preprocess_eval))
    with how.progress(f"retrieval {root.name}", len(split)) as progress:
        image_ND, _ = image_features(clip, split, how, progress)
        captions = [caption for of_image in split.captions for caption in of_image]
        text_MD = caption_features(clip, captions, how, progress)
        image_M = torch.tensor([image for image, of_image in enumerate(split.captions) for _ in of_image])
        image_M = image_M.to(image_ND.device)
        image_N = torch.arange(len(split), device=image_M.device)
        with stop_together(how.group):
            rank_M = first_ranks(text_MD, image_ND, image_N, image_M, progress)
            rank_N = first_ranks(image_ND, text_MD, image_M, image_N, progress)
    return {
        f"{name}_retrieval_recall@{k}": (rank < k).double().mean().item()
        for name, rank in (("image", rank_M), ("text", rank_N))
        for k in TOP_K
    }


def caption_features(clip: LoadedClip, captions: list[str], how: Execution, progress: Progress) -> torch.Tensor:
    """Features [M, D] fp32 on the model's device of all captions, of which each rank encodes a slice. A collective."""

    def batches() -> Iterator[torch.Tensor]:
        own = how.own(len(captions))
        for start in own[:: how.batch_size]:
            yield clip.encode_text(clip.tokenizer(captions[start : min(start + how.batch_size, own.stop)]))
            progress(0)

    empty = torch.empty(0, clip.embed_dim, device=clip.device)
    return how.gather(torch.cat([empty, *how.together(batches(), len(captions), how.batch_size)]))


def first_ranks(
    query_AD: torch.Tensor,
    item_BD: torch.Tensor,
    group_B: torch.Tensor,
    target_A: torch.Tensor,
    progress: Progress = no_progress,
) -> torch.Tensor:
    """int64 [A]: how many items of other groups score as high as the best one of the target group, or higher.

    Args:
        query_AD, item_BD: normalised embeddings.
        group_B: int64, group of each item.
        target_A: int64, the group that each query looks for.
        progress: polled for every chunk of queries.
    """
    ranks = []
    for start in range(0, len(query_AD), rows := max(1, CHUNK_SCORES // max(1, len(item_BD)))):
        progress(0)
        score = query_AD[start : start + rows] @ item_BD.T
        own = group_B[None, :] == target_A[start : start + rows, None]
        best = score.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(score < best) & ~own).sum(dim=1))  # NaN counts as higher
    return torch.cat(ranks)
