"""The stream of micro-batches of pairs: tars, decoded in workers, joined with the side tables.

Shapes: b micro-batch, T tokens, Dt teacher width, l labels per sample.
"""

from __future__ import annotations

import logging
import math
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megacid.data.batch import Batch, DataBudgetError, Positions
from megacid.data.cache import SmallCache
from megacid.data.decode import MAX_PIXELS, BadSample, decode_image
from megacid.data.index import ShardIndex, ShardReader
from megacid.data.order import SampleOrder, derive_key
from megacid.data.sidecar import KeepTable, LabelTable, TeacherTable
from megacid.errors import UserError

log = logging.getLogger(__name__)

# The error budget is a share, and a share of the first few samples is no number: it is taken of at least this many.
BUDGET_FLOOR = 10_000
_NAMED = 20  # bad samples that are logged one by one; then every hundredth
_FACT_SHARDS = 16


class _Pairs(Dataset[Any]):
    """Positions to a Batch; lives in the worker."""

    def __init__(
        self,
        index: ShardIndex,
        order: SampleOrder,
        rows_of: Callable[[int], np.ndarray],
        *,
        transform: Callable[[Image.Image], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        seeded: bool,
        seed: int,
        probe_stride: int,
        max_probes: int,
        max_pixels: float,
        teacher: TeacherTable | None,
        labels: LabelTable | None,
    ) -> None:
        self.index, self.order, self.rows_of = index, order, rows_of
        self.transform, self.tokenize, self.seeded, self.seed = transform, tokenize, seeded, seed
        self.probe_stride, self.max_probes, self.max_pixels = probe_stride, max_probes, max_pixels
        self.teacher, self.labels = teacher, labels
        self.reader = ShardReader(index)
        self.starts = index.starts

    def __getitems__(self, positions: list[int]) -> Batch | str:
        """A Batch, or the reason why the run has to stop (an exception would lose its text on the way to the
        trainer)."""
        located = list(zip(*(part.tolist() for part in self.order.locate_many(np.array(positions, np.int64)))))
        replaced: list[str] = []
        images, captions, used = [], [], []
        for position, (epoch, shard, nth) in zip(positions, located):
            failures = 0
            while True:
                row = int(self.rows_of(shard)[nth])
                try:
                    image, caption = self._read(epoch, shard, row)
                    break
                except BadSample as bad:
                    replaced.append(str(bad))
                    failures += 1
                    if failures >= self.max_probes:
                        return f"{failures} bad samples in a row, the last one {bad}"
                    epoch, shard, nth = self.order.locate(self._probe(position, failures))
            images.append(image)
            captions.append(caption)
            used.append((shard, row))
        shards, rows = np.array(used, np.int64).T
        return Batch(
            image=torch.stack(images),
            text=self.tokenize(captions),
            label=self._labels(shards, rows),
            sample_id=torch.from_numpy(self.starts[shards] + rows),
            replaced=tuple(replaced),
            **self._teacher(shards, rows),
        )

    def _probe(self, position: int, attempt: int) -> int:
        """The stand-in for a bad sample: a fixed walk through its own epoch that meets every sample once, and begins
        about one global batch further on, so that no sample is likely to appear twice in a batch."""
        epoch, offset = divmod(position, self.order.num_samples)
        return epoch * self.order.num_samples + (offset + attempt * self.probe_stride) % self.order.num_samples

    def _read(self, epoch: int, shard: int, row: int) -> tuple[Tensor, str]:
        name, key = self.index.names[shard], self.index.table(shard).keys[row]
        if self.teacher is not None and not self.teacher.has(shard, np.array([row])).all():
            raise BadSample(name, key, "no teacher embedding")
        data = self.reader.read(shard, row, "image")
        image = decode_image(data, max_pixels=self.max_pixels, shard=name, key=key)
        caption = self.reader.read(shard, row, "text").decode("utf-8", errors="replace").strip()
        if not self.seeded:
            return self.transform(image), caption
        # Only the CPU generator: torch.manual_seed would also reset the generators of the devices.
        seed = derive_key(self.seed, epoch, int(self.starts[shard]) + row) >> 1
        python_state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            random.seed(seed)
            try:
                return self.transform(image), caption
            finally:
                random.setstate(python_state)

    def _labels(self, shards: np.ndarray, rows: np.ndarray) -> Tensor | None:
        if self.labels is None:
            return None
        width = self.labels.labels_per_sample
        out = np.empty((len(rows), width) if width > 1 else len(rows), np.int64)
        for shard in np.unique(shards):
            out[shards == shard] = self.labels.rows(int(shard), rows[shards == shard])
        return torch.from_numpy(out)

    def _teacher(self, shards: np.ndarray, rows: np.ndarray) -> dict[str, Tensor | None]:
        if self.teacher is None:
            return {"teacher_image": None, "teacher_text": None}
        image = np.empty((len(rows), self.teacher.dim), np.float32)
        text = np.empty_like(image) if self.teacher.has_text else None
        for shard in np.unique(shards):
            here = shards == shard
            image[here], text_rows = self.teacher.rows(int(shard), rows[here])
            if text is not None:
                text[here] = text_rows
        return {
            "teacher_image": torch.from_numpy(image),
            "teacher_text": None if text is None else torch.from_numpy(text),
        }


class _RowsOf:
    """Rows of a shard that take part: kept, and with a text.

    A class, not a closure, so that spawned workers can have it.
    """

    def __init__(self, index: ShardIndex, keep: KeepTable | None) -> None:
        self.index, self.keep = index, keep
        self._rows: SmallCache[np.ndarray] = SmallCache(64)

    def __call__(self, shard: int) -> np.ndarray:
        return self._rows.get(shard, lambda: self._find(shard))

    def _find(self, shard: int) -> np.ndarray:
        rows = np.arange(int(self.index.sizes[shard])) if self.keep is None else self.keep.kept(shard)
        if self.index.shards[shard]["without_text"]:
            rows = rows[self.index.table(shard).text[rows, 1] >= 0]
        return rows

    def count(self, shard: int) -> int:
        """How many; without opening the shard where that can be avoided."""
        if self.index.shards[shard]["without_text"]:
            return len(self(shard))
        return int(self.index.sizes[shard] if self.keep is None else self.keep.counts[shard])


def _start_worker(_: int) -> None:
    """A worker is ended by its parent only: it must neither run the trainer's signal handlers nor print at Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _untouched(batch: Any) -> Any:
    """collate_fn: `__getitems__` has made the batch already."""
    return batch


class PairStream:
    """Iterate over the micro-batches of this rank for steps start_step .. total_steps - 1, `accumulation` for each
    step.

    Args:
        index: the shards.
        transform: PIL RGB image -> float32 [3, H, W].
        tokenize: list of captions -> int64 [b, T].
        global_batch: samples per step over all ranks = micro_batch * accumulation * world.
        seed: decides the order and, with `seeded`, the augmentation.
        seeded: the transform is random: torch's and Python's generators are seeded for every sample from (seed,
            epoch,
            sample), so that the result does not depend on rank or worker, and are put back afterwards.
        workers: processes that read and decode; 0 reads in this process.
        teacher, labels, keep: side tables; None leaves the fields of the batch None, or keeps every sample.
        error_budget: share of bad samples this rank tolerates (of at least 10,000 samples).
        max_consecutive_errors: bad samples in a row, while looking for a stand-in, that end the run.
        max_image_pixels: largest width x height that is decoded.
        block_shards: shards that are shuffled with each other, see `SampleOrder`.
        pin_memory: batches in page-locked memory, for copies to a GPU that overlap.

    Raises:
        UserError: sizes that do not fit together, or fewer samples than one global batch.
        DataBudgetError: while iterating.
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
    ) -> None:
        self.plan = Positions(global_batch, micro_batch, accumulation, rank, world, start_step, total_steps)
        self.index, self.teacher, self.labels = index, teacher, labels
        self.workers, self.pin_memory, self.error_budget = workers, pin_memory, error_budget
        self._rows_of = _RowsOf(index, keep)
        counts = np.array([self._rows_of.count(shard) for shard in range(len(index.names))], np.int64)
        if counts.sum() < global_batch:
            raise UserError(
                f"{index.root} has {counts.sum()} usable samples of {index.num_samples}, but the global batch is "
                f"{global_batch}: use a smaller batch or more data"
            )
        self.order = SampleOrder(counts, seed=seed, block_shards=block_shards)
        self.samples_read, self.bad_samples = 0, 0
        self._pairs = _Pairs(
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
        loader: DataLoader[Any] = DataLoader(
            self._pairs,
            batch_sampler=self.plan,
            num_workers=self.workers,
            collate_fn=_untouched,
            worker_init_fn=_start_worker,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else every epoch of the loader would draw from the global generator
        )
        for batch in loader:
            if isinstance(batch, str):
                raise DataBudgetError(
                    f"{batch}: the data is damaged, see tools/index_shards.py --verify {self.index.root}"
                )
            self._count(batch)
            yield batch

    def _count(self, batch: Batch) -> None:
        self.samples_read += len(batch.sample_id)
        for sentence in batch.replaced:
            self.bad_samples += 1
            if self.bad_samples <= _NAMED or self.bad_samples % 100 == 0:
                log.warning("bad sample number %d on rank %d, replaced: %s", self.bad_samples, self.plan.rank, sentence)
        allowed = self.error_budget * max(self.samples_read, BUDGET_FLOOR)
        if self.bad_samples > allowed:
            raise DataBudgetError(
                f"{self.bad_samples} bad samples among {self.samples_read} on rank {self.plan.rank}, "
                f"{allowed:.0f} are allowed (error budget {self.error_budget}), the last one {batch.replaced[-1]}: "
                "check the shards, or raise the budget"
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
