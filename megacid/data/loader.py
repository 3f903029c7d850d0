"""The stream of micro-batches of pairs: tars, decoded in workers, joined with the side tables."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from megacid.data.batch import Batch, Positions
from megacid.data.decode import MAX_PIXELS
from megacid.data.index import ShardIndex
from megacid.data.order import SampleOrder
from megacid.data.pairs import Pairs, UsableRows
from megacid.data.side_tables import KeepTable, LabelTable, TeacherTable
from megacid.data.workers import WorkersLost, watched, worker_start
from megacid.errors import UserError

log = logging.getLogger(__name__)

# The error budget is a share, and a share of the first few samples is no number: it is taken of at least this many.
BUDGET_FLOOR = 10_000
_NAMED = 20  # bad samples that are logged one by one; then every hundredth
_FACT_SHARDS = 16


def _untouched(batch: Any) -> Any:
    """collate_fn: `__getitems__` has made the batch already."""
    return batch


class PairStream:
    """Iterate over the micro-batches of this rank for steps start_step .. total_steps - 1, `accumulation` for each
    step.

    There are always `len` of them, all of the same shapes. What the data do wrong is no exception, which would leave the
    other ranks waiting: the batch gets a `failure`, and so does every later one, which is then a dummy (`Pairs.dummy`).
    The first one has real samples where they could be read: when the error budget is exceeded, that is; not when
    max_consecutive_errors is met, a side table turns out to be damaged, or a worker is lost.

    Args:
        index: the shards.
        transform: PIL RGB image -> float32 [3, H, W].
        tokenize: list of captions -> int64 [b, T].
        global_batch: samples per step over all ranks = micro_batch * accumulation * world.
        seed: decides the order and, with `seeded`, the augmentation.
        seeded: the transform is random: torch's and Python's generators are seeded for every sample from (seed,
            epoch,
            sample), so that the result does not depend on rank or worker, and are put back afterwards.
        workers: processes that read and decode; 0 reads in this process. They end with the thread that iterates.
        worker_timeout_s: seconds without a batch after which workers are taken for lost.
        teacher, labels, keep: side tables; None leaves the fields of the batch None, or keeps every sample.
        error_budget: share of bad samples this rank tolerates (of at least 10,000 samples).
        max_consecutive_errors: bad samples in a row, while looking for a stand-in, that end the run.
        max_image_pixels: largest width x height that is decoded.
        block_shards: shards that are shuffled with each other, see `SampleOrder`.
        pin_memory: batches in page-locked memory, for copies to a GPU that overlap.

    Raises:
        UserError: sizes that do not fit together, or fewer samples than one global batch; never while iterating.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        transform: Callable[[Image.Image], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        global_batch: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        start_step: int,
        total_steps: int,
        seeded: bool = False,
        workers: int = 0,
        teacher: TeacherTable | None = None,
        labels: LabelTable | None = None,
        keep: KeepTable | None = None,
        error_budget: float = 0.001,
        max_consecutive_errors: int = 100,
        max_image_pixels: float = MAX_PIXELS,
        block_shards: int = 16,
        pin_memory: bool = False,
        worker_timeout_s: float = 120.0,
    ) -> None:
        self.plan = Positions(global_batch, micro_batch, accumulation, rank, world, start_step, total_steps)
        self.index, self.teacher, self.labels = index, teacher, labels
        self.workers, self.pin_memory, self.error_budget = workers, pin_memory, error_budget
        self.worker_timeout_s = worker_timeout_s
        self._rows_of = UsableRows(index, keep)
        counts = np.array([self._rows_of.count(shard) for shard in range(len(index.names))], np.int64)
        if counts.sum() < global_batch:
            raise UserError(
                f"{index.root} has {counts.sum()} usable samples of {index.num_samples}, but the global batch is "
                f"{global_batch}: use a smaller batch or more data"
            )
        self.order = SampleOrder(counts, seed=seed, block_shards=block_shards)
        self.samples_read, self.bad_samples = 0, 0
        self._pairs = Pairs(
            index,
            self.order,
            self._rows_of,
            transform=transform,
            tokenize=tokenize,
            seeded=seeded,
            seed=seed,
            probe_stride=_coprime(global_batch, self.order.num_samples),
            max_probes=max_consecutive_errors,
            max_pixels=max_image_pixels,
            teacher=teacher,
            labels=labels,
        )

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        failure: str | None = None
        with contextlib.closing(self._read()) as results:
            for positions in self.plan:
                if failure is None:
                    batch = next(results)
                    if isinstance(batch, str):
                        batch = self._dummy(len(positions), batch)
                    else:
                        batch = self._counted(batch)
                    if (failure := batch.failure) is not None:
                        results.close()  # ends the workers
                else:
                    batch = self._dummy(len(positions), failure)
                yield batch

    def _read(self) -> Generator[Batch | str, None, None]:
        """What `Pairs` makes of every list of positions; a last sentence when workers are lost."""
        loader: DataLoader[Any] = DataLoader(
            self._pairs,
            batch_sampler=self.plan,
            num_workers=self.workers,
            collate_fn=_untouched,
            worker_init_fn=worker_start(),
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else every epoch of the loader would draw from the global generator
        )
        if self.workers == 0:
            yield from loader
            return
        try:
            yield from watched(loader, len(self.plan), self.worker_timeout_s)
        except WorkersLost as lost:
            yield f"rank {self.plan.rank}: {lost}"

    def _dummy(self, size: int, failure: str) -> Batch:
        batch = self._pairs.dummy(size, failure)
        return batch.pin_memory() if self.pin_memory else batch

    def _counted(self, batch: Batch) -> Batch:
        """The batch, with a `failure` when there were too many bad samples up to here."""
        self.samples_read += len(batch.sample_id)
        for sentence in batch.replaced:
            self.bad_samples += 1
            if self.bad_samples <= _NAMED or self.bad_samples % 100 == 0:
                log.warning("bad sample number %d on rank %d, replaced: %s", self.bad_samples, self.plan.rank, sentence)
        allowed = self.error_budget * max(self.samples_read, BUDGET_FLOOR)
        if self.bad_samples <= allowed:
            return batch
        return replace(
            batch,
            failure=f"{self.bad_samples} bad samples among {self.samples_read} on rank {self.plan.rank}, "
            f"{allowed:.0f} are allowed (error budget {self.error_budget}), the last one {batch.replaced[-1]}: "
            "check the shards, or raise the budget",
        )

    def facts(self) -> dict[str, Any]:
        """Counts for the log.

        The shares are taken from at most 16 shards, evenly spaced, so that starting stays quick.
        """
        shards = np.unique(np.linspace(0, len(self.index.names) - 1, _FACT_SHARDS).astype(int))
        rows = {int(shard): self._rows_of(int(shard)) for shard in shards}
        total = max(1, sum(len(r) for r in rows.values()))
        facts: dict[str, Any] = {
            "samples": self.index.num_samples,
            "kept": self.order.num_samples,
            "without_text": sum(shard["without_text"] for shard in self.index.shards),
            "left_out_by_index": self.index.dropped,
            "shards": len(self.index.names),
            "shards_examined": len(shards),
        }
        if self.labels is not None:
            labelled = 0
            for shard, r in rows.items():
                labels = self.labels.rows(shard, r)
                labelled += int(((labels if labels.ndim == 1 else labels[:, 0]) >= 0).sum())
            facts["labelled_share"] = labelled / total
        if self.teacher is not None:
            facts["teacher_share"] = sum(int(self.teacher.has(shard, r).sum()) for shard, r in rows.items()) / total
        return facts


def _coprime(at_least: int, n: int) -> int:
    """The smallest number >= at_least without a common factor with n: a walk with this stride meets all of
    range(n)."""
    while math.gcd(at_least, n) != 1:
        at_least += 1
    return at_least
