"""subset.npy: DataComp's sorted list of the uids that are kept. Legend: m samples of this rank that are kept."""

from __future__ import annotations

import itertools

import numpy as np

from megacid.distributed.array_exchange import Ranks
from megacid.distributed.stopping import Progress
from megacid.errors import UserError
from megacid.failpoints import failpoint
from megacid.offline.balance.inputs import SampleLocations
from megacid.storage.npy import write_blocks
from megacid.storage.stage_directory import StageDirectory

_BLOCK_ROWS = 1 << 16


def write_subset(
    stage: StageDirectory, locations: SampleLocations, rows: np.ndarray, ranks: Ranks, progress: Progress
) -> None:
    """Writes subset.npy. A collective: each rank reads the uids of its rows and sorts those of a range of uids.

    Args:
        rows: int64 [m], the kept rows of this rank.

    Raises:
        UserError: a sample has no uid, or one that is not of 32 hexadecimal digits.
    """
    root = locations.index.root
    with ranks.stop_together():
        blocks, missing = _read_uids(locations, rows, progress)
    missing, total = ranks.sum(np.array([missing, len(rows)])).tolist()
    with ranks.stop_together():
        if missing:
            raise UserError(
                f"{missing} of {total} kept samples of {root} have no uid, others have: the subset file would lack "
                "them; add the uids"
            )
    sent = ((block.view(np.int64), _range_of(block, ranks.world)) for block in blocks)
    received = [np.empty((0, 2), np.int64), *ranks.exchange(sent, 2, np.dtype(np.int64))]
    with ranks.stop_together():
        stage.work.save_array(f"subset-{ranks.rank}", subset_array(np.concatenate(received).view(np.uint64)))
        failpoint("balance:subset")
    with ranks.stop_together():
        if ranks.rank == 0:
            parts = [stage.work.array(f"subset-{number}", (None,), "V") for number in range(ranks.world)]
            whole = [part for part in parts if part is not None]
            if (count := sum(map(len, whole))) != total:
                raise UserError(
                    f"the partial results in {stage.work.folder} have {count:,} uids, expected {total:,}: "
                    "do not change them while the tool runs, and run the same command again"
                )
            write_blocks(stage.path / "subset.npy", whole[0].dtype, (total,), whole)


def _read_uids(locations: SampleLocations, rows: np.ndarray, progress: Progress) -> tuple[list[np.ndarray], int]:
    """(uids of the rows in blocks, see `uid_pairs`; the number of samples without one)."""
    values = (fields.get("uid") for _, fields in locations.read_json(rows, progress))
    blocks, missing = [], 0
    while block := list(itertools.islice(values, _BLOCK_ROWS)):
        uids = [uid for uid in block if isinstance(uid, str)]
        missing += len(block) - len(uids)
        try:
            blocks.append(uid_pairs(uids))
        except ValueError as error:
            raise UserError(f"{locations.index.root}: {error}; correct the json members") from None
    return blocks, missing


def _range_of(pairs: np.ndarray, world: int) -> np.ndarray:
    """The rank that sorts each uid: ranks have ascending ranges of the high half."""
    return ((pairs[:, 0] >> np.uint64(32)) * np.uint64(world) >> np.uint64(32)).astype(np.int64)


def uid_pairs(uids: list[str]) -> np.ndarray:
    """Uids of 32 hexadecimal digits as uint64 [m, 2], the high half first. Raises ValueError for other uids."""
    bad = next((uid for uid in uids if len(uid) != 32), None)
    if bad is not None:
        raise ValueError(f"uid {bad!r} has {len(bad)} characters, expected 32 hexadecimal digits")
    return np.frombuffer(bytes.fromhex("".join(uids)), ">u8").astype("u8").reshape(-1, 2)


def subset_array(pairs: np.ndarray) -> np.ndarray:
    """The uids of `uid_pairs` as DataComp's sorted 'u8,u8' array."""
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return pairs[order].reshape(-1).view(np.dtype("u8,u8"))
