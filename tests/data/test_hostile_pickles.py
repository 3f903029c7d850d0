"""F20: pickles in every place that a file is read from, members of tars and paths that other readers would execute or
follow: nothing runs, and the refusal is one UserError."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_data import Evil, build, checkpoint
from offline_data import load_tool
from pair_data import picture, put, stream, write_shards

from megacid.checkpoint import store
from megacid.checkpoint.state import CheckpointReader
from megacid.classifier.initialization import load_rows
from megacid.config.load import load_run
from megacid.data.features import FeatureSet
from megacid.data.index import ShardIndex, load_index
from megacid.data.index_verify import verify_index
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError
from megacid.offline.rows import EmbeddingRows


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_shards(tmp_path / "shards")


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


# ---- paths -----------------------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[str, ShardIndex], Any]] = {
    "shards": lambda path, index: load_index(path),
    "verify": lambda path, index: verify_index(path),
    "teacher": lambda path, index: TeacherTable(path, index),
    "labels": lambda path, index: LabelTable(path, index),
    "keep": lambda path, index: KeepTable(path, index),
    "features": lambda path, index: FeatureSet(path),
    "embeddings": lambda path, index: EmbeddingRows(path),
    "class rows": lambda path, index: load_rows(path, 0, 1, (1, 1)),
    "weights": lambda path, index: build("digits-student", path),
    "model": lambda path, index: build(f"local-dir:{path}", None),
    "run file": lambda path, index: load_run(path, world=1),
}


@pytest.mark.parametrize("path", ["pipe:touch {}", "|touch {}", "file:../{}", "$(touch {})", "$HOME/{}", "http://localhost:9/{}",
                                  "s3://x/{}", "`touch {}`", "x; touch {}", "a\0b"])  # fmt: skip
@pytest.mark.parametrize("place", PLACES)
def test_a_path_is_a_path_and_nothing_else(index: ShardIndex, marker: Path, place: str, path: str) -> None:
    with pytest.raises(UserError):
        PLACES[place](path.format(marker), index)


# ---- members of tars -------------------------------------------------------------------------------------------------


def test_members_that_other_readers_unpickle_or_follow_are_passed_over(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(picture(99))
    evil = pickle.dumps(Evil(marker))
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(8):
            put(tar, f"k{number}.png", picture(number))
            put(tar, f"k{number}.txt", str(number).encode())
            for ending in ("pyd", "pkl", "pth", "pickle", "npy", "pt", "json", "cls", "ten"):
                put(tar, f"k{number}.{ending}", evil)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            put(tar, f"link{kind!r}.png", b"", type=kind, linkname=str(secret))
            put(tar, f"link{kind!r}.txt", b"", type=kind, linkname="k0.txt")
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            put(tar, f"device{kind!r}.png", b"", type=kind, devmajor=1, devminor=5)
        for name in ("../up", "/abs", "a/../../b", "..", "ok/../x"):
            put(tar, f"{name}.png", picture(50))
            put(tar, f"{name}.txt", b"50")
    index = load_index(folder)
    assert index.num_samples == 8 and index.dropped["not a regular file"] == 7 and index.dropped["unsafe name"] >= 8
    for batch in stream(index, total_steps=2):
        assert batch.image[:, 0, 0, 0].long().equal(batch.text[:, 0]) and batch.failure is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret", "shards"]
    assert sorted(p.name for p in folder.iterdir()) == ["00000.tar", "index"]


# ---- weights ---------------------------------------------------------------------------------------------------------


def evil_files(folder: Path, marker: Path) -> dict[str, Path]:
    """Pickles in the three forms that torch.load knows, and one inside a state dict."""
    folder.mkdir()
    (folder / "plain.pt").write_bytes(pickle.dumps(Evil(marker)))
    torch.save({"weight": Evil(marker)}, folder / "zip.pt")
    torch.save({"weight": Evil(marker)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {"visual.proj": torch.ones(2, 2)}, "epoch": Evil(marker)}, folder / "mixed.pt")
    return {path.stem: path for path in sorted(folder.iterdir())}


FORMS = ["plain", "zip", "old", "mixed"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", [".pt", ".bin", ".safetensors", ".npy", ".npz"])
def test_a_pickle_for_the_students_weights_is_refused(tmp_path: Path, marker: Path, form: str, ending: str) -> None:
    path = evil_files(tmp_path / "evil", marker)[form].rename(tmp_path / f"weights{ending}")
    with pytest.raises(UserError, match="weights"):
        build("digits-student", str(path))


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_for_the_teachers_weights_is_refused(tmp_path: Path, marker: Path, form: str) -> None:
    from megacid.models.clip import load_clip
    from megacid.models.student import open_clip_config

    path = evil_files(tmp_path / "evil", marker)[form]
    with pytest.raises(UserError):
        load_clip("digits-student", str(path))
    for name in ("open_clip_pytorch_model.bin", "open_clip_model.pth", "open_clip_model.safetensors"):
        folder = tmp_path / f"model-{name}"
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(build("digits-student", None))))
        shutil.copy(path, folder / name)
        with pytest.raises(UserError):
            load_clip(f"local-dir:{folder}")


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_for_the_class_rows_is_refused(tmp_path: Path, marker: Path, form: str) -> None:
    path = evil_files(tmp_path / "evil", marker)[form]
    tool = load_tool("ckpt")
    for layout in ("softmax_fc_gpu_0.pt", "checkpoint_gpu_0.pt", "rank_0_softmax_weight.pt"):
        folder = tmp_path / layout.partition(".")[0]
        folder.mkdir()
        shutil.copy(path, folder / layout)
        with pytest.raises(UserError):
            load_rows(folder, 0, 1, (1, 2))
        with pytest.raises(UserError):
            tool.main(["import", str(folder), "--out", str(tmp_path / "rows.npy")])
    for ending in (".pt", ".safetensors", ".npy"):
        other = shutil.copy(path, tmp_path / f"rows{ending}")
        with pytest.raises(UserError):
            load_rows(other, 0, 1, (1, 2))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_pickle_in_a_checkpoint_is_refused(tmp_path: Path, marker: Path) -> None:
    run = tmp_path / "run"
    folder = checkpoint(run / "step-00000003", pickle.dumps(Evil(marker)))
    with pytest.raises(UserError):
        CheckpointReader(folder)
    (folder / store.MANIFEST).write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ValueError, match="cannot be read"):
        store.read_manifest(folder)
    assert store.newest_valid(run)[0] is None
    with pytest.raises(UserError):
        load_tool("ckpt").main(["show", str(run)])
