"""Settings of the balance stage, and what every step of it needs: inputs, device, ranks, partial results, progress."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist

from megacid.distributed.array_exchange import Ranks
from megacid.distributed.stopping import Progress, no_progress
from megacid.errors import UserError
from megacid.offline.balance.clusters import Clusters
from megacid.offline.balance.linking import Link, LinkOptions, panel_rows
from megacid.offline.nearest import Assigner
from megacid.offline.rows import Rows
from megacid.storage.stage_directory import PartialResults

Keep = Literal["nearest", "farthest", "random", "caption", "medoid"]
FARTHEST = 2.0  # the largest distance of two unit vectors


@dataclass(frozen=True)
class BalanceSettings:
    """What decides which samples are kept. Exactly one of `threshold` and `target_keep` is given."""

    threshold: float | None = None  # Euclidean distance of unit vectors below which two samples are linked
    target_keep: float | None = None  # share of samples to keep; the threshold is searched
    link: Link = "components"
    keep: Keep = "nearest"
    cap: int | None = None  # samples kept per cluster, at most
    neighbor_clusters: int = 0  # each sample is also compared with this many clusters next to its own
    seed: int = 0
    search_rows: int = 200_000  # samples, in whole clusters, on which the threshold is searched, at least
    block: int = 1024  # rows of one block of pairwise products
    cells: int | None = None  # clusters to make for the stage; None: they are given

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.target_keep is None):
            raise UserError("expected exactly one of --threshold and --target-keep")
        if self.threshold is not None and not 0 <= self.threshold <= FARTHEST:
            raise UserError(f"--threshold is {self.threshold}, expected a distance of unit vectors, 0 to 2")
        if self.target_keep is not None and not 0 < self.target_keep <= 1:
            raise UserError(f"--target-keep is {self.target_keep}, expected a share above 0 and at most 1")
        for name, value, choices in (("link", self.link, get_args(Link)), ("keep", self.keep, get_args(Keep))):
            if value not in choices:
                raise UserError(f"--{name} is {value!r}, expected one of {', '.join(choices)}")
        if self.keep == "medoid" and self.link != "components":
            raise UserError(
                f"--link is {self.link!r}, expected components with --keep medoid, since the other rules need an order "
                "of preference before there are groups: take --link components or another --keep"
            )
        if self.cap is not None and self.cap < 1:
            raise UserError(f"--cap is {self.cap}, expected at least 1 sample per cluster")
        if self.neighbor_clusters < 0:
            raise UserError(f"--neighbor-clusters is {self.neighbor_clusters}, expected 0 (none) or more")
        if self.link == "semdedup" and self.neighbor_clusters:
            raise UserError(
                f"--neighbor-clusters is {self.neighbor_clusters}, expected 0 with --link semdedup, which compares "
                "samples of one cluster: take --link greedy or components"
            )
        for name, number in (("search-rows", self.search_rows), ("block", self.block), ("cells", self.cells)):
            if number is not None and number < 1:
                raise UserError(f"--{name} is {number}, expected at least 1")


@dataclass(frozen=True)
class BalanceContext:
    """What every step of the stage needs."""

    rows: Rows  # the n image embeddings
    clusters: Clusters
    settings: BalanceSettings
    device: torch.device
    assigner: Assigner | None = None  # of the k centroids, for `settings.neighbor_clusters`
    group: dist.ProcessGroup | None = None  # of gloo: the ranks that share the work
    alone: bool = False  # this rank does all of the work, without communication
    partial: PartialResults | None = None  # where finished parts are kept
    progress: Progress = no_progress
    prefix: str = ""  # of the names of partial results
    part_pairs: int = 1 << 28  # pairs of samples in one partial result: seconds to minutes of work

    def __post_init__(self) -> None:
        if self.settings.neighbor_clusters and self.assigner is None:
            raise ValueError("neighbor_clusters is set, but there is no assigner of the centroids")

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.group, self.alone)

    def link_options(self, threshold: float, panel_bytes: int | None = None) -> LinkOptions:
        block = self.settings.block
        panel = panel_rows(self.rows.dim, block, panel_bytes)
        return LinkOptions(threshold, self.settings.link, block, panel, self.progress)

    def load(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray | None:
        """The integers that `save` stored; None when they are missing or damaged."""
        return self.partial.array(self.prefix + name, shape, "i") if self.partial else None

    def save(self, name: str, array: np.ndarray) -> None:
        if self.partial:
            self.partial.save_array(self.prefix + name, array)

    def stop_together(self) -> AbstractContextManager[None]:
        """All ranks leave the block together when one of them fails or is stopped. A collective unless `alone`."""
        return self.ranks.stop_together()

    def parts(self, cost: np.ndarray) -> list[tuple[int, int]]:
        """This rank's consecutive parts [low, high) of some items, about the same cost on every rank.

        cost: [items], pairs of samples in each cluster, or in each pair of clusters.
        """
        bounds = part_bounds(cost, self.part_pairs)
        total = np.concatenate([[0.0], np.cumsum(cost + 1)])[bounds]
        cuts = np.searchsorted(total, np.linspace(0, total[-1], self.ranks.world + 1))
        cuts[0], cuts[-1] = 0, len(bounds) - 1
        mine = bounds[cuts[self.ranks.rank] : cuts[self.ranks.rank + 1] + 1].tolist()
        return list(itertools.pairwise(mine))


def part_bounds(cost: np.ndarray, part_pairs: int) -> np.ndarray:
    """int64 [parts + 1]: the first item of every part. A part costs about `part_pairs`, or is one larger item.

    Independent of the number of ranks, so any number of them can continue an interrupted run.
    """
    total = np.cumsum(np.asarray(cost, np.float64) + 1)
    marks = np.arange(part_pairs, total[-1], part_pairs, dtype=np.float64) if len(total) else np.empty(0)
    return np.unique(np.concatenate([[0], np.searchsorted(total, marks), [len(total)]])).astype(np.int64)
