"""What the user accepted when the shards were indexed holds for unchanged tars when others are added or changed."""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path

import pytest
import torch
from pair_data import make_tar, put, write_shards

from megacid.config.load import load_run
from megacid.data import index_build as module
from megacid.data.captions import BLANK
from megacid.data.index import ShardReader, load_index
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.training.open_data import open_data


def write(path: Path, captions: list[str | None]) -> None:
    """A tar with one sample per caption; None: a sample without a caption, which is lost."""
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            put(tar, f"{path.stem}_{number}.png")
            if caption is not None:
                put(tar, f"{path.stem}_{number}.txt", caption.encode())


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tars that are scanned, in order."""
    names: list[str] = []
    real = module.scan_tar
    monkeypatch.setattr(module, "scan_tar", lambda path, *a, **b: names.append(path.name) or real(path, *a, **b))
    return names


GOOD, BLANKS = ["a"] * 40, ["a"] * 39 + [""]


# ---- blank captions ----------------------------------------------------------------------------------------------


def test_an_added_tar_leaves_the_blank_captions_of_the_others_in_use(tmp_path: Path, scanned: list[str]) -> None:
    write(tmp_path / "0.tar", BLANKS)
    write(tmp_path / "1.tar", GOOD)
    before = load_index(tmp_path, keep_blank=True)
    write(tmp_path / "2.tar", BLANKS)
    index = load_index(tmp_path)
    assert index.sizes.tolist() == [40, 40, 40] and index.dropped == {}
    assert scanned == ["0.tar", "1.tar", "2.tar"]  # each once
    (tmp_path / "2.tar").unlink()
    assert load_index(tmp_path).digest == before.digest  # what a teacher folder was made from


def test_a_tar_that_is_added_to_mixed_ones_loses_its_blank_captions_only(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", BLANKS)
    load_index(tmp_path / "0.tar", keep_blank=True)
    write(tmp_path / "1.tar", BLANKS)
    load_index(tmp_path / "1.tar", keep_blank=False)
    write(tmp_path / "2.tar", BLANKS)
    assert load_index(tmp_path).sizes.tolist() == [40, 39, 39]
    assert load_index(tmp_path, keep_blank=True).sizes.tolist() == [40, 40, 40]


def test_keeping_blank_captions_is_stored_while_no_tar_has_any(tmp_path: Path, scanned: list[str]) -> None:
    write(tmp_path / "0.tar", GOOD)
    load_index(tmp_path)
    load_index(tmp_path, keep_blank=True)
    assert scanned == ["0.tar"]
    write(tmp_path / "1.tar", BLANKS)
    assert load_index(tmp_path).sizes.tolist() == [40, 40]
    write(tmp_path / "2.tar", BLANKS)  # also not when the index was written again
    assert load_index(tmp_path).sizes.tolist() == [40, 40, 40]


def test_a_changed_tar_keeps_its_blank_captions(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", BLANKS)
    load_index(tmp_path, keep_blank=True)
    write(tmp_path / "0.tar", [*BLANKS, *BLANKS])
    assert load_index(tmp_path).num_samples == 80


def test_tars_of_an_index_without_blank_captions_stay_without(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", BLANKS)
    load_index(tmp_path)
    write(tmp_path / "1.tar", BLANKS)
    index = load_index(tmp_path)
    assert index.sizes.tolist() == [39, 39] and index.dropped == {BLANK: 2}


@pytest.mark.parametrize("content", [None, b"", b'{"version": 2, "shards": [{}]}'], ids=["lost", "empty", "damaged"])
def test_an_unusable_index_json_loses_no_decision(tmp_path: Path, scanned: list[str], content: bytes | None) -> None:
    write(tmp_path / "0.tar", BLANKS)
    write(tmp_path / "1.tar", GOOD)
    cut(tmp_path / "1.tar")
    before = load_index(tmp_path, keep_blank=True, allow_bad=True)
    path = tmp_path / "index" / "index.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert load_index(tmp_path).digest == before.digest and scanned == ["0.tar", "1.tar"]


def test_shards_of_a_second_folder_leave_the_blank_captions_of_the_first_in_use(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / f"{folder}.tar", BLANKS)
    load_index(tmp_path / "a", keep_blank=True)
    assert load_index(f"{tmp_path}/a::{tmp_path}/b").sizes.tolist() == [40, 40]
    assert load_index(tmp_path / "b").num_samples == 40


# ---- damaged tars and lost samples -------------------------------------------------------------------------------


def test_an_added_tar_leaves_the_damaged_ones_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "0.tar", GOOD)
    cut(tmp_path / "0.tar")
    used = load_index(tmp_path, allow_bad=True).num_samples
    write(tmp_path / "1.tar", GOOD)
    caplog.clear()
    assert load_index(tmp_path).sizes.tolist() == [used, 40]
    assert "0.tar is damaged" in caplog.text
    write(tmp_path / "2.tar", GOOD)
    cut(tmp_path / "2.tar")
    with pytest.raises(UserError, match=r"2.tar is damaged .*--allow-bad"):
        load_index(tmp_path)
    (tmp_path / "2.tar").unlink()
    write(tmp_path / "0.tar", GOOD * 2)
    cut(tmp_path / "0.tar")  # another cut is another decision
    with pytest.raises(UserError, match=r"0.tar is damaged .*--allow-bad"):
        load_index(tmp_path)


def test_accepted_losses_stay_accepted_and_new_ones_are_judged(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [*GOOD, *[None] * 10])
    load_index(tmp_path, max_lost=0.5)
    write(tmp_path / "1.tar", GOOD)
    assert load_index(tmp_path).num_samples == 80  # 10 of 90 are lost, none of them in the added tar
    write(tmp_path / "2.tar", [*GOOD, None, None])
    assert load_index(tmp_path).num_samples == 120  # 2 of 42
    write(tmp_path / "3.tar", [*GOOD, None, None, None])
    message = r"3 of 43 samples in tars that were added or changed cannot be used, expected at most 5%.*3_40 in 3.tar"
    with pytest.raises(UserError, match=message) as error:
        load_index(tmp_path)
    assert "--max-lost 1 to use the other 160" in str(error.value)
    with pytest.raises(UserError, match="3 of 43 samples"):  # a refused tar was not accepted
        load_index(tmp_path)
    assert load_index(tmp_path, max_lost=0.1).num_samples == 160
    (tmp_path / "1.tar").unlink()
    assert load_index(tmp_path).num_samples == 120
    write(tmp_path / "0.tar", [*GOOD, *[None] * 30])
    with pytest.raises(UserError, match="30 of 70 samples in tars that were added or changed"):
        load_index(tmp_path)


def test_a_small_added_tar_is_judged_with_the_others(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", GOOD)
    load_index(tmp_path)
    write(tmp_path / "1.tar", ["a", None])
    assert load_index(tmp_path).num_samples == 41  # 1 of 42


def test_losses_of_an_unfinished_index_were_not_accepted(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [*GOOD, *[None] * 10])
    for name in ("1.tar", "2.tar"):
        with pytest.raises(UserError, match=r"10 of \d+ samples cannot be used"):
            load_index(tmp_path)
        write(tmp_path / name, GOOD)


def test_keeping_blank_captions_leaves_accepted_losses_accepted(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [*BLANKS, *[None] * 10])
    assert load_index(tmp_path, max_lost=0.5).num_samples == 39
    assert load_index(tmp_path, keep_blank=True).num_samples == 40


# ---- work done once ----------------------------------------------------------------------------------------------


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_writable", lambda _: False)  # a permission would not stop root


def test_only_what_is_new_in_a_read_only_folder_is_scanned(
    tmp_path: Path, scanned: list[str], request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "acd":
        make_tar(tmp_path / f"{name}.tar", [f"{name}1", f"{name}2"])
    load_index(tmp_path)
    stored = (tmp_path / "index" / "index.json").read_bytes()
    make_tar(tmp_path / "b.tar", ["b1", "b2"])
    (tmp_path / "d.tar").unlink()
    request.getfixturevalue("read_only")
    scanned.clear()
    index = load_index(tmp_path)
    assert scanned == ["b.tar"] and list(index.in_memory) == [1] and "stays in memory" in caplog.text
    reader = ShardReader(index)
    for shard, name in enumerate("abc"):
        assert index.table(shard).keys == [f"{name}1", f"{name}2"]
        assert reader.read(shard, 1, "text") == f"text of {name}2".encode()
    assert (tmp_path / "index" / "index.json").read_bytes() == stored


def test_training_scans_the_tars_of_a_read_only_folder_once(
    tmp_path: Path, scanned: list[str], read_only: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_shards(tmp_path / "shards")
    scanned.clear()
    block = {
        "run": {"name": "x", "total_steps": 2},
        "student": {"model": "digits-student"},
        "data": {"shards": str(tmp_path / "shards")},
        "loss": {"contrastive": 1.0},
    }
    tree = {"train_batch_size": 8, "gradient_clipping": 1.0, "megacid": block,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(tree))
    open_data(load_run(tmp_path / "run.json", world=1), Parallel(0, 1, 0, torch.device("cpu"), None))
    assert scanned == ["00000.tar", "00001.tar", "00002.tar"] and "data: " in caplog.text
