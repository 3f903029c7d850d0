"""What the offline stages share when they run on several ranks."""

from __future__ import annotations

import argparse


def share(total: int, rank: int, world: int) -> tuple[int, int]:
    """Contiguous part [start, stop) of `total` things for one rank; the first ranks take one more."""
    base, extra = divmod(total, world)
    start = base * rank + min(rank, extra)
    return start, start + base + (rank < extra)


def accept_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    """`deepspeed` and old `torchrun` hand the local rank to the program; the environment variable is what counts."""
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
