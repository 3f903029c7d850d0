"""Training on commands that write tars: every rank gets its batches, and checkpoints store where the readers were."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from faultplan import Fault, FaultPlan
from harness import rank_fates, run_ranks
from offline_data import run as run_tool
from train_run import Pipeline, run_train, scalars, tensors, train_rank

from megacid.checkpoint.store import read_manifest
from megacid.data.index import load_index
from megacid.data.pipes.side_files import KeepFiles
from megacid.data.side_tables import KeepTable


def piped_run(pipeline: Pipeline, name: str, command: str = "cat", **changes: object) -> Path:
    tars = f"pipe:{command} {pipeline.shards}/{{00000..{len(list(pipeline.shards.glob('*.tar'))) - 1:05d}}}.tar"
    return pipeline.run_file(name, **{"data__shards": tars, "data__shuffle_buffer": 4, **changes})


def test_ranks_get_as_many_batches_from_few_tars_and_checkpoints_store_their_turns(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    run_train(2, piped_run(pipeline, "piped"))
    assert "read by 2 loader processes of 2 ranks: a resumed run continues at the next tar of each" in (
        log := capfd.readouterr().err
    )
    run = pipeline.root / "runs" / "piped"
    turns = {step: read_manifest(run / f"step-{step:08d}")["stream"]["next_turns"] for step in (3, 6)}
    assert all(turn % 2 == rank for step in turns for rank, turn in enumerate(turns[step])), turns
    assert all(before < after for before, after in zip(turns[3], turns[6])), turns
    epochs = scalars(run, "train/epoch")
    assert 0 < epochs[2] <= epochs[6] and "finished" in log


def _train_and_kill(argv: list[str], plan: str) -> int:
    FaultPlan.from_json(plan).install(dist.get_rank())
    return train_rank(argv)


@pytest.mark.slow
def test_a_killed_run_continues_at_the_next_tars_and_each_time_with_the_same_bits(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    file, run = piped_run(pipeline, "piped-kill", data__workers=2), pipeline.root / "runs" / "piped-kill"
    plan = FaultPlan(Fault("train:applied", "kill", step=4)).to_json()
    fates = rank_fates(_train_and_kill, 2, ["--deepspeed_config", str(file)], plan, timeout_s=120)
    assert fates == [-9, -9] and not (run / "step-00000006").exists()
    shutil.copytree(run, run.with_name("as-killed"))
    ends = []
    for _ in range(2):
        run_train(2, file)
        log = capfd.readouterr().err
        assert "data: every reader continues at its next tar" in log and "the first loss after resuming" not in log
        ends.append(tensors(run / "step-00000006"))
        shutil.rmtree(run)
        shutil.copytree(run.with_name("as-killed"), run)
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
    run_train(1, file)
    assert "data: 2 readers continue at tar " in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_commands_that_fail_end_all_ranks_with_one_message(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    name = f"piped-fail{workers}"
    command = "test $RANK = 0 && exit 7; cat" if workers == 0 else "exit 7; cat"
    file = piped_run(pipeline, name, command, data__workers=workers)
    assert run_ranks(train_rank, 2, ["--deepspeed_config", str(file)], timeout_s=120) == [66, 66]
    log = capfd.readouterr().err
    assert log.count("rank 0: 3 tars in a row cannot be read, the last one 0") == 1, log
    assert "its command ended with exit code 7" in log
    assert not (pipeline.root / "runs" / name / "step-00000003").exists() and os.environ.get("RANK") is None


def test_keys_of_kept_samples_are_those_of_the_index(pipeline: Pipeline) -> None:
    """The masks of tools/balance.py have no keys."""
    out = pipeline.root / "piped-balance"
    folders = ("--embeddings", pipeline.teacher, "--clusters", pipeline.labels, "--out", out)
    run_tool("balance", *folders, "--target-keep", 0.6)
    index, files = load_index(pipeline.shards), KeepFiles(out, None)
    table = KeepTable(out, index)
    for shard, name in enumerate(index.names):
        kept = [index.table(shard).keys[row] for row in table.kept(shard)]
        assert [key for key, keep in files.kept(name).items() if keep] == kept
    assert 0 < table.counts.sum() < index.num_samples


@pytest.mark.slow
def test_projections_are_fitted_to_samples_of_the_stream(pipeline: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    run_train(2, piped_run(pipeline, "piped-fit", student__projection_init="teacher"))
    assert "projections fitted to the teacher's embeddings of 8192 samples" in capfd.readouterr().err
