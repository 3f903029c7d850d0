"""Several teachers in the loader: each is joined by key, and what does not fit names its directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_data import data_of, run_file
from pair_data import SIZES, save, stream, teacher_rows, write_parquet, write_shards

from megacid.data.batch import Positions
from megacid.data.ensemble import TeacherEnsemble, open_teachers
from megacid.data.index import ShardIndex
from megacid.data.side_tables import KeepTable
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError
from megacid.storage.metadata import write_meta

ONE_EPOCH = dict(global_batch=1, micro_batch=1)


def row_of(teacher: int, sample: int, width: int) -> np.ndarray:
    return np.random.default_rng([teacher, sample]).standard_normal(width).astype(np.float16)


def write_teacher(
    folder: Path,
    index: ShardIndex,
    number: int,
    width: int,
    missing: Iterable[int] = (),
    dtype: str = "float16",
    **meta: Any,
) -> Path:
    """Embeddings of the samples of `write_shards` but some, in an order of rows of its own; texts are -image."""
    row, order, skipped = 0, np.random.default_rng(number), {}
    for partition, (name, size) in enumerate(SIZES.items()):
        samples = order.permutation([r for r in range(row, row + size) if r not in set(missing)])
        skipped[name], row = size - len(samples), row + size
        image = np.stack([row_of(number, int(sample), width) for sample in samples]).astype(dtype)
        save(folder / "img_emb" / f"img_emb_{partition:05d}.npy", image)
        save(folder / "text_emb" / f"text_emb_{partition:05d}.npy", -image)
        keys = [f"k{sample}" for sample in samples]
        write_parquet(folder / "metadata" / f"metadata_{partition:05d}.parquet", image_path=keys)
    entries = {"dim": width, "partitions": {name: i for i, name in enumerate(SIZES)}, "failures_by_shard": skipped}
    write_meta(folder, "embed", {"images": str(folder)}, **({"shards_digest": index.digest} | entries | meta))
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("ensemble") / "shards")


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "float32")])
def test_a_row_is_the_embeddings_of_one_sample_side_by_side_and_rescaled(
    tmp_path: Path, index: ShardIndex, dtypes: tuple[str, str]
) -> None:
    widths = (3, 5)
    folders = [write_teacher(tmp_path / f"{n}", index, n, w, dtype=d) for n, (w, d) in enumerate(zip(widths, dtypes))]
    teacher = open_teachers(folders, index)
    assert isinstance(teacher, TeacherEnsemble) and teacher.dim == 8 and teacher.has_text
    batches = stream(index, **ONE_EPOCH, total_steps=24, teacher=teacher)
    seen = []
    for batch in batches:
        (sample,) = batch.sample_id.tolist()
        seen.append(sample)
        expected = np.concatenate([row_of(n, sample, width) for n, width in enumerate(widths)]) / np.sqrt(2)
        image, text = batch.teacher_image, batch.teacher_text
        assert image is not None and text is not None
        assert image.dtype == (torch.float32 if "float32" in dtypes else torch.float16)  # as stored
        np.testing.assert_allclose(image[0].numpy(), expected, rtol=1e-3)
        assert torch.equal(text, -image)
    assert sorted(seen) == list(range(24)) and batches.statistics()["without_teacher"] == 0


def test_one_directory_is_that_teacher_as_it_is_stored(tmp_path: Path, index: ShardIndex) -> None:
    teacher = open_teachers([write_teacher(tmp_path / "t", index, 0, 3)], index)
    assert isinstance(teacher, TeacherTable)
    assert np.array_equal(teacher_rows(teacher, 0, np.array([4]))[0][0], row_of(0, 4, 3))


VIEWS = {"count": 2, "seed": 1, "crops": "c"}


def test_the_view_of_a_sample_is_that_of_every_teacher(tmp_path: Path, index: ShardIndex) -> None:
    folders = []
    for number in range(2):
        folders.append(write_teacher(tmp_path / f"{number}", index, number, 3, views=VIEWS))
        for path in sorted((folders[-1] / "img_emb").iterdir()):
            rows = np.repeat(np.load(path), 2, axis=0)
            rows[1::2] += 10  # view 1
            save(folders[-1] / "view_emb" / path.name.replace("img", "view"), rows)
    teacher = open_teachers(folders, index)
    assert teacher.views is not None and teacher.views.count == 2
    image, text = teacher_rows(teacher, 0, np.array([4, 7]), np.array([[1, 0], [0, 0]]))
    whole = [np.concatenate([row_of(n, sample, 3) for n in range(2)]) for sample in (4, 7)]
    np.testing.assert_allclose(image * np.sqrt(2), [whole[0] + 10, whole[1]], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(text * np.sqrt(2), [-whole[0], -whole[1]], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("second", [None, VIEWS | {"seed": 2}, VIEWS | {"count": 3}], ids=str)
def test_teachers_of_other_views_are_refused(tmp_path: Path, index: ShardIndex, second: dict[str, Any] | None) -> None:
    folders = []
    for number, views in enumerate((VIEWS, second)):
        folders.append(write_teacher(tmp_path / f"{number}", index, number, 3, views=views))
        if views is not None:
            shutil.copytree(folders[-1] / "img_emb", folders[-1] / "view_emb")
            for path in (folders[-1] / "view_emb").iterdir():
                path.rename(path.with_name(path.name.replace("img", "view")))
    with pytest.raises(
        UserError, match=r"/1 has .*iews.*, expected those of .*/0, Views\(count=2, seed=1, crops='c'\)"
    ):
        open_teachers(folders, index)


@pytest.mark.parametrize("recorded", [True, False], ids=["in meta.json", "not recorded"])
@pytest.mark.parametrize("missing", [({3}, ()), ({3, 10}, {3, 4}), ({3}, {22, 23})], ids=str)
def test_a_sample_that_any_teacher_lacks_is_left_out_from_the_start(
    tmp_path: Path, index: ShardIndex, missing: tuple[set[int], set[int]], recorded: bool
) -> None:
    meta = {} if recorded else {"failures_by_shard": None}
    teacher = open_teachers(
        [write_teacher(tmp_path / f"{n}", index, n, 2 + n, lacks, **meta) for n, lacks in enumerate(missing)], index
    )
    usable = sorted({*range(24)} - set().union(*missing))
    batches = stream(index, **ONE_EPOCH, total_steps=len(usable), teacher=teacher, error_budget=0.0)
    assert batches.statistics()["without_teacher"] == 24 - len(usable)
    seen = list(batches)
    assert sorted(s for batch in seen for s in batch.sample_id.tolist()) == usable
    assert not any(batch.failure or batch.replaced for batch in seen)


@pytest.mark.parametrize("kept", [False, True], ids=["all", "some kept"])
def test_a_run_joins_its_samples_once_and_a_second_run_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Else the streams of a start open every tar each: minutes, for which the watchdog does not wait."""
    index = write_shards(tmp_path / "shards")
    folders = [write_teacher(tmp_path / "a", index, 0, 2, {3, 10}), write_teacher(tmp_path / "b", index, 1, 3, {3, 20})]
    rows = {*range(24)}
    settings = ["data.augment=none", f"data.teacher={json.dumps([*map(str, folders)])}"]
    if kept:
        rows -= {1, 3}
        for name, start in zip(SIZES, (0, 9, 16)):
            save(tmp_path / "k" / "keep" / f"{name}.npy", np.array([start + n in rows for n in range(SIZES[name])]))
        write_meta(tmp_path / "k", "balance", {}, shards_digest=index.digest)
        settings.append(f"data.keep={tmp_path / 'k'}")
    usable, joined, join = rows - {3, 10, 20}, [], TeacherTable.join
    with monkeypatch.context() as patch:
        patch.setattr(TeacherTable, "join", lambda t, shard: joined.append((t.directory, shard)) or join(t, shard))
        for _ in range(2):
            data = data_of(run_file(tmp_path, *settings))
            for batches in (data.stream(0), data.stream(3), data.samples(Positions(7, 7, 1, 0, 1, 0, 1))):
                assert batches.statistics()["kept"] == len(usable)
    assert sorted(joined) == [(folder, shard) for folder in folders for shard in range(3)]
    assert {s for batch in data.stream(0) for s in batch.sample_id.tolist()} == usable


def test_balance_on_one_teacher_says_nothing_about_the_other(tmp_path: Path, index: ShardIndex) -> None:
    """A kept sample without an embedding of any teacher is left out, whichever it was balanced on."""
    folders = [write_teacher(tmp_path / "a", index, 0, 2, {1}), write_teacher(tmp_path / "b", index, 1, 3, {0, 9})]
    for name, start in zip(SIZES, (0, 9, 16)):
        save(tmp_path / "k" / "keep" / f"{name}.npy", np.arange(start, start + SIZES[name]) % 2 == 0)
    write_meta(tmp_path / "k", "balance", {"embeddings": str(folders[0])}, shards_digest=index.digest)
    keep, teacher = KeepTable(tmp_path / "k", index), open_teachers(folders, index)
    batches = stream(index, **ONE_EPOCH, total_steps=11, teacher=teacher, keep=keep, error_budget=0.0)
    assert sorted(s for batch in batches for s in batch.sample_id.tolist()) == list(range(2, 24, 2))
    own = {"embeddings": str(folders[1])}  # of the teacher that lacks sample 0, which is kept
    write_meta(tmp_path / "k", "balance", own, shards_digest=index.digest)
    batches = stream(index, **ONE_EPOCH, total_steps=1, teacher=teacher, keep=KeepTable(tmp_path / "k", index))
    statistics = batches.statistics()
    assert (statistics["kept"], statistics["without_teacher"]) == (11, 1)


def without_text(folder: Path) -> None:
    shutil.rmtree(folder / "text_emb")


def without_a_tar(folder: Path) -> None:
    (folder / "img_emb" / "img_emb_00001.npy").unlink()


def of_other_width(folder: Path) -> None:
    save(folder / "img_emb" / "img_emb_00000.npy", np.zeros((9, 4), np.float16))


def of_integers(folder: Path) -> None:
    save(folder / "img_emb" / "img_emb_00000.npy", np.zeros((9, 3), np.int16))


def of_fewer_rows(folder: Path) -> None:
    save(folder / "text_emb" / "text_emb_00000.npy", np.zeros((8, 3), np.float16))


def of_other_shards(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"shards_digest": "other"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_text, r"/b has no embeddings of captions \(text_emb/\), expected them as in .*/a: run tools/embed.py"),
        (without_a_tar, "/b has no embeddings of 1 shards .00001."),
        (of_other_shards, "/b was made from other shards"),
        (of_other_width, r"/b/img_emb/img_emb_00000.npy has shape \(9, 4\)"),
        (of_integers, "/b/img_emb/img_emb_00000.npy has shape .* of int16"),
        (of_fewer_rows, r"/b/text_emb/text_emb_00000.npy has shape \(8, 3\)"),
    ],
)
def test_what_does_not_fit_names_its_teacher(tmp_path: Path, index: ShardIndex, damage: Any, message: str) -> None:
    folders = [write_teacher(tmp_path / "a", index, 0, 2), write_teacher(tmp_path / "b", index, 1, 3)]
    damage(folders[1])
    with pytest.raises(UserError, match=message):
        teacher_rows(open_teachers(folders, index), 0, np.arange(9))


def test_a_wrong_count_of_skipped_samples_names_its_teacher(tmp_path: Path, index: ShardIndex) -> None:
    folders = [write_teacher(tmp_path / "a", index, 0, 2, {2}), write_teacher(tmp_path / "b", index, 1, 3, {3, 4})]
    meta = json.loads((folders[1] / "meta.json").read_text())
    (folders[1] / "meta.json").write_text(json.dumps(meta | {"failures_by_shard": {"00000": 1}}))
    with pytest.raises(
        UserError, match=r"/b/meta.json counts 1 samples of 00000\.tar without an embedding, its metadata 2"
    ):
        stream(index, teacher=open_teachers(folders, index))
