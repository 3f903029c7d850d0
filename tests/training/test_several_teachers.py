"""Training with two teachers of different widths: resume, micro-batches, ranks; what does not fit is refused early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from train_run import Pipeline, losses, run_train, scalars, tensors

from megacid.config.load import load_run
from megacid.errors import UserError
from megacid.training.communication import objective_collectives
from megacid.training.components import check_student

FIRST, SECOND = 32, 20  # widths


def second_teacher(first: Path, folder: Path) -> Path:
    """A random projection of the first teacher, with its rows in another order."""
    shutil.copytree(first, folder)
    random = np.random.default_rng(5)
    projection = random.standard_normal((FIRST, SECOND))
    for metadata in sorted((folder / "metadata").iterdir()):
        table = pq.read_table(metadata)
        order = random.permutation(len(table))
        pq.write_table(table.take(order), metadata)
        number = metadata.stem.removeprefix("metadata_")
        for kind in ("img_emb", "text_emb"):
            path = folder / kind / f"{kind}_{number}.npy"
            rows = np.load(path)[order] @ projection
            np.save(path, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"dim": SECOND}))
    return folder


@pytest.fixture(scope="module")
def teachers(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(pipeline.teacher), str(second_teacher(pipeline.teacher, tmp_path_factory.mktemp("second") / "teacher"))]


def run_file(pipeline: Pipeline, name: str, teachers: list[str], **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "run__total_steps": 4, "run__save_every": 2, "run__log_every": 1, "data__teacher": teachers,
        "loss__affinity": 0.5, "loss__affinity_temperature": [0.05, 0.1], "classifier__init": "random",
        "student__projection_init": "teacher",
    }  # fmt: skip
    return pipeline.run_file(name, **(settings | changes))


def test_a_resumed_run_has_the_same_bits_and_micro_batches_and_ranks_the_same_losses(
    pipeline: Pipeline, teachers: list[str]
) -> None:
    cached = {"gradient_accumulation_steps": 2}
    run_train(2, run_file(pipeline, "two-teachers", teachers, **cached))
    resumed = run_file(pipeline, "two-teachers-resumed", teachers, **cached)
    run_train(2, resumed, "--stop-after", "2", expect=143)
    run_train(2, resumed)
    run_train(1, run_file(pipeline, "two-teachers-one-rank", teachers))
    runs = [pipeline.root / "runs" / f"two-teachers{suffix}" for suffix in ("", "-resumed", "-one-rank")]
    want, got = (tensors(run / "step-00000004") for run in runs[:2])
    assert want["head/weight"].shape[1] == FIRST + SECOND
    assert [name for name in want if not want[name].equal(got[name])] == []
    assert losses(runs[0]) == pytest.approx(losses(runs[2]), rel=1e-5)
    both = [scalars(runs[0], f"train/{name}") for name in ("mse", "cosine_image", "cosine_text")]
    for step, mse in both[0].items():  # of unit vectors
        assert mse == pytest.approx(4 - 2 * (both[1][step] + both[2][step]), abs=1e-2)
    assert both[1][1] > 0.3  # the projections were fitted to both teachers


def affinity_file(pipeline: Pipeline, name: str, teachers: list[str], **changes: Any) -> Path:
    """A run of affinity alone with a student of another width."""
    file = run_file(pipeline, name, teachers, student__embed_dim=16, student__projection_init="random", **changes)
    tree = json.loads(file.read_text())
    tree["megacid"] |= {"loss": {"affinity": 1.0, "affinity_temperature": [0.05, 0.1]}}
    del tree["megacid"]["classifier"], tree["megacid"]["data"]["labels"]
    file.write_text(json.dumps(tree))
    return file


def test_affinity_trains_a_student_of_another_width(pipeline: Pipeline, teachers: list[str]) -> None:
    file = affinity_file(pipeline, "narrow", teachers, run__total_steps=3)
    run_train(1, file, "--dry-run")
    run_train(1, file)
    run = pipeline.root / "runs" / "narrow"
    found = scalars(run, "train/affinity")
    assert found[2] < found[1]
    with pytest.raises(KeyError):  # there is no cosine between vectors of different widths
        scalars(run, "train/cosine_image")
    teacher, student = objective_collectives(load_run(file, world=2), 0, 16, 2, "cpu", teacher_width=FIRST + SECOND)[:2]
    assert (teacher.what, teacher.size, teacher.number) == ("teacher embeddings", 16 * (FIRST + SECOND) * 2, 2)
    assert (student.what, student.size, student.number) == ("student embeddings", 16 * 16 * 4, 2)


REFUSED: dict[str, tuple[list[str], str]] = {
    "another width": (
        ["student.embed_dim=32"],
        r'student\.embed_dim" is 32, expected 52, the sum of the widths of the teachers in .*teacher \(32\), '
        r".*teacher \(20\): write null or 52",
    ),
    "another number of temperatures": (
        ["loss.affinity_temperature=[0.1,0.2,0.3]"],
        r'affinity_temperature" has 3 values, expected a number, or one for each teacher in data\.teacher \(2\)',
    ),
    "temperatures of one teacher": (["data.teacher=t"], r"has 2 values, expected a number, or .* \(1\)"),
    "centroids": (["classifier.init=centroids"], "width of one teacher, but the student has that of 2 teachers"),
    "centroids of affinity alone": (
        ["classifier.init=centroids", "loss.instance=0", "loss.mse=0", "loss.beta=0", "loss.gamma=0",
         "student.projection_init=random"],
        "width of one teacher, but the student has that of 2 teachers",
    ),
    "no teacher": (["data.teacher=[]"], r'data\.teacher" is \[\], expected a path, or a list of paths'),
    "not a path": (['data.teacher=["a",3]'], r'data\.teacher" is \["a", 3\], expected a path, or a list of paths'),
    "a variable": (['data.teacher=["a","$B"]'], "expected a path, and variables are not expanded"),
    "a temperature of 0": (
        ["loss.affinity_temperature=[0.1,0]"],
        r"is \[0.1, 0\], expected a number >= 0.001, or a list of one for each of several teachers: raise it",
    ),
    "no temperature": (["loss.affinity_temperature=[]"], r"is \[\], expected a number >= 0.001, .* teachers$"),
    "not a temperature": (["loss.affinity_temperature=true"], r"is true, expected a number >= 0.001, .* teachers$"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_teachers_that_do_not_fit_are_refused_before_data_are_read(
    pipeline: Pipeline, teachers: list[str], case: str
) -> None:
    changes, message = REFUSED[case]
    file = run_file(pipeline, "refused", teachers)
    with pytest.raises(UserError, match=message) as error:
        check_student(load_run(file, changes, world=1))
    assert "\n" not in str(error.value)


def test_a_list_of_one_teacher_and_of_one_temperature_is_that_one(pipeline: Pipeline) -> None:
    changes: dict[str, Any] = {"loss__affinity": 1.0, "loss__temperature": 0.5}
    one, alone = (
        load_run(
            pipeline.run_file("one", data__teacher=teacher, loss__affinity_temperature=temperature, **changes), world=1
        ).resolved()
        for teacher, temperature in (([str(pipeline.teacher)], [0.02]), (str(pipeline.teacher), 0.02))
    )
    assert one == alone
