"""Exchange of NumPy arrays between ranks, a bounded number of bytes at a time. Arrays are sent from host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megacid.distributed.collectives import (
    Group,
    all_reduce_max,
    all_reduce_sum,
    gather_plain,
    gather_sizes,
    rank,
    world_size,
)
from megacid.distributed.consensus import gather_json
from megacid.distributed.stopping import stop_together

PIECE_BYTES = 1 << 24  # that a rank receives at a time


@dataclass(frozen=True)
class Ranks:
    """The ranks that share some work, with a gloo group. alone: this rank does all of it, without communication."""

    group: Group = None
    alone: bool = False

    @property
    def rank(self) -> int:
        return 0 if self.alone else rank(self.group)

    @property
    def world(self) -> int:
        return 1 if self.alone else world_size(self.group)

    def stop_together(self) -> AbstractContextManager[None]:
        """All ranks leave the block together when one of them fails or is stopped. A collective unless `alone`."""
        return contextlib.nullcontext() if self.alone else stop_together(self.group)

    def pieces(self, array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (place, piece) of the concatenated arrays [m, ...] of all ranks, on every rank. A collective.

        place: of the piece's first row in the concatenation. The pieces cover it, but are not in its order.
        """
        sizes = [len(array)] if self.world == 1 else gather_sizes(len(array), self.group)
        starts = np.cumsum([0, *sizes]).tolist()
        row_bytes = array[:1].nbytes if len(array) else array.dtype.itemsize * int(np.prod(array.shape[1:]))
        step = max(PIECE_BYTES // (max(row_bytes, 1) * self.world), 1)
        for low in range(0, max(sizes), step):
            counts = [min(max(size - low, 0), step) for size in sizes]
            piece = np.array(array[low : low + step])
            if self.world > 1:
                piece = gather_plain(torch.from_numpy(piece), self.group, sizes=counts).numpy()
            for start, part in zip(starts, np.split(piece, np.cumsum(counts)[:-1])):
                if len(part):
                    yield start + low, part

    def concatenate(self, array: np.ndarray) -> np.ndarray:
        """The arrays [m, ...] of all ranks in order of the ranks, on every rank. A collective."""
        count = int(self.sum(np.array([len(array)]))[0])
        out = np.empty((count, *array.shape[1:]), array.dtype)
        for place, piece in self.pieces(array):
            out[place : place + len(piece)] = piece
        return out

    def gather_json(self, value: Any) -> list[Any]:
        """The JSON-able value of every rank. A collective."""
        return [value] if self.world == 1 else gather_json(value, self.group)

    def exchange(
        self, blocks: Iterable[tuple[np.ndarray, np.ndarray]], columns: int, dtype: np.dtype
    ) -> Iterator[np.ndarray]:
        """Sends rows to ranks; yields the received ones, [m, columns] at a time. A collective: `blocks` must not raise.

        Args:
            blocks: (rows [B, columns] of `dtype`, int [B]: the rank that each is for); as many as this rank has.
        """
        if self.world == 1:
            yield from (rows for rows, _ in blocks)
            return
        remaining = iter(blocks)
        while True:
            block = next(remaining, None)
            rows, destination = block or (np.empty((0, columns), dtype), np.empty(0, np.int64))
            counts = np.bincount(destination, minlength=self.world)
            table = torch.from_numpy(np.append(counts, block is not None).astype(np.int64))[None]
            table = gather_plain(table, self.group, sizes=[1] * self.world)
            if not table[:, -1].any():
                return
            sent = torch.from_numpy(rows[np.argsort(destination, kind="stable")])
            received = table[:, self.rank].tolist()
            out = torch.empty(sum(received), columns, dtype=sent.dtype)
            dist.all_to_all_single(out, sent, received, counts.tolist(), group=self.group)
            yield out.numpy()

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of `values` over the ranks. A collective."""
        return values if self.world == 1 else all_reduce_sum(torch.from_numpy(values.copy()), self.group).numpy()

    def any(self, flags: np.ndarray) -> None:
        """Sets each flag (bool [m]) that is set on any rank. A collective."""
        if self.world > 1:
            for low in range(0, len(flags), PIECE_BYTES):
                all_reduce_max(torch.from_numpy(flags[low : low + PIECE_BYTES].view(np.uint8)), self.group)


ALONE = Ranks(alone=True)
