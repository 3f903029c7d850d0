"""Suite assignment of tools/bench.py: the errors it finds, its limits, and one run."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import assignment
from benchmarks.suite import add_shared_arguments
from megacid.errors import UserError


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_shared_arguments(parser)
    assignment.add_arguments(parser)
    args = parser.parse_args(["--device", "cpu", *words])
    args.suite = "assignment"
    return args


def test_every_provider_that_runs_on_a_cpu_finds_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    report = assignment.run(options("--shapes", "70,33,8", "--repeats", "1"))
    rows = {row["provider"]: row for row in report["results"]}
    assert rows["megacid-torch"]["same_bits"] == 1
    for name in ("megacid-torch", "faiss"):
        assert rows[name]["wrong_fraction"] == 0 and len(rows[name]["seconds"]) == 3
    assert "expected a GPU" in rows["megacid-fp16"]["skipped"]
    assert assignment.check(report) == []
    assert "70,33,8" in capsys.readouterr().out


def test_a_wrong_label_is_found_with_its_lost_similarity() -> None:
    data = assignment.make_data("40,9,6", torch.device("cpu"))
    label = (data.x_bD @ data.c_KD.T).argmax(1)
    assert assignment.lost_similarity(data, label)[0] == 0
    worst = (data.x_bD @ data.c_KD.T).argmin(1)
    wrong, lost = assignment.lost_similarity(data, torch.where(torch.arange(40) < 10, worst, label))
    assert wrong == 0.25 and lost > 0.1


def test_the_limits_compare_with_cublas_and_faiss_at_a_million_centroids() -> None:
    rows = [
        {"provider": "megacid-fp16", "shape": "8,1048576,4", "seconds": [1.0], "cublas_fraction": 0.6},
        {"provider": "faiss", "shape": "8,1048576,4", "seconds": [1.5]},
        {"provider": "megacid-fp16", "shape": "8,10,4", "seconds": [1.0], "cublas_fraction": 0.1},
    ]
    limits = assignment.check({"arguments": {"device": "cuda"}, "results": rows})
    assert [limit.met for limit in limits] == [False, True]


@pytest.mark.parametrize("shape", ["3,4", "0,4,4", "a,b,c"])
def test_an_invalid_shape_is_named(shape: str) -> None:
    with pytest.raises(UserError, match=f"shape is '{shape}'"):
        assignment.make_data(shape, torch.device("cpu"))
