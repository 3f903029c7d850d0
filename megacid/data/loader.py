"""The stream of micro-batches of image-text pairs: read from tars, decoded in workers, joined with the side tables.

The content of a batch is a pure function of the seed and the step. `Mixture` divides the positions of the endless
stream among the sources, `SampleOrder` maps the positions of a source to its samples, and `Positions` assigns positions
to steps, micro-batches and ranks. So neither the number of ranks nor that of workers changes a global batch, and
resuming needs the step only. Random augmentation is seeded per sample.

Samples without a caption, and those that the teacher could not embed, are not in the joined table. A bad sample that is
met later is replaced by another one of its epoch, logged and counted. A run ends when the bad samples of a rank exceed
its error budget.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from megacid.data.batch import Batch, Positions
from megacid.data.indexed_pairs import Pairs, SourceReader
from megacid.data.mixture import Mixture
from megacid.data.order import derive_key
from megacid.data.pairs import PairBatches, PairOptions
from megacid.data.remote.ahead import RemoteSource, fetch_ahead
from megacid.data.sources import Source
from megacid.data.workers import WorkersLost, watched, worker_start
from megacid.errors import UserError

log = logging.getLogger(__name__)

# A fraction of a few samples is meaningless, so the error budget is computed over at least this many.
BUDGET_FLOOR = 10_000
_LOGGED_BAD_SAMPLES = 20  # logged one by one; then every hundredth
_SAMPLED_SHARDS = 16  # for `statistics`
_SOURCE = 2  # distinguishes the seeds of sources from the keys of `SampleOrder`


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
    """The micro-batches of indexed sources; the reader stops at max_consecutive_errors and at damaged files.

    Args:
        sources: what the samples come from. All have the same teachers and clusters, see `check_sources_agree`.
        plan: which positions of the stream this rank reads.
        options: how samples are read; the same on every rank.

    Raises:
        UserError: a source has fewer usable samples than its share of one global batch, or the cache is too small for
            the remote tars that are read at a time. Never raised while iterating.
    """

    def __init__(self, sources: Sequence[Source], plan: Positions, options: PairOptions) -> None:
        self.sources, self.plan = tuple(sources), plan
        self.mixture = Mixture([source.weight for source in sources])
        first_ids = np.cumsum([0, *(source.index.num_samples for source in sources)])
        self.readers = []
        for number, (source, weight) in enumerate(zip(sources, self.mixture.weights)):
            source.index.check_captions()
            at_a_time = -(-plan.global_batch * weight // self.mixture.period)
            self._check_size(source, at_a_time)
            # Sources of the same shards must not give the same samples at the same time.
            seed = derive_key(options.seed, number, _SOURCE) if number else options.seed
            self.readers.append(
                SourceReader(
                    source,
                    options,
                    seed=seed,
                    first_id=int(first_ids[number]),
                    replaced_after=at_a_time,
                    readers=len(sources),
                )
            )
        caches = [source.joined.sources.cache for source in sources]
        self._fetch_ahead = fetch_ahead(
            [RemoteSource(source.joined.remote_files(), reader.order) for source, reader in zip(sources, self.readers)],
            next((cache for cache in caches if cache is not None), None),
            *(self.mixture, plan, options.workers * options.prefetch),
        )
        super().__init__(plan, options, Pairs(self.readers, self.mixture, options))

    def _check_size(self, source: Source, at_a_time: int) -> None:
        """Raise UserError unless a source has as many usable samples as a global batch takes of it."""
        usable, without_teacher = source.joined.counts.sum(axis=0).tolist()
        if usable >= at_a_time:
            return
        keep = source.joined.sources.keep
        counts = {
            "without a caption": source.index.without_text,
            "not kept by data.keep": 0 if keep is None else source.index.num_samples - int(keep.counts.sum()),
            "without a teacher embedding": without_teacher,
        }
        left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        share = "" if len(self.sources) == 1 else f"{at_a_time}, the share of source {source.name} of "
        raise UserError(
            f"{source.index.root} has {usable} usable samples of {source.index.num_samples}"
            f"{f' ({left_out})' if left_out else ''}, expected at least {share}one global batch of "
            f"{self.plan.global_batch}: use a smaller batch{', a smaller weight' if share else ''} or more data"
        )

    def _source(self) -> dict[str, Any]:
        return {"dataset": self._pairs, "batch_sampler": self.plan}

    def _walk(self) -> Generator[list[int], None, None]:
        return self._fetch_ahead.over(self.plan) if self._fetch_ahead else super()._walk()

    def statistics(self) -> dict[str, Any]:
        """Counts for the log; of several sources by source, and all that is kept."""
        if len(self.sources) == 1:
            return _statistics(self.sources[0])
        kept = sum(reader.order.num_samples for reader in self.readers)
        statistics: dict[str, Any] = {"kept": kept, "sources": len(self.sources)}
        for source, weight in zip(self.sources, self.mixture.weights):
            of_source = {"share": weight / self.mixture.period, **_statistics(source)}
            statistics |= {f"{source.name}/{name}": value for name, value in of_source.items()}
        return statistics

    def progress(self, samples: int) -> dict[str, float]:
        """Scalars by tag after `samples` samples of the run: share and epochs of each of several sources so far."""
        scalars: dict[str, float] = {}
        for reader, count in zip(self.readers if len(self.readers) > 1 else (), self.mixture.counts(samples)):
            name = reader.source.name
            scalars |= {f"train/{name}/share": count / samples, f"train/{name}/epoch": count / reader.order.num_samples}
        return scalars

    def name_of(self, sample_id: int) -> str:
        """For messages: the number of a sample; with several sources its source, tar and key."""
        if len(self.readers) == 1 or sample_id < 0:
            return str(sample_id)
        reader = next(reader for reader in self.readers if sample_id < reader.first_ids[-1])
        shard = int(np.searchsorted(reader.first_ids, sample_id, side="right")) - 1
        return reader.name_of(shard, sample_id - int(reader.first_ids[shard]))


def _statistics(source: Source) -> dict[str, Any]:
    """Counts of a source. The labelled share is an estimate from at most 16 evenly spaced shards."""
    index, kept_and_lacking = source.index, source.joined.counts.sum(axis=0).tolist()
    statistics: dict[str, Any] = {
        "samples": index.num_samples,
        "kept": kept_and_lacking[0],
        "without_text": index.without_text,
        "without_teacher": kept_and_lacking[1],
        "left_out_by_index": index.dropped,
        "shards": len(index.names),
    }
    if source.labels is not None:
        shards = np.unique(np.linspace(0, len(index.names) - 1, _SAMPLED_SHARDS).astype(int))
        labels = np.concatenate([source.joined.tar(int(shard))["labels"][:, 0] for shard in shards])
        statistics["shards_examined"] = len(shards)
        statistics["labelled_share"] = int((labels >= 0).sum()) / max(1, len(labels))
    return statistics
