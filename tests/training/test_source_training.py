"""Training on several sources: the same samples and bits after kills and at other numbers of ranks; what is refused."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faultplan import Fault, FaultPlan, kill, read_trace, trace
from harness import rank_fates, run_ranks
from offline_data import run as run_tool
from train_run import Pipeline, run_train, scalars, tensors, train_rank

from megacid.config.load import load_run
from megacid.errors import UserError
from megacid.training.open_data import check_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def other(pipeline: Pipeline) -> Pipeline:
    """Other scenes, whose labels are of the clusters of `pipeline`."""
    root = pipeline.root / "other"
    made = replace(pipeline, shards=root / "scenes" / "train", teacher=root / "teacher", labels=root / "clusters")
    sizes = ("--num", 36, "--clusters", 12, "--size", 32, "--samples-per-shard", 10, "--seed", 5)
    run_tool("synthesize", "scenes", "--out", root / "scenes", *sizes)
    run_tool("embed", "--shards", made.shards, "--out", made.teacher, "--model", f"local-dir:{pipeline.root / 'model'}")
    run_tool("cluster", "--embeddings", made.teacher, "--out", made.labels, "--assign-only", pipeline.labels)
    return made


def run_file(first: Pipeline, second: Pipeline, name: str, **changes: Any) -> Path:
    """6 steps of 16 samples, three of four from the first pipeline."""
    file = first.run_file(name, **changes)
    tree = json.loads(file.read_text())
    data = tree["megacid"]["data"]
    tables = ("shards", "teacher", "labels")
    sources = {"large": first, "small": second}
    for key in tables:
        del data[key]
    data["sources"] = {
        name: {"weight": weight} | {key: str(getattr(sources[name], key)) for key in tables}
        for name, weight in (("large", 0.75), ("small", 0.25))
    }
    file.write_text(json.dumps(tree))
    return file


def train_with(argv: list[str], plan: str) -> int:
    FaultPlan.from_json(plan).install(int(os.environ.get("RANK", "0")))
    return train_rank(argv)


def train(world: int, file: Path, *faults: Fault) -> list[int]:
    return rank_fates(train_with, world, ["--deepspeed_config", str(file)], FaultPlan(*faults).to_json(), timeout_s=120)


def steps(pipeline: Pipeline, name: str) -> Path:
    return pipeline.root / "runs" / name / "step-00000006"


def test_a_weight_that_gives_no_sample_in_the_whole_run_is_refused(pipeline: Pipeline) -> None:
    file = run_file(pipeline, pipeline, "tiny")
    check_weights(load_run(file, world=1))
    message = (
        r'"megacid\.data\.sources\.small\.weight" is 1e-05 of 0\.75001 in all, which gives no sample among the 96 of '
    )
    with pytest.raises(UserError, match=message):
        check_weights(load_run(file, ["data.sources.small.weight=1e-5"], world=1))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_killed_goes_on_with_the_same_bits(pipeline: Pipeline, other: Pipeline, workers: int) -> None:
    names = f"whole{workers}", f"killed{workers}"
    whole, killed = (run_file(pipeline, other, name, data__workers=workers) for name in names)
    assert train(2, whole) == [0, 0]
    assert train(2, killed, kill("train:applied", step=4)) == [-9, -9]
    assert train(2, killed) == [0, 0]
    want, got = (tensors(steps(pipeline, name)) for name in names)
    assert want.keys() == got.keys() and all(want[name].equal(got[name]) for name in want)


@pytest.mark.slow
def test_other_numbers_of_ranks_go_on_with_the_same_samples_and_log_the_shares(
    pipeline: Pipeline, other: Pipeline
) -> None:
    root = pipeline.root
    assert train(1, run_file(pipeline, other, "one"), trace(root / "t")) == [0]
    moved = run_file(pipeline, other, "moved")
    assert train(4, moved, trace(root / "m"), kill("train:applied", step=4)) == [-9] * 4
    assert train(2, moved, trace(root / "n")) == [0, 0]
    want = read_trace(root / "t", 1)
    got = {**read_trace(root / "m", 4), **read_trace(root / "n", 2)}
    assert {step: at["ids"] for step, at in got.items()} == {step: at["ids"] for step, at in want.items()}
    seen = list(itertools.chain(*(at["ids"] for at in want.values())))
    large = sum(1 for sample in seen if sample < 72)
    run = root / "runs" / "one"
    assert large == 72 and scalars(run, "train/small/share") == {step: 0.25 for step in (2, 4, 6)}
    assert scalars(run, "train/small/epoch")[6] == pytest.approx(24 / 36)
    assert scalars(run, "train/large/epoch")[6] == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.launch
def test_under_a_launcher_a_run_of_sources_stops_and_goes_on(pipeline: Pipeline, other: Pipeline) -> None:
    run_train(2, run_file(pipeline, other, "forked"))
    file = run_file(pipeline, other, "launched")
    for options, code in (("--stop-after", "3"), 143), ((), 0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "--master_port", port]
        command += ["megacid/train.py", "--deepspeed_config", str(file), *options]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert (result.returncode != 0) == (code != 0), result.stderr
        assert "large/kept" in result.stderr
    want, got = tensors(steps(pipeline, "forked")), tensors(steps(pipeline, "launched"))
    assert want.keys() == got.keys() and all(want[name].equal(got[name]) for name in want)


@pytest.mark.slow
def test_labels_of_other_clusters_are_one_error_on_all_ranks(
    pipeline: Pipeline, other: Pipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clusters = tmp_path / "clusters"
    run_tool("cluster", "--embeddings", other.teacher, "--out", clusters, "--k", 13, "--iterations", 3)
    file = run_file(pipeline, replace(other, labels=clusters), "foreign")
    assert run_ranks(train_rank, 2, ["--deepspeed_config", str(file)], timeout_s=120) == [2, 2]
    message = f"{clusters} of source small has labels of other clusters than {pipeline.labels} of source large"
    assert capfd.readouterr().err.count(message) == 1
