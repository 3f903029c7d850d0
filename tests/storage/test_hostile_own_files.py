"""Tampered files that a run or a stage wrote itself: no code runs, and the reader makes them again or raises UserError.

Inputs from others: `tests/data/test_hostile_*.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_data import BOMBS, DIM, RUN, Evil, features
from pair_data import picture, put

from megacid.config.load import load_run
from megacid.data.features import FeatureSet
from megacid.data.index import ShardReader, load_index, read_sample_json
from megacid.errors import UserError
from megacid.evaluate.export import student_from_run
from megacid.evaluate.features import trained_tower
from megacid.offline.cluster.state import KMeansSettings, KMeansState, fingerprint, load_state, save_state
from megacid.storage.stage_directory import StageDirectory, finished_meta
from megacid.training.resume import ResumeLossCheck
from megacid.training.run_settings import check_same_settings


def drift(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(RUN))
    check_same_settings(load_run(folder / "run.json", world=1), folder)


# What reads which file of a folder: UserError, or None where it may be done without.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "drift": ("config.json", drift),
    "export": ("config.json", student_from_run),
    "tower": ("config.json", lambda folder: trained_tower(folder, FeatureSet(features(folder / "f")))),
    "embed": ("settings.json", lambda folder: StageDirectory(folder, "embed", {"model": "x"}).begin()),
}
SHAPES: dict[str, bytes] = {
    **BOMBS,
    "other keys": b'{"resolved": {}}',
    "list inside": b'{"resolved": []}',
    "number inside": b'{"resolved": {"megacid": 7}}',
    "blocks missing": b'{"resolved": {"megacid": {"student": {}, "data": {}}}}',
    "blocks are lists": b'{"resolved": {"megacid": {"student": [], "data": []}}}',
    "values of other types": b'{"resolved": {"megacid": {"student": {"model": 7, "embed_dim": "x", "hidden": [], '
    b'"layers": {}}, "data": {"features": "x"}}}}',
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_settings_that_is_none_is_one_sentence(tmp_path: Path, reader: str, shape: str) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(SHAPES[shape])
    with pytest.raises(UserError):
        read(tmp_path)


@pytest.mark.parametrize("plant", ["40 GB", "a pipe"])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_settings_without_end_is_refused_before_it_is_read(tmp_path: Path, reader: str, plant: str) -> None:
    name, read = READERS[reader]
    os.mkfifo(tmp_path / name) if plant == "a pipe" else (tmp_path / name).touch()
    if plant == "40 GB":
        os.truncate(tmp_path / name, 40 << 30)
    with pytest.raises(UserError):
        read(tmp_path)


@pytest.mark.parametrize("plant", ["40 GB", "a pipe"])
def test_a_stored_loss_without_end_is_done_without(tmp_path: Path, plant: str) -> None:
    file = tmp_path / "next_loss.json"
    os.mkfifo(file) if plant == "a pipe" else file.touch()
    if plant == "40 GB":
        os.truncate(file, 40 << 30)
    ResumeLossCheck(tmp_path, 3, tolerance=1e-3).first_loss(3, 1.0)
    assert json.loads(file.read_text())["loss"] == 1.0


@pytest.mark.parametrize("shape", [*BOMBS, "text"])
def test_what_only_compares_or_saves_time_is_done_without(tmp_path: Path, shape: str) -> None:
    data = BOMBS.get(shape, b'{"step": 3, "loss": "x"}')
    (tmp_path / "next_loss.json").write_bytes(data)
    ResumeLossCheck(tmp_path, 3, tolerance=1e-3).first_loss(3, 1.0)
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "meta.json").write_bytes(data)
    try:
        assert finished_meta(stage, "cluster") is None
    except UserError as error:
        assert "stage" in str(error)


@pytest.mark.parametrize("shape", BOMBS)
def test_json_of_a_sample_is_nothing_where_it_cannot_be_read(tmp_path: Path, shape: str) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        put(tar, "a.png", picture(1))
        put(tar, "a.txt", b"1")
        put(tar, "a.json", BOMBS[shape])
    assert read_sample_json(ShardReader(load_index(tmp_path)), 0, 0) == {}


# ---- the state of k-means ----------------------------------------------------------------------------------------

SETTINGS = KMeansSettings(k=4)


def npz(path: Path, **arrays: Any) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def metadata(**changes: Any) -> np.ndarray:
    settings = fingerprint(SETTINGS, {})
    stored: Any = {
        "settings": settings,
        "iteration": 1,
        "objective": [0.5],
        "imbalance": 1.0,
        "stopped": False,
        **changes,
    }
    return np.frombuffer(json.dumps(stored).encode(), np.uint8)


ROWS = np.ones((4, DIM), np.float32)
STATES: dict[str, Callable[[Path, Path], object]] = {
    "pickle": lambda path, mark: path.write_bytes(pickle.dumps(Evil(mark))),
    "objects": lambda path, mark: npz(path, metadata=metadata(), centroids=np.array([Evil(mark)], object)),
    "metadata are objects": lambda path, mark: npz(path, metadata=np.array([Evil(mark)], object), centroids=ROWS),
    "npy": lambda path, mark: np.save(path.open("wb"), ROWS),
    "torch": lambda path, mark: torch.save({"centroids": Evil(mark)}, path),
    "no centroids": lambda path, mark: npz(path, metadata=metadata()),
    "text": lambda path, mark: npz(path, metadata=metadata(), centroids=np.full((4, DIM), "x")),
    "another shape": lambda path, mark: npz(path, metadata=metadata(), centroids=ROWS[:3]),
    "integers": lambda path, mark: npz(path, metadata=metadata(), centroids=ROWS.astype(np.int64)),
    "deep": lambda path, mark: npz(path, metadata=np.frombuffer(b"[" * 200_000, np.uint8), centroids=ROWS),
    "a number": lambda path, mark: npz(path, metadata=np.frombuffer(b"7", np.uint8), centroids=ROWS),
    "settings are a list": lambda path, mark: npz(path, metadata=metadata(settings=[]), centroids=ROWS),
    "iteration is text": lambda path, mark: npz(path, metadata=metadata(iteration="1"), centroids=ROWS),
    "iteration is huge": lambda path, mark: npz(path, metadata=metadata(iteration=3_000_000), centroids=ROWS),
    "objective is a number": lambda path, mark: npz(path, metadata=metadata(objective=7), centroids=ROWS),
    "empty": lambda path, mark: path.write_bytes(b""),
}


def test_the_state_that_the_cases_change_is_a_good_one(tmp_path: Path) -> None:
    npz(tmp_path / "state.npz", metadata=metadata(), centroids=ROWS)
    assert load_state(tmp_path / "state.npz", SETTINGS, {}).iteration == 1
    save_state(tmp_path / "saved.npz", KMeansState(torch.from_numpy(ROWS), 1, [0.5], 1.0), SETTINGS, {})
    assert torch.equal(load_state(tmp_path / "saved.npz", SETTINGS, {}).centroids, torch.from_numpy(ROWS))


@pytest.mark.parametrize("case", STATES)
def test_a_state_of_k_means_that_is_none_is_one_sentence(tmp_path: Path, marker: Path, case: str) -> None:
    path = tmp_path / "state.npz"
    STATES[case](path, marker)
    with pytest.raises(UserError, match=r"state\.npz is damaged"):
        load_state(path, SETTINGS, {})
