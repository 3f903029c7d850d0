"""tools/cluster.py: --features, and arguments that are refused before anything is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from offline_data import run, write_embeddings
from offline_tool import Tool

from megacid.errors import UserError
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.stage import _with_clusters
from megacid.offline.cluster.modality import MeanRows, embedding_rows
from megacid.storage.metadata import read_meta


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rows(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(10, 8))[rng.integers(10, size=n)] + 0.2 * rng.normal(size=(n, 8))).astype(np.float16)


def write_texts(folder: Path, text: np.ndarray, tars: int) -> None:
    (folder / "text_emb").mkdir()
    for number, part in enumerate(np.array_split(text, tars)):
        np.save(folder / "text_emb" / f"text_emb_{number:05d}.npy", part)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings `both` of images and texts, and `images`."""
    path = tmp_path_factory.mktemp("features")
    for name in ("both", "images"):
        write_embeddings(path / name, rows(900, 1), 3)
    write_texts(path / "both", rows(900, 2), 3)
    return path


def arguments(folder: Path, out: str, *more: object, emb: str = "both") -> list[object]:
    what = ["--k", 12, "--iterations", 3, "--method", "flat"]
    return ["--embeddings", folder / emb, "--out", folder / out, *what, *more]


@pytest.mark.parametrize("features", ["image", "text", "mean"])
def test_centroids_and_labels_are_those_of_the_features(features: str, folder: Path) -> None:
    run("cluster", *arguments(folder, features, "--features", features))
    image, text = rows(900, 1).astype(np.float64), rows(900, 2).astype(np.float64)
    x = {"image": image, "text": text, "mean": unit(image + text)}[features]
    centroids = np.load(folder / features / "centroids.npy")
    tables = [pq.read_table(path) for path in sorted((folder / features / "labels").iterdir())]
    label, score = (np.concatenate([table[name].to_numpy() for table in tables]) for name in ("label", "score"))
    cosine = x @ centroids.T
    np.testing.assert_allclose(cosine.max(1), score, atol=2e-3)
    assert (cosine.argmax(1) == label).mean() > 0.99
    # A centroid is the direction of the sum of its rows.
    means = unit(np.stack([x[label == cluster].sum(0) for cluster in range(12)]))
    assert (means * centroids).sum(1).mean() > 0.99
    meta = read_meta(folder / features, expect="cluster")
    assert meta.get("features", "image") == features
    assert "is complete" in run("cluster", *arguments(folder, features, "--features", features))


def test_other_features_and_folders_without_them_are_refused(folder: Path) -> None:
    run("cluster", *arguments(folder, "first", "--features", "mean"))
    before = (folder / "first" / "meta.json").read_bytes()
    for other in ("image", "text"):
        assert "made with features 'mean'" in run("cluster", *arguments(folder, "first", "--features", other), expect=2)
    assert (folder / "first" / "meta.json").read_bytes() == before
    for features in ("text", "mean"):
        output = run("cluster", *arguments(folder, "none", "--features", features, emb="images"), expect=2)
        assert f"--features is {features}, but {folder}/images/text_emb does not exist" in output
    assert not (folder / "none").exists()
    with pytest.raises(UserError, match="features is 'audio', expected one of image, text, mean"):
        embedding_rows(folder / "both", "audio")


def test_balance_compares_images_with_centroids_of_images_only(folder: Path) -> None:
    run("cluster", *arguments(folder, "texts", "--features", "text"))
    inputs: Any = SimpleNamespace(clusters=folder / "texts", rows=SimpleNamespace(dim=8), k=12, labels_digest="")
    alone: Any = SimpleNamespace(group=None, device=torch.device("cpu"))
    inside = _with_clusters({}, BalanceSettings(threshold=0.1), inputs, alone)
    assert inside[1] is None
    with pytest.raises(UserError, match="centroids of text features, --neighbor-clusters expects those of images"):
        _with_clusters({}, BalanceSettings(threshold=0.1, neighbor_clusters=2), inputs, alone)


def test_labels_of_new_rows_take_the_features_of_the_centroids(folder: Path) -> None:
    run("cluster", *arguments(folder, "trained", "--features", "mean"))
    new = ["--assign-only", folder / "trained", "--out", folder / "assigned"]
    run("cluster", "--embeddings", folder / "both", *new)
    for name in ("00000", "00002"):
        labels = [pq.read_table(folder / out / "labels" / f"{name}.parquet") for out in ("trained", "assigned")]
        assert labels[0].equals(labels[1])
    assert read_meta(folder / "assigned", expect="cluster")["features"] == "mean"
    output = run("cluster", "--embeddings", folder / "images", *new[:2], "--out", folder / "no", expect=2)
    assert "--features is mean" in output and not (folder / "no").exists()


def test_two_ranks_give_the_same_files_of_the_mean(folder: Path, tmp_path: Path) -> None:
    what = ["--k", 9, "--iterations", 2, "--method", "hierarchical", "--refine", 1, "--features", "mean"]
    run("cluster", "--embeddings", folder / "both", "--out", folder / "alone", *what)
    pair = Tool("cluster", folder, "pair", tmp_path / "log")
    pair.args = ["--embeddings", folder / "both", "--out", folder / "pair", *what]
    assert pair.fates(2) == [0, 0], pair.output
    pair.equals(folder / "alone")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("long text", r"row 3 of .*img_emb_00001.npy .* or the same row of .*text_emb_00001.npy .* NaN"),
        ("opposite", r"row 3 of .*img_emb_00001.npy .* is zero"),
        ("fewer texts", r"text_emb_00001.npy|has 899 text embeddings"),
    ],
)
def test_pairs_without_a_mean_are_named(problem: str, message: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "both", tmp_path / "emb")
    path = tmp_path / "emb" / "text_emb" / "text_emb_00001.npy"
    text, image = np.load(path), np.load(tmp_path / "emb" / "img_emb" / "img_emb_00001.npy")
    if problem == "long text":
        text[3] *= 2
    elif problem == "opposite":
        text[3] = -image[3]
    np.save(path, text[:-1] if problem == "fewer texts" else text)
    output = run("cluster", *arguments(tmp_path, "out", "--features", "mean", emb="emb"), expect=2)
    assert re.search(message, output), output


def test_mean_rows_read_and_take_the_same(folder: Path) -> None:
    mean = MeanRows(folder / "both")
    whole = mean.read(0, 900)
    assert whole.dtype == np.float16 and whole.shape == (900, 8)
    np.testing.assert_array_equal(mean.read(250, 720), whole[250:720])
    chosen = np.array([899, 0, 301, 300])
    np.testing.assert_array_equal(mean.take(chosen), whole[chosen])
    assert mean.take(np.empty(0, np.int64)).dtype == np.float16


def test_sizes_that_cannot_be_clustered_are_refused_before_anything_is_written(folder: Path) -> None:
    for more, message in (
        (("--k", 901), "k is 901 but there are only 900 rows to train on"),
        (("--train-sample", 11), "train sample is 11 rows, expected at least k = 12"),
        (("--memory-gb", 1e-5), r"memory bound is 1e-05 GB, .* 12 clusters of width 8 need"),
        (("--memory-gb", 1e-5, "--method", "hierarchical"), r"memory bound is 1e-05 GB, .* raise --memory-gb to"),
    ):
        output = run("cluster", *arguments(folder, "refused", *more), expect=2)
        assert re.search(message, output), output
        assert not (folder / "refused").exists()


def test_the_estimate_has_every_stage(folder: Path) -> None:
    flat = run("cluster", *arguments(folder, "estimate"))
    levels = run("cluster", *arguments(folder, "levels", "--method", "hierarchical"))
    for output, stages in (
        (flat, ["check", "seeding", "iterations", "labels", "writing"]),
        (levels, ["check", "coarse clusters", "cells", "cell seeding", "fine level", "merging", "refining", "labels"]),
    ):
        line = next(line for line in output.splitlines() if line.startswith("estimate of a rank"))
        named = [part.rsplit(" ", 4)[0] for part in line.split(": ", 1)[1].split("; ")]
        assert named[: len(stages)] == stages, line
