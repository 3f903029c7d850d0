from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pair_data import keep_dir, label_dir, make_tar, remove_joined, save, teacher_dir, teacher_rows, write_parquet

from megacid.data.index import ShardIndex, load_index
from megacid.data.joined import JoinSources
from megacid.data.joined_build import open_joined
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError

KEYS = {"00000": ["a", "b", "c"], "00001": ["d", "e"]}


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    (tmp_path / "shards").mkdir()
    for name, keys in KEYS.items():
        make_tar(tmp_path / "shards" / f"{name}.tar", keys)
    return load_index(tmp_path / "shards")


@pytest.mark.parametrize("pad", [1, 5])
def test_teacher_rows_are_joined_by_key(tmp_path: Path, index: ShardIndex, pad: int) -> None:
    table = TeacherTable(teacher_dir(tmp_path / "t", index.digest, pad=pad), index)
    image, text = teacher_rows(table, 0, np.array([2, 0]))
    assert image.dtype == np.float16 and image.tolist() == [[ord("c"), 1], [ord("a"), 1]]
    assert text is not None and text.tolist() == [[-ord("c"), -1], [-ord("a"), -1]]
    assert teacher_rows(table, 1, np.array([0]))[0].tolist() == [[ord("d"), 0]]
    assert table.dim == 2 and table.join(0).row_of.tolist() == [1, -1, 0]
    joined = open_joined(JoinSources(index, table))
    assert joined.counts.tolist() == [[2, 1], [2, 0]] and joined.tar(0)["row"].tolist() == [0, 2]


def test_teacher_without_texts_gives_none(tmp_path: Path, index: ShardIndex) -> None:
    table = TeacherTable(teacher_dir(tmp_path / "t", index.digest, text=False), index)
    assert not table.has_text and teacher_rows(table, 0, np.array([0]))[1] is None


def test_teacher_of_another_width_than_its_meta(tmp_path: Path, index: ShardIndex) -> None:
    table = TeacherTable(teacher_dir(tmp_path / "t", index.digest, width=3), index)
    with pytest.raises(UserError, match=r"shape \(2, 2\) of float16, expected \(2, 3\)"):
        table.join(0)


@pytest.mark.parametrize("folder", ["img_emb", "text_emb"])
@pytest.mark.parametrize("number", [0, 1])
def test_teacher_has_the_dtype_of_its_widest_shard(tmp_path: Path, index: ShardIndex, folder: str, number: int) -> None:
    """Ranks exchange embeddings in one dtype: none may have float32 where another has float16."""
    teacher = teacher_dir(tmp_path / "t", index.digest)
    assert open_joined(JoinSources(index, TeacherTable(teacher, index))).teacher_dtype == np.float16
    remove_joined(index)
    file = teacher / folder / f"{folder}_{number:05d}.npy"
    np.save(file, np.load(file).astype(np.float32))
    assert open_joined(JoinSources(index, TeacherTable(teacher, index))).teacher_dtype == np.float32


def test_teacher_without_a_shard_is_refused(tmp_path: Path, index: ShardIndex) -> None:
    folder = teacher_dir(tmp_path / "t", index.digest)
    (folder / "img_emb" / "img_emb_00000.npy").unlink()
    with pytest.raises(UserError, match=r"no embeddings of 1 shards \(00001\)"):
        TeacherTable(folder, index)


def test_labels_are_joined_by_key_and_missing_ones_are_minus_one(tmp_path: Path, index: ShardIndex) -> None:
    table = LabelTable(label_dir(tmp_path / "c", index.digest), index)
    assert table.num_classes == 10 and table.labels_per_sample == 1
    assert table.join(0).tolist() == [[3], [-1], [7]]
    assert table.join(1).tolist() == [[-1], [9]]
    assert table.join(0).dtype == np.int64


def test_several_labels_per_sample_keep_their_order(tmp_path: Path, index: ShardIndex) -> None:
    extra = {f"label_{i}": pa.array([i % 10, -1], pa.int32()) for i in (10, 2, 1)}
    table = LabelTable(label_dir(tmp_path / "c", index.digest, **extra), index)
    assert table.labels_per_sample == 4
    assert table.join(0)[[2, 1, 0]].tolist() == [[7, 1, 2, 0], [-1, -1, -1, -1], [3, -1, -1, -1]]
    nearest = LabelTable(tmp_path / "c", index, labels_per_sample=2)
    assert (nearest.labels_per_sample, nearest.stored) == (2, 4)
    with pytest.raises(UserError, match="has 4 labels per sample, expected 5"):
        LabelTable(tmp_path / "c", index, labels_per_sample=5)


def test_labels_beyond_the_number_of_classes_are_refused(tmp_path: Path, index: ShardIndex) -> None:
    with pytest.raises(UserError, match=r"label 7 for sample c, expected -1 .. 6"):
        LabelTable(label_dir(tmp_path / "c", index.digest, k=7), index)


def test_a_key_named_twice_is_refused(tmp_path: Path, index: ShardIndex) -> None:
    folder = label_dir(tmp_path / "c", index.digest)
    write_parquet(folder / "labels" / "00000.parquet", key=["a", "a"], label=pa.array([1, 2], pa.int32()))
    with pytest.raises(UserError, match=r"00000.parquet has more than one row for the key a, expected unique keys"):
        LabelTable(folder, index)


@pytest.mark.parametrize("content", [None, b"not parquet"])
def test_a_missing_or_damaged_label_file_is_named(tmp_path: Path, index: ShardIndex, content: bytes | None) -> None:
    folder = label_dir(tmp_path / "c", index.digest)
    path = folder / "labels" / "00001.parquet"
    path.unlink()
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"labels/00001.parquet (is missing|cannot be read)"):
        LabelTable(folder, index).join(1)


def test_kept_rows(tmp_path: Path, index: ShardIndex) -> None:
    table = KeepTable(keep_dir(tmp_path / "k", index.digest), index)
    assert table.counts.tolist() == [2, 0]
    assert table.kept(0).tolist() == [0, 2] and table.kept(1).tolist() == []


def test_keep_of_another_length_is_refused(tmp_path: Path, index: ShardIndex) -> None:
    folder = keep_dir(tmp_path / "k", index.digest)
    save(folder / "keep" / "00001.npy", np.array([True]))
    table = KeepTable(folder, index)
    assert table.kept(0).tolist() == [0, 2], "other masks are not read"
    for read in (lambda: table.counts, lambda: table.kept(1)):
        with pytest.raises(UserError, match=r"00001.npy"):
            read()


@pytest.mark.parametrize(
    "open_table,make",
    [(TeacherTable, teacher_dir), (LabelTable, label_dir), (KeepTable, keep_dir)],
    ids=["teacher", "labels", "keep"],
)
def test_tables_of_other_shards_are_refused_by_digest(tmp_path: Path, index: ShardIndex, open_table, make) -> None:
    folder = make(tmp_path / "stage", "f" * 64)
    with pytest.raises(UserError) as caught:
        open_table(folder, index)
    for part in (str(folder), str(index.root), "ffff", index.digest[:12]):
        assert part in str(caught.value)
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match=r"meta.json"):
        open_table(folder, index)
