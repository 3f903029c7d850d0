"""Shards named as other tools name them: braces, globs, lists, single files; what cannot be read is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hostile_data import teacher
from pair_data import make_tar, stream, write_shards

from megacid.data.index import ShardReader, load_index
from megacid.data.index_verify import verify_index
from megacid.data.shard_paths import find_shards
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError
from tools import index_shards


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a/00000.tar .. a/00003.tar, b/x.tar and b/y.tar, below the current directory."""
    for name in ("a/00000", "a/00001", "a/00002", "a/00003", "b/x", "b/y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_tar(tmp_path / f"{name}.tar", [f"{name[-1]}1", f"{name[-1]}2"])
    (tmp_path / "a" / "00000_stats.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


A = ["00000", "00001", "00002", "00003"]
SPELLINGS = {
    "a": A,
    "a/": A,
    "./a/../a": A,
    "a/{00000..00003}.tar": A,
    "a/{00003..00000}.tar": A,
    "a/0000{0..3}.tar": A,
    "{a,b}": [*A, "x", "y"],
    "{a/00000,b/x}.tar": ["00000", "x"],
    "a/{00000..00003..2}.tar": ["00000", "00002"],
    "a/00001.tar": ["00001"],
    "a::b": [*A, "x", "y"],
    "b::a": [*A, "x", "y"],
    "a/{00000..00001}.tar::b/x.tar": ["00000", "00001", "x"],
    "a/*.tar": A,
    "a/*": A,  # without the .json
    "*/*[1x].tar": ["00001", "x"],
    "**/0000?.tar": A,
    "a/{00000,00001}*": ["00000", "00001"],
    "a::": A,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_shards_are_found_however_they_are_named(here: Path, spelling: str) -> None:
    index = load_index(spelling)
    assert index.names == SPELLINGS[spelling]
    reader = ShardReader(index)
    for shard, name in enumerate(index.names):
        assert index.table(shard).keys == [f"{name[-1]}1", f"{name[-1]}2"]
        assert reader.read(shard, 1, "text") == f"text of {name[-1]}2".encode()
    os.chdir("/")
    assert load_index(index.paths.source).digest == index.digest  # what is recorded finds them from anywhere


def test_all_spellings_of_the_same_shards_are_the_same_content(here: Path) -> None:
    whole = load_index("a")
    for spelling in (spelling for spelling, names in SPELLINGS.items() if names == A):
        index = load_index(spelling)
        assert index.digest == whole.digest and index.starts.tolist() == whole.starts.tolist()


def test_a_part_of_a_directory_uses_and_keeps_its_index(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from megacid.data import index_build as module

    scanned, real = [], module.scan_tar
    monkeypatch.setattr(module, "scan_tar", lambda path, *a, **b: scanned.append(path.stem) or real(path, *a, **b))
    load_index("a/{00001..00002}.tar")
    load_index("a/00000.tar::b/x.tar")
    assert scanned == ["00001", "00002", "00000", "x"]
    load_index("a/{00000..00002}.tar::b/x.tar")
    assert len(scanned) == 4 and {e["name"] for e in stored(here / "a")} == set(A[:3])
    assert load_index("a").names == A and scanned[4:] == ["00003"]
    load_index("a/00001.tar")
    assert len(scanned) == 5 and [e["name"] for e in stored(here / "a")] == A
    assert "such as" not in caplog.text  # the other files of a directory are left out on purpose


def stored(folder: Path) -> list[dict]:
    return json.loads((folder / "index" / "index.json").read_text())["shards"]


def test_the_index_of_a_part_can_be_verified(here: Path) -> None:
    assert verify_index("a/00001.tar") == ["a/index/index.json is missing or unreadable"]
    load_index("a::b")
    assert verify_index("a/00001.tar::b") == []
    make_tar(here / "a" / "00001.tar", ["other"])
    make_tar(here / "b" / "x.tar", ["11", "22"])
    assert len(verify_index("a/{00000..00001}.tar")) == 1 and len(verify_index("a::b")) == 2


REFUSED = {
    "a/{00000..00009}.tar": r"6 of the 10 shards of a/{00000..00009}.tar do not exist, the first is a/00004.tar",
    "a/{00000..00003}": r"4 of the 4 shards .* the first is a/00000: correct the numbers",
    "a/{0..3}.tar": r"4 of the 4 shards .* the first is a/0.tar",
    "a/00009.tar": r"a/00009.tar does not exist",
    "nowhere": r"nowhere does not exist: correct it, or make one with img2dataset",
    "a::nowhere": "nowhere does not exist",
    "a/*.tgz": "matches no .tar file",
    "a/{00000": "braces do not match",
    "a/{0..99999999999}.tar": "names more than 1,000,000 tars",
    "": "shards is '', expected a directory",
    "::": "expected a directory",
    "a/00000_stats.json": "is neither a .tar file nor a directory with some",
    "a::empty": "empty is neither a .tar file nor a directory with some",
    "a::a/00001.tar": "a/00001.tar and a/00001.tar have the same name",
    "a::c": "a/00001.tar and c/00001.tar have the same name, expected unique ones",
    "{a,c}/00001.tar": "a/00001.tar and c/00001.tar have the same name",
    "a/\0.tar": "without zero characters",
    "s3://bucket/{00000..00009}.tar": r"^s3://bucket/{0.*}.tar is remote and has no cache: set MEGACID_CACHE_DIR",
    "https://host/00000.tar": "has no cache: set MEGACID_CACHE_DIR, or data.cache_dir of a run file",
    "gs://b/0.tar::a": "^gs://b/0.tar is remote",
    "a::hf://datasets/x": "^hf://datasets/x is remote",
    "pipe:aws s3 cp s3://bucket/0.tar -": "expected a path or a URL with s3://, gs://, hf:// or https://: copy",
    "s3:/bucket/collapsed-by-a-path": "expected a path or a URL",
    "ftp://host/00000.tar": "expected a path or a URL",
    "file:///data/0.tar": "a URL of local files: write the path alone",
    "$HOME/a": "variables are not expanded",
    "a/" + "x" * 5000: "does not exist",
}


@pytest.mark.parametrize("spelling", REFUSED, ids=range(len(REFUSED)))
def test_what_names_no_shards_is_one_line(here: Path, spelling: str) -> None:
    (here / "c").mkdir()
    (here / "empty").mkdir()
    make_tar(here / "c" / "00001.tar", ["other"])
    with pytest.raises(UserError, match=REFUSED[spelling]) as error:
        load_index(spelling)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert not list(here.glob("*/index"))


def test_a_product_of_braces_is_bounded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megacid.data.shard_paths._MAX_TARS", 50)
    with pytest.raises(UserError, match="names more than 50 tars: correct the numbers"):
        find_shards("a/{0..9}{0..9}.tar")


@pytest.mark.parametrize("name", ["{0..1}", "a::b", "[1]", "*"])
def test_a_directory_with_such_a_name_is_that_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    make_tar(tmp_path / name / "0.tar", ["k1"])
    index = load_index(tmp_path / name)
    assert index.paths.directory == tmp_path / name and load_index(index.paths.source).digest == index.digest


def test_a_home_directory_is_expanded_in_every_part(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert find_shards("~/a/00000.tar::~/b").root == here


def test_links_to_tars_keep_their_own_names(here: Path) -> None:
    (here / "links").mkdir()
    for name in ("a/00000", "b/x"):
        (here / "links" / f"{name.replace('/', '-')}.tar").symlink_to(here / f"{name}.tar")
    assert load_index("links/*.tar").names == ["a-00000", "b-x"]
    (here / "links" / "broken.tar").symlink_to(here / "nowhere.tar")
    with pytest.raises(UserError, match=r"broken.tar is a broken link"):
        load_index("links")
    with pytest.raises(UserError, match=r"broken.tar"):
        load_index("links/broken.tar")


def test_training_reads_a_part_and_joins_the_embeddings_of_the_whole(tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "s")
    part = load_index(tmp_path / "s" / "{00000,00002}.tar")
    for batch in stream(part, workers=0):
        assert batch.text[:, 0].equal(batch.image[:, 0, 0, 0].long())
    table = TeacherTable(teacher(tmp_path / "t", whole), load_index(tmp_path / "s" / "*.tar"))
    assert (table.join(2).row_of >= 0).all()
    with pytest.raises(UserError, match="was made from other shards"):
        TeacherTable(tmp_path / "t", part)


def test_a_folder_that_cannot_be_written_does_not_stop_the_others(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "a" / "index").write_text("in the way")
    index = load_index("a::b")
    assert index.names == [*A, "x", "y"] and "a/index cannot be written" in caplog.text
    assert [index.table(shard).keys[0] for shard in range(6)] == ["01", "11", "21", "31", "x1", "y1"]
    assert (here / "b" / "index" / "index.json").is_file()


def test_the_tool_takes_what_a_shell_expands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index_shards.main(["a/00000.tar", "a/00001.tar", "b/x.tar"]) == 0
    assert "3 shards, 6 samples used, 0 not used" in capsys.readouterr().out
    assert index_shards.main(["a/{00000..00001}.tar", "--verify"]) == 0
