"""Ranks, devices and the process group, which only this module creates.

A program runs under `deepspeed`, `torchrun` or plain `python`. Both launchers set the environment variables RANK,
LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without them the program is a single process without a group.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megacid.distributed.rendezvous import START_TIMEOUT_S, rendezvous
from megacid.errors import UserError

DEFAULT_TIMEOUT_S = 600.0
WAIT_LIMIT = timedelta(days=7)


def shard_range(total: int, rank: int, world: int) -> tuple[int, int]:
    """[start, stop) of the items that belong to `rank`: the formula of published partial-FC checkpoints."""
    base, extra = divmod(total, world)
    start = base * rank + min(rank, extra)
    return start, start + base + (rank < extra)


@dataclass(frozen=True)
class Parallel:
    """This process among the ranks. group: None for a single process without a process group."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"environment variable {name} is {text!r}, expected an integer: use deepspeed or torchrun, or unset it"
        ) from None


def launched() -> bool:
    """Whether a launcher started this process, also as the only rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_device(local_rank: int) -> torch.device:
    """The GPU of this local rank; the CPU without GPUs or with DS_ACCELERATOR=cpu. UserError for too few GPUs."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "") != "cpu":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"local rank {local_rank} has no GPU, this host has {count}: start at most {count} ranks here "
                f"(--num_gpus {count})"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def init(
    timeout_s: float = DEFAULT_TIMEOUT_S, *, start_timeout_s: float = START_TIMEOUT_S, always: bool = False
) -> Parallel:
    """Join the launcher's process group: nccl on GPUs, gloo on CPUs.

    Args:
        timeout_s: seconds after which a collective that a rank does not join is an error.
        start_timeout_s: seconds to wait for all ranks to start.
        always: create a group of one rank when there is no launcher, which the DeepSpeed engine needs.

    Raises:
        UserError: a rank does not start, the rendezvous port is in use, or an environment variable is invalid.
    """
    rank, world = _environment_int("RANK", 0), _environment_int("WORLD_SIZE", 1)
    local_rank = _environment_int("LOCAL_RANK", rank)
    device = local_device(local_rank)
    if not launched() and not always:
        return Parallel(0, 1, 0, device, None)
    if not dist.is_initialized():
        # A single rank needs no port, so none can be in use.
        store = rendezvous(rank, world, start_timeout_s) if launched() else dist.HashStore()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
    return Parallel(rank, world, local_rank, device, dist.group.WORLD)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def session(timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[Parallel]:
    """Join the process group for a `with` block and leave it at its end."""
    parallel = init(timeout_s)
    try:
        yield parallel
    finally:
        shutdown()


@contextlib.contextmanager
def waiting_group() -> Iterator[dist.ProcessGroup]:
    """A gloo group of all ranks whose collectives wait WAIT_LIMIT for a rank that works longer. A collective.

    The time limit of the launcher's group is for ranks that reach a collective at about the same time. A rank that ends
    closes its connections, so the others do not wait for it in either group.
    """
    group = dist.new_group(backend="gloo", timeout=WAIT_LIMIT)
    assert isinstance(group, dist.ProcessGroup)  # not the mark of a rank outside of it
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


@contextlib.contextmanager
def long_waits(parallel: Parallel) -> Iterator[Parallel]:
    """The same ranks with a `waiting_group`. A collective."""
    if parallel.world == 1:
        yield parallel
        return
    with waiting_group() as group:
        yield replace(parallel, group=group)


def accept_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    """Accept, and ignore, the local rank that `deepspeed` and old `torchrun` pass; the environment variable is used."""
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
