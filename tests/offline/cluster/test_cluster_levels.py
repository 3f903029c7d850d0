"""tools/cluster.py, hierarchical and --assign-only: the same files when killed anywhere and on any number of ranks."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faultplan import Fault, kill
from offline_data import results, run, write_embeddings
from offline_tool import KILLED, Tool

from megacid.errors import EXIT_AGAIN, UserError
from megacid.offline.cluster.results import read_labels
from megacid.offline.rows import EmbeddingRows
from megacid.storage.metadata import read_meta

Make = Callable[[str, str], Tool]


def rows(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = np.random.default_rng(0).normal(size=(25, 8))[rng.integers(25, size=n)] + 0.3 * rng.normal(size=(n, 8))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def levels(folder: Path, out: str) -> list[object]:
    what = ["--method", "hierarchical", "--k", 20, "--iterations", 3, "--refine", 2, "--refine-cells", 2]
    return ["--embeddings", folder / "emb", "--out", folder / out, *what, "--top-labels", 2]


def from_finished(folder: Path, out: str) -> list[object]:
    what = ["--assign-only", folder / "levels", "--top-labels", 3]
    return ["--embeddings", folder / "new", "--out", folder / out, *what]


ARGUMENTS = {"levels": levels, "from_finished": from_finished}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levels")
    write_embeddings(folder / "emb", rows(2500, 1), 3)
    write_embeddings(folder / "new", rows(700, 2), 2, shards_digest="other", precision="bf16")
    for name, arguments in ARGUMENTS.items():
        run("cluster", *arguments(folder, name))
    return folder


@pytest.fixture
def make(stage: Path, tmp_path: Path) -> Make:
    def one(what: str, out: str) -> Tool:
        tool = Tool("cluster", stage, f"{out}-{len(list(stage.iterdir()))}", tmp_path / "log")
        tool.args = ARGUMENTS[what](stage, tool.out.name)
        return tool

    return one


def test_files_and_what_meta_says(stage: Path) -> None:
    meta = read_meta(stage / "levels", expect="cluster")
    assert (meta["method"], meta["k"], meta["refine"], meta["refine_cells"]) == ("hierarchical", 20, 2, 2)
    assert (meta["iterations_asked"], meta["iterations"], len(meta["objective"])) == (3, 2, 2)
    assert np.load(stage / "levels" / "sizes.npy").sum() == meta["num_samples"] == 2500
    assert set(results(stage / "levels")) == {
        *("centroids.npy", "sizes.npy", "settings.json", "meta.json"),
        *(f"labels/0000{tar}.parquet" for tar in range(3)),
    }
    output = run("cluster", *levels(stage, "levels"))
    assert "is complete" in output and "20 clusters (hierarchical)" in output


KILLS = [
    *[kill("cluster:iteration_saved", step=2), kill("cluster:coarse"), kill("cluster:cells")],
    *[kill("cluster:fine", nth=3), kill("cluster:refine", step=1), kill("cluster:refine_saved", step=2)],
    *[kill("offline:file", nth=n) for n in (4, 6, 9, 12)],
    kill("cluster:after_meta"),
]  # fmt: skip


@pytest.mark.parametrize("fault", KILLS, ids=[f"{f.at}-{f.step}-{f.nth}" for f in KILLS])
def test_a_killed_run_continues_to_the_same_bits(fault: Fault, stage: Path, make: Make) -> None:
    one = make("levels", "cut")
    assert one.fates(1, fault) == [KILLED], one.output
    assert one.fates(1) == [0], one.output
    one.equals(stage / "levels")


@pytest.mark.parametrize("at", ["cluster:coarse", "cluster:fine"])
def test_another_number_of_ranks_continues_a_killed_run(at: str, stage: Path, make: Make) -> None:
    pair = make("levels", "pair")
    assert pair.fates(2, kill(at, rank=1)) == [EXIT_AGAIN, KILLED], pair.output
    assert pair.fates(4) == [0] * 4, pair.output
    pair.equals(stage / "levels")


def test_two_ranks_write_the_same_files(stage: Path, make: Make) -> None:
    pair = make("levels", "ranks")
    assert pair.fates(2) == [0, 0], pair.output
    pair.equals(stage / "levels")


def test_finished_steps_are_not_repeated(stage: Path, make: Make) -> None:
    one = make("levels", "kept")
    assert one.fates(1, kill("cluster:refine", step=1)) == [KILLED]
    again = [kill(f"cluster:{what}") for what in ("init", "iteration", "cells", "fine")]
    assert one.fates(1, *again) == [0], one.output
    one.equals(stage / "levels")


def test_another_method_is_refused(stage: Path, make: Make) -> None:
    one = make("levels", "mixed")
    assert one.fates(1, kill("cluster:refine_saved", step=1)) == [KILLED]
    flat = [value if value != "hierarchical" else "flat" for value in one.args]
    assert "method 'hierarchical', this run has 'flat'" in run("cluster", *flat, expect=2)
    assert "has an unfinished clustering" in run("cluster", *from_finished(stage, one.out.name), expect=2)
    finished = ["flat" if value == "hierarchical" else value for value in levels(stage, "levels")]
    assert "method 'hierarchical', this run has 'flat'" in run("cluster", *finished, expect=2)


# ---- labels from finished centroids ------------------------------------------------------------------------------


def test_labels_of_new_rows(stage: Path) -> None:
    out = stage / "from_finished"
    meta = read_meta(out, expect="cluster")
    assert (meta["method"], meta["k"], meta["labels_per_sample"], meta["precision"]) == ("assign-only", 20, 3, "bf16")
    assert meta["source"]["clusters"] == str(stage / "levels") and meta["source"]["embeddings"] == str(stage / "new")
    centroids = np.load(out / "centroids.npy")
    np.testing.assert_array_equal(centroids, np.load(stage / "levels" / "centroids.npy"))
    table = pq.read_table(out / "labels" / "00001.parquet")
    x = np.load(stage / "new" / "img_emb" / "img_emb_00001.npy").astype(np.float32)
    labels = np.stack([table[name].to_numpy() for name in ("label", "label_1", "label_2")], 1)
    cosine = x @ centroids.T
    # Compare cosines, not labels: the order of nearly equal ones depends on how the machine rounds.
    nearest = -np.sort(-cosine, axis=1)[:, :3]
    np.testing.assert_allclose(np.take_along_axis(cosine, labels, 1), nearest, rtol=0, atol=1e-6)
    assert all(len(set(row)) == 3 for row in labels.tolist())
    assert table["key"].to_pylist() == [f"00001{row:04d}" for row in range(350)]
    assert np.load(out / "sizes.npy").sum() == 700
    # The training rows get the labels that they had.
    run("cluster", "--embeddings", stage / "emb", "--out", stage / "same", "--assign-only", stage / "levels")
    for tar in range(3):
        before, after = (pq.read_table(stage / d / "labels" / f"0000{tar}.parquet") for d in ("levels", "same"))
        assert before["label"].equals(after["label"]) and before["score"].equals(after["score"])
    assert "is complete" in run("cluster", *from_finished(stage, "from_finished"))


def test_labels_of_new_rows_after_a_kill_and_on_ranks(stage: Path, make: Make) -> None:
    one = make("from_finished", "cut")
    assert one.fates(1, kill("cluster:labels", step=0)) == [KILLED]
    assert one.fates(2) == [0, 0], one.output
    one.equals(stage / "from_finished")
    (one.out / "labels" / "00001.parquet").unlink()
    assert one.fates(1) == [0]
    one.equals(stage / "from_finished")


def test_rows_of_another_teacher_are_refused(stage: Path) -> None:
    wide = np.eye(9, dtype=np.float16)
    cases = {
        "width": (wide, {}, "width 9, expected 8 as in the centroids of .*levels"),
        "model": (wide[:, :8], {"model": "x"}, "model 'x', expected 'm' as in"),
        "weights": (wide[:, :8], {"weights": "y"}, "weights 'y', expected 'w' as in"),
    }
    for name, (x, meta, message) in cases.items():
        write_embeddings(stage / name, x, 1, **meta)
        args = ["--embeddings", stage / name, "--out", stage / f"{name}-out", "--assign-only", stage / "levels"]
        output = run("cluster", *args, expect=2)
        assert re.search(message, output), output
        assert not (stage / f"{name}-out").exists()


def test_invalid_arguments_are_refused(stage: Path, tmp_path: Path) -> None:
    new = ["--embeddings", stage / "new"]
    assert "take another --out" in run(
        "cluster", *new, "--out", stage / "levels", "--assign-only", stage / "levels", expect=2
    )
    more = ["--assign-only", stage / "levels", "--top-labels", 21]
    assert "top labels is 21" in run("cluster", *new, "--out", tmp_path / "o", *more, expect=2)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "meta.json").write_text(json.dumps(read_meta(stage / "levels")))
    assert "centroids.npy is missing" in run("cluster", *new, "--out", tmp_path / "o", "--assign-only", bare, expect=2)
    changed = [value if value != 3 else 2 for value in from_finished(stage, "from_finished")]
    assert "labels_per_sample 3, this run has 2" in run("cluster", *changed, expect=2)


# ---- scores ------------------------------------------------------------------------------------------------------


def half_scores(path: Path) -> None:
    """Rewrites a label file as an earlier version wrote it."""
    table = pq.read_table(path)
    half = pa.array(table["score"].to_numpy().astype(np.float16), pa.float16())
    pq.write_table(table.set_column(2, "score", half), path)


def test_scores_are_fp32_so_that_the_order_of_preference_has_no_ties(stage: Path) -> None:
    label, score, _ = read_labels(stage / "levels", EmbeddingRows(stage / "emb"))
    x = np.concatenate([np.load(path) for path in sorted((stage / "emb" / "img_emb").iterdir())]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    centroids = np.load(stage / "levels" / "centroids.npy").astype(np.float64)
    exact = (x * centroids[label]).sum(1) / np.linalg.norm(centroids, axis=1)[label]
    assert score.dtype == np.float32
    np.testing.assert_allclose(score, exact, rtol=0, atol=3e-7)
    # What this is about: these samples have many ties in fp16.
    assert len(np.unique(score)) > 2400 and len(np.unique(score.astype(np.float16))) < 1000


def test_folders_with_fp16_scores_stay_readable_and_half_written_ones_are_not_mixed(stage: Path, make: Make) -> None:
    rows, old = EmbeddingRows(stage / "emb"), stage / "old"
    shutil.copytree(stage / "levels", old)
    expected = read_labels(old, rows)[1].astype(np.float16)
    for path in (old / "labels").iterdir():
        half_scores(path)
    score = read_labels(old, rows)[1]
    # The same type as before: the digest of the labels is one of the arguments of a finished balance.
    assert score.dtype == np.float16
    np.testing.assert_array_equal(score, expected)
    one = make("from_finished", "half")
    assert one.fates(1, kill("cluster:labels", step=0)) == [KILLED]
    half_scores(one.out / "labels" / "00000.parquet")
    assert one.fates(1) == [0], one.output
    one.equals(stage / "from_finished")


@pytest.mark.parametrize("values", [["a", "b"], [0.5, math.nan], [1, 2], [0.5, None]])
def test_scores_that_are_no_numbers_are_refused_with_the_file(tmp_path: Path, values: list[object]) -> None:
    embeddings = write_embeddings(tmp_path / "emb", rows(2, 1), 1)
    run("cluster", "--embeddings", embeddings, "--out", tmp_path / "out", "--k", 1)
    path = tmp_path / "out" / "labels" / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "score", pa.array(values)), path)
    with pytest.raises(UserError, match=r"00000\.parquet has .* scores, expected finite floating point numbers"):
        read_labels(tmp_path / "out", EmbeddingRows(embeddings))
