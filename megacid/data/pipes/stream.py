"""The stream of micro-batches from piped tars, as `loader.py` has it for indexed ones.

The content of a batch follows from the seed, the number of ranks and of loader processes, and the tars with which the
readers began. The number of samples of a tar is not known before it is read, so a checkpoint stores the next tar of
every reader, and a resumed run leaves out the rest of the tars that were being read and of the shuffle buffers.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from megacid.data.batch import Batch
from megacid.data.loader import BatchStream
from megacid.data.pipes.reading import PipedPairs

log = logging.getLogger(__name__)

TAR_FLOOR = 1000  # tars over which the error budget is at least computed


class PipedStream(BatchStream):
    """The micro-batches of one rank from commands that write tars.

    A tar that cannot be read to its end loses its other samples. Such tars may be a share `error_budget` of those that
    this rank has begun, of at least 1,000.

    Args:
        pairs: how the batches are read in the loader processes.
    """

    def __init__(self, pairs: PipedPairs) -> None:
        self.tars = pairs.tars
        self.failed_tars = 0
        self._begun: dict[int, int] = {}  # tars, by reader
        self._left_out: dict[int, dict[str, int]] = {}  # samples, by reader and reason
        self._logged = 1
        super().__init__(pairs.plan, pairs.options, pairs)

    def _source(self) -> dict[str, Any]:
        return {"dataset": self._pairs, "batch_size": None}

    def _count_bad_samples(self, batch: Batch) -> Batch:
        batch = super()._count_bad_samples(batch)
        progress = batch.progress
        assert progress is not None
        self._begun[progress.reader], self._left_out[progress.reader] = progress.tars, progress.left_out
        self._log_left_out()
        for failed in progress.failed:
            self.failed_tars += 1
            log.warning("tar %d of rank %d that cannot be read: %s", self.failed_tars, self.plan.rank, failed)
        budget = self.options.error_budget
        allowed = budget * max(sum(self._begun.values()), TAR_FLOOR)
        if self.failed_tars <= allowed or batch.failure is not None:
            return batch
        return replace(
            batch,
            failure=f"{self.failed_tars} of {sum(self._begun.values())} tars cannot be read on rank {self.plan.rank}, "
            f"{allowed:.0f} are allowed (error budget {budget}), the last one {progress.failed[-1]}: correct the "
            "commands of data.shards, or raise the budget",
        )

    def _log_left_out(self) -> None:
        """Log the samples that were left out, each time that their number has doubled."""
        counts: dict[str, int] = {}
        for reasons in self._left_out.values():
            for reason, count in reasons.items():
                counts[reason] = counts.get(reason, 0) + count
        if sum(counts.values()) >= self._logged:
            self._logged = 2 * sum(counts.values())
            shown = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            log.info("samples that rank %d has left out: %s; used: %d", self.plan.rank, shown, self.samples_read)

    def statistics(self) -> dict[str, Any]:
        """Counts for the log. The number of samples is not known."""
        return {"tars": len(self.tars), "named": sum(tar.name is not None for tar in self.tars)}
