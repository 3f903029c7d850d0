"""tools/embed.py --adopt: clip-retrieval and DataComp folders become teacher folders, or are refused."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faultplan import kill
from offline_data import balance_args, cluster_args, results, run, write_shards
from offline_tool import KILLED, Tool
from pair_data import teacher_rows
from pair_data import write_shards as write_pairs

from megacid.data.index import load_index
from megacid.data.teacher_table import TeacherTable
from megacid.offline.rows import EmbeddingRows
from megacid.storage.metadata import read_meta

KEYS = [f"{shard:05d}{row:04d}" for shard in range(3) for row in range(12)]
DIM = 16


def embeddings(seed: int, rows: int = len(KEYS)) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, DIM))
    x[2::3] = x[1::3] + 1e-3  # as the pictures of write_shards: every third one is a copy
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


IMAGE, TEXT = embeddings(1), embeddings(2)
OTHER_KEYS = [f"99999{row:04d}" for row in range(4)]


def clip_retrieval(
    folder: Path, *, name: str = "image_path", image: np.ndarray = IMAGE, text: np.ndarray = TEXT
) -> Path:
    """Two parts in another order than the tars, with four rows of samples that are in no tar."""
    keys = np.array(KEYS + OTHER_KEYS)
    order = np.random.default_rng(3).permutation(len(keys))
    for part, rows in enumerate(np.split(order, [25])):
        for kind, x in (("img_emb", image), ("text_emb", text)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            np.save(folder / kind / f"{kind}_{part}.npy", np.concatenate([x, x[:4]])[rows])
        (folder / "metadata").mkdir(exist_ok=True)
        table = {name: keys[rows].tolist(), "caption": [f"caption of {key}" for key in keys[rows]]}
        pq.write_table(pa.table(table), folder / "metadata" / f"metadata_{part}.parquet")
    return folder


def datacomp(folder: Path, *, key: str = "key", compressed: bool = False) -> Path:
    """One .npz and one .parquet per tar, with two models' embeddings, in reversed order."""
    folder.mkdir(parents=True)
    for shard in range(3):
        rows = np.arange(12 * shard, 12 * shard + 12)[::-1]
        arrays = {"l14_img": IMAGE[rows], "l14_txt": TEXT[rows], "b32_img": TEXT[rows], "b32_txt": IMAGE[rows]}
        (np.savez_compressed if compressed else np.savez)(folder / f"{shard:05d}.npz", **arrays)
        names = [KEYS[row] for row in rows]
        values = names if key == "key" else [hashlib.md5(name.encode()).hexdigest() for name in names]
        pq.write_table(pa.table({key: values, "text": names}), folder / f"{shard:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adopt")
    write_shards(folder / "shards")
    clip_retrieval(folder / "foreign")
    run("embed", *adopt_args(folder, folder / "foreign", "emb"))
    return folder


def adopt_args(stage: Path, foreign: Path, out: str, *rest: object) -> list[object]:
    return ["--shards", stage / "shards", "--out", stage / out, "--model", "ViT-L-14", "--adopt", foreign, *rest]


def embedded(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(image, text) of all samples in the order of KEYS."""
    image, text = EmbeddingRows(folder), EmbeddingRows(folder, "text")
    assert [key for partition in range(3) for key in image.keys(partition)] == KEYS
    return image.read(0, len(KEYS)), text.read(0, len(KEYS))


def test_adopted_clip_retrieval_folder_is_a_teacher_folder(stage: Path) -> None:
    image, text = embedded(stage / "emb")
    # Rows of length 1 keep their bits.
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(text, TEXT)
    meta = read_meta(stage / "emb", expect="embed")
    assert (meta["dim"], meta["num_samples"], meta["model"], meta["precision"]) == (DIM, 36, "ViT-L-14", "fp16")
    assert meta["adopted"] == {"rows": 40, "surplus": 4, "key": "image_path"} and meta["failures"]["count"] == 0
    assert meta["source"] == {"shards": str(stage / "shards"), "adopted": str(stage / "foreign")}
    metadata = pq.read_table(stage / "emb" / "metadata" / "metadata_00001.parquet")
    assert metadata["caption"].to_pylist() == [f"caption of {key}" for key in KEYS[12:24]]
    table = TeacherTable(stage / "emb", load_index(stage / "shards"))
    np.testing.assert_array_equal(teacher_rows(table, 2, np.array([3, 0]))[1], TEXT[[27, 24]])


def test_imported_clip_retrieval_embeddings_join_by_key(tmp_path: Path) -> None:
    """Partitions that do not follow the tars, rows in another order, a stranger's row, and a sample without one."""
    index = write_pairs(tmp_path / "shards", sizes={"00000": 9, "00001": 7, "00002": 12})
    keys = [key for number in range(len(index.names)) for key in index.table(number).keys]
    order = np.random.default_rng(0).permutation(len(keys))[1:]  # one sample has no embedding
    names = [keys[row] for row in order] + ["stranger"]
    vectors = np.concatenate([np.eye(32, dtype=np.float16)[order], np.ones((1, 32), np.float16)])
    for folder in ("img_emb", "text_emb", "metadata"):
        (tmp_path / "old" / folder).mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(names)), 2)):
        np.save(tmp_path / "old" / "img_emb" / f"img_emb_{number}.npy", vectors[part])
        np.save(tmp_path / "old" / "text_emb" / f"text_emb_{number}.npy", -vectors[part])
        table = {"image_path": [names[i] for i in part], "caption": [f"caption {i}" for i in part]}
        pq.write_table(pa.table(table), tmp_path / "old" / "metadata" / f"metadata_{number}.parquet")

    run("embed", *adopt_args(tmp_path, tmp_path / "old", "teacher"))
    assert read_meta(tmp_path / "teacher")["failures"]["count"] == 1

    teacher, checked = TeacherTable(tmp_path / "teacher", index), 0
    for shard in range(len(index.names)):
        rows = np.flatnonzero(teacher.join(shard).row_of >= 0)
        image, text = teacher_rows(teacher, shard, rows)
        assert text is not None
        assert image.argmax(1).tolist() == (index.starts[shard] + rows).tolist()
        np.testing.assert_array_equal(text, -image)
        checked += len(rows)
    assert checked == len(keys) - 1
    assert EmbeddingRows(tmp_path / "teacher").num_rows == len(keys) - 1


def test_adopt_then_cluster_then_balance(stage: Path) -> None:
    run("cluster", *cluster_args(stage))
    output = run("balance", *balance_args(stage, "balance", "--threshold", 0.05, "--gallery-groups", 0))
    assert "24 of 36 samples kept" in output
    keep = np.concatenate([np.load(path) for path in sorted((stage / "balance" / "keep").iterdir())])
    assert keep.reshape(12, 3)[:, 0].all() and (keep.reshape(12, 3)[:, 1:].sum(1) == 1).all()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("key", ["key", "uid"])
def test_datacomp_folder_by_key_or_by_the_uid_of_the_json_member(stage: Path, key: str, compressed: bool) -> None:
    out = f"datacomp-{key}-{compressed}"
    foreign = datacomp(stage / f"{out}-foreign", key=key, compressed=compressed)
    assert "b32_txt" in run("embed", *adopt_args(stage, foreign, out), expect=2)
    run("embed", *adopt_args(stage, foreign, out, "--arrays", "l14"))
    for got, expected in zip(embedded(stage / out), (IMAGE, TEXT)):
        np.testing.assert_array_equal(got, expected)
    captions = pq.read_table(stage / out / "metadata" / "metadata_00002.parquet")["caption"].to_pylist()
    assert captions == KEYS[24:]


def test_keys_that_repeat_between_tars_are_joined_inside_of_theirs(stage: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    for shard in range(3):  # the same keys in every tar
        tar = tmp_path / "shards" / f"{shard:05d}.tar"
        tar.write_bytes((tmp_path / "shards" / "00000.tar").read_bytes())
    foreign = datacomp(tmp_path / "foreign")
    for shard in range(3):
        table = pa.table({"key": KEYS[:12][::-1]})
        pq.write_table(table, foreign / f"{shard:05d}.parquet")
    run("embed", *adopt_args(tmp_path, foreign, "emb", "--arrays", "l14"))
    np.testing.assert_array_equal(EmbeddingRows(tmp_path / "emb").read(0, 36), IMAGE)
    clip_retrieval(tmp_path / "other")
    assert "belong to several samples" in run("embed", *adopt_args(tmp_path, tmp_path / "other", "x"), expect=2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_embeddings_of_any_length_are_normalised(stage: Path, dtype: type) -> None:
    name = f"length-{dtype.__name__}"
    long = (IMAGE.astype(np.float64) * 30).astype(dtype)
    clip_retrieval(stage / f"{name}-foreign", image=long, text=TEXT.astype(dtype))
    assert "36 embeddings of" in run("embed", *adopt_args(stage, stage / f"{name}-foreign", name))
    image, text = embedded(stage / name)
    exact = long.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_array_equal(image, exact.astype(np.float16))
    np.testing.assert_array_equal(text, TEXT)
    assert read_meta(stage / name)["precision"] == f"fp{8 * np.dtype(dtype).itemsize}"


def test_an_interrupted_adoption_continues_with_the_same_files_on_any_number_of_ranks(
    stage: Path, tmp_path: Path
) -> None:
    tool = Tool("embed", stage, "killed", tmp_path / "log")
    tool.args = adopt_args(stage, stage / "foreign", "killed")
    assert tool.fates(1, kill("adopt:partition", step=1)) == [KILLED]
    assert not (tool.out / "meta.json").exists() and len(list((tool.out / "img_emb").iterdir())) == 2
    assert tool.fates(2) == [0, 0], tool.output
    tool.equals(stage / "emb")
    before = results(stage / "emb")
    run("embed", *adopt_args(stage, stage / "foreign", "emb"))  # a finished one is kept
    assert results(stage / "emb") == before


def test_another_folder_does_not_continue_a_started_one(stage: Path) -> None:
    before = results(stage / "emb")
    other = clip_retrieval(stage / "swapped", image=TEXT, text=IMAGE)
    assert "was made with weights" in run("embed", *adopt_args(stage, other, "emb"), expect=2)
    assert results(stage / "emb") == before


# ---- missing and surplus samples ---------------------------------------------------------------------------------


def without(folder: Path, keys: list[str]) -> Path:
    """clip-retrieval's folder without the rows of some keys."""
    clip_retrieval(folder)
    for part in range(2):
        path = folder / "metadata" / f"metadata_{part}.parquet"
        table = pq.read_table(path)
        rows = np.flatnonzero([key not in keys for key in table["image_path"].to_pylist()])
        pq.write_table(table.take(rows), path)
        for kind in ("img_emb", "text_emb"):
            array = folder / kind / f"{kind}_{part}.npy"
            np.save(array, np.load(array)[rows])
    return folder


def test_up_to_5_percent_missing_samples_are_counted_and_named(stage: Path) -> None:
    output = run("embed", *adopt_args(stage, without(stage / "one_less", KEYS[13:14]), "one"))
    assert "35 samples embedded, 1 skipped" in output and "39 rows of" in output and "4 of them in no tar" in output
    assert f"skipped: 00001/{KEYS[13]}" in output
    failures = pq.read_table(stage / "one" / "failures" / "failures_00001.parquet")
    assert failures.to_pylist() == [{"shard": "00001", "key": KEYS[13], "reason": "no embedding in the adopted folder"}]
    assert TeacherTable(stage / "one", load_index(stage / "shards")).failures(1) == 1


def test_more_missing_samples_are_refused_before_anything_is_written(stage: Path) -> None:
    foreign = without(stage / "two_less", KEYS[13:15])
    output = run("embed", *adopt_args(stage, foreign, "two"), expect=2)
    assert "2 of 36 samples" in output and "have no embedding" in output and "5%" in output
    assert not (stage / "two").exists()
    assert "34 samples embedded, 2 skipped" in run("embed", *adopt_args(stage, foreign, "two", "--max-lost", 0.1))


# ---- what does not fit -------------------------------------------------------------------------------------------


def replaced(path: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / path, array)


def edited(path: str, edit: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        array = np.load(folder / path)
        edit(array)
        np.save(folder / path, array)

    return change


def table(path: str, **columns: list[object]) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table(columns), folder / path)


def pickled(folder: Path) -> None:
    np.save(folder / "img_emb" / "img_emb_0.npy", np.array([Bomb()] * 25, object), allow_pickle=True)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was run",))


META0 = "metadata/metadata_0.parquet"


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (table(META0, image_path=[f"k{i}" for i in range(25)]), "samples"),
        (table(META0, image_path=["same"] * 25), "24 keys more than once, such as same (row 0 of metadata_0.parquet)"),
        (table(META0, image_path=list(range(25))), "column image_path of type int64, expected strings"),
        (table(META0, image_path=["a", None] * 12 + ["b"]), "has no image_path in row 1"),
        (table(META0, name=["x"] * 25), "has the columns name, expected one of key, image_path, uid"),
        (table(META0, image_path=["x"] * 24), "of shape (25, 16), expected floating point and (24, width)"),
        (lambda folder: (folder / META0).write_bytes(b"PAR1"), "cannot be read"),
        (lambda folder: (folder / META0).unlink(), "lacks part 0"),
        (lambda folder: shutil.rmtree(folder / "text_emb"), "has no text_emb/text_emb_*.npy"),
        (lambda folder: (folder / "text_emb" / "text_emb_1.npy").unlink(), "text_emb lacks part 1"),
        (lambda folder: shutil.rmtree(folder / "img_emb"), "has no img_emb/ and no *.npz"),
        (replaced("text_emb/text_emb_0.npy", np.ones((25, 8), np.float16)), "images of width 16 and texts of width 8"),
        (replaced("img_emb/img_emb_1.npy", np.ones((15, 16), np.float32)), "expected float16 of width 16 as in part 0"),
        (replaced("img_emb/img_emb_0.npy", np.ones((25, 16), np.int8)), "is int8 of shape (25, 16)"),
        (replaced("img_emb/img_emb_0.npy", np.ones(25 * 16, np.float16)), "of shape (400,)"),
        (replaced("img_emb/img_emb_0.npy", np.ones((25, 0), np.float16)), "width 0"),
        (edited("img_emb/img_emb_0.npy", lambda x: x[3].fill(0)), "img_emb_0.npy (img) is zero"),
        (edited("text_emb/text_emb_0.npy", lambda x: x[0].fill(np.nan)), "text_emb_0.npy (txt) holds NaN"),
        (edited("text_emb/text_emb_0.npy", lambda x: x[0].fill(np.inf)), "holds NaN or infinity"),
        (pickled, "img_emb_0.npy is not a readable .npy array"),
        (lambda folder: (folder / "img_emb" / "img_emb_0.npy").write_bytes(pickle.dumps([1])), "not a readable .npy"),
    ],
)
def test_clip_retrieval_folder_that_does_not_fit(
    stage: Path, tmp_path: Path, break_it: Callable[[Path], object], problem: str
) -> None:
    foreign = clip_retrieval(tmp_path / "foreign")
    break_it(foreign)
    output = run("embed", *adopt_args(stage, foreign, str(tmp_path / "out")), expect=2)
    assert problem in output and "Traceback" not in output, output
    assert not (tmp_path / "out" / "meta.json").exists()


def npz(**arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / "00000.npz", **arrays)


def lying_npz(folder: Path) -> None:
    """A header that promises 2^40 rows."""
    with zipfile.ZipFile(folder / "00000.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("l14_img", "l14_txt"):
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": "<f2", "fortran_order": False, "shape": (2**40, DIM)}
                np.lib.format.write_array_header_1_0(file, header)


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (npz(l14_img=IMAGE[:12]), "has the arrays l14_img, expected l14_txt"),
        (npz(l14_img=IMAGE[:11], l14_txt=TEXT[:11]), "of shape (11, 16), expected floating point and (12, width)"),
        (npz(l14_img=IMAGE[:12], l14_txt=TEXT[:12, :8]), "images of width 16 and texts of width 8"),
        (npz(l14_img=np.array([Bomb()] * 12, object), l14_txt=TEXT[:12]), "holds pickled objects"),
        (lying_npz, "needs 35184372088832 bytes, has 0"),
        (lambda folder: (folder / "00000.npz").write_bytes(b"PK"), "is not a readable .npz archive"),
        (lambda folder: (folder / "00000.parquet").unlink(), "00000.parquet is missing, expected it next to 00000.npz"),
    ],
)
def test_datacomp_folder_that_does_not_fit(
    stage: Path, tmp_path: Path, break_it: Callable[[Path], object], problem: str
) -> None:
    foreign = datacomp(tmp_path / "foreign")
    break_it(foreign)
    output = run("embed", *adopt_args(stage, foreign, str(tmp_path / "out"), "--arrays", "l14"), expect=2)
    assert problem in output and "Traceback" not in output, output
    assert not (tmp_path / "out").exists()


def test_parts_of_clip_retrieval_are_no_tars_though_their_numbers_are_names_of_tars(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    for shard in range(3):
        (tmp_path / "shards" / f"{shard:05d}.tar").rename(tmp_path / "shards" / f"{shard}.tar")
    clip_retrieval(tmp_path / "foreign")
    run("embed", *adopt_args(tmp_path, tmp_path / "foreign", "emb"))
    np.testing.assert_array_equal(EmbeddingRows(tmp_path / "emb").read(0, 36), IMAGE)


def test_a_folder_without_rows_is_refused(stage: Path, tmp_path: Path) -> None:
    foreign = without(tmp_path / "foreign", KEYS + OTHER_KEYS)
    assert "has no rows in its 2 parts" in run("embed", *adopt_args(stage, foreign, "never"), expect=2)
    assert not (stage / "never").exists()


def test_embeddings_of_other_shards_and_a_wrong_option_are_refused(stage: Path, tmp_path: Path) -> None:
    foreign = clip_retrieval(tmp_path / "foreign")
    for part, rows in enumerate((25, 15)):
        table(f"metadata/metadata_{part}.parquet", image_path=[f"o{part}-{row}" for row in range(rows)])(foreign)
    output = run("embed", *adopt_args(stage, foreign, "never"), expect=2)
    assert "none of the 40 samples" in output and "such as o0-0" in output and f"such as {KEYS[0]}" in output
    assert "--arrays is l14" in run("embed", *adopt_args(stage, foreign, "never", "--arrays", "l14"), expect=2)
    assert "--precision is bf16" in run("embed", *adopt_args(stage, foreign, "never", "--precision", "bf16"), expect=2)
    alone = ["--shards", stage / "shards", "--out", stage / "never", "--model", "m", "--arrays", "l14"]
    assert "--arrays is l14, expected only with --adopt" in run("embed", *alone, expect=2)
    assert not (stage / "never").exists()


def test_ranks_fail_together_over_one_bad_row(stage: Path, tmp_path: Path) -> None:
    foreign = clip_retrieval(tmp_path / "foreign")
    edited("img_emb/img_emb_0.npy", lambda x: x[3].fill(0))(foreign)
    tool = Tool("embed", stage, "bad", tmp_path / "log")
    tool.args = adopt_args(stage, foreign, "bad")
    assert tool.fates(2) == [2, 2] and all("is zero" in output for output in tool.output)
