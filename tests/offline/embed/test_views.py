"""Views: random crops that tools/embed.py embeds and the loader gives to the student again."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from distill_data import data_of, run_file, same
from faultplan import Fault, kill
from offline_data import embed_args, results, run, save_model, write_shards
from offline_tool import KILLED, Tool
from open_clip.transform import PreprocessCfg, image_transform_v2
from pair_data import teacher_rows
from PIL import Image
from torch import Tensor

from megacid.data.augmentation import Views
from megacid.data.batch import Batch
from megacid.data.index import load_index
from megacid.data.loader import PairStream
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError
from megacid.models.clip import LoadedClip, load_clip
from megacid.offline.embed.encoding import teacher_crops
from megacid.offline.embed.input import Pairs
from megacid.offline.rows import EmbeddingRows
from megacid.storage.stored_arrays import recorded_arrays

VIEWS, SEED = 3, 7
OPTIONS = ["--views", VIEWS, "--seed", SEED]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of 12 pictures, one of them damaged, a model, its embeddings with views (emb) and without (plain)."""
    folder = tmp_path_factory.mktemp("views")
    write_shards(folder / "shards")
    save_model(folder / "model", 0)
    for out, options in (("emb", OPTIONS), ("plain", [])):
        tool = Tool("embed", folder, out, folder / "log")
        assert tool.fates(1, more=options) == [0], tool.output
    return folder


@pytest.fixture(scope="module")
def clip(stage: Path) -> LoadedClip:
    return load_clip(f"local-dir:{stage / 'model'}")


# ---- tools/embed.py --------------------------------------------------------------------------------------------------


def test_views_change_no_byte_of_the_other_files(stage: Path) -> None:
    found, expected = results(stage / "emb"), results(stage / "plain")
    assert {name for name in found if name not in expected} == {f"view_emb/view_emb_0000{n}.npy" for n in range(3)}
    metadata = [f"metadata/metadata_0000{n}.parquet" for n in range(3)]
    changed = {name for name in expected if found[name] != expected[name]}
    assert changed == {"settings.json", "meta.json", *metadata}
    for name in metadata:
        tables = [pq.read_table(stage / folder / name) for folder in ("emb", "plain")]
        assert tables[0].equals(tables[1])
        views, plain = (recorded_arrays(table, name, "") for table in tables)
        assert views.keys() - plain.keys() == {"view_emb"} and views.items() >= plain.items()
    meta, plain = found["meta.json"], expected["meta.json"]
    assert isinstance(meta, dict) and isinstance(plain, dict)
    assert meta.pop("views").items() >= {"count": VIEWS, "seed": SEED}.items() and meta == plain
    assert EmbeddingRows(stage / "emb").num_rows == 35  # what cluster and balance read


def test_a_row_is_the_embedding_of_its_seeded_crop_by_open_clip(stage: Path, clip: LoadedClip) -> None:
    rows, keys = np.load(stage / "emb" / "view_emb" / "view_emb_00001.npy"), EmbeddingRows(stage / "emb").keys(1)
    assert rows.shape == (11 * VIEWS, 32) and rows.dtype == np.float16  # one picture is damaged
    crop = image_transform_v2(PreprocessCfg(**clip.model.visual.preprocess_cfg), is_train=True)  # type: ignore[arg-type, union-attr]
    views, seen = Views(VIEWS, SEED, ""), set()
    with tarfile.open(stage / "shards" / "00001.tar") as tar:
        for row in (0, 5, 10):
            data = tar.extractfile(f"{keys[row]}.png").read()  # type: ignore[union-attr]
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            for view in range(VIEWS):
                torch.manual_seed(views.seed_of(keys[row], view))
                pixels = crop(picture)
                seen.add(pixels.numpy().tobytes())
                expected = clip.encode_image(pixels[None])[0]
                found = torch.from_numpy(rows[row * VIEWS + view]).float()
                torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("world", "fault"),
    [
        (2, kill("embed:views_written", rank=1)),
        pytest.param(1, kill("embed:views_written", step=1), marks=pytest.mark.slow),
        pytest.param(1, kill("embed:text_written", step=2), marks=pytest.mark.slow),
    ],
    ids=["one of two ranks", "after the views", "before the views"],
)
def test_a_killed_tool_gives_the_same_bytes_on_one_and_two_ranks(stage: Path, world: int, fault: Fault) -> None:
    tool = Tool("embed", stage, f"again-{len(list(stage.iterdir()))}", stage / "log")
    assert KILLED in tool.fates(world, fault, more=OPTIONS), tool.output
    assert tool.fates(world, more=OPTIONS) == [0] * world, tool.output
    tool.equals(stage / "emb")


@pytest.fixture
def emb(stage: Path, tmp_path: Path) -> Path:
    """A copy of the embeddings that may be changed."""
    shutil.copytree(stage / "emb", tmp_path / "emb")
    return tmp_path / "emb"


def test_damaged_views_of_one_tar_are_embedded_again(stage: Path, emb: Path) -> None:
    before, path = results(emb), emb / "view_emb" / "view_emb_00002.npy"
    whole = np.load(path)
    for spoil in (path.unlink, lambda: np.save(path, whole[:-1])):
        spoil()
        with pytest.raises(UserError, match=r"view_emb_00002|no embeddings of 1 shards \(00002\)"):
            TeacherTable(emb, load_index(stage / "shards")).join(2)
        assert "1 of 3 shards to do, 12 samples" in run("embed", *embed_args(stage, str(emb)), *OPTIONS)
        assert results(emb) == before


@pytest.mark.parametrize("options", [[], ["--views", 2, "--seed", SEED], ["--views", VIEWS]], ids=str)
def test_one_output_is_not_continued_with_other_views(stage: Path, emb: Path, options: list[object]) -> None:
    before = results(emb)
    assert "was made with views" in run("embed", *embed_args(stage, str(emb)), *options, expect=2)
    assert results(emb) == before


def test_the_disk_has_to_hold_the_views_too(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=15_000))
    args = embed_args(stage, str(tmp_path / "emb"))
    assert f"error: {tmp_path / 'emb'} needs" in run("embed", *args, *OPTIONS, expect=2)
    assert not list(tmp_path.rglob("*.npy"))
    assert "36 samples, 0.000 GB to write" in run("embed", *embed_args(stage, str(tmp_path / "plain")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--views", 2, "--adopt", "x"], "--views is 2, but --adopt computes no embedding: leave it out"),
        (["--seed", 2], "--seed is 2, expected only with --views: leave it out"),
        (["--views", -1], "--views is -1, expected a whole number, 0 or more"),
    ],
)
def test_options_of_views_that_have_no_effect_are_refused(
    stage: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    assert f"error: {message}" in run("embed", *embed_args(stage, str(tmp_path / "new")), *options, expect=2)
    assert not (tmp_path / "new").exists()


# ---- training --------------------------------------------------------------------------------------------------------


def crops_of_the_teacher(stage: Path, clip: LoadedClip) -> dict[int, Tensor]:
    """uint8 [views, 3, H, W] by sample number, as tools/embed.py cuts them."""
    index = load_index(stage / "shards")
    crops = teacher_crops(f"local-dir:{stage / 'model'}", None, VIEWS, SEED)
    dataset = Pairs(index, clip.preprocess_eval, clip.tokenizer, crops)
    found = {}
    for shard in range(3):
        batch = dataset.__getitems__(list(range(12 * shard, 12 * shard + 12)))
        assert batch.views is not None
        found |= {12 * shard + row: batch.views[:, at] for at, row in enumerate(batch.rows)}
    return found


def drawn(batch: Batch, crops: dict[int, Tensor]) -> Iterator[tuple[int, int]]:
    """(sample, view) of each image of a batch, by its pixels; the first view of equal ones."""
    for number, image in zip(batch.sample_id.tolist(), batch.image):
        yield number, next(view for view in range(VIEWS) if image.equal(crops[number][view]))


def test_the_student_sees_the_pixels_that_the_teacher_has_embedded(stage: Path, clip: LoadedClip) -> None:
    run, crops = run_file(stage), crops_of_the_teacher(stage, clip)
    assert (
        len({crop.numpy().tobytes() for image in crops.values() for crop in image}) > 70
    )  # of 35 x 3, many are copies
    data = data_of(run)
    rows = EmbeddingRows(stage / "emb")
    stored = np.concatenate([np.load(stage / "emb" / "view_emb" / f"view_emb_0000{n}.npy") for n in range(3)])
    keys = [key for shard in range(3) for key in rows.keys(shard)]
    row_of = {12 * int(key[:5]) + int(key[5:]): at for at, key in enumerate(keys)}
    counts = np.zeros((36, VIEWS), int)
    for batch in data.stream(0):
        assert batch.replaced == () and batch.teacher_image is not None and data.normalize is not None
        for at, (number, view) in enumerate(drawn(batch, crops)):
            counts[number, view] += 1
            assert np.array_equal(batch.teacher_image[at].numpy(), stored[row_of[number] * VIEWS + view])
        # Independent of how the rows are ordered: the teacher's embedding of the pixels is that of the batch.
        again = clip.encode_image(data.normalize(batch.image))
        torch.testing.assert_close(again, batch.teacher_image.float(), atol=1e-3, rtol=0)
    assert counts.sum() == 84 and (counts.sum(axis=0) > 15).all() and (counts > 0).sum(axis=1).max() > 1


@pytest.mark.parametrize("settings", [("data.workers=2",), ("train_micro_batch_size_per_gpu=1", "data.prefetch=null")])
def test_views_do_not_depend_on_workers_or_micro_batches_and_resuming_draws_the_same(
    stage: Path, settings: tuple[str, ...]
) -> None:
    whole = list(data_of(run_file(stage)).stream(0))
    other = list(data_of(run_file(stage, *settings)).stream(4))
    micro = len(other) // 8
    joined = [
        replace(batch, **{
            name: torch.cat([getattr(part, name) for part in other[micro * at : micro * (at + 1)]])
            for name in ("image", "text", "sample_id", "teacher_image", "teacher_text")
        })
        for at, batch in enumerate(whole[4:])
    ]  # fmt: skip
    assert len(whole) == 12 and all(same(a, b) for a, b in zip(whole[4:], joined, strict=True))


def test_another_seed_of_the_run_draws_other_views_of_the_same_crops(stage: Path, clip: LoadedClip) -> None:
    crops = crops_of_the_teacher(stage, clip)
    draws = []
    for seed in (3, 4):
        batches = data_of(run_file(stage, f"run.seed={seed}")).stream(0)
        assert isinstance(batches, PairStream)
        draws.append([pair for batch in batches for pair in drawn(batch, crops)])
    assert sorted(draws[0]) != sorted(draws[1])


def test_a_run_that_would_crop_otherwise_is_refused_before_data_are_read(stage: Path, emb: Path) -> None:
    settings = f"data.shards={stage / 'nothing'}", f"data.teacher={emb}"
    with pytest.raises(UserError, match=r'data.augment" is "none", expected "random_resized_crop", since .*emb has'):
        data_of(run_file(stage, *settings, "data.augment=none"))
    meta = json.loads((emb / "meta.json").read_text())
    for views, message in (
        (meta["views"] | {"crops": "0123456789abcdef"}, r"other crops \(digest 0123456789abcdef\) than this install"),
        (meta["views"] | {"count": 0}, r"meta.json has views .*, expected count \(1 or more\), seed and crops"),
        (meta["views"] | {"more": 1}, "meta.json has views"),
        ([VIEWS], r"meta.json has views '\[3\]'"),
    ):
        (emb / "meta.json").write_text(json.dumps(meta | {"views": views}))
        with pytest.raises(UserError, match=message):
            data_of(run_file(stage, *settings))


def test_tables_without_views_ignore_the_view(stage: Path) -> None:
    index = load_index(stage / "shards")
    plain, rows, drawn = TeacherTable(stage / "plain", index), np.arange(3), np.array([[2, 0], [1, 0], [0, 0]])
    assert plain.views is None
    found: Any = teacher_rows(plain, 0, rows, drawn)[0]
    assert np.array_equal(found, np.load(stage / "plain" / "img_emb" / "img_emb_00000.npy")[:3])
    with_views = TeacherTable(stage / "emb", index)
    stored = np.load(stage / "emb" / "view_emb" / "view_emb_00000.npy")
    assert np.array_equal(teacher_rows(with_views, 0, rows, drawn)[0], stored[[2, 4, 6]])
