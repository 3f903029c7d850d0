"""Ranks, device and process groups: the only place that creates a process group.

One program runs under `deepspeed`, `torchrun` or plain `python`. The launchers agree on the environment variables
RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without them the program is alone and no process group is made.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megacid.errors import UserError

DEFAULT_TIMEOUT_S = 600.0


def shard_range(total: int, rank: int, world: int) -> tuple[int, int]:
    """[start, stop) of the part of `total` items that belongs to `rank`; published partial-FC checkpoints use the same formula."""
    base, extra = divmod(total, world)
    start = base * rank + min(rank, extra)
    return start, start + base + (rank < extra)


@dataclass(frozen=True)
class Parallel:
    """Where this process stands. `group` is None for a single process without a process group."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"environment variable {name} is {text!r}, expected an integer: start through deepspeed or torchrun, or unset it"
        ) from None


def launched() -> bool:
    """True when a launcher has placed this process among others (also a world of one)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_device(local_rank: int) -> torch.device:
    """The accelerator of this local rank, or the CPU; DS_ACCELERATOR=cpu forces the CPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "") != "cpu":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"local rank {local_rank} has no GPU, this host has {count}: start at most {count} ranks here (--num_gpus {count})"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def init(timeout_s: float = DEFAULT_TIMEOUT_S, *, always: bool = False) -> Parallel:
    """Join the launcher's process group (nccl on GPUs, gloo on CPUs).

    timeout_s: seconds until a collective that a peer never joins is an error.
    always: also make a group of one when there was no launcher (the DeepSpeed engine needs one).
    Raises UserError when the rendezvous port is taken.
    """
    rank, world = _environment_int("RANK", 0), _environment_int("WORLD_SIZE", 1)
    local_rank = _environment_int("LOCAL_RANK", rank)
    device = local_device(local_rank)
    if not launched() and not always:
        return Parallel(0, 1, 0, device, None)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            if launched():
                dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
            else:
                # A world of one needs no port, so nothing can be in its way.
                dist.init_process_group(
                    backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=timeout_s)
                )
        except (dist.DistNetworkError, RuntimeError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                raise UserError(
                    f"port {os.environ.get('MASTER_PORT')} is in use on this host, expected it free for the ranks to meet at {address}: choose another with --master_port"
                ) from None
            raise
    return Parallel(rank, world, local_rank, device, dist.group.WORLD)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def session(timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[Parallel]:
    """`with session() as p:` for the offline tools: join, and leave again however the block ends."""
    parallel = init(timeout_s)
    try:
        yield parallel
    finally:
        shutdown()


def accept_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    """`deepspeed` and old `torchrun` pass the local rank to the program; the environment variable is what counts."""
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
