"""Verification of a checkpoint by all ranks, each of which reads its share of the bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from megacid.checkpoint import store
from megacid.distributed.divided_work import Workers


def find_problem(directory: Path, workers: Workers, *, to_resume: bool = False) -> str | None:
    """Why a checkpoint cannot be used, the same on every rank; None for a valid one. A collective.

    Rank 0 reads the manifest and the sizes, and the ranks divide the files, which they hash.

    to_resume: as of `store.verify`.
    """
    problem, files = None, []
    with workers.together():
        if workers.rank == 0:
            try:
                files = store.verify(directory, hashes=False, to_resume=to_resume)["files"]
            except ValueError as error:
                problem = str(error)
    problem, files = workers.broadcast([problem, files])
    if problem is not None:
        return str(problem)
    own = {number: files[number] for number in share_of_files(files, workers)}
    found = workers.divide(partial(store.file_problem, directory), own, 0)
    return next((problem for _, problem in sorted(found.items()) if problem is not None), None)


def share_of_files(files: list[dict[str, Any]], workers: Workers) -> list[int]:
    """The numbers of this rank's files: the largest first, each to the rank with the fewest bytes so far."""
    loads, own = [0] * workers.world, []
    for number in sorted(range(len(files)), key=lambda number: -files[number]["bytes"]):
        rank = loads.index(min(loads))
        loads[rank] += files[number]["bytes"]
        if rank == workers.rank:
            own.append(number)
    return own
