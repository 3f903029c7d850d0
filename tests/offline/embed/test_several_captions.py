"""Several captions per sample: every one is embedded, and the loader draws one of them, together with a view."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distill_data import data_of, run_file, same
from faultplan import kill
from offline_data import balance_args, cluster_args, embed_args, results, rewrite, run, save_model, write_shards
from offline_tool import KILLED, Tool

from megacid.data.batch import Batch
from megacid.data.index import ShardReader, load_index
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError
from megacid.models.clip import LoadedClip, load_clip
from megacid.training.open_data import Data

SOURCE = "json:texts.all.*"
OPTIONS = ["--caption", SOURCE, "--views", 2]
SETTING = f"data.caption={SOURCE}"
WITHOUT = "000020003"  # has a list without a caption


def captions_of(key: str) -> list[str]:
    """The captions of a sample of `write_shards`: 1 to 3, all different."""
    return [f"text {number} of picture {key}" for number in range(1 + int(key) % 3)] if key != WITHOUT else []


def with_list(name: str, data: bytes) -> tuple[str, bytes]:
    """A member of `write_shards`, whose json gets a list of captions with missing ones in between."""
    if not name.endswith(".json"):
        return name, data
    texts = [None, *captions_of(name[:9]), "", "nan"]
    return name, json.dumps({**json.loads(data), "texts": {"all": texts}}).encode()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a model, and its embeddings with two views and all captions."""
    folder = tmp_path_factory.mktemp("captions")
    write_shards(folder / "shards")
    for tar in (folder / "shards").glob("*.tar"):
        rewrite(tar, with_list)
    save_model(folder / "model", 0)
    tool = Tool("embed", folder, "emb", folder / "log")
    assert tool.fates(1, more=OPTIONS) == [0], tool.output
    return folder


@pytest.fixture(scope="module")
def clip(stage: Path) -> LoadedClip:
    return load_clip(f"local-dir:{stage / 'model'}")


@pytest.fixture
def emb(stage: Path, tmp_path: Path) -> Path:
    """A copy of the embeddings that may be changed."""
    shutil.copytree(stage / "emb", tmp_path / "emb")
    return tmp_path / "emb"


def check_rows(batch: Batch, data: Data, clip: LoadedClip) -> None:
    """The teacher's rows are what it makes of the images and captions of the batch."""
    assert batch.replaced == () and data.normalize is not None
    assert batch.teacher_image is not None and batch.teacher_text is not None
    image, text = clip.encode_image(data.normalize(batch.image)), clip.encode_text(batch.text)
    torch.testing.assert_close(image, batch.teacher_image.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(text, batch.teacher_text.float(), atol=1e-3, rtol=0)


# ---- tools/embed.py --------------------------------------------------------------------------------------------------


def test_every_caption_of_the_list_has_its_embedding(stage: Path, clip: LoadedClip) -> None:
    table = pq.read_table(stage / "emb" / "metadata" / "metadata_00001.parquet")
    assert table.column_names == ["image_path", "caption", "shard", "key", "uid", "url", "captions"]
    keys = table["image_path"].to_pylist()
    assert len(keys) == 11 and table["captions"].to_pylist() == [len(captions_of(key)) for key in keys]
    assert table["caption"].to_pylist() == [captions_of(key)[0] for key in keys]
    texts = [text for key in keys for text in captions_of(key)]
    found = np.load(stage / "emb" / "caption_emb" / "caption_emb_00001.npy")
    assert found.dtype == np.float16 and found.shape == (len(texts), 32)
    expected = torch.cat([clip.encode_text(clip.tokenizer([text])) for text in texts])
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, atol=1e-3, rtol=0)
    first = [texts.index(captions_of(key)[0]) for key in keys]
    assert np.array_equal(np.load(stage / "emb" / "text_emb" / "text_emb_00001.npy"), found[first])


def test_a_sample_whose_list_has_no_caption_is_left_out_by_the_index(stage: Path) -> None:
    index = load_index(stage / "shards", caption=SOURCE)
    assert index.sizes.tolist() == [12, 12, 11] and index.dropped == {"blank caption": 1}
    reader = ShardReader(index)
    for shard in range(3):
        for row, key in enumerate(index.table(shard).keys):
            assert reader.captions(shard, row) == captions_of(key)
            assert reader.caption(shard, row) == captions_of(key)[0]


@pytest.mark.slow
def test_a_killed_tool_on_two_ranks_gives_the_same_bytes(stage: Path) -> None:
    tool = Tool("embed", stage, "again", stage / "log")
    assert KILLED in tool.fates(2, kill("embed:captions_written", rank=1), more=OPTIONS), tool.output
    assert tool.fates(2, more=OPTIONS) == [0, 0], tool.output
    tool.equals(stage / "emb")


def test_damaged_captions_of_one_tar_are_embedded_again(stage: Path, emb: Path) -> None:
    before, path = results(emb), emb / "caption_emb" / "caption_emb_00002.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(UserError, match=r"caption_emb_00002\.npy has shape"):
        TeacherTable(emb, load_index(stage / "shards", caption=SOURCE)).join(2)
    assert "1 of 3 shards to do" in run("embed", *embed_args(stage, str(emb)), *OPTIONS)
    assert results(emb) == before


@pytest.mark.parametrize("counts", [[0] * 11, [-1] * 11, [None] * 11, ["1"] * 11, [2**40] * 11], ids=str)
def test_counts_of_captions_that_are_none_are_one_line(stage: Path, emb: Path, counts: list[object]) -> None:
    path = emb / "metadata" / "metadata_00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(6, "captions", pa.array(counts)), path)
    with pytest.raises(UserError, match=r"metadata_00001.parquet has the column captions with values other than") as e:
        TeacherTable(emb, load_index(stage / "shards", caption=SOURCE)).join(1)
    assert "\n" not in str(e.value)


def test_the_disk_has_to_hold_all_captions(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=15_000))
    output = run("embed", *embed_args(stage, str(tmp_path / "emb")), "--caption", SOURCE, expect=2)
    assert f"error: {tmp_path / 'emb'} needs" in output and not list(tmp_path.rglob("*.npy"))


def test_adopting_one_text_embedding_for_several_captions_is_refused(stage: Path, tmp_path: Path) -> None:
    args = embed_args(stage, str(tmp_path / "new"))
    output = run("embed", *args, "--caption", SOURCE, "--adopt", stage / "emb", expect=2)
    assert f"error: --caption is {SOURCE}, but --adopt takes one text embedding per sample: name one caption" in output
    assert not (tmp_path / "new").exists()


def test_cluster_and_balance_use_whole_images_and_first_captions(stage: Path, clip: LoadedClip) -> None:
    run("cluster", *cluster_args(stage))
    copy = stage / "kept"
    run("balance", *balance_args(stage, "balance", "--threshold", 0.003, "--keep", "caption", "--reshard", copy))
    gallery = (stage / "balance" / "gallery.html").read_text()
    assert "text 0 of picture 0000" in gallery and "text 1 of picture" not in gallery
    data, seen = data_of(run_file(stage, SETTING, f"data.shards={copy}")), set()
    for batch in data.stream(0):  # of the copy, whose samples have other numbers
        check_rows(batch, data, clip)
        seen |= set(batch.sample_id.tolist())
    assert 10 < len(seen) < 30


# ---- training --------------------------------------------------------------------------------------------------------


def test_caption_and_view_belong_to_the_rows_of_the_teacher(stage: Path, clip: LoadedClip) -> None:
    run_ = run_file(stage, SETTING, "run.total_steps=20")
    data, index = data_of(run_), load_index(stage / "shards", caption=SOURCE)
    keys = [key for shard in range(3) for key in index.table(shard).keys]
    seen: dict[str, set[int]] = {key: set() for key in keys}
    for batch in data.stream(0):
        check_rows(batch, data, clip)
        for number, tokens in zip(batch.sample_id.tolist(), batch.text):
            texts = clip.tokenizer(captions_of(keys[number]))
            (drawn,) = [at for at in range(len(texts)) if texts[at].equal(tokens)]
            seen[keys[number]].add(drawn)
    assert len(seen) == 35 and sum(map(len, seen.values())) > 50
    assert set().union(*seen.values()) == {0, 1, 2}


def test_resuming_and_workers_draw_the_same_captions_and_views(stage: Path) -> None:
    whole = list(data_of(run_file(stage, SETTING)).stream(0))
    rest = list(data_of(run_file(stage, SETTING, "data.workers=2")).stream(5))
    assert all(same(a, b) for a, b in zip(whole[5:], rest, strict=True))
    assert len({batch.text.numpy().tobytes() for batch in whole}) == 12


def test_captions_are_drawn_without_a_teacher_too(stage: Path) -> None:
    changes = "loss.contrastive=1", "loss.instance=0", "data.teacher=null", SETTING
    first, again = (list(data_of(run_file(stage, *changes)).stream(0)) for _ in range(2))
    assert all(a.text.equal(b.text) and a.teacher_text is None for a, b in zip(first, again, strict=True))
    of_sample: dict[int, set[bytes]] = {}
    for batch in first:
        for number, tokens in zip(batch.sample_id.tolist(), batch.text):
            of_sample.setdefault(number, set()).add(tokens.numpy().tobytes())
    assert max(map(len, of_sample.values())) > 1


def test_a_sample_with_other_captions_than_were_embedded_is_replaced(stage: Path, tmp_path: Path) -> None:
    shutil.copytree(stage / "shards", tmp_path / "shards", ignore=shutil.ignore_patterns("index*"))

    def with_one_less(name: str, data: bytes) -> tuple[str, bytes]:
        return name, data.replace(b', "text 2 of picture 000010001"', b"")

    rewrite(tmp_path / "shards" / "00001.tar", with_one_less)
    batches = data_of(run_file(stage, SETTING, f"data.shards={tmp_path / 'shards'}")).stream(0)
    replaced = {reason for batch in batches for reason in batch.replaced}
    assert replaced == {f"00001/000010001: 2 captions, of which the teacher has embedded 3 in {stage / 'emb'}"}
