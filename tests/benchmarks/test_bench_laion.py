"""The suite laion: every row at toy sizes, laws from points that follow them, and what is promised is judged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import balance_bookkeeping, laion, laion_shares, loader_tables
from benchmarks.laws import fit
from benchmarks.suite import Report
from megacid.data.joined import PART
from megacid.distributed.array_exchange import Ranks
from megacid.errors import UserError


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A run in this process, with two ranks at most and one process of the loader."""

    def on_ranks(module: str, request: dict[str, Any], world: int) -> dict[str, tuple[float, float]]:
        return balance_bookkeeping.phases_of(request | {"n": request["n"] // world}, Ranks())

    def here(module: str, request: dict[str, Any], environment: Any) -> dict[str, Any]:
        return laion_shares.answer(json.loads(json.dumps(request)))

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANKS": 4, "MICRO_BATCH": 2, "WORKERS": 1, "SHORT": 1, "LONG": 2}.items():
            patch.setattr(loader_tables, name, value)
        patch.setattr(loader_tables, "BLOCKS", {2: 0.3, 20: 0.4})
        patch.setattr(laion, "RANKS", (1, 2, 4))
        patch.setattr(balance_bookkeeping, "ask_ranks", on_ranks)
        patch.setattr(laion, "ask_process", here)
        patch.setattr(laion_shares, "STUDENT_BYTES", 12_000)
        sizes = {"tars": [20, 40], "samples": 10, "index_tars": [1, 2], "balance_rows": [20_000, 40_000]}
        sizes |= {"balance_ranks": [1, 2], "neighbor_clusters": 2, "copied_tars": 3, "merged": [50, 200]}
        sizes |= {"classes": [100, 1000], "dim": 8, "rounds": 1, "folder": tmp_path_factory.mktemp("laion")}
        shared = {"suite": "laion", "device": "cpu", "clock": "cpu", "threads": 1}
        return laion.run(argparse.Namespace(**shared, **sizes))


def test_every_promise_has_a_row_with_what_was_measured_and_its_law(report: Report) -> None:
    rows = {row["what"]: row for row in report["results"]}
    assert laion.LIMITS.keys() < rows.keys() and sum(name.startswith("loader") for name in rows) == 2
    for what, row in rows.items():
        assert all(np.isfinite(row[f"{ranks} ranks"]) for ranks in (1, 2, 4)), row
        shared = what.startswith(("resume, bytes", "index, 12", "balance, a node"))  # from another row
        assert shared or any(name.startswith("at ") for name in row), row


def test_every_rank_hashes_an_equal_share_of_a_checkpoint(report: Report) -> None:
    (row,) = (row for row in report["results"] if row["what"].startswith("resume, bytes"))
    assert [row[f"{ranks} ranks"] for ranks in (1, 2, 4)] == pytest.approx([1.0] * 3, rel=0.01)


def test_limits_are_judged_and_a_row_that_is_missing_meets_none() -> None:
    loader = next(name for name in laion.limits() if name.startswith("loader"))
    rows = [{"what": "index, us per sample", "8 ranks": 44.0}, {"what": loader, "8 ranks": 9.0, "512 ranks": 0.2}]
    limits = laion.check({"results": rows})
    assert len(limits) == len(laion.LIMITS) + len(loader_tables.BLOCKS)
    assert [limit.what for limit in limits if limit.met] == [f"{loader}, 512 ranks"]
    assert limits[0].value == 44.0 and limits[-1].value is None


def test_a_law_is_found_again_from_points_that_follow_it() -> None:
    sizes = [(n, ranks) for n in (2e6, 8e6) for ranks in (2, 8)]
    terms = [(1.0, n, n / ranks) for n, ranks in sizes]
    assert fit(terms, [100 + 12e-6 * n + 30e-6 * n / ranks for n, ranks in sizes]) == pytest.approx([100, 12e-6, 30e-6])
    assert fit(terms, [4e-6 * n / ranks for n, ranks in sizes]) == pytest.approx([0, 0, 4e-6], abs=1e-9)
    assert fit([(1.0, n) for n in (1, 2, 3)], [3.0, 2.0, 1.0]) == [2.0, 0.0], "a cost does not fall"
    assert fit([(1.0, n) for n in (1, 2, 3)], [0.0, 0.0, 0.0]) == [0.0, 0.0]


def test_a_rank_of_many_joins_its_share_and_reads_the_batches_of_a_whole_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANKS": 2, "MICRO_BATCH": 4, "WORKERS": 1, "SHORT": 1, "LONG": 2}.items():
        monkeypatch.setattr(loader_tables, name, value)
    loader_tables.write_data(tmp_path, 40, 10)
    laion_shares.join(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "join-2").glob("rows-*")) == ["rows-00000.npy", "rows-00002.npy"]
    sources, plan = loader_tables.open_data(tmp_path), loader_tables.plans(2)[-1]
    table = laion_shares._table_of(sources, tmp_path / "table", PART, np.concatenate(list(plan)))
    tables = (table, loader_tables.open_joined(sources, PART))
    batches = [list(loader_tables.streams_of(joined, PART, 2)[-1]) for joined in tables]
    assert [batch.sample_id.tolist() for batch in batches[0]] == [batch.sample_id.tolist() for batch in batches[1]]
    assert len(batches[0]) == len(plan) and all(batch.failure is None for batch in batches[0])


def test_a_checkpoint_that_does_not_verify_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laion_shares, "STUDENT_BYTES", 1000)
    monkeypatch.setattr(laion_shares, "file_sha256", lambda path: "0" * 64)
    with pytest.raises(UserError, match="the checkpoint does not verify"):
        laion_shares.resume(tmp_path, 10, 4, 2)
