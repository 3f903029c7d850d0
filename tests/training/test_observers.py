"""What watches a run leaves its weights as they are: a run with every observer ends with the bits of one without."""

from __future__ import annotations

import gzip
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benchmark_data import write_benchmark
from harness import run_ranks
from offline_data import run
from small_student import run_file
from trackio_stand_in import Trackio
from train_run import Pipeline, losses, scalars, tensors, train_rank
from wandb_files import offline_starts

from megacid.config.load import load_run
from megacid.training.observe import Observed
from megacid.training.open_data import Data
from megacid.training.reports import _observed

# Observer -> (changes of the run file, options of train.py). All are switched on in one run.
OBSERVERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "evaluation": ({"eval__every": 2, "eval__tasks": ["zero_shot", "knn"], "eval__neighbors": 3}, []),
    "trackers": ({"run__trackers": ["tensorboard", "wandb", "trackio"]}, []),
    "profile": ({}, ["--profile-steps", "2:4"]),
    "EMA": ({"student__ema_decay": 0.9}, []),
}
STEPS = 6


@dataclass(frozen=True)
class Runs:
    plain: Path
    colours: Path
    observed: Path  # stopped after step 3 and resumed
    trackio: list[Any]  # calls


def train_with_trackio(argv: list[str], trackio: Trackio) -> int:
    sys.modules["trackio"] = trackio
    return train_rank(argv)


@pytest.fixture(scope="module")
def runs(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    changes = {key: value for settings, _ in OBSERVERS.values() for key, value in settings.items()}
    options = [word for _, words in OBSERVERS.values() for word in words]
    colours = write_benchmark(tmp_path_factory.mktemp("sets") / "colours")
    changes["eval__datasets"] = [str(colours)]
    plain = pipeline.run_file("unobserved", run__trackers=[])
    observed = pipeline.run_file("observed", **changes)
    trackio = Trackio(tmp_path_factory.mktemp("trackio") / "calls")
    argv = ["--deepspeed_config", str(observed), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert run_ranks(train_rank, 2, ["--deepspeed_config", str(plain)], timeout_s=120) == [0, 0]
        for more, code in ((["--stop-after", "3"], 143), ([], 0)):
            assert run_ranks(train_with_trackio, 2, [*argv, *more], trackio, timeout_s=120) == [code, code]
    folder = pipeline.root / "runs"
    return Runs(folder / "unobserved", colours, folder / "observed", trackio.read())


def test_a_run_with_every_observer_ends_with_the_bits_of_one_without(runs: Runs) -> None:
    want, got = (tensors(run / f"step-{STEPS:08d}") for run in (runs.plain, runs.observed))
    assert len(want) > 20
    assert [name for name in want if not want[name].equal(got[name])] == []


def test_wandb_shows_what_tensorboard_shows_and_a_resume_continues_its_run(runs: Runs) -> None:
    starts = offline_starts(runs.observed)
    identity = json.loads((runs.observed / "trackers.json").read_text())["wandb"]
    assert [name for name, _, _ in starts] == [identity, identity]
    config = [settings.get("megacid", {}).get("run", {}).get("total_steps") for _, settings, _ in starts]
    assert config == [STEPS, None]  # logged once
    history = [step for _, _, steps in starts for step in steps]
    assert [step["_step"] for step in history] == [2, 3, 4, 6]  # step 3: the classes with the checkpoint
    assert {step["_step"]: step["train/loss"] for step in history if "train/loss" in step} == pytest.approx(
        losses(runs.observed)
    )
    assert {"eval/colours/zero_shot_acc1", "eval/colours/knn_acc1"} <= history[0].keys() & history[3].keys()
    assert history[1].keys() >= {"classes/never_hit", "classes/hits/bins"}


def test_trackio_gets_the_same_and_a_resume_continues_its_run(runs: Runs) -> None:
    first, second = (call for call in runs.trackio if call[0] == "init")
    assert first[1] == "megacid" and first[2].startswith("observed-") and first[4] == "allow"
    assert first[3]["megacid"]["run"]["total_steps"] == STEPS
    assert second == first  # trackio 0.43 forgets the settings of a run that is resumed without them
    logged = [call for call in runs.trackio if call[0] == "log" and "train/loss" in call[1]]
    assert {step: values["train/loss"] for _, values, step in logged} == pytest.approx(losses(runs.observed))
    assert sum(call == ["finish"] for call in runs.trackio) == 2


def test_averaged_weights_are_evaluated_apart_as_by_the_evaluation_tool(runs: Runs, tmp_path: Path) -> None:
    for task, tag in (("zeroshot_classification", "zero_shot_acc1"), ("knn", "knn_acc1")):
        found = {step: scalars(runs.observed, f"eval/colours/{tag}")[step] for step in (2, 4, STEPS)}
        averaged = scalars(runs.observed, f"eval/colours/ema_{tag}")
        assert averaged.keys() == found.keys()
        for step in found:
            files = sorted((runs.observed / "eval" / f"step-{step:08d}").glob(f"*_{task}.json"))
            stored = {(result := json.loads(file.read_text()))["pretrained"]: result for file in files}
            name = f"observed-step-{step}"
            assert stored.keys() == {name, f"{name}-ema"}
            metric = tag.removeprefix("zero_shot_")
            values = (stored[name]["metrics"][metric], stored[f"{name}-ema"]["metrics"][metric])
            assert (found[step], averaged[step]) == pytest.approx(values)
    options = ["--run", runs.observed, "--dataset-root", runs.colours, "--tasks", "zero_shot,knn", "--neighbors", 3]
    for more in ([], ["--ema"]):
        run("eval", *options, *more, "--out", tmp_path, "--device", "cpu", "--batch-size", 4)
    results = [json.loads(file.read_text()) for file in sorted(tmp_path.iterdir())]
    assert len(results) == 4
    for result in results:
        (file,) = (runs.observed / "eval" / f"step-{STEPS:08d}").glob(f"*{result['pretrained']}_{result['task']}.json")
        assert json.loads(file.read_text()) == result


def test_profile_is_a_trace_for_each_rank_and_ten_lines_of_the_log(runs: Runs) -> None:
    # The first start ends after step 3, the second one profiles what is left of the range.
    traces = sorted((runs.observed / "profile").iterdir())
    steps = ("2-3", "4-4")
    names = [f"rank{rank:05d}.steps{part}.pt.trace.json.gz" for rank in range(2) for part in steps]
    assert [trace.name for trace in traces] == names
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        assert {"aten::mm", "aten::addmm"} & {event["name"] for event in events}
    lines = (runs.observed / "log.txt").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "profile of steps 2 to 3" in line)
    table = lines[first + 1 : first + 11]
    shares = [float(line.split(" ms ")[1].split(" %")[0]) for line in table]
    assert all("calls  " in line for line in table) and shares == sorted(shares, reverse=True) and sum(shares) > 30


def test_scalars_of_the_student_are_those_of_all_ranks(runs: Runs) -> None:
    found = {tag: scalars(runs.observed, f"train/{tag}") for tag in ("mse", "cosine_image", "cosine_text")}
    for step, mse in found["mse"].items():
        # |a - b|^2 = 2 - 2 cos(a, b) for unit vectors, and the term is a mean over the ranks.
        both = found["cosine_image"][step] + found["cosine_text"][step]
        assert mse == pytest.approx(4 - 2 * both, abs=1e-2) and abs(both) > 1e-3
    name = "param/logit_scale"
    before, after = (tensors(runs.observed / f"step-{step:08d}")[name].item() for step in (3, STEPS))
    scale = scalars(runs.observed, "train/logit_scale")
    assert scale[4] == pytest.approx(math.exp(before)) and scale[4] != scale[6] != pytest.approx(math.exp(after))
    samples = json.loads((runs.observed / "train_summary.json").read_text())["samples"] / 3
    assert scalars(runs.observed, "train/samples_seen") == {step: samples * step for step in (2, 4, 6)}
    assert scalars(runs.observed, "train/epoch")[6] == pytest.approx(6 * samples / 72)
    assert all(scalars(runs.observed, f"train/{tag}")[6] > 0 for tag in ("memory_mib", "tflops_per_gpu"))


def test_there_is_a_cosine_for_each_matrix_of_the_teacher(tmp_path: Path) -> None:
    run = load_run(run_file(tmp_path), [], world=1).with_embed_dim(2)
    observed = Observed(0.5, 0.0, 10.0, -9.0)
    both = {"train/cosine_image": 0.5, "train/cosine_text": 0.0}
    learned = {"train/logit_scale": 10.0}
    for data, cosines in (
        (Data(lambda _: None), {}),  # type: ignore[arg-type,return-value]
        (Data(lambda _: None, teacher_dims=(2,)), {"train/cosine_image": 0.5}),  # type: ignore[arg-type,return-value]
        (Data(lambda _: None, teacher_dims=(2,), teacher_has_text=True), both),  # type: ignore[arg-type,return-value]
    ):
        assert _observed(run, data, observed) == cosines | learned
    sigmoid = load_run(run_file(tmp_path), ["loss.form=sigmoid"], world=1)
    assert _observed(sigmoid, Data(lambda _: None), observed) == learned | {"train/logit_bias": -9.0}  # type: ignore[arg-type,return-value]


def test_closing_summary_says_what_was_done_and_what_comes_next(runs: Runs) -> None:
    summary = json.loads((runs.observed / "train_summary.json").read_text())
    assert (summary["steps"], summary["start_step"], summary["samples"], summary["skipped"]) == (3, 3, 48, 0)
    assert summary["last_loss"] == pytest.approx(losses(runs.observed)[STEPS])
    assert 0 < summary["data_wait_share"] < 1 and summary["last_evaluation"]["step"] == STEPS
    assert 0 <= summary["last_evaluation"]["eval/colours/zero_shot_acc1"] <= 1
    said = [line for line in (runs.observed / "log.txt").read_text().splitlines() if " summary: " in line]
    assert len(said) == 8  # of two starts
    assert "run the same command again to continue" in said[3]
    assert "3 steps, 48 samples in 0:0" in said[4] and f"last logged loss {summary['last_loss']:.4f}" in said[5]
    assert f"checkpoint {runs.observed / 'step-00000006'}, curves: tensorboard --logdir {runs.observed}" in said[6]
    assert f"next: python tools/export.py --run {runs.observed} --out export/observed" in said[7]
