"""Evaluation while training: results of every due step, through signals, resumes and bad data; no bit changes."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from benchmark_data import break_image, write_benchmark
from faultplan import Fault, FaultPlan
from harness import run_ranks
from open_clip.transformer import PatchDropout
from toy import differing, tensors
from train_run import Pipeline, run_train, train_rank

from megacid import failpoints
from megacid.evaluate.datasets import load_benchmark
from megacid.evaluate.execution import Execution
from megacid.evaluate.export import export_student, student_from_run
from megacid.evaluate.tasks import evaluate
from megacid.models.clip import load_clip
from megacid.models.student import Student
from megacid.training import components
from megacid.training.resume import abandon_later_checkpoints
from megacid.training.watchdog import Watchdog

STEPS, MICRO_BATCH = 4, 4


def train_with_dropout(argv: list[str], notes: Path, plan: str) -> int:
    """Train a student with dropout; note the random state after every step, and the beats of evaluations."""
    rank, build, beat = dist.get_rank(), components.make_student, Watchdog.beat

    def with_dropout(*args: Any, **options: Any) -> Student:
        student = build(*args, **options)
        student.clip.visual.patch_dropout = PatchDropout(0.5)
        return student

    def note(line: str) -> None:
        with open(f"{notes}.{rank}", "a") as file:
            file.write(line + "\n")

    def noted_beat(self: Watchdog, phase: str, step: int, limit_s: float | None = None) -> None:
        if phase == "evaluation":
            note(f"beat {limit_s}")
        beat(self, phase, step, limit_s)

    def random_state(step: int) -> None:
        state = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr, index]
        note(f"random {step} {hashlib.sha256(repr(state).encode()).hexdigest()}")

    components.make_student = with_dropout  # type: ignore[assignment]  in this forked process only
    Watchdog.beat = noted_beat  # type: ignore[method-assign]
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    FaultPlan.from_json(plan).install(rank)
    failpoints.hooks["train:step_end"] = random_state
    return train_rank(argv)


@dataclass(frozen=True)
class Runs:
    plain: Path
    evaluated: Path  # asked to stop in its first evaluation, and resumed
    colours: Path
    file: Path
    notes: dict[str, list[str]]
    stopped: list[str]  # what stood in the directory of the first evaluation when the run had stopped
    checkpoints: list[str]  # and its checkpoints
    log: str


@pytest.fixture(scope="module", params=[3, pytest.param(0, marks=pytest.mark.slow)], ids=lambda stage: f"zero{stage}")
def runs(request: pytest.FixtureRequest, pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root, stage = tmp_path_factory.mktemp("evaluated"), request.param
    colours, broken = write_benchmark(root / "colours"), write_benchmark(root / "broken")
    break_image(broken / "test" / "1.tar")
    changes: dict[str, Any] = {
        "run__total_steps": STEPS, "run__save_every": STEPS, "run__log_every": 1, "run__save_timeout_s": 777.0,
        "gradient_accumulation_steps": 2, "train_batch_size": 4 * MICRO_BATCH, "zero_optimization": {"stage": stage},
    }  # fmt: skip
    evaluation = {
        "eval__datasets": [str(colours), str(broken)], "eval__every": 2, "eval__tasks": ["zero_shot", "knn"],
        "eval__neighbors": 3,
    }  # fmt: skip
    plain = pipeline.run_file(f"plain{stage}", **changes)
    evaluated = pipeline.run_file(f"seen{stage}", **changes, **evaluation)
    folder = pipeline.root / "runs"

    def train(file: Path, *faults: Fault) -> list[int]:
        argv, plan = ["--deepspeed_config", str(file)], FaultPlan(*faults).to_json()
        return list(run_ranks(train_with_dropout, 2, argv, root / file.stem, plan, timeout_s=300))

    assert train(plain) == [0, 0]
    asked = Fault("eval:batch", "signal", rank=1, nth=3, value=15)  # one rank alone
    assert train(evaluated, asked) == [143, 143]
    run = folder / evaluated.stem
    stopped = [path.name for path in (run / "eval").rglob("*.json")]
    checkpoints = [path.name for path in run.glob("step-*")]
    assert train(evaluated) == [0, 0]
    notes = {
        file.stem: [line for rank in (0, 1) for line in Path(f"{root / file.stem}.{rank}").read_text().splitlines()]
        for file in (plain, evaluated)
    }
    log = (run / "log.txt").read_text()
    return Runs(folder / plain.stem, run, colours, evaluated, notes, stopped, checkpoints, log)


def result(run: Path, step: int, task: str) -> Any:
    (file,) = (run / "eval" / f"step-{step:08d}").glob(f"colours_*_{task}.json")
    return json.loads(file.read_text())


def test_weights_and_random_state_of_a_run_with_dropout_are_those_of_a_run_without_evaluation(runs: Runs) -> None:
    ends = [tensors(run / f"step-{STEPS:08d}") for run in (runs.plain, runs.evaluated)]
    assert len(ends[0]) > 20 and differing(*ends) == []
    plain, evaluated = (
        [line for line in runs.notes[run.name] if line.startswith("random")] for run in (runs.plain, runs.evaluated)
    )
    assert len(plain) == 2 * STEPS and len(set(plain)) == STEPS
    # The first process of the evaluated run ended after step 1; the second began with the same seeds.
    assert [line for line in evaluated if int(line.split()[1]) < 2] == [
        line for line in plain if int(line.split()[1]) < 2
    ]


def test_a_stop_in_an_evaluation_saves_a_checkpoint_and_the_resume_fills_what_is_missing(runs: Runs) -> None:
    assert runs.stopped == [] and runs.checkpoints == ["step-00000002"]
    assert [result(runs.evaluated, step, "zeroshot_classification")["task"] for step in (2, STEPS)] == [
        "zeroshot_classification"
    ] * 2


def test_results_are_those_of_the_evaluation_tool_on_an_export(runs: Runs, tmp_path: Path) -> None:
    student, _ = student_from_run(runs.evaluated, STEPS)
    export_student(student, tmp_path / "export", name="seen", source={"run": "seen"})
    clip, how = load_clip(f"local-dir:{tmp_path / 'export'}"), Execution(MICRO_BATCH)
    benchmark = load_benchmark(runs.colours)
    for task, name in (("zero_shot", "zeroshot_classification"), ("knn", "knn")):
        want, got = evaluate(task, clip, benchmark, how, neighbors=3), result(runs.evaluated, STEPS, name)
        assert got["metrics"] == want["metrics"] and got.keys() == want.keys()
    assert got["pretrained"] == f"{runs.evaluated.name}-step-{STEPS}"


def test_scalars_have_one_point_for_every_evaluated_step(runs: Runs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs.evaluated / "tensorboard"))
    events.Reload()
    for tag, task, name in (
        ("zero_shot_acc1", "zeroshot_classification", "acc1"),
        ("knn_mean_per_class_recall", "knn", "knn_mean_per_class_recall"),
    ):
        points = {event.step: event.value for event in events.Scalars(f"eval/colours/{tag}")}
        want = {step: result(runs.evaluated, step, task)["metrics"][name] for step in (2, STEPS)}
        assert points == pytest.approx(want) and len(events.Scalars(f"eval/colours/{tag}")) == 2


def test_a_bad_image_is_a_warning_with_its_name_and_leaves_the_result_out(runs: Runs) -> None:
    assert list((runs.evaluated / "eval").rglob("broken_*")) == []
    for task in ("zero_shot", "knn"):
        assert len(re.findall(rf"no {task} on broken after step {STEPS}: .*1.tar, sample s0012 cannot", runs.log)) == 1


def test_the_watchdog_waits_for_an_evaluation_as_long_as_for_a_checkpoint(runs: Runs) -> None:
    beats = [line for line in runs.notes[runs.evaluated.name] if line.startswith("beat")]
    assert len(beats) > 30 and set(beats) == {"beat 777.0"}


def test_a_finished_run_measures_the_last_result_that_is_missing_and_nothing_else(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    want, folder = result(runs.evaluated, STEPS, "knn"), runs.evaluated / "eval" / f"step-{STEPS:08d}"
    next(folder.glob("colours_*_knn.json")).unlink()
    kept = {path: path.stat().st_mtime_ns for path in runs.evaluated.rglob("*.json")}
    options = "--set", f'eval.datasets=["{runs.colours}"]'
    run_train(1, runs.file, *options)
    assert result(runs.evaluated, STEPS, "knn") == want
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # the summary of the training, too
    assert "already finished" not in capfd.readouterr().err
    run_train(1, runs.file, *options)
    assert "already finished" in capfd.readouterr().err


def test_a_set_that_is_missing_is_one_error_before_the_data_are_read(
    pipeline: Pipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = pipeline.run_file(
        "no-set", eval__datasets=[str(tmp_path / "none")], data__shards=str(tmp_path / "nor-these")
    )
    run_train(2, file, expect=2)
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and f"dataset root {tmp_path / 'none'} is not a directory" in said


def test_going_back_to_a_checkpoint_moves_later_results_aside(tmp_path: Path) -> None:
    steps = [tmp_path / "eval" / f"step-{step:08d}" for step in (2, 4)]
    for folder in steps:
        folder.mkdir(parents=True)
    abandon_later_checkpoints(tmp_path, 2)
    assert [folder.exists() for folder in steps] == [True, False]
    assert len(list((tmp_path / "eval").glob(".abandoned-*"))) == 1
