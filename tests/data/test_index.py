import importlib.util
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from pair_data import make_tar, put

from megacid.data.decode import BadSample
from megacid.data.index import ShardReader, load_index
from megacid.data.index_verify import verify_index
from megacid.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_members_are_read_back_exactly(tmp_path: Path) -> None:
    make_tar(tmp_path / "00000.tar", ["a", "b"])
    make_tar(tmp_path / "00001.tar", ["sub.dir/c", "k" * 150], ending="JPEG")  # a long name needs an extended header
    index = load_index(tmp_path)
    assert index.names == ["00000", "00001"] and index.sizes.tolist() == [2, 2] and index.num_samples == 4
    assert index.starts.tolist() == [0, 2, 4]
    assert index.table(1).keys == ["sub.dir/c", "k" * 150]
    reader = ShardReader(index, max_open=1)
    for shard, row, key in [(0, 0, "a"), (1, 1, "k" * 150), (0, 1, "b"), (1, 0, "sub.dir/c")]:
        assert reader.read(shard, row, "image") == f"image of {key}".encode()
        assert reader.read(shard, row, "text") == f"text of {key}".encode()
        assert reader.read(shard, row, "json") == b'{"key": 1}'
    with pytest.raises(BadSample, match="no cls member"):
        reader.read(0, 0, "cls")
    with pytest.raises(BadSample, match="more than 3"):
        ShardReader(index, max_member_bytes=3).read(0, 0, "image")
    reader.close()


def test_grouping_agrees_with_webdataset(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("d/a.jpg", "d/a.txt", "b.seg.png", "b.png", "b.txt", "noext", "c.webp", "c.txt", "c.pyd"):
            put(tar, name)
    keys = [s["__key__"] for s in wds.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)]
    assert load_index(tmp_path).table(0).keys == keys == ["d/a", "b", "c"]


def test_second_load_uses_the_stored_index_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tar(tmp_path / "00000.tar", ["a", "b"])
    first = load_index(tmp_path)
    monkeypatch.setattr("megacid.data.index_build.scan_tar", lambda *_, **__: pytest.fail("scanned again"))
    second = load_index(tmp_path)
    assert second.digest == first.digest and second.table(0).keys == ["a", "b"]
    assert np.array_equal(second.table(0).members, first.table(0).members)


def test_only_the_changed_tar_is_scanned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megacid.data import index_build as module

    make_tar(tmp_path / "00000.tar", ["a"])
    make_tar(tmp_path / "00001.tar", ["b"])
    old = load_index(tmp_path)
    make_tar(tmp_path / "00001.tar", ["b", *(f"c{i}" for i in range(20))])
    scanned = []
    real = module.scan_tar
    monkeypatch.setattr(
        module, "scan_tar", lambda path, *args, **kwargs: scanned.append(path.name) or real(path, *args, **kwargs)
    )
    new = load_index(tmp_path)
    assert scanned == ["00001.tar"] and new.sizes.tolist() == [1, 21] and new.digest != old.digest
    make_tar(tmp_path / "00002.tar", ["z"])
    assert load_index(tmp_path).names == ["00000", "00001", "00002"]


def test_change_of_the_same_size_is_found_by_verify(tmp_path: Path) -> None:
    make_tar(tmp_path / "00000.tar", ["a", "b"])
    load_index(tmp_path)
    assert verify_index(tmp_path) == []
    make_tar(tmp_path / "00000.tar", ["a", "c"])
    assert "another sha256" in verify_index(tmp_path)[0]
    assert load_index(tmp_path).table(0).keys == ["a", "b"]  # a size alone cannot tell
    assert load_index(tmp_path, verify=True).table(0).keys == ["a", "c"]
    assert verify_index(tmp_path) == []
    (tmp_path / "new.tar").write_bytes((tmp_path / "00000.tar").read_bytes())
    (tmp_path / "00000.tar").unlink()
    assert len(verify_index(tmp_path)) == 2


def test_digest_names_tar_names_and_keys_not_the_place(tmp_path: Path) -> None:
    for folder, keys in (("p", ["a", "b"]), ("q", ["a", "b"]), ("r", ["b", "a"])):
        (tmp_path / folder).mkdir()
        make_tar(tmp_path / folder / "00000.tar", keys)
    p, q, r = (load_index(tmp_path / folder).digest for folder in "pqr")
    assert p == q != r


def test_half_samples_and_duplicates_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name in ("a.jpg", "a.txt", "only_text.txt", "only_image.jpg", "a.jpg", "a.txt", "c.jpg", "c.cls"):
            put(tar, name)
    index = load_index(tmp_path, allow_bad=True)
    assert index.table(0).keys == ["a", "c"]
    assert index.dropped == {"sample without an image": 1, "sample without a text": 1, "duplicate key": 1}
    assert "only_text" in caplog.text
    assert index.table(0).text[1].tolist() == [-1, -1] and index.shards[0]["without_text"] == 1


def test_nothing_is_merged_across_tars(tmp_path: Path) -> None:
    for name, member in (("0.tar", "a.jpg"), ("1.tar", "a.txt")):
        with tarfile.open(tmp_path / name, "w") as tar:
            put(tar, member)
    with pytest.raises(UserError, match="no complete sample"):
        load_index(tmp_path)


def test_links_devices_and_unsafe_names_are_never_used(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        put(tar, "l.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        put(tar, "h.jpg", b"", type=tarfile.LNKTYPE, linkname="l.jpg")
        put(tar, "n.jpg", b"", type=tarfile.CHRTYPE)
        put(tar, "../up.jpg")
        put(tar, "/abs.jpg")
        put(tar, "ok.jpg")
        put(tar, "ok.txt")
    index = load_index(tmp_path)
    assert index.table(0).keys == ["ok"] and index.dropped == {"not a regular file": 3, "unsafe name": 2}


@pytest.mark.parametrize("where", ["payload", "header", "boundary", "garbage", "zeros", "without json"])
def test_a_cut_tar_is_refused_or_used_up_to_the_cut(tmp_path: Path, where: str) -> None:
    make_tar(tmp_path / "00000.tar", ["a", "b", "c"])
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = tar.getmembers()
    data = (tmp_path / "00000.tar").read_bytes()
    text_of_c, image_of_c = members[7], members[6].offset
    cut = {
        "payload": data[: text_of_c.offset_data + 4],
        "header": data[: text_of_c.offset + 100],
        "boundary": data[:image_of_c],
        "garbage": data[:image_of_c] + b"\xff" * 2048,
        "zeros": data[:image_of_c] + bytes(512) + data[image_of_c + 512 :],
        "without json": data[: members[8].offset],
    }[where]
    (tmp_path / "00000.tar").write_bytes(cut)
    with pytest.raises(UserError, match=r"00000.tar is damaged .* --allow-bad"):
        load_index(tmp_path)
    index = load_index(tmp_path, allow_bad=True)
    assert index.table(0).keys == ["a", "b"]
    partial = where in ("payload", "header", "without json")
    assert index.shards[0]["dropped_names"] == ({"sample at the cut": ["c"]} if partial else {})
    assert load_index(tmp_path).table(0).keys == ["a", "b"]  # the decision was stored


def test_a_tar_cut_after_indexing_gives_bad_samples(tmp_path: Path) -> None:
    make_tar(tmp_path / "00000.tar", ["a", "b"])
    index = load_index(tmp_path)
    os.truncate(tmp_path / "00000.tar", 600)
    reader = ShardReader(index)
    assert reader.read(0, 0, "image") == b"image of a"
    with pytest.raises(BadSample, match="the tar was cut"):
        reader.read(0, 1, "text")


def test_not_a_tar_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match=r"x.tar is damaged"):
        load_index(tmp_path)


@pytest.mark.parametrize("bad", ["pipe:rm x", "s3://bucket/x", "$HOME", "/no/such/folder"])
def test_only_plain_local_directories(bad: str) -> None:
    with pytest.raises(UserError):
        load_index(bad)


def test_folder_without_tars(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .tar file"):
        load_index(tmp_path)


def test_folder_that_cannot_be_written_is_indexed_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tar(tmp_path / "00000.tar", ["a", "b"])
    (tmp_path / "index").write_text("in the way")  # also fails for root, whom permissions do not stop
    index = load_index(tmp_path)
    assert index.table(0).keys == ["a", "b"] and "stays in memory" in caplog.text
    assert ShardReader(index).read(0, 1, "text") == b"text of b"


@pytest.mark.parametrize("name", ["index.json", "00000.keys.json", "00000.members.npy"])
def test_a_damaged_index_is_found(tmp_path: Path, name: str) -> None:
    make_tar(tmp_path / "00000.tar", ["a", "b"])
    load_index(tmp_path)
    (tmp_path / "index" / name).write_bytes(b'{"version": 1')
    if name == "index.json":
        assert load_index(tmp_path).table(0).keys == ["a", "b"]
        return
    with pytest.raises(UserError, match="is damaged"):
        load_index(tmp_path).table(0)
    assert load_index(tmp_path, verify=True).table(0).keys == ["a", "b"]


def test_an_index_with_objects_is_never_unpickled(tmp_path: Path) -> None:
    make_tar(tmp_path / "00000.tar", ["a"])
    load_index(tmp_path)
    np.save(tmp_path / "index" / "00000.members.npy", np.array([[{}] * 8], object), allow_pickle=True)
    with pytest.raises(UserError, match="is damaged"):
        load_index(tmp_path).table(0)


def test_index_shards_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("index_shards", ROOT / "tools" / "index_shards.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    make_tar(tmp_path / "00000.tar", ["a", "b"])
    assert tool.main([str(tmp_path)]) == 0
    assert "1 shards, 2 samples" in capsys.readouterr().out
    assert tool.main([str(tmp_path), "--verify"]) == 0
    stored = json.loads((tmp_path / "index" / "index.json").read_text())
    stored["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "index" / "index.json").write_text(json.dumps(stored))
    assert tool.main([str(tmp_path), "--verify"]) == 1
