"""The class rows of a sampled step: a shard's drawn classes and the labels of the batch, sorted and unique.

Legend: n labels of the global batch, S rows.

Host and device synchronise once in a step, in `LabelExchange`. A selection therefore leaves the numbers that shape it
on the device, and gets them back with everything else that the host reads.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megacid.classifier.sampling import Draw

_ABOVE_ALL = torch.iinfo(torch.int64).max  # sorts behind every class id: marks entries to drop


class ChosenRows(NamedTuple):
    """Local ids, int64."""

    rows: Tensor  # [S] sorted, unique
    positive: Tensor  # bool [S] the row is a label of the batch
    with_pending: Tensor | None  # sorted, unique: `rows` and the pending rows; None without any
    padded: Tensor | None  # `rows`, then the shard's last id; None if no length was given


class RowSelection(Protocol):
    """Made of sorted labels [n], which may be out of range, and of a draw, for the classes [start, stop)."""

    labels_before: Tensor  # int64 [n + 1] distinct labels before each label, and in all
    numbers: list[Tensor]  # int64 [1] each, for `choose`

    def choose(self, numbers: list[int], padded_length: int | None) -> ChosenRows:
        """The rows. numbers: those of the device."""


def labels_before(labels_n: Tensor) -> Tensor:
    """int64 [n + 1]: distinct ids before each of the sorted ids, and in all."""
    return _counts_before(_first_of_equals(labels_n))


def _first_of_equals(ids: Tensor) -> Tensor:
    first = torch.ones_like(ids, dtype=torch.bool)
    torch.ne(ids[1:], ids[:-1], out=first[1:])
    return first


def _counts_before(flags: Tensor) -> Tensor:
    return torch.nn.functional.pad(flags.cumsum(0), (1, 0))


def _sort_unique(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(sorted ids, bool mask of the first of equal ids, without _ABOVE_ALL)."""
    ids = ids.sort().values
    return ids, _first_of_equals(ids) & (ids != _ABOVE_ALL)


class SortedRows:
    """A selection in PyTorch's operators, which sorts drawn classes and labels."""

    def __init__(self, labels_n: Tensor, draw: Draw, start: int, stop: int, pending_rows: Tensor | None = None):
        self._labels, self._start, self._stop = labels_n, start, stop
        first = _first_of_equals(labels_n)
        self.labels_before = _counts_before(first)
        here = first & (labels_n >= start) & (labels_n < stop)
        drawn = draw.classes(start, stop, labels_n.device)
        self._classes = _sort_unique(torch.cat([drawn, labels_n.masked_fill(~here, _ABOVE_ALL)]))
        self.numbers = [self._classes[1].sum()[None]]
        self._both = None
        if pending_rows is not None:
            ids, keep = self._classes
            self._both = _sort_unique(torch.cat([ids.masked_fill(~keep, _ABOVE_ALL), pending_rows + start]))
            self.numbers.append(self._both[1].sum()[None])

    def choose(self, numbers: list[int], padded_length: int | None) -> ChosenRows:
        padded = None if padded_length is None else self._compact(*self._classes, padded_length)
        rows = self._compact(*self._classes, numbers[0]) if padded is None else padded[: numbers[0]]
        place = torch.searchsorted(self._labels, rows + self._start).clamp(max=len(self._labels) - 1)
        positive = self._labels[place] == rows + self._start
        with_pending = None if self._both is None else self._compact(*self._both, numbers[1])
        return ChosenRows(rows, positive, with_pending, padded)

    def _compact(self, ids: Tensor, keep: Tensor, length: int) -> Tensor:
        """ids[keep] as local ids, filled up to `length` with the shard's last id; boolean indexing would synchronise to
        learn their number."""
        place = torch.where(keep, keep.cumsum(0) - 1, length)
        return ids.new_full((length + 1,), self._stop - 1).scatter_(0, place, ids)[:length] - self._start


class MergedRows:
    """The same selection in two Triton kernels, without pending rows: few launches, and nothing of size S is sorted."""

    def __init__(self, labels_n: Tensor, draw: Draw, start: int, stop: int):
        from megacid_kernels.fused.sampled_rows import Strata, count_labels  # needs triton

        strata = draw.strata_of(start, stop)
        self._strata = Strata(draw.num_classes, draw.strata, draw.offset, draw.key, start, stop, *strata)
        self._labels = labels_n
        self.labels_before, self._not_drawn_before = count_labels(labels_n, self._strata).unbind()
        self.numbers = [self._not_drawn_before[-1:]]

    def choose(self, numbers: list[int], padded_length: int | None) -> ChosenRows:
        from megacid_kernels.fused.sampled_rows import merge_rows_  # needs triton

        strata, labels, padded = self._strata, self._labels, None
        count = strata.drawn + numbers[0]
        if padded_length is None:
            rows = labels.new_empty(count)
        else:
            padded = labels.new_full((padded_length,), strata.stop - 1 - strata.start)
            rows = padded[:count]
        positive = torch.empty(count, dtype=torch.bool, device=labels.device)
        merge_rows_(rows, positive, labels, self._not_drawn_before, strata)
        return ChosenRows(rows, positive, None, padded)
