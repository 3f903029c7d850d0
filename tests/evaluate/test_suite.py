"""Suites: which sets are found and missing, bad sets that do not stop the others, equal results on several ranks."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
import torch.distributed as dist
from benchmark_data import break_image, write_benchmark, write_retrieval_set
from faultplan import Fault, FaultPlan
from harness import rank_fates, run_ranks
from offline_data import load_tool, run, save_model
from offline_tool import tool_rank

from megacid.errors import UserError
from megacid.evaluate.execution import Execution
from megacid.evaluate.suite import SUITES, choose_sets, find_sets


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "student", seed=5)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("sets") / "colours")


def empty_set(root: Path, file: str = "classnames.txt") -> Path:
    root.mkdir(parents=True)
    (root / file).write_text("one\n")
    return root


def written(out: Path) -> dict[tuple[str, str], dict[str, float]]:
    results = (json.loads(file.read_text()) for file in out.glob("*.json"))
    return {(result["dataset"], result["task"]): result["metrics"] for result in results}


def test_the_folders_of_clip_benchmarks_repositories_give_its_names(tmp_path: Path) -> None:
    for folder in ("wds_vtab-pets", "vtab/dtd", "wds/vtab/flowers", "wds/cars", "wds_imagenet-a", "stl10"):
        empty_set(tmp_path / folder)
    empty_set(tmp_path / "coco", "dataset_type.txt")
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    names = {"vtab/pets", "vtab/dtd", "vtab/flowers", "cars", "imagenet-a", "stl10", "coco"}
    assert set(find_sets(tmp_path)) == names
    empty_set(tmp_path / "cars")
    with pytest.raises(UserError, match=r"two sets of the name cars .*rename a directory"):
        find_sets(tmp_path)
    shutil.rmtree(tmp_path / "cars")
    empty_set(tmp_path / "vtab_pets")  # its results have the file names of vtab/pets
    with pytest.raises(UserError, match=r"two sets of the name vtab/pets \(.*vtab_pets.*rename a directory"):
        find_sets(tmp_path)
    with pytest.raises(UserError, match=r"has no folder with classnames\.txt"):
        find_sets(tmp_path / "notes")


def test_a_named_suite_takes_what_is_there_and_names_the_rest(tmp_path: Path) -> None:
    for folder in ("caltech101", "vtab/pets", "pets", "cars", "mnist"):
        empty_set(tmp_path / folder)
    sets, missing = choose_sets("clip_cid14", tmp_path)
    assert sets == {
        "cars": tmp_path / "cars",
        "vtab/pets": tmp_path / "vtab/pets",
        "vtab/caltech101": tmp_path / "caltech101",
    }
    assert len(missing) == 11 and set(missing) | set(sets) == set(SUITES["clip_cid14"])
    with pytest.raises(UserError, match="without --data"):
        choose_sets("clip_cid14", None)
    with pytest.raises(UserError, match='did you mean "clip_cid14"'):
        choose_sets("clip_cid", None)
    with pytest.raises(UserError, match="is not a named suite"):
        choose_sets(str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="none of the sets of clip_cid14"):
        choose_sets("clip_cid14", empty_set(tmp_path / "other" / "mnist").parent)


def test_bad_sets_do_not_stop_the_others_and_the_exit_code_says_so(colours: Path, model: Path, tmp_path: Path) -> None:
    sets, out = tmp_path / "sets", tmp_path / "out"
    good = ("a_good", "z_good")
    broken = ("no_classnames", "no_templates", "label_out_of_range", "empty_split", "bad_image", "bad_type")
    for name in (*good, *broken):
        shutil.copytree(colours, sets / name)
    write_retrieval_set(sets / "captions")
    (sets / "no_classnames" / "classnames.txt").unlink()
    (sets / "no_templates" / "zeroshot_classification_templates.txt").unlink()
    (sets / "label_out_of_range" / "classnames.txt").write_text("red\ngreen\n")
    shutil.rmtree(sets / "empty_split" / "test")
    (sets / "empty_split" / "test").mkdir()
    tarfile.open(sets / "empty_split" / "test" / "0.tar", "w").close()
    (sets / "empty_split" / "test" / "nshards.txt").write_text("1\n")
    break_image(sets / "bad_image" / "test" / "1.tar")
    (sets / "bad_type" / "dataset_type.txt").write_text("video\n")
    options = ("--model", f"local-dir:{model}", "--out", out, "--batch-size", 8, "--device", "cpu")
    said = run("eval", *options, "--suite", sets, "--tasks", "zero_shot,retrieval", expect=2)
    assert set(written(out)) == {
        *((name, "zeroshot_classification") for name in good),
        ("captions", "zeroshot_retrieval"),
    }
    reasons = {
        "no_classnames": "classnames.txt is missing",
        "no_templates": "zeroshot_classification_templates.txt is missing",
        "label_out_of_range": "class id is 2, expected 0 to 1",
        "empty_split": "sample",
        "bad_image": "1.tar, sample s0012 cannot be evaluated",
        "bad_type": "dataset_type.txt says 'video'",
    }
    left_out = [line for line in said.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == len(broken)
    for name in broken:
        (line,) = (line for line in left_out if line.startswith(f"left out: {name}"))
        assert reasons[name] in line
    (error,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "6 results left out" in error and all(name in error for name in broken)
    acc1 = written(out)["a_good", "zeroshot_classification"]["acc1"]
    assert f"acc1 {acc1:.4f}" in said and "mean of 2 sets" in said
    alone = tmp_path / "alone"
    run("eval", *options[:2], "--out", alone, *options[4:], "--dataset-root", sets / "a_good", "--tasks", "zero_shot")
    assert [(out / file.name).read_bytes() == file.read_bytes() for file in alone.iterdir()] == [True]


def test_sets_that_a_suite_omits_are_no_error(colours: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "sets" / "wds_sun397", ignore=lambda *_: ["train"])
    options = ("--model", f"local-dir:{model}", "--out", tmp_path / "out", "--device", "cpu")
    said = run("eval", *options, "--suite", "clip_cid14", "--data", tmp_path / "sets")
    assert set(written(tmp_path / "out")) == {("sun397", "zeroshot_classification")}
    assert "clip_cid14: 13 of 14 sets are not in" in said and "birdsnap" in said
    assert "sun397 has no train split: zero_shot is its only task" in said
    suite = (*options, "--suite", tmp_path / "sets", "--tasks")
    assert "sun397 is left out: its tasks are zero_shot, --tasks has knn" in run("eval", *suite, "knn")
    assert "sun397 is left out: its tasks are zero_shot, --tasks has retrieval" in run("eval", *suite, "retrieval")
    (file,) = (tmp_path / "out").glob("*.json")
    file.unlink()
    said = run("eval", *suite, "zero_shot,linear_probe,linear_probe_pre_projection")
    assert set(written(tmp_path / "out")) == {("sun397", "zeroshot_classification")}
    assert "sun397 has no train split: zero_shot is its only task" in said
    alone = ("--dataset-root", tmp_path / "sets" / "wds_sun397", "--tasks", "zero_shot,knn")
    said = run("eval", *options, *alone, expect=2)
    assert "--tasks has 'knn'" in said and "is a classification set without a train split, expected some of" in said
    shutil.copytree(colours, tmp_path / "sets" / "wds_cars")
    said = run("eval", *suite, "retrieval")
    assert "cars is left out: its tasks are zero_shot, linear_probe, knn, " in said


def test_features_on_several_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would write the same file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = run("eval", "--run", tmp_path, "--features", tmp_path, "--out", tmp_path / "out", expect=2)
    assert "--features runs on 2 ranks, expected one" in said and not (tmp_path / "out").exists()


def error_of_own_suite(suites: list[Path]) -> str:
    suite = str(suites[dist.get_rank()])
    args = argparse.Namespace(suite=suite, data=None, dataset_name=None, dataset_root=None, tasks=None)
    try:
        load_tool("eval").evaluate_sets(args, Execution(group=dist.group.WORLD))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_ranks_that_see_different_sets_are_told_before_a_set_is_opened(tmp_path: Path) -> None:
    for folder in ("one/cars", "two/cars", "two/pets"):
        empty_set(tmp_path / folder)
    errors = run_ranks(error_of_own_suite, 2, [tmp_path / "one", tmp_path / "two"])
    assert errors[0] == errors[1]
    assert errors[0].startswith("RanksDisagree: the ranks disagree about the sets: ") and "pets" in errors[0]


def test_two_ranks_write_what_one_writes_and_stop_together(
    colours: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacid.evaluate.linear_probe.STRENGTHS", (0.1, 10.0))
    sets = tmp_path / "sets"
    shutil.copytree(colours, sets / "colours")
    write_retrieval_set(sets / "captions")
    shutil.copytree(colours, sets / "bad", ignore=lambda *_: ["classnames.txt", "index"])
    options = ["--model", f"local-dir:{model}", "--suite", sets, "--batch-size", 4]
    run("eval", *options, "--out", tmp_path / "one", "--device", "cpu", expect=2)

    def ends(out: str, *faults: Fault) -> list[int]:
        args = [*options, "--out", tmp_path / out]
        return rank_fates(tool_rank, 2, "eval", args, FaultPlan(*faults), {}, tmp_path / "log")

    assert ends("two") == [2, 2]
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 4
    for key, metrics in one.items():
        assert two[key] == pytest.approx(metrics, abs=1e-6)
    assert (
        "acc1" in Path(f"{tmp_path / 'log'}.0").read_text() and "acc1" not in Path(f"{tmp_path / 'log'}.1").read_text()
    )
    term = 128 + signal.SIGTERM
    assert ends("stopped", Fault("eval:batch", "signal", rank=1, nth=3, value=int(signal.SIGTERM))) == [term, term]
