"""Classification on feature vectors as users run it: synthesize, train, resume, evaluate, sweep."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from offline_data import run as run_tool_inside
from train_run import losses, run_train, tensors

from megacid import train
from megacid.checkpoint.state import CheckpointReader
from megacid.data.features import FeatureSet
from megacid.evaluate import features as judged

CLASSES = 40
RUN = subprocess.run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classification")
    run_tool_inside(
        "synthesize", "features", "--out", root / "features", "--classes", CLASSES, "--dim", 12, "--per-class", 16,
        "--test-per-class", 4, "--noise", 0.8, "--rows-per-file", 250,
    )  # fmt: skip
    return root


def run_file(root: Path, name: str, **run: Any) -> Path:
    block: dict[str, Any] = {
        "run": {"name": name, "dir": str(root / "runs"), "total_steps": 40, "save_every": 10, "log_every": 1, **run},
        "student": {"model": "feature-mlp", "embed_dim": 16, "hidden": 24, "layers": 1},
        "data": {"features": str(root / "features")},
        "loss": {"cluster": 1.0},
        "classifier": {"init": "random", "sample_rate": 0.5, "m3": 0.1, "scale": 16.0, "lr": 2e-2},
    }
    tree = {
        "train_batch_size": 64, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}}, "megacid": block,
    }  # fmt: skip
    (root / f"{name}.json").write_text(json.dumps(tree))
    return root / f"{name}.json"


@pytest.fixture(scope="module")
def through(root: Path) -> Path:
    """The directory of a run without a stop."""
    run_train(1, run_file(root, "through"), "--set", "student.ema_decay=0.9")
    return root / "runs" / "through"


def test_a_stopped_and_resumed_run_on_features_goes_on_with_the_same_losses_and_bits(root: Path, through: Path) -> None:
    broken = run_file(root, "broken")
    run_train(1, broken, "--stop-after", "17", expect=143)
    run_train(1, broken)
    want, got = losses(through), losses(root / "runs" / "broken")
    assert got == want and sorted(got) == list(range(1, 41))
    assert want[40] < want[1] / 3, "nothing was learned"
    want_bits, got_bits = (tensors(run / "step-00000040") for run in (through, root / "runs" / "broken"))
    assert want_bits.keys() == got_bits.keys()
    assert [name for name in want_bits if not want_bits[name].equal(got_bits[name])] == []


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_continue_a_run_on_features_under_every_kind_of_partition(root: Path, stage: int) -> None:
    """With every class in every step, the loss of two ranks is that of one."""
    options = ("--set", "classifier.sample_rate=1.0", "--set", "run.total_steps=6")
    run_train(1, run_file(root, f"one{stage}"), *options)
    two = run_file(root, f"two{stage}")
    run_train(2, two, *options, "--set", f"zero_optimization.stage={stage}", "--stop-after", "3", expect=143)
    run_train(2, two, *options, "--set", f"zero_optimization.stage={stage}")
    want, got = losses(root / "runs" / f"one{stage}"), losses(root / "runs" / f"two{stage}")
    assert list(got.values()) == pytest.approx(list(want.values()), rel=1e-5)


# ---- evaluation --------------------------------------------------------------------------------------------------


def expected(root: Path, run: Path, *, ema: bool = False) -> dict[str, float]:
    """Both accuracies, all at once with numpy."""
    train, test = FeatureSet(root / "features"), FeatureSet(root / "features", "test")
    trained = judged.trained_tower(run, train, ema=ema)
    rows = {name: np.arange(split.num_rows) for name, split in (("train", train), ("test", test))}
    train_ND, test_ND = (trained.embed(s, rows[n]).double().numpy() for n, s in (("train", train), ("test", test)))
    label_N = train.take_labels(rows["train"])
    mean_CD = np.stack([train_ND[label_N == c].mean(0) for c in range(CLASSES)])
    head_CD = trained.reader.rows("head/weight", 0, CLASSES).double().numpy()
    scores = {
        name: test_ND @ (row_CD / np.linalg.norm(row_CD, axis=1, keepdims=True)).T
        for name, row_CD in (("head", head_CD), ("nearest_class_mean", mean_CD))
    }
    truth = test.take_labels(rows["test"])
    return {name: float((score.argmax(1) == truth).mean()) for name, score in scores.items()}


def test_eval_gives_the_accuracy_over_all_classes_in_blocks_that_do_not_fit_evenly(
    root: Path, through: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judged, "CLASSES_PER_BLOCK", 13)
    monkeypatch.setattr(judged, "ROWS_PER_TILE", 7)
    out = root / "results"
    run_tool_inside("eval", "--run", through, "--features", root / "features", "--out", out)
    want = expected(root, through)
    assert want["head"] > 0.5 and want["nearest_class_mean"] > 0.5, "an accuracy near chance would hide a mistake"
    for task, share in want.items():
        result = json.loads((out / f"features_through-step-40_{task}.json").read_text())
        assert result["metrics"] == {"acc1": pytest.approx(share), "test_rows": 160, "classes": CLASSES}


def test_eval_takes_the_average_of_the_weights_where_the_run_has_one(root: Path, through: Path) -> None:
    features, out = root / "features", root / "averaged"
    towers = [judged.trained_tower(through, FeatureSet(features), ema=ema).tower.state_dict() for ema in (False, True)]
    saved = CheckpointReader(through / "step-00000040")
    for kind, tower in zip(("param", "ema"), towers):
        assert tower.keys() == {*saved.names(kind)} and all(tower[n].equal(saved.tensor(kind, n)) for n in tower)
    run_tool_inside("eval", "--run", through, "--ema", "--features", features, "--out", out)
    for task, share in expected(root, through, ema=True).items():
        result = json.loads((out / f"features_through-step-40-ema_{task}.json").read_text())
        assert result["metrics"]["acc1"] == pytest.approx(share)


def test_eval_limits_the_test_rows_and_names_what_does_not_fit(root: Path, through: Path) -> None:
    options = ("eval", "--run", through, "--out", root / "limited", "--features")
    run_tool_inside(*options, root / "features", "--limit", 50, "--tasks", "head")
    (file,) = (root / "limited").iterdir()
    assert json.loads(file.read_text())["metrics"]["test_rows"] == 50
    other = root / "other"
    run_tool_inside("synthesize", "features", "--out", other, "--classes", 30, "--dim", 12, "--test-per-class", 1)
    assert "has 40 classes, but the labels of" in run_tool_inside(*options, other, "--tasks", "head", expect=2)
    assert "--tasks has 'zero_shot'" in run_tool_inside(*options, other, "--tasks", "zero_shot", expect=2)


# ---- sweep -------------------------------------------------------------------------------------------------------


def train_forked(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run which starts `python megacid/train.py ...` as a fork of this process, which has the modules."""
    if words[0] != sys.executable:
        return RUN(words, **options)
    assert Path(words[1]).samefile(train.__file__) and options["stderr"] == subprocess.STDOUT, (words, options)

    def child() -> None:
        os.dup2(options["stdout"].fileno(), 1)
        os.dup2(options["stdout"].fileno(), 2)
        sys.exit(train.main(words[2:]))

    process = mp.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return subprocess.CompletedProcess(words, process.exitcode or 0)


# The sweep starts its command in the default run, too: where the training fails, see the next test.
@pytest.mark.parametrize("started", ["forked", pytest.param("as a command", marks=pytest.mark.slow)])
def test_a_sweep_is_kept_and_resumed_and_ends_in_table_and_plot(
    root: Path, tmp_path: Path, started: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rate that was interrupted after its first checkpoint, and one number of clusters."""
    pytest.importorskip("matplotlib")
    if started == "forked":
        monkeypatch.setattr(subprocess, "run", train_forked)
    file, out, began = run_file(root, "swept"), tmp_path / "sweep", time.monotonic()
    point = "rate-0.5-seed-0"
    options = [f"run.name={point}", f"run.dir={out}", "classifier.sample_rate=0.5"]
    run_train(1, file, *(word for option in options for word in ("--set", option)), "--stop-after", "10", expect=143)
    words = ("sweep", "--deepspeed_config", file, "--rates", 0.5, "--clusters", 25, "--iterations", 2, "--out", out)
    output = run_tool_inside(*words)
    assert "resumed from" in (out / point / "log.txt").read_text()
    sweep = json.loads((out / "sweep.json").read_text())
    assert [(row["value"], row["seeds"]) for row in sweep["rate"] + sweep["clusters"]] == [(0.5, 1), (25, 1)]
    rate, clusters = sweep["points"]
    assert rate["nearest_class_mean"] > 0.5 and clusters["nearest_class_mean"] > 0.5
    assert "head" in rate and "head" not in clusters
    assert rate["final_loss"] == losses(out / point)[40]
    assert 0 < rate["seconds_per_step"] < time.monotonic() - began and rate["peak_memory_mib"] > 100
    assert f"| {100 * rate['nearest_class_mean']:.1f} %" in (out / "sweep.md").read_text() and "| 25 |" in output
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")

    linked = FeatureSet(out / "features-k-25")
    assert linked.clustered and linked.classes == 25
    assert os.path.samefile(linked.paths[1], root / "features" / "features" / "features_00001.npy")
    rows = np.arange(linked.num_rows)
    true = FeatureSet(out / "features-k-25", true_labels=True).take_labels(rows)
    assert (true == FeatureSet(root / "features").take_labels(rows)).all()
    assert len(np.unique(linked.take_labels(rows))) == 25

    before = {path: path.stat().st_mtime_ns for path in out.rglob("step-*")}
    run_tool_inside(*words)
    assert before and {path: path.stat().st_mtime_ns for path in out.rglob("step-*")} == before
    assert "'limit': None}, expected" in run_tool_inside(*words, "--limit", 9, expect=2)
    assert "classifier.m3: 0.1 -> 0.2" in run_tool_inside(*words, "--set", "classifier.m3=0.2", expect=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "neither --rates nor --clusters is given"),
        (["--rates", 1.5], "--rates is 1.5, expected a finite number, above 0 and at most 1"),
        (["--rates", 0.5, "--set", "run.seed=3"], "the sweep sets run.seed itself"),
        (["--rates", 0.5, "--set", "classifier.m3=-1"], '"megacid.classifier.m3" is -1, expected >= 0'),
        (["--clusters", 100_000], "k is 100000 but there are only 640 rows"),
        (["--rates", 0.5, "--set", "train_batch_size=4096"], "training of rate-0.5-seed-0 ended with exit code 2"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_one_error(root: Path, tmp_path: Path, options: list[Any], message: str) -> None:
    file = run_file(root, "refused")
    assert message in run_tool_inside(
        "sweep", "--deepspeed_config", file, "--out", tmp_path / "out", *options, expect=2
    )


def test_nearest_prefers_the_lower_class_and_never_a_class_without_rows() -> None:
    rows = torch.tensor([[torch.nan, torch.nan], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    classes = judged.nearest(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), iter(rows.split(1)))
    assert classes.tolist() == [2, 1, 1]
