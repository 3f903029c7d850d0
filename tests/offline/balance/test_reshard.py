"""The copy of what was kept: bytes, names, restarts, and what joins it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_data import label_dir, put, teacher_dir, teacher_rows

from megacid.data.index import ShardIndex, load_index
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.offline.balance.figures import read_balanced
from megacid.offline.balance.reshard import reshard
from megacid.storage.metadata import read_meta, write_meta
from megacid.storage.stage_directory import finished_meta

KEPT = {"00000": [True, False, True], "00001": [False, True], "00002": [False, False]}
KEYS = {"00000": ["a", "b", "c"], "00001": ["d", "e" * 150], "00002": ["f", "g"]}


def parallel() -> Parallel:
    return Parallel(rank=0, world=1, local_rank=0, device=torch.device("cpu"), group=None)


def write_masks(folder: Path, index: ShardIndex, kept: dict[str, list[bool]]) -> Path:
    (folder / "keep").mkdir(parents=True, exist_ok=True)
    for name, mask in kept.items():
        np.save(folder / "keep" / f"{name}.npy", np.array(mask))
    write_meta(folder, "balance", {}, shards_digest=index.digest)
    return folder


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    (tmp_path / "shards").mkdir()
    for name, keys in KEYS.items():
        with tarfile.open(tmp_path / "shards" / f"{name}.tar", "w") as tar:
            for key in keys:
                put(tar, f"{key}.jpg", f"image of {key}".encode() * 99)
                put(tar, f"{key}.txt", f"text of {key}".encode())
                put(tar, f"{key}.npy", b"a kind that we do not read")
                put(tar, f"{key}.json", b"{}")
            if name == "00000":
                put(tar, "a.jpg", b"a key for the second time")
                put(tar, "a.txt", b"left out")
                put(tar, "lonely.txt", b"left out as well")
    return load_index(tmp_path / "shards", allow_bad=True)  # 2 of 9 samples are left out


@pytest.fixture
def balance(tmp_path: Path, index: ShardIndex) -> Path:
    return write_masks(tmp_path / "balance", index, KEPT)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def test_kept_samples_are_copied_byte_for_byte(tmp_path: Path, index: ShardIndex, balance: Path) -> None:
    out = tmp_path / "kept"
    meta = reshard(balance, index, out, parallel())
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 2, "00001.tar": 1}
    assert sorted(path.name for path in out.iterdir()) == [
        "00000.tar",
        "00001.tar",
        "meta.json",
        "settings.json",
        "sizes.json",
    ]
    for name in ("00000", "00001"):
        expected = [key for key, kept in zip(KEYS[name], KEPT[name]) if kept]
        source, copy = members(index.root / f"{name}.tar"), members(out / f"{name}.tar")
        assert list(copy) == [f"{key}.{kind}" for key in expected for kind in ("jpg", "txt", "npy", "json")]
        assert all(copy[file] == source[file] for file in copy if not file.startswith("a."))
        assert (out / f"{name}.tar").stat().st_size % 10240 == 0
    assert members(out / "00000.tar")["a.jpg"] == b"image of a" * 99
    # The bytes of a member with its headers, extended ones too, are those of the source.
    raw, made = ((folder / "00001.tar").read_bytes() for folder in (index.root, out))
    end = made.rstrip(b"\0")
    assert end in raw and len(end) > 3000
    copied = load_index(out)
    assert (
        copied.table(1).keys == ["e" * 150] and copied.digest == meta["digest"] and copied.num_samples == meta["kept"]
    )


def test_embeddings_and_labels_join_the_copy_as_they_are(tmp_path: Path, index: ShardIndex) -> None:
    source = tmp_path / "two"
    source.mkdir()
    for name, keys in {"00000": "abc", "00001": "de"}.items():
        with tarfile.open(source / f"{name}.tar", "w") as tar:
            for key in keys:
                put(tar, f"{key}.jpg", key.encode())
                put(tar, f"{key}.txt", key.encode())
    whole = load_index(source)
    masks = write_masks(tmp_path / "masks", whole, {"00000": [False, True, True], "00001": [True, False]})
    teacher, labels = teacher_dir(tmp_path / "t", whole.digest), label_dir(tmp_path / "l", whole.digest)
    reshard(masks, whole, tmp_path / "kept", parallel())
    copy = load_index(tmp_path / "kept")
    table = TeacherTable(teacher, copy)
    assert (table.join(0).row_of >= 0).tolist() == [False, True]
    assert teacher_rows(table, 0, np.array([1]))[0].tolist() == [[ord("c"), 1]]
    assert LabelTable(labels, copy).join(0).tolist() == [[-1], [7]]
    with pytest.raises(UserError, match="other shards"):
        KeepTable(masks, copy)
    # A copy that was changed since is a copy no more.
    (tmp_path / "kept" / "00001.tar").unlink()
    with pytest.raises(UserError, match="other shards"):
        TeacherTable(teacher, load_index(tmp_path / "kept"))


def test_a_restart_writes_only_what_is_missing(tmp_path: Path, index: ShardIndex, balance: Path) -> None:
    out, whole = tmp_path / "kept", tmp_path / "whole"
    reshard(balance, index, whole, parallel())

    class Cut(Exception):  # noqa: N818
        pass

    def cut(rows: int) -> None:
        if (out / "00000.tar").exists() and not rows:
            raise Cut

    with pytest.raises(Cut):
        reshard(balance, index, out, parallel(), start_progress=lambda total: cut)
    assert not (out / "meta.json").exists() and not list(out.glob("*.tmp*")) and not (out / "00001.tar").exists()
    first = (out / "00000.tar").stat().st_ino
    reshard(balance, index, out, parallel())
    assert (out / "00000.tar").stat().st_ino == first
    for path in whole.iterdir():
        if path.name != "meta.json":
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert read_meta(out)["digest"] == read_meta(whole)["digest"] and not (out / ".work").exists()
    # A tar that is gone or was cut is made again, the others stay.
    (out / "00001.tar").write_bytes(b"cut")
    reshard(balance, index, out, parallel())
    assert (out / "00001.tar").read_bytes() == (whole / "00001.tar").read_bytes()
    assert (out / "00000.tar").stat().st_ino == first


def test_a_copy_of_other_masks_is_refused(tmp_path: Path, index: ShardIndex, balance: Path) -> None:
    out = tmp_path / "kept"
    reshard(balance, index, out, parallel())
    load_index(out)
    write_masks(balance, index, KEPT | {"00001": [False, False], "00002": [True, False]})
    tars = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    with pytest.raises(UserError, match="kept was made with keep '"):
        reshard(balance, index, out, parallel())
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == tars


def test_bad_directories_are_refused(tmp_path: Path, index: ShardIndex, balance: Path) -> None:
    with pytest.raises(UserError, match="the directory of the shards: give it another"):
        reshard(balance, index, index.root, parallel())
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"not empty and was not made by tools/balance\.py --reshard"):
        reshard(balance, index, other, parallel())
    with pytest.raises(UserError, match=r"was not made by tools/balance\.py --reshard"):
        reshard(balance, index, balance, parallel())
    assert (other / "mine.tar").read_bytes() == b"precious" and (balance / "keep" / "00000.npy").exists()


def test_a_folder_of_an_earlier_version_is_refused(tmp_path: Path, index: ShardIndex, balance: Path) -> None:
    """Every reader of a balance folder: masks (training and --reshard), figures, and a new run of the stage."""
    write_meta(balance, "balance", {}, shards_digest=index.digest, across=0)  # the field is neighbor_clusters today
    message = "balance was written by an earlier version of megacid: delete it and run tools/balance.py again"
    with pytest.raises(UserError, match=message):
        reshard(balance, index, tmp_path / "kept", parallel())
    with pytest.raises(UserError, match=message):
        KeepTable(balance, index)
    with pytest.raises(UserError, match=message):
        read_balanced(balance)
    with pytest.raises(UserError, match=message):
        finished_meta(balance, "balance")


def test_a_source_that_changed_is_named(tmp_path: Path, index: ShardIndex, balance: Path) -> None:
    path = index.root / "00001.tar"
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        put(tar, "x.jpg", b"another")
    path.write_bytes(data.getvalue())
    with pytest.raises(UserError, match=r"00001.tar is not the tar that was indexed: 0 of 1 kept samples"):
        reshard(balance, index, tmp_path / "kept", parallel())
    path.unlink()
    with pytest.raises(UserError, match=r"00001.tar cannot be read"):
        reshard(balance, index, tmp_path / "kept", parallel())
