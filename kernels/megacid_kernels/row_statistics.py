"""Per-sample statistics that the ranks sum, and the one all-reduce that sums them.

Legend: b samples of one chunk, l labels per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacid_kernels.loss_spec import Distribution


class RowStatistics(NamedTuple):
    """What the class shards have to know of each other, per sample: of one rank, or summed over the ranks."""

    sums: dict[Distribution, Tensor]  # [b] sums of exponentials over the negatives
    gap: Tensor | None  # [b] sum_j E_j (cosT_j - cosS_j), E of the KL's teacher; None without a KL
    owned: Tensor  # [b] number of labels whose class is held
    psi: Tensor | None  # [b, l] the student's target cosine after the margin; None without a student term
    cos: Tensor | None  # [b, l] the same before the margin
    teacher_cos: Tensor | None  # [b, l] the teacher's target cosine; None without a teacher term

    def start_all_reduce(self, group: dist.ProcessGroup | None, world: int) -> Callable[[], RowStatistics]:
        """Start ONE sum all-reduce of everything; the returned function waits for it and returns the sums."""
        if world == 1:
            return lambda: self
        by_label = [None if value is None else value.unbind(1) for value in (self.psi, self.cos, self.teacher_cos)]
        rows = [*self.sums.values(), self.gap, self.owned, *(row for rows in by_label for row in rows or ())]
        packed = torch.stack([row for row in rows if row is not None])
        pending = dist.all_reduce(packed, group=group, async_op=True)

        def result() -> RowStatistics:
            pending.wait()
            reduced = iter(packed.unbind())
            sums = {distribution: next(reduced) for distribution in self.sums}
            gap, owned = None if self.gap is None else next(reduced), next(reduced)
            values = [None if x is None else torch.stack([next(reduced) for _ in x], 1) for x in by_label]
            return RowStatistics(sums, gap, owned, *values)

        return result
