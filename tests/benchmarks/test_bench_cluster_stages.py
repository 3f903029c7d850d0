"""The suites of clustering's stages and of its seeding: every estimated stage is measured, and their limits judge."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import kmeans_seeding, kmeans_stages
from benchmarks.kmeans_quality import tree
from benchmarks.synthetic_folders import write_embeddings
from megacid.failpoints import hooks


@pytest.mark.parametrize(("method", "stages"), [("flat", 5), ("hierarchical", 9)])
def test_every_estimated_stage_is_measured(
    method: str, stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("emb", 3000), ("few", 200)):
        write_embeddings(tmp_path / name, lambda part: tree(len(part), 8, 0), count, 1)
    request = {"k": 300, "dim": 8, "rows": 3000, "method": method, "iterations": 2, "refine": 1, "memory_gb": 1.0}
    request |= {"seed": 0, "threads": 1, "clock": "wall", "label_rows": 200, "folder": str(tmp_path)}
    monkeypatch.setattr(sys, "argv", ["kmeans_stages", json.dumps(request)])
    monkeypatch.setitem(hooks, "cluster:stage", lambda stage: None)
    threads = threading.active_count()
    kmeans_stages.main()
    assert threading.active_count() == threads, "memory is still sampled after the last stage"
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
    assert len(rows) == stages
    for row in rows:
        assert row["seconds"] >= 0 and row["estimated_s"] > 0 and row["estimated_gb"] > 0, row
    assert len(list((tmp_path / "clusters" / "labels").iterdir())) == 1  # of the 200 rows alone


def test_limits_judge_memory_and_objective() -> None:
    row = {"stage": "merging", "seconds": 1.0, "estimated_s": 1.0, "gb": 0.5, "estimated_gb": 0.4}
    report = {"results": [row, row | {"gb": 0.3}], "arguments": {"memory_gb": 0.4}}
    assert [limit.met for limit in kmeans_stages.check(report)] == [False, True, False]
    fits = [{"fit": "one by one", "objective_ratio": [1.0]}, {"fit": "batches", "objective_ratio": [1.0, 0.998]}]
    assert [limit.met for limit in kmeans_seeding.check({"results": fits})] == [False]
