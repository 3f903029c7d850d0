"""Evaluation shared over ranks: the results of one rank, from parts of any size, and one error on every rank."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from benchmark_data import TEST, TRAIN, break_image, write_benchmark, write_retrieval_set
from harness import run_ranks
from offline_data import run, save_model
from torch import Tensor

import megacid.evaluate.knn as module
import megacid.evaluate.linear_probe as linear_probe
import megacid.evaluate.retrieval as retrieval
from megacid.config.load import load_run
from megacid.config.schema import RunFile
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Stopped, no_progress
from megacid.errors import UserError
from megacid.evaluate.datasets import Benchmark, load_benchmark
from megacid.evaluate.execution import Execution, image_features
from megacid.evaluate.knn import from_keys, keys_of, knn, nearest_rows, vote
from megacid.evaluate.suite import open_set
from megacid.evaluate.tasks import evaluate
from megacid.evaluate.zero_shot import class_embeddings, zero_shot
from megacid.models.clip import LoadedClip
from megacid.models.student import build_student, loaded_student
from megacid.training.evaluation import open_benchmarks

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits_cpu.json"
NEIGHBORS = 4
QUIET = Execution(batch_size=3, progress=lambda describe, total: nullcontext(no_progress))


@pytest.fixture(scope="module")
def clip() -> LoadedClip:
    return loaded_student(build_student("digits-student", embed_dim=32, seed=5), "memory")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("sets") / "colours")


def results(clip: LoadedClip, root: Path) -> tuple[Tensor, Tensor, Tensor, dict[str, float | int]]:
    benchmark = load_benchmark(root)
    predictions = zero_shot(clip, benchmark, QUIET)
    classes = class_embeddings(clip, benchmark, QUIET)
    return classes, predictions.top, predictions.label, knn(clip, benchmark, QUIET, neighbors=NEIGHBORS)


@pytest.mark.parametrize("world", [2, 4, pytest.param(6, marks=pytest.mark.slow)])
def test_every_rank_has_the_results_of_a_single_one(clip: LoadedClip, root: Path, world: int) -> None:
    """6 ranks are more than classes; no number divides the images."""
    classes, top, label, metrics = results(clip, root)
    assert len(label) == TEST and 0 < metrics["knn_acc1"] < 1
    for other in run_ranks(results, world, clip, root):
        torch.testing.assert_close(other[0], classes, rtol=0, atol=1e-6)
        assert torch.equal(other[1], top) and torch.equal(other[2], label)
        assert other[3] == metrics


def test_the_classifier_is_open_clips(clip: LoadedClip, root: Path) -> None:
    benchmark = load_benchmark(root)
    templates = [template.replace("{c}", "{}") for template in benchmark.templates]
    want = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, benchmark.classnames, templates).T
    torch.testing.assert_close(class_embeddings(clip, benchmark, QUIET), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [5, 10, 23])
def test_the_classifier_has_the_bits_of_open_clips_for_equal_batches(clip: LoadedClip, classes: int) -> None:
    """open_clip encodes the captions of 10 classes at a time."""
    names = [f"thing {number}" for number in range(classes)]
    benchmark = Benchmark(Path(), "things", names, ["a photo of a {c}.", "the {c}", "{c}"])
    templates = [template.replace("{c}", "{}") for template in benchmark.templates]
    want = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, names, templates).T
    assert torch.equal(class_embeddings(clip, benchmark, replace(QUIET, batch_size=10 * len(templates))), want)


def test_knn_is_the_weighted_vote_of_the_nearest_train_images(
    clip: LoadedClip, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load_benchmark(root)
    (train_ND, train_N), (test_ND, test_N) = (
        image_features(clip, benchmark.split(name, clip.preprocess_eval), QUIET, no_progress)
        for name in ("train", "test")
    )
    similarity = (test_ND.double() @ train_ND.double().T).numpy()
    predicted = []
    for row in similarity:
        order = np.argsort(-row)[:NEIGHBORS]
        votes = np.zeros(5)
        for index in order:
            votes[int(train_N[index])] += np.exp(row[index] / 0.07)
        predicted.append(votes.argmax())
    want = float((np.array(predicted) == test_N.numpy()).mean())
    whole = knn(clip, benchmark, QUIET, neighbors=NEIGHBORS)
    assert whole["knn_acc1"] == pytest.approx(want)
    assert (whole["train_samples"], whole["test_samples"]) == (TRAIN, TEST)
    monkeypatch.setattr(module, "TRAIN_ROWS", 4)
    monkeypatch.setattr(module, "TEST_ROWS", 5)
    assert knn(clip, benchmark, QUIET, neighbors=NEIGHBORS) == whole


def test_all_train_images_vote_where_they_are_fewer_than_the_neighbours(clip: LoadedClip, root: Path) -> None:
    benchmark = load_benchmark(root)
    train = benchmark.split("train", clip.preprocess_eval)
    query = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    similarity, label = nearest_rows(clip, train, query, QUIET, no_progress, 1000)
    assert similarity.shape == label.shape == (3, TRAIN)
    assert label.sort(dim=1).values.tolist() == [sorted(row % 5 for row in range(TRAIN))] * 3


def test_keys_order_like_similarities_and_equal_ones_by_row() -> None:
    values = torch.tensor([[-1.0, -1e-30, 0.0, 1e-30, 0.5, 0.5, 1.0, -0.5]])
    keys = keys_of(values, 7)
    assert keys.sort(dim=1, descending=True).indices.tolist() == [[6, 4, 5, 3, 2, 1, 7, 0]]
    similarity, row = from_keys(keys)
    assert torch.equal(similarity, values) and row.tolist() == [list(range(7, 15))]


def test_near_neighbours_outvote_more_distant_ones() -> None:
    similarity, label = torch.tensor([[0.9, 0.6, 0.6, 0.6]]), torch.tensor([[2, 1, 1, 1]])
    assert vote(similarity, label, 6)[0, :2].tolist() == [2, 1]


def error_of(task: str, clip: LoadedClip, root: Path) -> str:
    try:
        {"zero_shot": zero_shot, "knn": knn}[task](clip, load_benchmark(root), QUIET)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("task", "split"), [("zero_shot", "test"), ("knn", "train")])
def test_an_unreadable_image_of_one_rank_is_the_same_error_on_each(
    clip: LoadedClip, tmp_path: Path, task: str, split: str
) -> None:
    root = write_benchmark(tmp_path / "set")
    break_image(root / split / "1.tar")
    errors = run_ranks(error_of, 2, task, clip, root)
    assert errors[0] == errors[1]
    assert f"{split}/1.tar, sample s00" in errors[0] and "cannot be evaluated" in errors[0]


def stopped_code(clip: LoadedClip, root: Path) -> int:
    """The code with which an evaluation ends that only rank 1 is asked to stop."""
    batches = 0

    def stop_in_the_second_batch(rows: int) -> None:
        nonlocal batches
        batches += 1
        if torch.distributed.get_rank() == 1 and batches == 2:
            raise Stopped(143)

    how = Execution(batch_size=3, progress=lambda describe, total: nullcontext(stop_in_the_second_batch))
    try:
        zero_shot(clip, load_benchmark(root), how)
    except Stopped as stopped:
        return stopped.code + 1000 * batches
    return 0


def test_a_request_to_stop_on_one_rank_ends_the_evaluation_of_all_in_the_same_round(
    clip: LoadedClip, root: Path
) -> None:
    assert run_ranks(stopped_code, 2, clip, root) == [2143, 2143]


def stopped_after(clip: LoadedClip, root: Path, task: str, module: ModuleType, name: str) -> int:
    """The code with which a task ends that only rank 1 is asked to stop in a poll after its function `name`."""
    called, original = False, getattr(module, name)

    def call(*args: Any) -> Any:
        nonlocal called
        result, called = original(*args), True
        return result

    def stop_when_called(rows: int) -> None:
        if called and rows == 0 and torch.distributed.get_rank() == 1:
            raise Stopped(143)

    setattr(module, name, call)  # of this forked rank
    try:
        evaluate(task, clip, open_set(root, None), replace(QUIET, progress=lambda *_: nullcontext(stop_when_called)))
    except Stopped as stopped:
        return stopped.code
    return 0


def test_a_request_to_stop_ends_fits_and_rankings_on_all_ranks(
    clip: LoadedClip, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_probe, "STRENGTHS", (0.1, 10.0))
    captions = write_retrieval_set(tmp_path / "captions")
    for task in ("linear_probe", "linear_probe_adamw"):
        assert run_ranks(stopped_after, 2, clip, root, task, linear_probe, "image_features") == [143, 143]
    assert run_ranks(stopped_after, 2, clip, captions, "retrieval", retrieval, "caption_features") == [143, 143]


def opened(run_file: RunFile) -> str:
    group = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank()
    try:
        open_benchmarks(run_file, Parallel(rank, 2, rank, torch.device("cpu"), group))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("removed", "tasks", "named"),
    [
        ("classnames.txt", ["zero_shot"], "classnames.txt is missing"),
        ("zeroshot_classification_templates.txt", ["zero_shot"], "templates.txt is missing"),
        ("train", ["zero_shot", "knn"], "train is missing, but the task needs it"),
        ("train", ["zero_shot"], ""),
        ("../colours", ["zero_shot"], "is not a directory"),
    ],
)
def test_data_that_are_not_there_are_one_error_on_every_rank(
    tmp_path: Path, removed: str, tasks: list[str], named: str
) -> None:
    root = write_benchmark(tmp_path / "colours")
    (root / removed).rename(tmp_path / "elsewhere")
    setting = [f'eval.datasets=["{root}"]', "eval.tasks=" + str(tasks).replace("'", '"')]
    errors = run_ranks(opened, 2, load_run(DIGITS, setting, world=2))
    assert errors[0] == errors[1]
    assert (named in errors[0]) if named else errors[0] == ""


def test_the_tool_writes_knn_in_clip_benchmarks_schema(clip: LoadedClip, root: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=5)
    options = ("--model", f"local-dir:{model}", "--dataset-root", root, "--out", tmp_path, "--batch-size", 3)
    said = run("eval", *options, "--tasks", "knn", "--neighbors", NEIGHBORS, "--device", "cpu")
    (file,) = tmp_path.glob("*_knn.json")
    result = json.loads(file.read_text())
    want = knn(clip, load_benchmark(root), QUIET, neighbors=NEIGHBORS)
    assert result["metrics"] == want and (result["task"], result["dataset"]) == ("knn", "colours")
    assert f"{want['knn_acc1']:.4f}" in said


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    roots = [str(write_benchmark(tmp_path / folder / "test")) for folder in ("a", "b")]
    errors = run_ranks(opened, 2, load_run(DIGITS, ["eval.datasets=" + str(roots).replace("'", '"')], world=2))
    assert errors[0] == errors[1] and "two sets of the name test" in errors[0]
