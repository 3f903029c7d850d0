"""State by global row: the same names and numbers for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.config import UserError
from megacid.distributed.collectives import gather_plain

# read(name, start, stop) -> the rows of the global tensor `name`, [stop - start, ...], on any device.
ReadRows = Callable[[str, int, int], Tensor]


def copy_rows(own: Mapping[str, Tensor], read: ReadRows, start: int, stop: int) -> None:
    """Fill the tensors of `own` [stop - start, ...] in place with global rows [start, stop)."""
    # Everything is read and checked before anything changes: a file that ends early leaves no half-loaded state.
    found = {name: read(name, start, stop) for name in own}
    for name, rows in found.items():
        if rows.shape != own[name].shape:
            raise UserError(
                f"rows [{start}, {stop}) of {name!r} have shape {tuple(rows.shape)}, wanted {tuple(own[name].shape)}: "
                "load a state of the same number of classes, width and optimizer"
            )
    with torch.no_grad():
        for name, rows in found.items():
            own[name].copy_(rows)


def gather_state(own: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """All ranks' rows of every tensor, on the host of every rank: [num_classes, ...]. A collective."""
    return {name: gather_plain(rows, group).cpu() for name, rows in own.items()}


def reader_of(state: Mapping[str, Tensor], num_classes: int) -> ReadRows:
    """Rows out of full tensors in memory."""

    def read(name: str, start: int, stop: int) -> Tensor:
        if name not in state:
            raise UserError(f"the state has no {name!r}, only {sorted(state)}: load one that this class wrote")
        if len(state[name]) != num_classes:
            raise UserError(
                f"{name!r} has {len(state[name])} rows, wanted {num_classes}: load a state of as many classes"
            )
        return state[name][start:stop]

    return read
