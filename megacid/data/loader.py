"""The stream of micro-batches of image-text pairs: read from tars, decoded in workers, joined with the side tables.

The content of a batch is a pure function of the seed and the step. `SampleOrder` maps a position of the endless stream
to a sample and `Positions` assigns positions to steps, micro-batches and ranks, so neither the number of ranks nor that
of workers changes a global batch, and resuming needs the step only. Random augmentation is seeded per sample.

Samples without a caption, and those that the teacher could not embed, are not in the joined table. A bad sample that is
met later is replaced by another one of its epoch, logged and counted. A run ends when the bad samples of a rank exceed
its error budget.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from megacid.data.batch import Batch, Positions
from megacid.data.index import ShardIndex
from megacid.data.joined import JoinedTable, JoinSources
from megacid.data.joined_build import open_joined
from megacid.data.order import SampleOrder
from megacid.data.pairs import PairBatches, PairOptions, Pairs
from megacid.data.remote.ahead import fetch_ahead
from megacid.data.workers import WorkersLost, watched, worker_start
from megacid.errors import UserError

log = logging.getLogger(__name__)

# A fraction of a few samples is meaningless, so the error budget is computed over at least this many.
BUDGET_FLOOR = 10_000
_LOGGED_BAD_SAMPLES = 20  # logged one by one; then every hundredth
_SAMPLED_SHARDS = 16  # for `statistics`


def _identity(batch: Any) -> Any:
    """collate_fn: `Pairs.__getitems__` already returns a batch."""
    return batch


class BatchStream:
    """Iterates over the micro-batches of one rank, `accumulation` for each step from start_step to total_steps - 1.

    Every rank gets exactly `len(stream)` batches, all of the same shapes, also when the data is bad: an exception on
    one rank would leave the others waiting in a collective. Instead the batch has a `failure`, which the guard shares
    between the ranks, and all later batches are dummies (`PairBatches.dummy`) with the same failure. The first failing
    batch holds real samples when the error budget is exceeded. It is a dummy when the reader gives a reason for
    stopping, or a worker is lost.

    Workers belong to one iteration. They start at its first batch and end with it, or with the thread that iterates.
    """

    def __init__(self, plan: Positions, options: PairOptions, pairs: PairBatches) -> None:
        self.plan, self.options = plan, options
        self.samples_read, self.bad_samples = 0, 0
        self._pairs = pairs

    def _source(self) -> dict[str, Any]:
        """Where the DataLoader gets batches from, as its arguments."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        failure: str | None = None
        plan = self._walk()
        with contextlib.closing(plan), contextlib.closing(self._read()) as batches:
            for _ in plan:
                if failure is None:
                    batch = next(batches)
                    batch = self._dummy(batch) if isinstance(batch, str) else self._count_bad_samples(batch)
                    if (failure := batch.failure) is not None:
                        batches.close()  # ends the workers
                else:
                    batch = self._dummy(failure)
                yield batch

    def _walk(self) -> Generator[list[int], None, None]:
        """The positions of every batch, which is about to be read."""
        return iter(self.plan)

    def _read(self) -> Generator[Batch | str, None, None]:
        """Every batch, or the reason for stopping; ends early when workers are lost."""
        workers = self.options.workers
        loader: DataLoader[Any] = DataLoader(
            **self._source(),
            num_workers=workers,
            prefetch_factor=self.options.prefetch if workers else None,
            collate_fn=_identity,
            worker_init_fn=worker_start(),
            pin_memory=self.options.pin_memory,
            generator=torch.Generator(),  # the default draws from the global generator
        )
        if workers == 0:
            yield from loader
            return
        try:
            yield from watched(loader, len(self.plan), self.options.worker_timeout_s)
        except WorkersLost as lost:
            reading = self._pairs.being_read()
            samples = f"; the workers were reading {reading}: if it happens there again, remove it" if reading else ""
            yield f"rank {self.plan.rank}: {lost}{samples}"

    def _dummy(self, failure: str) -> Batch:
        batch = self._pairs.dummy(self.plan.micro_batch, failure)
        return batch.pin_memory() if self.options.pin_memory else batch

    def _count_bad_samples(self, batch: Batch) -> Batch:
        """The batch, with a `failure` when the bad samples so far exceed the error budget."""
        self.samples_read += len(batch.sample_id)
        for reason in batch.replaced:
            self.bad_samples += 1
            if self.bad_samples <= _LOGGED_BAD_SAMPLES or self.bad_samples % 100 == 0:
                log.warning("bad sample %d on rank %d, replaced: %s", self.bad_samples, self.plan.rank, reason)
        budget = self.options.error_budget
        allowed = budget * max(self.samples_read, BUDGET_FLOOR)
        if self.bad_samples <= allowed:
            return batch
        return replace(
            batch,
            failure=f"{self.bad_samples} bad samples among {self.samples_read} on rank {self.plan.rank}, "
            f"{allowed:.0f} are allowed (error budget {budget}), the last one {batch.replaced[-1]}: "
            "check the shards, or raise the budget",
        )


class PairStream(BatchStream):
    """The micro-batches of indexed shards; the reader stops at max_consecutive_errors and at damaged files.

    Args:
        index: the shards.
        plan: which positions of the stream this rank reads.
        options: how samples are read; the same on every rank.
        joined: the joined table of the index and the options, for several streams that share it; None: opened here.

    Raises:
        UserError: fewer usable samples than one global batch, a side table is damaged, or the cache is too small for
            the remote tars that are read at a time. Never raised while iterating.
    """

    def __init__(
        self, index: ShardIndex, plan: Positions, options: PairOptions, joined: JoinedTable | None = None
    ) -> None:
        self.index = index
        index.check_captions()
        self.joined = joined or open_joined(
            JoinSources(index, options.teacher, options.labels, options.keep), options.block_shards
        )
        counts = self.joined.counts
        usable, self._without_teacher = counts.sum(axis=0).tolist()
        if usable < plan.global_batch:
            raise UserError(
                f"{index.root} has {usable} usable samples of {index.num_samples}{self._left_out()}, expected at least "
                f"one global batch of {plan.global_batch}: use a smaller batch or more data"
            )
        self.order = SampleOrder(counts[:, 0], seed=options.seed, block_shards=options.block_shards)
        replacement_stride = _coprime(plan.global_batch, self.order.num_samples)
        self._fetch_ahead = fetch_ahead(index.paths, index.shards, self.order, plan, options.workers * options.prefetch)
        super().__init__(plan, options, Pairs(index, self.order, self.joined, options, replacement_stride))

    def _source(self) -> dict[str, Any]:
        return {"dataset": self._pairs, "batch_sampler": self.plan}

    def _walk(self) -> Generator[list[int], None, None]:
        return self._fetch_ahead.over(self.plan) if self._fetch_ahead else super()._walk()

    def _left_out(self) -> str:
        """For messages: the samples that cannot be used, by reason."""
        keep = self.joined.sources.keep
        counts = {
            "without a caption": self.index.without_text,
            "not kept by data.keep": 0 if keep is None else self.index.num_samples - int(keep.counts.sum()),
            "without a teacher embedding": self._without_teacher,
        }
        text = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        return f" ({text})" if text else ""

    def statistics(self) -> dict[str, Any]:
        """Counts for the log. The labelled share is an estimate from at most 16 evenly spaced shards."""
        statistics: dict[str, Any] = {
            "samples": self.index.num_samples,
            "kept": self.order.num_samples,
            "without_text": self.index.without_text,
            "without_teacher": self._without_teacher,
            "left_out_by_index": self.index.dropped,
            "shards": len(self.index.names),
        }
        if self.joined.sources.labels is not None:
            shards = np.unique(np.linspace(0, len(self.index.names) - 1, _SAMPLED_SHARDS).astype(int))
            labels = np.concatenate([self.joined.tar(int(shard))["labels"][:, 0] for shard in shards])
            statistics["shards_examined"] = len(shards)
            statistics["labelled_share"] = int((labels >= 0).sum()) / max(1, len(labels))
        return statistics


def _coprime(at_least: int, n: int) -> int:
    """The smallest number >= at_least that is coprime to n: a walk with this stride visits all of range(n)."""
    while math.gcd(at_least, n) != 1:
        at_least += 1
    return at_least
