"""k nearest neighbours: the train images nearest to a test image vote for its class, as in DINO.

Similarity is the cosine of the L2-normalised image features after the projection. A neighbour votes for its class with
weight exp(similarity / TEMPERATURE); k is 20 and the temperature 0.07, as in the evaluation of Caron et al. (2021),
"Emerging Properties in Self-Supervised Vision Transformers". Of train images that are equally near, those that come
first in the tars are taken.

The features of the test images are in memory, those of the train images one block after another: memory does not grow
with the train split. Shapes: B batch, N test images, C classes, D features, K neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacid.distributed.stopping import Progress
from megacid.evaluate.datasets import Benchmark, Split
from megacid.evaluate.execution import DEFAULT, Execution, image_features
from megacid.evaluate.zero_shot import TOP, Predictions, top_classes
from megacid.models.clip import LoadedClip

NEIGHBORS = 20
TEMPERATURE = 0.07
TRAIN_ROWS = 16384  # features of a block
TEST_ROWS = 512  # x TRAIN_ROWS similarities and keys: about 256 MiB


def keys_of(similarity_NB: Tensor, first_row: int) -> Tensor:
    """int64 [N, B] keys that order pairs by similarity and equal ones by row, the lowest row first.

    similarity_NB: fp32, of the rows first_row, first_row + 1, ...
    """
    bits = similarity_NB.contiguous().view(torch.int32)
    # Floats order like their bits; negative ones in reverse.
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    row = torch.arange(first_row, first_row + similarity_NB.shape[1], device=bits.device)
    return (order << 32) + (0xFFFFFFFF - row)


def from_keys(key: Tensor) -> tuple[Tensor, Tensor]:
    """The (fp32 similarities, int64 rows) of keys."""
    order = (key >> 32).to(torch.int32)
    similarity = torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)
    return similarity, 0xFFFFFFFF - (key & 0xFFFFFFFF)


class Nearest:
    """The keys of the K nearest rows seen so far, for each of N queries.

    count: K. first_row: number of the first row to be seen.
    """

    def __init__(self, query_ND: Tensor, count: int, first_row: int) -> None:
        self.query_ND, self.next_row = query_ND, first_row
        # Smaller than every key.
        self.key_NK = torch.full(
            (len(query_ND), count), torch.iinfo(torch.int64).min, dtype=torch.int64, device=query_ND.device
        )

    def add(self, feature_BD: Tensor) -> None:
        """See the next B rows."""
        for start in range(0, len(self.query_ND), TEST_ROWS):
            tile = slice(start, start + TEST_ROWS)
            key = keys_of(self.query_ND[tile] @ feature_BD.T, self.next_row)
            count = self.key_NK.shape[1]
            best = key.topk(min(count, key.shape[1]), dim=1).values
            self.key_NK[tile] = torch.cat([self.key_NK[tile], best], dim=1).topk(count, dim=1).values
        self.next_row += len(feature_BD)

    def add_ranks(self, how: Execution) -> None:
        """See the rows that other ranks have seen. A collective."""
        for start in range(0, len(self.query_ND), TEST_ROWS):
            tile = slice(start, start + TEST_ROWS)
            own = self.key_NK[tile]
            by_rank = how.gather(own).unflatten(0, (-1, len(own)))
            self.key_NK[tile] = by_rank.transpose(0, 1).flatten(1).topk(own.shape[1], dim=1).values


def nearest_rows(
    clip: LoadedClip, train: Split, query_ND: Tensor, how: Execution, progress: Progress, count: int
) -> tuple[Tensor, Tensor]:
    """Similarities and labels [N, K] of the `count` nearest train images of each query, on the CPU. A collective."""
    nearest = Nearest(query_ND, min(count, len(train)), how.own(len(train)).start)
    labels, block = [torch.empty(0, dtype=torch.int64)], [query_ND[:0]]
    for feature_BD, label in how.own_images(train, clip.encode_image, clip.device, progress):
        block.append(feature_BD)
        labels.append(label)
        if sum(map(len, block)) >= TRAIN_ROWS:
            nearest.add(torch.cat(block))
            block = [query_ND[:0]]
    nearest.add(torch.cat(block))
    nearest.add_ranks(how)
    similarity_NK, row_NK = from_keys(nearest.key_NK.cpu())
    return similarity_NK, how.gather(torch.cat(labels))[row_NK]


def vote(similarity_NK: Tensor, label_NK: Tensor, num_classes: int) -> Tensor:
    """The classes with the largest sums of exp(similarity / TEMPERATURE): `top_classes` of the K neighbours."""
    score_NC = torch.zeros(len(label_NK), num_classes, dtype=torch.float64)
    return top_classes(score_NC.scatter_add_(1, label_NK, (similarity_NK.double() / TEMPERATURE).exp()))


def knn(
    clip: LoadedClip, benchmark: Benchmark, how: Execution = DEFAULT, *, neighbors: int = NEIGHBORS
) -> dict[str, float | int]:
    """Classify the test split by the train split. A collective.

    Args:
        neighbors: number of neighbours; all train images where they are fewer.

    Returns:
        knn_acc1, knn_acc5 and knn_mean_per_class_recall; then k, the temperature and the sizes of both splits.

    Raises:
        UserError: a split is missing or incomplete; the same on every rank.
    """
    train, test = how.opened(lambda: [benchmark.split(name, clip.preprocess_eval) for name in ("train", "test")])
    with how.progress(f"kNN {benchmark.name}", len(train) + len(test)) as progress:
        test_ND, test_N = image_features(clip, test, how, progress)
        similarity_NK, label_NK = nearest_rows(clip, train, test_ND, how, progress, neighbors)
    own = how.own(len(test))  # classes of this rank's slice, in tiles: a score for every class does not fit in memory
    tops = [torch.empty(0, min(TOP, benchmark.num_classes), dtype=torch.int64)]
    for start in own[::TEST_ROWS]:
        tile = slice(start, min(start + TEST_ROWS, own.stop))
        tops.append(vote(similarity_NK[tile], label_NK[tile], benchmark.num_classes))
    metrics = Predictions(how.gather(torch.cat(tops)), test_N).metrics()
    return {
        **{f"knn_{name}": value for name, value in metrics.items()},
        "k": neighbors,
        "temperature": TEMPERATURE,
        "train_samples": len(train),
        "test_samples": len(test),
    }
