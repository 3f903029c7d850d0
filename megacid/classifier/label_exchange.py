"""Exchanges labels between ranks before a step: batch sizes, labels of the global batch, class rows of each rank.

Legend: B local batch, G gathered batch, l labels per sample, W ranks, S class rows that this rank uses.

A step takes one small all-gather and ONE host synchronisation: the numbers that shape the step (batch sizes, rows) and
those that end it (labels out of range, invalid input on a rank) are read together. Before that read everything runs on
the device and no label is used as an index, so an invalid label cannot make a kernel access memory out of bounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.classifier.row_selection import MergedRows, RowSelection, SortedRows, labels_before
from megacid.classifier.sampling import Draw, padded_rows
from megacid.distributed.collectives import Gathered, all_gather_single, rank, world_size
from megacid.distributed.consensus import gather_json
from megacid.distributed.parallel import shard_range
from megacid.errors import UserError
from megacid_kernels import Weights

# Batch size, labels per sample, 1 for invalid input, and the three numbers of `InputKind` precede a rank's labels.
HEADER = 6
_DTYPES = (None, torch.float32, torch.float64, torch.float16, torch.bfloat16)
_YES_NO = ("no", "yes")
# (what must be the same on every rank, lowest bit of its code, number of bits, meaning of the codes, remedy)
_AGREED: tuple[tuple[str, int, int, tuple[object, ...], str], ...] = (
    ("dtype of the embeddings", 0, 3, _DTYPES, "cast them alike"),
    ("dtype of the teacher embeddings", 3, 3, _DTYPES, "cast them alike"),
    ("requires_grad of the embeddings", 6, 1, _YES_NO, "train or freeze the student on every rank"),
    ("grad mode", 7, 1, _YES_NO, "use torch.no_grad on every rank or on none"),
    ("training mode of the classifier", 8, 1, _YES_NO, "call train() or eval() on every rank"),
)


class GatheredLabels(NamedTuple):
    """Labels of the global batch, and the class rows that this rank uses in the step.

    Attributes:
        target_Gl: int64, global class ids, -1 = none. It, `sizes` and `max_rows` are the same on every rank.
        sizes: local batch size by rank.
        max_rows: upper bound of S over the ranks; the length of `padded`.
        num_positive: rows of this rank that are labels of the batch.
        rows: int64 [S], local ids of drawn classes and labels of the batch, sorted, unique; None: all rows.
        positive: bool [S], the row is a label of the batch; None if `rows` is.
        rows_with_pending: int64, local ids of `rows` and the pending rows, sorted, unique; None without either.
        padded: int64 [max_rows], `rows`, then this rank's last id; None without static shapes.
    """

    target_Gl: Tensor
    sizes: list[int]
    max_rows: int
    num_positive: int
    rows: Tensor | None = None
    positive: Tensor | None = None
    rows_with_pending: Tensor | None = None
    padded: Tensor | None = None

    @property
    def computed_rows(self) -> Tensor | None:
        """The rows that the loss is computed with: `rows`, with static shapes `padded`."""
        return self.rows if self.padded is None else self.padded

    @torch.no_grad()
    def count_hits_(self, hits_L: Tensor, class_start: int) -> None:
        """Add the labels of the batch to the counts of the classes from class_start on."""
        local = self.target_Gl.flatten() - class_start
        inside = local.clamp(0, len(hits_L) - 1)  # a label that this moves, as it moves -1 (no label), counts 0
        hits_L.index_add_(0, inside, (inside == local).int())

    def log_q_bias(self, draw: Draw, class_start: int) -> Tensor:
        """[S] minus the log-probability that this step uses each row; 0 for the labels of the batch."""
        assert self.rows is not None and self.positive is not None
        return (-draw.log_q(self.rows + class_start)).masked_fill(self.positive, 0.0)

    def bias_of_negatives(self, draw: Draw | None, class_start: int) -> Tensor | None:
        """What is added to the logits of negatives, fp32 [S], or [max_rows] with static shapes; None: nothing.

        draw: of the log-Q correction; None: without it.
        """
        bias = None if draw is None else self.log_q_bias(draw, class_start)
        if self.padded is None or self.rows is None:
            return bias
        bias = torch.zeros(len(self.rows), device=self.rows.device) if bias is None else bias
        # exp(-inf) = 0: padding changes no sum and gets the gradient 0.
        return torch.nn.functional.pad(bias, (0, len(self.padded) - len(self.rows)), value=-torch.inf)


class InputKind(NamedTuple):
    """What the next collectives, the draw or the loss depend on, as integers that must be equal on every rank."""

    code: int = 0
    step: int = 0
    digest: int = 0
    settings: Mapping[str, object] = MappingProxyType({})  # whose digest it is

    @classmethod
    def of(
        cls, emb: Tensor, teacher: Tensor | None, *, training: bool, step: int, settings: Mapping[str, object]
    ) -> InputKind:
        grad = torch.is_grad_enabled()
        # A dtype without a code is an input error.
        dtypes = [_DTYPES.index(x.dtype) if x is not None and x.dtype in _DTYPES else 0 for x in (emb, teacher)]
        values = (*dtypes, emb.requires_grad and grad, grad, training)
        code = sum(int(value) << low for value, (_, low, *_) in zip(values, _AGREED, strict=True))
        digest = hashlib.blake2b(repr(settings).encode(), digest_size=7).digest()
        return cls(code, step & ((1 << 62) - 1), int.from_bytes(digest, "little"), settings)


_ANY_KIND = InputKind()


def _find_disagreement(
    kinds: list[list[int]], settings: Mapping[str, object], group: dist.ProcessGroup | None
) -> str | None:
    """The first difference between the ranks' `InputKind`s. A collective if there is one."""
    codes, steps, digests = kinds
    if len(set(codes)) == len(set(steps)) == len(set(digests)) == 1:
        return None
    for name, low, bits, meanings, remedy in _AGREED:
        values = [meanings[code >> low & ((1 << bits) - 1)] for code in codes]
        if message := _describe_difference(name, values, remedy):
            return message
    everyones = gather_json({name: str(value) for name, value in settings.items()}, group)
    for name in settings:
        if message := _describe_difference(name, [one.get(name) for one in everyones], "pass the same value"):
            return message
    return _describe_difference("step", steps, "call set_step with the same number")


def _describe_difference(name: str, values: Sequence[object], remedy: str) -> str | None:
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    if other is None:
        return None
    return f"{name}: {values[0]} on rank 0, {values[other]} on rank {other}, expected the same on every rank: {remedy}"


def rows_of(x: Tensor | Gathered) -> Tensor:
    """The rows of a matrix, of this rank or of all."""
    return x.rows if isinstance(x, Gathered) else x


def find_input_error(
    emb: Tensor | Gathered, target: Tensor, teacher: Tensor | Gathered | None, embed_dim: int, weights: Weights
) -> str | None:
    """Why a rank's input of the classifier is invalid. Raising it on that rank alone would deadlock the others."""
    shape, size = tuple(rows_of(emb).shape), len(target) if isinstance(emb, Gathered) else len(emb)
    if len(shape) != 2 or shape[1] != embed_dim:
        return f"embeddings have shape {shape}, expected [B, {embed_dim}]: build the head with the student's width"
    for name, x in (("embeddings", emb), ("teacher embeddings", teacher)):
        if x is not None and rows_of(x).dtype not in _DTYPES:
            return f"{name} are {rows_of(x).dtype}, expected one of {_DTYPES[1:]}: cast them"
    if target.dtype != torch.int64 or target.ndim not in (1, 2) or target.shape[0] != size:
        return (
            f"labels are {target.dtype} {tuple(target.shape)}, expected torch.int64 [{size}] or [{size}, l]: "
            "pass the class id of every sample, -1 for none"
        )
    if target.ndim == 2 and target.shape[1] > 1 and weights.gamma > 0:
        return (
            f"Got {target.shape[1]} labels per sample with gamma {weights.gamma}, expected one label for the KL: "
            "set gamma to 0, or pass the nearest label alone"
        )
    if weights.needs_teacher and teacher is None:
        return "teacher embeddings are missing, but beta or gamma is > 0: pass them, or set both weights to 0"
    if teacher is not None:
        found, expected = tuple(rows_of(teacher).shape), (size, embed_dim)
        if found[isinstance(teacher, Gathered) :] != expected[isinstance(teacher, Gathered) :]:
            return f"teacher embeddings have shape {found}, expected the student's {expected}: pass one per sample"
    return None


class LabelExchange:
    """Gathers the labels of all ranks and selects this rank's class rows. Calling it is a collective over `group`."""

    def __init__(self, num_classes: int, group: dist.ProcessGroup | None, *, static_shapes: bool = False):
        """static_shapes: pad the rows of every rank to one number that hardly changes from step to step."""
        self.num_classes, self.group, self.static_shapes = num_classes, group, static_shapes
        self.rank, self.world = rank(group), world_size(group)
        self.starts = [shard_range(num_classes, r, self.world)[0] for r in range(self.world)] + [num_classes]
        self.start = self.starts[self.rank]
        # Labels per message. Grows to the largest batch, equally on every rank; a step in which it grows gathers and
        # synchronises twice.
        self._capacity = 1
        self._edges: Tensor | None = None  # `starts` on the device

    def __call__(
        self,
        target_Bl: Tensor,
        input_error: str | None,
        draw: Draw | None,
        device: torch.device,
        pending_rows: Tensor | None = None,
        kind: InputKind = _ANY_KIND,
        *,
        fused: bool = False,
    ) -> GatheredLabels:
        """
        Args:
            target_Bl: int64 [B, l] global class ids, on the host or on `device`.
            input_error: why this rank's input is invalid. It is raised on every rank, which avoids a deadlock.
            draw: random classes of the step; None uses every row.
            pending_rows: int64 local ids, sorted and unique, whose gradients will be added to those of this batch.
            kind: must be the same on every rank, like the labels' number per sample.
            fused: select the rows by Triton kernels; with the same result.

        Raises:
            UserError: on every rank, for invalid input or labels on any rank.
        """
        target_Bl = target_Bl.to(device, non_blocking=True)
        if self._edges is None or self._edges.device != device:
            self._edges = torch.tensor(self.starts, device=device)
        while True:
            table = self._gather(target_Bl, (int(input_error is not None), *kind[:3]), device)
            labels = table[:, HEADER:].flatten().sort().values
            selection: RowSelection | None = None
            if draw is not None:
                shard = self.start, self.starts[self.rank + 1]
                if fused and pending_rows is None:
                    selection = MergedRows(labels, draw, *shard)
                else:
                    selection = SortedRows(labels, draw, *shard, pending_rows)
            before = labels_before(labels) if selection is None else selection.labels_before
            positives = before[torch.searchsorted(labels, self._edges)].diff()
            numbers = [table[:, :HEADER].flatten(), labels[:1], labels[-1:], positives]
            numbers += [] if selection is None else selection.numbers
            values = torch.cat(numbers).tolist()  # the host synchronisation
            header, (lowest, highest, *counts) = values[: HEADER * self.world], values[HEADER * self.world :]
            sizes, widths, invalid, *kinds = (header[i::HEADER] for i in range(HEADER))
            longest = max(size * width for size, width in zip(sizes, widths))
            if longest <= self._capacity or any(invalid):
                break
            self._capacity = longest
        self._check_inputs(input_error, invalid, kinds, kind.settings)
        self._check_labels(widths, lowest, highest)
        target_Gl = self._targets(target_Bl, table, sizes, widths[0])
        num_positive, most_positive, widest = counts[self.rank], max(counts[: self.world]), self.starts[1]
        if draw is None or selection is None:
            return GatheredLabels(target_Gl, sizes, widest, num_positive)
        max_rows = padded_rows(draw.max_count(widest) + most_positive, widest, static_shapes=self.static_shapes)
        chosen = selection.choose(counts[self.world :], max_rows if self.static_shapes else None)
        return GatheredLabels(target_Gl, sizes, max_rows, num_positive, *chosen)

    def _gather(self, target_Bl: Tensor, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """int64 [W, HEADER + capacity]: every rank's header and labels, padded with -1."""
        size, width = target_Bl.shape
        labels = target_Bl.flatten()[: self._capacity]
        # Only from pinned memory a copy to a GPU does not synchronise.
        header = torch.tensor([size, width, *numbers], pin_memory=device.type == "cuda").to(device, non_blocking=True)
        filled = [] if len(labels) == self._capacity else [labels.new_full((self._capacity - len(labels),), -1)]
        message = torch.cat([header, labels, *filled])
        if self.world == 1:
            return message[None]
        table = message.new_empty(self.world * len(message))
        all_gather_single(table, message, group=self.group)
        return table.view(self.world, -1)

    def _targets(self, target_Bl: Tensor, table: Tensor, sizes: list[int], width: int) -> Tensor:
        if self.world == 1:
            return target_Bl
        labels = table[:, HEADER:]
        if len(set(sizes)) == 1:
            return labels[:, : sizes[0] * width].reshape(-1, width)
        return torch.cat([labels[r, : size * width].reshape(size, width) for r, size in enumerate(sizes)])

    def _check_inputs(
        self, input_error: str | None, invalid: list[int], kinds: list[list[int]], settings: Mapping[str, object]
    ) -> None:
        if input_error is not None:
            raise UserError(input_error)
        if any(invalid):
            raise UserError(f"rank {invalid.index(1)} has invalid input for the classifier: see that rank's message")
        disagreement = _find_disagreement(kinds, settings, self.group)
        if disagreement is not None:
            raise UserError(disagreement)

    def _check_labels(self, widths: list[int], lowest: int, highest: int) -> None:
        if len(set(widths)) > 1:
            raise UserError(f"Got {widths} labels per sample by rank, expected the same number on every rank")
        for value in (lowest, highest):
            if not -1 <= value < self.num_classes:
                raise UserError(
                    f"label {value} is out of range, expected -1 (none) or 0 to {self.num_classes - 1}: "
                    "use labels of the same clustering"
                )
