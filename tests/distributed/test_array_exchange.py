"""Arrays of many ranks that are gathered, exchanged and reduced in pieces."""

from __future__ import annotations

import numpy as np
import pytest
from harness import run_ranks

from megacid.distributed import array_exchange
from megacid.distributed.array_exchange import ALONE, Ranks

SIZES = [0, 5, 3]


def own(rank: int) -> np.ndarray:
    return np.arange(2 * SIZES[rank], dtype=np.int32).reshape(-1, 2) + 100 * rank


def blocks_of(rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rank r sends r blocks, row i of each to rank i % 3."""
    return [(own(rank) + 1000 * block, np.arange(SIZES[rank]) % 3) for block in range(rank)]


def all_of_them() -> dict[str, object]:
    array_exchange.PIECE_BYTES = 2 * 8 * 3  # two rows of each rank at a time
    ranks = Ranks()
    whole = np.full((sum(SIZES), 2), -1, np.int32)
    most = 0
    for place, piece in ranks.pieces(own(ranks.rank)):
        whole[place : place + len(piece)] = piece
        most = max(most, len(piece))
    received = list(ranks.exchange(iter(blocks_of(ranks.rank)), 2, np.dtype(np.int32)))
    flags = np.zeros(100, bool)
    flags[10 * ranks.rank] = flags[99] = True
    ranks.any(flags)
    total = ranks.sum(np.array([ranks.rank, 1.5]))
    np.testing.assert_array_equal(ranks.concatenate(own(ranks.rank)), whole)
    return {"whole": whole, "most": most, "received": received, "flags": flags, "sum": total}


def test_uneven_and_empty_parts_arrive_whole_in_pieces_of_bounded_size() -> None:
    whole = np.concatenate([own(rank) for rank in range(3)])
    for rank, got in enumerate(run_ranks(all_of_them, 3)):
        np.testing.assert_array_equal(got["whole"], whole)
        assert got["whole"].dtype == np.int32 and got["most"] == 2
        expected = [
            [rows[to == rank] for blocks in map(blocks_of, range(3)) for rows, to in blocks[turn : turn + 1]]
            for turn in range(2)
        ]
        assert [block.tolist() for block in got["received"]] == [np.concatenate(e).tolist() for e in expected]
        assert np.flatnonzero(got["flags"]).tolist() == [0, 10, 20, 99]
        assert got["sum"].tolist() == [3.0, 4.5]


def test_one_rank_gets_what_it_has_without_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_exchange, "PIECE_BYTES", 16)
    for ranks in (ALONE, Ranks()):
        pieces = list(ranks.pieces(own(1)))
        assert [place for place, _ in pieces] == [0, 2, 4]
        np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), own(1))
        assert list(ranks.pieces(own(0))) == []
        (block,) = ranks.exchange(iter([(own(1), np.zeros(5, int))]), 2, np.dtype(np.int32))
        np.testing.assert_array_equal(block, own(1))
        np.testing.assert_array_equal(ranks.concatenate(own(1)), own(1))
        assert ranks.sum(np.array([2])).tolist() == [2] and ranks.gather_json("a") == ["a"]
