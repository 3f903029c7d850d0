"""What the ranks have to know of each other's batch before a step of the classifier: sizes, labels, rows to use.

Legend: B local batch, G gathered batch, l labels per sample, W ranks, S rows that this rank uses.

One small all-gather and ONE host synchronisation: the numbers that shape the step (batch sizes, how many rows) and those
that can end it (labels out of range, a rank with unusable input) are read together. Everything before it is a pure
function on the device; nothing before it uses a label as an index, so a label out of range is found on the host before
any kernel could follow it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.classifier.sampling import Draw
from megacid.distributed.collectives import all_gather_single, rank, world_size
from megacid.distributed.parallel import shard_range
from megacid.errors import UserError

_NOWHERE = torch.iinfo(torch.int64).max  # above every class id


class GatheredLabels(NamedTuple):
    """The same on every rank, but for `rows` and `positive`."""

    target_Gl: Tensor  # int64 global class ids, -1 = none
    sizes: list[int]  # local batch of every rank
    rows: Tensor | None  # int64 [S] local ids, sorted and unique: drawn, or a label of the batch; None: all
    positive: Tensor | None  # bool [S] the row is a label of the batch; None with `rows`
    num_positive: int  # rows of this rank that are labels of the batch
    max_rows: int  # no rank uses more
    rows_with_pending: (
        Tensor | None
    )  # int64, local ids, sorted and unique: `rows` and those that are pending_rows; None without either


def _first_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids sorted, bool: the first of equal ones and not _NOWHERE)."""
    ids = ids.sort().values
    keep = ids != _NOWHERE
    keep[1:] &= ids[1:] != ids[:-1]
    return ids, keep


class LabelExchange:
    """`exchange(...)` is a collective over `group`."""

    def __init__(self, num_classes: int, group: dist.ProcessGroup | None):
        self.num_classes, self.group = num_classes, group
        world = world_size(group)
        self.me, self.world = rank(group), world
        self.starts = [shard_range(num_classes, r, world)[0] for r in range(world)] + [num_classes]
        self.start = self.starts[self.me]
        # Labels of a rank that fit the message. It grows with the largest batch, alike on every rank; the step in which it
        # grows sends twice and so synchronises twice.
        self._room = 1
        self._edges: Tensor | None = None  # `starts` on the device

    def __call__(
        self,
        target_Bl: Tensor,
        fault: str | None,
        draw: Draw | None,
        device: torch.device,
        pending_rows: Tensor | None = None,
    ) -> GatheredLabels:
        """target_Bl: int64 [B, l], on the host or on `device`. fault: why this rank's input cannot be used: becomes an
        error on every rank instead of a rank that never arrives. draw: None to use every row. pending_rows: local ids whose
        gradients wait for this batch's to be added to them."""
        target_Bl = target_Bl.to(device, non_blocking=True)
        if self._edges is None or self._edges.device != device:
            self._edges = torch.tensor(self.starts, device=device)
        while True:
            table = self._gather(target_Bl, fault, device)
            ordered, first = _first_of_each(table[:, 3:].flatten())
            counted = torch.cat([first.new_zeros(1, dtype=torch.int64), first.cumsum(0)])
            edges = torch.searchsorted(ordered, self._edges)
            present = counted[edges[1:]] - counted[edges[:-1]]
            numbers = [table[:, :3].flatten(), ordered[:1], ordered[-1:], present]
            if draw is not None:
                merged, keep = self._merge(draw, ordered, first)
                joined, join = merged, keep
                if pending_rows is not None:
                    joined, join = _first_of_each(
                        torch.cat([merged.masked_fill(~keep, _NOWHERE), pending_rows + self.start])
                    )
                numbers += [keep.sum()[None], join.sum()[None]]
            said = torch.cat(numbers).tolist()  # the host synchronisation
            sizes, widths, faults = (said[i : 3 * self.world : 3] for i in range(3))
            longest = max(n * width for n, width in zip(sizes, widths))
            if longest <= self._room or any(faults):
                break
            self._room = longest
        self._refuse(fault, sizes, widths, faults, *said[3 * self.world : 3 * self.world + 2])
        width = widths[0]
        if self.world == 1:
            target_Gl = target_Bl
        elif len(set(sizes)) == 1:
            target_Gl = table[:, 3 : 3 + sizes[0] * width].reshape(-1, width)
        else:
            target_Gl = torch.cat([table[r, 3 : 3 + n * width].reshape(n, width) for r, n in enumerate(sizes)])
        positives = said[3 * self.world + 2 : 4 * self.world + 2]
        widest = self.starts[1]
        if draw is None:
            return GatheredLabels(target_Gl, sizes, None, None, positives[self.me], widest, None)
        rows = self._compact(merged, keep, said[-2])
        at = torch.searchsorted(ordered, rows + self.start).clamp(max=len(ordered) - 1)
        positive = ordered[at] == rows + self.start
        most = min(widest, draw.most(widest) + max(positives))
        rows_with_pending = None if pending_rows is None else self._compact(joined, join, said[-1])
        return GatheredLabels(target_Gl, sizes, rows, positive, positives[self.me], most, rows_with_pending)

    def _gather(self, target_Bl: Tensor, fault: str | None, device: torch.device) -> Tensor:
        """[W, 3 + room]: batch size, labels per sample, 1 for a fault, labels; the rest -1."""
        size, width = target_Bl.shape
        labels = target_Bl.flatten()[: self._room]
        # Filled on the device: a tensor made of host numbers would be copied, and the copy waits.
        head = [labels.new_full((1,), number) for number in (size, width, int(fault is not None))]
        mine = torch.cat([*head, labels, labels.new_full((self._room - len(labels),), -1)])
        if self.world == 1:
            return mine[None]
        table = mine.new_empty(self.world * len(mine))
        all_gather_single(table, mine, group=self.group)
        return table.view(self.world, -1)

    def _merge(self, draw: Draw, ordered: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """(classes drawn here and labels of the batch that live here, sorted; which of them to keep)."""
        stop = self.starts[self.me + 1]
        here = first & (ordered >= self.start) & (ordered < stop)
        drawn = draw.classes(self.start, stop, ordered.device)
        return _first_of_each(torch.cat([drawn, ordered.masked_fill(~here, _NOWHERE)]))

    def _compact(self, merged: Tensor, keep: Tensor, count: int) -> Tensor:
        """merged[keep] as local ids; a boolean index would ask the device for the count that is known already."""
        place = torch.where(keep, keep.cumsum(0) - 1, count)
        return merged.new_empty(count + 1).scatter_(0, place, merged)[:count] - self.start

    def _refuse(
        self, fault: str | None, sizes: list[int], widths: list[int], faults: list[int], lowest: int, highest: int
    ) -> None:
        if fault is not None:
            raise UserError(fault)
        if any(faults):
            bad = [r for r, flag in enumerate(faults) if flag]
            raise UserError(f"rank {bad[0]} was given unusable input for the classifier: see its message")
        if len(set(widths)) > 1:
            raise UserError(f"the ranks have {widths} labels per sample: pass equally many on every rank")
        for value in (lowest, highest):
            if not -1 <= value < self.num_classes:
                raise UserError(
                    f"label {value} is out of range, expected -1 (none) or 0 to {self.num_classes - 1}: "
                    "use labels of the same clustering"
                )
