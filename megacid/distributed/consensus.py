"""Agreement between ranks: exchange of small JSON values, shared errors, checks that ranks have the same values."""

from __future__ import annotations

import contextlib
import json
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.distributed.collectives import Group, gather_plain, gather_sizes, group_device, rank, world_size
from megacid.errors import UserError, one_line


def any_rank(flag: bool, group: Group = None) -> bool:
    """Whether `flag` is true on any rank. A collective."""
    if world_size(group) == 1:
        return flag
    value = torch.tensor([int(flag)], dtype=torch.int32, device=group_device(group))
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value.item())


def _bytes_tensor(obj: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8).to(device)


def gather_json(obj: Any, group: Group = None) -> list[Any]:
    """The JSON-able object of every rank, by rank. JSON instead of pickle, so received data cannot run code."""
    if world_size(group) == 1:
        return [obj]
    mine = _bytes_tensor(obj, group_device(group))
    sizes = gather_sizes(mine.numel(), group)
    parts = gather_plain(mine, group, sizes=sizes).split(sizes)
    return [json.loads(bytes(part.cpu().numpy())) for part in parts]


def broadcast_json(obj: Any, group: Group = None) -> Any:
    """Rank 0's JSON-able object, on every rank."""
    if world_size(group) == 1:
        return obj
    device = group_device(group)
    mine = _bytes_tensor(obj, device) if rank(group) == 0 else torch.empty(0, dtype=torch.uint8, device=device)
    size = torch.tensor([mine.numel()], dtype=torch.int64, device=device)
    dist.broadcast(size, src=0, group=group)
    if rank(group) != 0:
        mine = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    dist.broadcast(mine, src=0, group=group)
    return json.loads(bytes(mine.cpu().numpy()))


class RanksDisagree(RuntimeError):  # noqa: N818  the run ends with its own exit code
    """The ranks have different values of something that must be equal. Raised on every rank."""

    def __init__(self, what: str, values: str) -> None:
        """what: the thing that differs. values: which rank has which value."""
        super().__init__(f"the ranks disagree about {what}: {values}; start every rank with the same files and options")


def agree(value: str, what: str, group: Group = None) -> None:
    """Raise RanksDisagree on every rank when `value` differs between ranks; the message lists the ranks by value."""
    values = gather_json(value, group)
    if any(other != values[0] for other in values):
        ranks_of: dict[str, list[int]] = {}
        for index, other in enumerate(values):
            ranks_of.setdefault(str(other), []).append(index)
        texts = (f"{other!r} on rank {', '.join(map(str, ranks))}" for other, ranks in ranks_of.items())
        raise RanksDisagree(what, "; ".join(texts))


def agree_on_mapping(mapping: dict[str, Any], what: str, group: Group = None) -> None:
    """Like `agree`, for a flat dict of JSON values; the message names only the keys that differ."""
    all_ranks = gather_json(mapping, group)
    first = all_ranks[0]
    differing = sorted(
        {key for one in all_ranks for key in one.keys() | first.keys() if one.get(key) != first.get(key)}
    )
    if differing:
        texts = (f"{key} is {', '.join(f'{one.get(key)!r} on rank {r}' for r, one in enumerate(all_ranks))}"
                 for key in differing)  # fmt: skip
        raise RanksDisagree(what, "; ".join(texts))


_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|timed out|connection refused|gloo|NCCL", re.IGNORECASE
)


def from_a_collective(error: BaseException) -> bool:
    """Whether an error means that another rank has ended or is late, and not that this rank failed."""
    # Any frame counts, not the innermost alone: DeepSpeed and autograd wrap torch's.
    frames = [entry.filename for entry in traceback.extract_tb(error.__traceback__)]
    inside = any(f"{os.sep}torch{os.sep}distributed{os.sep}" in name for name in frames)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and bool(_LOST_PEER.search(str(error)))
        and (inside or "gloo" in str(error).lower())
    )


@contextlib.contextmanager
def as_user_error(what: str, passed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn an exception of a library into one line that begins with `what`.

    Errors of all ranks stay what they are, and so do those of the connection and of the classes `passed`.
    """
    try:
        yield
    except (UserError, RanksDisagree):
        raise
    except Exception as error:
        if isinstance(error, passed) or from_a_collective(error):
            raise
        raise UserError(
            f"{what} ({type(error).__name__}: {one_line(error)}): correct the settings that it names"
        ) from error


@contextlib.contextmanager
def fail_together(group: Group = None) -> Iterator[None]:
    """A block of local work: when it raises on one rank, every rank raises.

    Without it the other ranks would wait in their next collective until its timeout. The block must contain no
    collective. The end of the block is one. A UserError is a UserError with the same message on every rank.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    kind = None if failure is None else "user" if isinstance(failure, UserError) else type(failure).__name__
    failures = gather_json([kind, str(failure)], group)
    if failure is None:
        for number, (kind, message) in enumerate(failures):
            if kind == "user":
                failure = UserError(message)
                break
            if kind is not None:
                failure = RuntimeError(f"rank {number} of {len(failures)} failed: {kind}: {message}")
                break
    if isinstance(failure, UserError):
        failure.on_every_rank = True
    if failure is not None:
        raise failure
