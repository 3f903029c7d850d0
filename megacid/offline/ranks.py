"""What the offline stages share when they run on several ranks."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from megacid.distributed.collectives import gather_json
from megacid.errors import UserError

Group = dist.ProcessGroup | None


@contextlib.contextmanager
def fail_together(group: Group = None) -> Iterator[None]:
    """A block of local work (no collectives inside): when it fails on one rank, every rank raises the same message.

    Without it the healthy ranks would wait in their next collective until its timeout. UserError stays UserError.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    kind = None if failure is None else "user" if isinstance(failure, UserError) else type(failure).__name__
    said = gather_json([kind, str(failure)], group)
    if failure is not None:
        raise failure
    for number, (kind, message) in enumerate(said):
        if kind == "user":
            raise UserError(message)
        if kind is not None:
            raise RuntimeError(f"rank {number} of {len(said)} failed: {kind}: {message}")


def share(total: int, rank: int, world: int) -> tuple[int, int]:
    """Contiguous part [start, stop) of `total` things for one rank; the first ranks take one more."""
    base, extra = divmod(total, world)
    start = base * rank + min(rank, extra)
    return start, start + base + (rank < extra)


def accept_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    """`deepspeed` and old `torchrun` hand the local rank to the program; the environment variable is what counts."""
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
