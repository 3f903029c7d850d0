"""F20, F21: arrays, Parquet tables and their values that are damaged or made to do harm: each is one UserError (or one
failure of a batch), nothing is unpickled, and no label out of range reaches the trainer."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hostile_data import CLASSES, DIM, Evil, features, keep, labels, read_features, read_pairs, teacher
from pair_data import save, stream, write_parquet, write_shards

from megacid.classifier.initialization import load_rows
from megacid.data.features import FeatureSet
from megacid.data.index import ShardIndex, load_index
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError
from megacid.offline.rows import EmbeddingRows


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_shards(tmp_path / "shards")


# Where arrays are read: name -> (make what is good, which file is replaced, read it).
Reader = Callable[[Path, ShardIndex], None]
ARRAYS: dict[str, tuple[Callable[[Path, ShardIndex], Path], str, Reader]] = {
    "index": (
        lambda f, i: shutil.copytree(i.root, f), "index/00001.members.npy", lambda f, i: read_pairs(load_index(f)),
    ),
    "teacher image": (teacher, "img_emb/img_emb_00001.npy", lambda f, i: read_pairs(i, teacher=TeacherTable(f, i))),
    "teacher text": (teacher, "text_emb/text_emb_00001.npy", lambda f, i: read_pairs(i, teacher=TeacherTable(f, i))),
    "embeddings": (teacher, "img_emb/img_emb_00001.npy", lambda f, i: void(EmbeddingRows(f).read(0, 24))),
    "keep": (keep, "keep/00001.npy", lambda f, i: read_pairs(i, keep=KeepTable(f, i))),
    "features": (lambda f, i: features(f), "features/features_00000.npy", lambda f, i: read_features(f)),
    "feature labels": (lambda f, i: features(f), "labels/labels_00000.npy", lambda f, i: read_features(f)),
    "class rows": (
        lambda f, i: void_path(save(f / "rows.npy", np.ones((CLASSES, DIM), np.float32)), f), "rows.npy",
        lambda f, i: void(load_rows(f / "rows.npy", 0, CLASSES, (CLASSES, DIM))),
    ),
}  # fmt: skip


def void(_: Any) -> None:
    """For a lambda that must give nothing."""


def void_path(_: Any, path: Path) -> Path:
    return path


def npy_header(text: str) -> bytes:
    header = text.encode().ljust(4096) + b"\n"
    return b"\x93NUMPY\x02\0" + len(header).to_bytes(4, "little") + header


HUGE = "{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000, 2), }"
BAD_ARRAYS: dict[str, Callable[[Path, Path], None]] = {
    "objects": lambda path, mark: np.save(path, np.array([[Evil(mark)] * 2] * 8, object), allow_pickle=True),
    "pickle": lambda path, mark: void(path.write_bytes(pickle.dumps(Evil(mark)))),
    "zip": lambda path, mark: void(path.write_bytes(_npz(mark))),
    "structured": lambda path, mark: np.save(path, np.zeros(7, [("a", "i4"), ("b", "O")]), allow_pickle=True),
    "strings": lambda path, mark: np.save(path, np.full((7, 2), "x")),
    "complex": lambda path, mark: np.save(path, np.ones((7, 2), np.complex64)),
    "empty": lambda path, mark: void(path.write_bytes(b"")),
    "cut": lambda path, mark: void(path.write_bytes(path.read_bytes()[:-3])),
    "huge": lambda path, mark: void(path.write_bytes(npy_header(HUGE))),
    "negative": lambda path, mark: void(path.write_bytes(npy_header(HUGE.replace("1000000000000", "-1")))),
    "nested": lambda path, mark: void(path.write_bytes(npy_header("(" * 4000))),
    "minuses": lambda path, mark: void(path.write_bytes(npy_header("-" * 4000 + "1"))),
    "code": lambda path, mark: void(path.write_bytes(npy_header(f"open({str(mark)!r}, 'w')"))),
}


def _npz(mark: Path) -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.array([Evil(mark)], object))
    return buffer.getvalue()


@pytest.mark.parametrize("bad", BAD_ARRAYS)
@pytest.mark.parametrize("place", ARRAYS)
def test_an_array_that_is_none_is_a_clear_error(
    tmp_path: Path, index: ShardIndex, marker: Path, place: str, bad: str
) -> None:
    make, name, read = ARRAYS[place]
    folder = make(tmp_path / "stage", index)
    read(folder, index)
    for joined in tmp_path.rglob("joined-*"):
        shutil.rmtree(joined)
    BAD_ARRAYS[bad](folder / name, marker)
    with pytest.raises(UserError, match=Path(name).stem.partition(".")[0]):
        read(folder, index)


# ---- values of side tables and labels (F21) -------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "keys are numbers": lambda keys: {"key": list(range(len(keys))), "label": [0] * len(keys)},
    "keys are bytes": lambda keys: {"key": [k.encode() for k in keys], "label": [0] * len(keys)},
    "labels are text": lambda keys: {"key": keys, "label": ["0"] * len(keys)},
    "labels are lists": lambda keys: {"key": keys, "label": [[0]] * len(keys)},
    "labels are floats": lambda keys: {"key": keys, "label": [0.5] * len(keys)},
    "labels are whole floats": lambda keys: {"key": keys, "label": [1.0] * len(keys)},
    "labels are truth": lambda keys: {"key": keys, "label": [True] * len(keys)},
    "a label is null": lambda keys: {"key": keys, "label": [0, None] + [0] * (len(keys) - 2)},
    "no label": lambda keys: {"key": keys, "other": [0] * len(keys)},
    "no key": lambda keys: {"label": [0] * len(keys)},
    "another number of labels": lambda keys: {"key": keys},
    "label C": lambda keys: {"key": keys, "label": [0, CLASSES] + [0] * (len(keys) - 2)},
    "label 2^31": lambda keys: {"key": keys, "label": [0, 2**31] + [0] * (len(keys) - 2)},
    "label 2^63": lambda keys: {"key": keys, "label": pa.array([0, 2**63] + [0] * (len(keys) - 2), pa.uint64())},
    "label -2": lambda keys: {"key": keys, "label": [0, -2] + [0] * (len(keys) - 2)},
}


@pytest.mark.parametrize("case", COLUMNS)
def test_a_label_table_of_wrong_types_or_values_never_reaches_the_trainer(
    tmp_path: Path, index: ShardIndex, case: str
) -> None:
    folder = labels(tmp_path / "clusters", index)
    labelled = LabelTable(folder, index)
    keys = index.table(1).keys
    write_parquet(folder / "labels" / "00001.parquet", **COLUMNS[case](keys))
    with pytest.raises(UserError, match=r"00001\.parquet") as error:  # before the first batch
        stream(index, labels=labelled)
    if case.startswith(("label ", "a label")):
        assert f"sample {keys[1]}" in str(error.value)
    assert not [*index.root.rglob("tars*.npy")], "a table that is not complete counts as none"


def test_minus_one_is_no_label_and_no_fault(tmp_path: Path, index: ShardIndex) -> None:
    folder = labels(tmp_path / "clusters", index)
    write_parquet(folder / "labels" / "00001.parquet", key=index.table(1).keys, label=pa.array([-1] * 7, pa.int16()))
    batches = list(stream(index, total_steps=3, labels=LabelTable(folder, index)))
    assert not any(b.failure for b in batches)
    assert sorted(
        n for b in batches for n, label in zip(b.sample_id.tolist(), b.label.tolist()) if label == -1
    ) == list(range(9, 16))


@pytest.mark.parametrize("column", ["image_path"])
@pytest.mark.parametrize("values", [list(range(7)), [1.0] * 7, [b"x"] * 7, [["x"]] * 7, None])
def test_teacher_keys_of_wrong_types_are_refused(
    tmp_path: Path, index: ShardIndex, column: str, values: list[Any] | None
) -> None:
    folder = teacher(tmp_path / "teacher", index)
    path = folder / "metadata" / "metadata_00001.parquet"
    write_parquet(path, **({column: values} if values is not None else {"other": ["x"] * 7}))
    with pytest.raises(UserError, match="metadata_00001"):
        read_pairs(index, teacher=TeacherTable(folder, index))


@pytest.mark.parametrize("field", ["k", "dim", "partitions", "classes"])
@pytest.mark.parametrize("value", [None, "7", 7.5, [], {}, -1, 0, 10**30, True, {"00000": "x"}])
def test_meta_of_wrong_types_is_refused(tmp_path: Path, index: ShardIndex, field: str, value: Any) -> None:
    make: dict[str, Any] = {"k": labels, "dim": teacher, "partitions": teacher, "classes": lambda f, i: features(f)}
    folder = make[field](tmp_path / "stage", index)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, field: value}))
    with pytest.raises(UserError, match="stage"):
        {"k": LabelTable, "dim": TeacherTable, "partitions": TeacherTable, "classes": lambda f, i: FeatureSet(f)}[
            field
        ](folder, index)


@pytest.mark.parametrize("label", [CLASSES, 2**31 - 1, -1, -(2**31)])
def test_feature_labels_out_of_range_are_a_failure_that_names_the_row(tmp_path: Path, label: int) -> None:
    folder = features(tmp_path / "features")
    values = np.zeros(16, np.int32)
    values[11] = label
    save(folder / "labels" / "labels_00000.npy", values)
    with pytest.raises(UserError, match=rf"labels_00000.npy row 11 has label {label}, expected 0 .. 4"):
        read_features(folder)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, np.uint32, np.bool_])
def test_feature_labels_of_another_type_are_refused(tmp_path: Path, kind: type) -> None:
    folder = features(tmp_path / "features")
    save(folder / "labels" / "labels_00000.npy", np.zeros(16, kind))
    with pytest.raises(UserError, match=r"labels_00000.npy is .*, expected int32"):
        read_features(folder)
