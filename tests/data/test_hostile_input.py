"""F20, F21: everything the project reads from disk, written by somebody who means harm. Nothing runs, and the refusal is one
clear sentence: a UserError (for a sample a BadSample or a batch's failure), never an error of some library's inside."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_data import picture, put, stream, write_shards

from megacid.checkpoint import store
from megacid.checkpoint.state import CheckpointReader
from megacid.classifier.initialization import load_rows
from megacid.config.load import load_run
from megacid.data.batch import Positions
from megacid.data.features import FeatureSet, FeatureStream
from megacid.data.index import ShardIndex, load_index, verify_index
from megacid.data.side_tables import KeepTable, LabelTable, TeacherTable
from megacid.errors import UserError
from megacid.offline.rows import EmbeddingRows

ROOT = Path(__file__).resolve().parents[2]
CLASSES, DIM = 5, 3


class Evil:
    """Unpickled, it makes a file: the mark that code of the input has run."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    """Where a payload would leave its mark; checked at the end of every test that asks for it."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code of the input was executed"


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_shards(tmp_path / "shards")


def meta(folder: Path, **facts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").write_text(json.dumps(facts))
    return folder


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=True)


def table(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


# ---- complete good inputs, one part of which is then replaced ----------------------------------------------------


def teacher(folder: Path, index: ShardIndex) -> Path:
    for number, name in enumerate(index.names):
        keys = index.table(number).keys
        for kind in ("img", "text"):
            save(folder / f"{kind}_emb" / f"{kind}_emb_{number:05d}.npy", np.ones((len(keys), 2), np.float16))
        table(folder / "metadata" / f"metadata_{number:05d}.parquet", image_path=keys, shard=[name] * len(keys))
    partitions = {name: number for number, name in enumerate(index.names)}
    return meta(folder, made_by="embed", shards_digest=index.digest, dim=2, partitions=partitions,
                num_samples=index.num_samples)  # fmt: skip


def labels(folder: Path, index: ShardIndex) -> Path:
    for number, name in enumerate(index.names):
        keys = index.table(number).keys
        table(folder / "labels" / f"{name}.parquet", key=keys, label=pa.array([0] * len(keys), pa.int32()))
    return meta(folder, made_by="cluster", shards_digest=index.digest, k=CLASSES)


def keep(folder: Path, index: ShardIndex) -> Path:
    for name, size in zip(index.names, index.sizes):
        save(folder / "keep" / f"{name}.npy", np.ones(size, bool))
    return meta(folder, made_by="balance", shards_digest=index.digest)


def features(folder: Path) -> Path:
    save(folder / "features" / "features_00000.npy", np.ones((16, DIM), np.float16))
    save(folder / "labels" / "labels_00000.npy", np.zeros(16, np.int32))
    return meta(folder, made_by="synthesize", classes=CLASSES, dim=DIM)


def read_pairs(index: ShardIndex, **tables: Any) -> None:
    """Everything of an epoch; a failure becomes a UserError, as the trainer makes one error of it."""
    for batch in stream(index, total_steps=3, **tables):
        if batch.failure:
            raise UserError(batch.failure)


def read_features(folder: Path) -> None:
    plan = Positions(8, 8, 1, 0, 1, 0, 2)
    for batch in FeatureStream(FeatureSet(folder), plan, seed=0):
        if batch.failure:
            raise UserError(batch.failure)


# Where arrays are read: name -> (make what is good, which file is replaced, read it).
Reader = Callable[[Path, ShardIndex], None]
ARRAYS: dict[str, tuple[Callable[[Path, ShardIndex], Path], str, Reader]] = {
    "index": (lambda f, i: shutil.copytree(i.root, f), "index/00001.members.npy", lambda f, i: read_pairs(load_index(f))),
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
    BAD_ARRAYS[bad](folder / name, marker)
    with pytest.raises(UserError, match=Path(name).stem.partition(".")[0]):
        read(folder, index)


# ---- paths -------------------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[str, ShardIndex], Any]] = {
    "shards": lambda path, index: load_index(path),
    "verify": lambda path, index: verify_index(path),
    "teacher": lambda path, index: TeacherTable(path, index),
    "labels": lambda path, index: LabelTable(path, index),
    "keep": lambda path, index: KeepTable(path, index),
    "features": lambda path, index: FeatureSet(path),
    "embeddings": lambda path, index: EmbeddingRows(path),
    "class rows": lambda path, index: load_rows(path, 0, 1, (1, 1)),
    "weights": lambda path, index: _build("digits-student", path),
    "model": lambda path, index: _build(f"local-dir:{path}", None),
    "run file": lambda path, index: load_run(path, world=1),
}


def _build(model: str, pretrained: str | None) -> Any:
    from megacid.models.student import build_student

    return build_student(model, embed_dim=None, pretrained=pretrained, seed=0)


@pytest.mark.parametrize("path", ["pipe:touch {}", "|touch {}", "file:../{}", "$(touch {})", "$HOME/{}", "http://localhost:9/{}",
                                  "s3://x/{}", "`touch {}`", "x; touch {}", "a\0b"])  # fmt: skip
@pytest.mark.parametrize("place", PLACES)
def test_a_path_is_a_path_and_nothing_else(index: ShardIndex, marker: Path, place: str, path: str) -> None:
    with pytest.raises(UserError):
        PLACES[place](path.format(marker), index)


# ---- members of tars ---------------------------------------------------------------------------------------------


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


# ---- weights -----------------------------------------------------------------------------------------------------


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
        _build("digits-student", str(path))


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
        (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(_build("digits-student", None))))
        shutil.copy(path, folder / name)
        with pytest.raises(UserError):
            load_clip(f"local-dir:{folder}")


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_for_the_class_rows_is_refused(tmp_path: Path, marker: Path, form: str) -> None:
    path = evil_files(tmp_path / "evil", marker)[form]
    tool = _tool("ckpt")
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


def _tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- checkpoints -------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, data: bytes, name: str = "student-0.safetensors", **changes: Any) -> Path:
    """A checkpoint whose manifest is right about a file that may be anything."""
    folder.mkdir(parents=True)
    (folder / "student-0.safetensors").write_bytes(data)
    entry = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    facts = {"format": 1, "step": 3, "updates": 3, "num_classes": 2, "embed_dim": 2, "files": [entry], **changes}
    (folder / store.MANIFEST).write_bytes(store.seal(facts))
    return folder


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
        _tool("ckpt").main(["show", str(run)])


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "a/../../b", "", "."])
def test_a_manifest_cannot_name_a_file_outside_of_its_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    folder = checkpoint(tmp_path / "run" / "step-00000003", b"x", name)
    with pytest.raises(ValueError, match="has entries that are no files of a checkpoint"):
        store.read_manifest(folder)


@pytest.mark.parametrize(
    "manifest",
    [[], None, 7, "x", {}, {"format": 1}, {"format": 1, "files": 7}, {"format": 1, "files": [7]},
     {"format": 1, "files": [{}]}, {"format": 1, "files": [{"name": 7, "bytes": "x", "sha256": None}]}],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_a_clear_error(tmp_path: Path, manifest: Any) -> None:
    folder = checkpoint(tmp_path / "run" / "step-00000003", b"x")
    (folder / store.MANIFEST).write_bytes(store.seal(manifest))
    with pytest.raises(ValueError, match="step-00000003"):
        store.read_manifest(folder)
    assert store.newest_valid(folder.parent)[0] is None


# ---- JSON --------------------------------------------------------------------------------------------------------

BOMBS = {
    "deep list": b"[" * 200_000,
    "deep dict": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "long number": b'{"made_by": ' + b"9" * 5000 + b"}",
    "no text": b"\x80\x04\x95\xff",
    "number": b"7",
    "list": b"[1, 2]",
    "null": b"null",
    "empty": b"",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_made_to_do_harm_is_a_clear_error_wherever_it_is_read(
    tmp_path: Path, index: ShardIndex, bomb: str
) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "meta.json").write_bytes(BOMBS[bomb])
    for open_stage in (TeacherTable, LabelTable, KeepTable):
        with pytest.raises(UserError, match="stage"):
            open_stage(stage, index)
    with pytest.raises(UserError, match="stage"):
        FeatureSet(stage)
    folder = checkpoint(tmp_path / "run" / "step-00000003", b"x")
    (folder / store.MANIFEST).write_bytes(BOMBS[bomb])
    with pytest.raises(ValueError, match=store.MANIFEST):
        store.read_manifest(folder)
    run_file = tmp_path / "run.json"
    run_file.write_bytes(BOMBS[bomb])
    with pytest.raises(UserError, match=r"run\.json"):
        load_run(run_file, world=1)
    model = tmp_path / "model"
    model.mkdir()
    (model / "open_clip_config.json").write_bytes(BOMBS[bomb])
    with pytest.raises(UserError, match="open_clip_config"):
        _build(f"local-dir:{model}", None)
    for name in ("index.json", "00001.keys.json"):  # made again, from the tars
        (index.root / "index" / name).write_bytes(BOMBS[bomb])
        (index.root / "index" / "index.json").write_bytes(BOMBS[bomb])
        assert verify_index(index.root) == [f"{index.root}/index/index.json is missing or unreadable"]
        again = load_index(index.root)
        assert again.digest == index.digest and again.table(1).keys == index.table(1).keys


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000, '{"a":' * 100_000])
def test_a_setting_made_to_do_harm_is_a_clear_error(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN))
    with pytest.raises(UserError):
        load_run(path, [f"run.seed={value}"], world=1)


@pytest.mark.parametrize(
    "change",
    [{"bytes": "7"}, {"samples": -1}, {"samples": 10**30}, {"dropped": {"x": "y"}}, {"name": "../../00001"}, {"damage": 7},
     {"sha256": None}],
)  # fmt: skip
def test_an_index_that_was_tampered_with_is_made_again_or_refused(
    tmp_path: Path, index: ShardIndex, change: dict[str, Any]
) -> None:
    path = index.root / "index" / "index.json"
    stored = json.loads(path.read_text())
    stored["shards"][1].update(change)
    path.write_text(json.dumps(stored))
    try:
        again = load_index(index.root)
        again.table(1)
    except UserError as error:
        assert "index" in str(error)
    else:
        assert again.digest == index.digest and again.table(1).keys == index.table(1).keys


def test_offsets_of_a_tampered_index_read_nothing_else(index: ShardIndex) -> None:
    members = np.load(index.root / "index" / "00001.members.npy")
    for row, (offset, size) in enumerate([(-5, 10), (2**62, 10), (0, 2**62), (0, -7), (10**6, 10), (0, 0)]):
        members[row, :2] = offset, size
    np.save(index.root / "index" / "00001.members.npy", members)
    batches = list(stream(load_index(index.root), total_steps=3, error_budget=1.0))
    assert {s.partition(":")[0] for b in batches for s in b.replaced} == {f"00001/k{9 + row}" for row in range(6)}
    assert all(b.image[:, 0, 0, 0].long().equal(b.text[:, 0]) for b in batches)


# ---- the run file ------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "megacid": {
        "run": {"name": "x", "total_steps": 2},
        "student": {"model": "feature-mlp", "embed_dim": 8},
        "data": {"features": "somewhere"},
        "loss": {"cluster": 1.0},
        "classifier": {"init": "random"},
    },
}


def numbers() -> list[str]:
    """Every number of the megacid block."""
    from megacid.config.schema import defaults

    found = [f"{s}.{n}" for s, fs in defaults().items() for n, v in fs.items() if isinstance(v, int | float) and v is not True and v is not False]  # fmt: skip
    return [*found, "run.total_steps", "loss.temperature", "classifier.filter_threshold", "classifier.lr"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "-1" + "0" * 30])
def test_numbers_that_are_none_or_beyond_all_measure_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN))
    accepted = []
    for name in numbers():
        try:
            load_run(path, [f"{name}={value}"], world=1)
            accepted.append(name)
        except UserError as error:
            assert name in str(error)
    assert not accepted
    for key in ("train_batch_size", "gradient_clipping", "optimizer.params.lr"):
        with pytest.raises(UserError):
            load_run(path, [f"{key}={value}"], world=1)
    assert math.isnan(json.loads("NaN"))  # json lets it pass: somebody else has to look


# ---- side tables of wrong types, and labels (F21) ----------------------------------------------------------------

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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", COLUMNS)
def test_a_label_table_of_wrong_types_or_values_never_reaches_the_trainer(
    tmp_path: Path, index: ShardIndex, case: str, workers: int
) -> None:
    folder = labels(tmp_path / "clusters", index)
    labelled = LabelTable(folder, index)
    keys = index.table(1).keys
    table(folder / "labels" / "00001.parquet", **COLUMNS[case](keys))
    batches = list(stream(index, total_steps=3, labels=labelled, workers=workers))
    said = {batch.failure for batch in batches} - {None}
    assert len(said) == 1 and len(batches) == 3
    assert "00001.parquet" in str(said)
    if case.startswith(("label ", "a label")):
        assert f"sample {keys[1]}" in str(said)
    for batch in batches:
        assert batch.label is not None and batch.label.dtype == torch.int64 and batch.label.shape == (8,)
        assert ((batch.label >= -1) & (batch.label < CLASSES)).all()


def test_minus_one_is_no_label_and_no_fault(tmp_path: Path, index: ShardIndex) -> None:
    folder = labels(tmp_path / "clusters", index)
    table(folder / "labels" / "00001.parquet", key=index.table(1).keys, label=pa.array([-1] * 7, pa.int16()))
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
    table(path, **({column: values} if values is not None else {"other": ["x"] * 7}))
    with pytest.raises(UserError, match="metadata_00001"):
        read_pairs(index, teacher=TeacherTable(folder, index))


@pytest.mark.parametrize("fact", ["k", "dim", "partitions", "classes"])
@pytest.mark.parametrize("value", [None, "7", 7.5, [], {}, -1, 0, 10**30, True, {"00000": "x"}])
def test_meta_of_wrong_types_is_refused(tmp_path: Path, index: ShardIndex, fact: str, value: Any) -> None:
    make: dict[str, Any] = {"k": labels, "dim": teacher, "partitions": teacher, "classes": lambda f, i: features(f)}
    folder = make[fact](tmp_path / "stage", index)
    facts = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**facts, fact: value}))
    with pytest.raises(UserError, match="stage"):
        {"k": LabelTable, "dim": TeacherTable, "partitions": TeacherTable, "classes": lambda f, i: FeatureSet(f)}[fact](
            folder, index
        )


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
