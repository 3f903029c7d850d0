"""Which ranks of a job have the same shards: the names of all tars, and the folders that ranks share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
from pathlib import Path

from megacid.data.remote.cache import ShardCache
from megacid.data.shard_paths import ShardPaths, find_shards, list_remote
from megacid.distributed.divided_work import Workers
from megacid.storage.atomic import disk_errors


def find_shards_once(spec: str | Path, workers: Workers, cache: ShardCache | None = None, *, ask: bool) -> ShardPaths:
    """`find_shards` on every rank, for which rank 0 asks the stores. A collective."""
    with workers.together():
        listed = list_remote(spec, cache, ask=ask) if workers.rank == 0 else {}
    listed = workers.broadcast(listed)
    with workers.together():
        return find_shards(spec, cache, listed=listed)


def agree_on_names(paths: ShardPaths, workers: Workers) -> None:
    """Raise RanksDisagree on every rank when the ranks see tars of different names. A collective."""
    digest = hashlib.sha256(json.dumps([tar.name for tar in paths.tars]).encode()).hexdigest()
    workers.agree(f"{len(paths.tars):,} names with sha256 {digest[:16]}", f"the tars of {paths}")


def ranks_that_share(folders: dict[Path, bool], workers: Workers) -> list[int]:
    """The ranks that read and write the same files as this one in every folder, ascending. A collective.

    Shards, or a cache of them, may be on a disk of every host. Ranks share a folder if each sees what the others write
    there. A folder that cannot be written is shared by the ranks of a host.

    Args:
        folders: of an index; whether this rank can write each.
    """
    if workers.world == 1:
        return [0]
    start = f".tmp-{workers.broadcast(secrets.token_hex(8))}-"
    marks = [folder / f"{start}{workers.rank}" for folder, writable in folders.items() if writable]
    with workers.together():
        for mark in marks:
            with disk_errors(mark.parent):
                mark.touch()
    seen: list[object] = []
    with workers.together():
        for folder, writable in folders.items():
            names = sorted(name for name in os.listdir(folder) if name.startswith(start)) if writable else []
            seen.append(names or socket.gethostname())
    views = workers.gather(hashlib.sha256(json.dumps(seen).encode()).hexdigest())
    for mark in marks:
        with contextlib.suppress(OSError):
            mark.unlink()
    return [rank for rank, view in enumerate(views) if view == views[workers.rank]]
