"""Shards that lose samples: the message names the reason, the rule and the remedy, and many lost samples end it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from pair_data import make_tar, put, stream

from megacid.data.index import load_index
from megacid.errors import UserError
from tools import index_shards


def write(path: Path, names: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            put(tar, name)


def pairs(keys: list[str], endings: tuple[str, ...] = ("jpg", "txt", "json")) -> list[str]:
    return [f"{key}.{ending}" for key in keys for ending in endings]


DOTTED = {
    "all": pairs([f"{i}.b" for i in range(6)]),
    "one prefix": pairs([f"img.{i:04d}" for i in range(6)]),
    "addresses": pairs([f"https__www.example.com_{i}" for i in range(6)]),
    "two dots": pairs([f"a.b.{i}" for i in range(6)]),
    "folders": pairs([f"v1.0/{i}.5" for i in range(6)]),
    "unequal dots": [name for i in range(6) for name in (f"k{i}.v2.jpg", f"k{i}.txt")],
    "classes": pairs([f"{i}.b" for i in range(6)], ("png", "cls")),
    "without images": pairs([f"{i}.b" for i in range(6)], ("heic", "txt")),
    "beside complete samples": pairs([f"k{i}{dot}" for i in range(6) for dot in ("", ".2")]),
}


@pytest.mark.parametrize("case", DOTTED)
def test_keys_with_dots_are_refused_with_the_rule_and_the_remedy(tmp_path: Path, case: str) -> None:
    good = [f"g{i}" for i in range(20)]
    write(tmp_path / "0.tar", pairs(good) + DOTTED[case])
    message = r"6 of (26|32) samples cannot be used.* key with a dot \(6 times, such as .* in 0.tar"
    with pytest.raises(UserError, match=message) as error:
        load_index(tmp_path)
    assert "a key ends at the first dot" in str(error.value) and "a1_b.jpg" in str(error.value)
    assert "--max-lost 1" in str(error.value) and "\n" not in str(error.value)
    index = load_index(tmp_path, max_lost=1.0)
    assert index.table(0).keys[:20] == good and index.dropped == {"key with a dot": 6}


def test_a_second_image_of_a_sample_is_no_lost_sample(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [f"k{i}.{e}" for i in range(4) for e in ("seg.png", "jpg", "txt", "depth.png", "en.txt")])
    index = load_index(tmp_path)
    assert index.num_samples == 4 and index.dropped == {}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("endings", [("jpg", "txt"), ("jpg", "txt", "json"), ("png", "cls")], ids=len)
def test_a_shuffled_tar_is_refused_for_members_that_are_not_adjacent(
    tmp_path: Path, seed: int, endings: tuple[str, ...]
) -> None:
    names = pairs([f"k{i}" for i in range(12)], endings)
    random.Random(seed).shuffle(names)
    write(tmp_path / "0.tar", names)
    with pytest.raises(UserError, match=r"of 12 samples cannot|no complete sample") as error:
        load_index(tmp_path)
    assert "mostly because of: members not adjacent (" in str(error.value) and "tar --sort=name" in str(error.value)
    groups = [sample["__key__"] for sample in wds.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)]
    assert len(groups) > 12  # webdataset has the same rule


@pytest.mark.parametrize("order", ["by kind", "image last", "two by two"])
def test_other_orders_without_adjacent_members_are_named_too(tmp_path: Path, order: str) -> None:
    keys = [f"k{i}" for i in range(6)]
    names = {
        "by kind": [f"{key}.{ending}" for ending in ("jpg", "txt") for key in keys],
        "image last": [f"{key}.{ending}" for ending in ("txt", "json", "jpg") for key in keys],
        "two by two": [f"{key}.{e}" for at in (0, 2, 4) for e in ("jpg", "txt") for key in keys[at : at + 2]],
    }[order]
    write(tmp_path / "0.tar", names)
    with pytest.raises(UserError, match=r"no complete sample, mostly because of: members not adjacent \(6 times"):
        load_index(tmp_path)


def test_other_files_in_a_tar_are_no_lost_samples(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [*pairs(["a", "b"]), "README.md", "LICENSE", "notes.v1.pdf", "._a.jpg"])
    index = load_index(tmp_path)
    assert index.num_samples == 2 and index.dropped == {"member of no sample": 2}


def test_json_members_at_the_end_lose_no_sample(tmp_path: Path) -> None:
    keys = [f"k{i}" for i in range(6)]
    write(tmp_path / "0.tar", pairs(keys, ("jpg", "txt")) + pairs(keys, ("json",)))
    index = load_index(tmp_path)
    assert index.num_samples == 6 and index.dropped == {"member apart from its sample": 6}


MISSING_PARTS = {
    "images alone": (pairs(["a", "b"], ("jpg",)), "sample without a text .*end in .jpg.*a caption in a .txt member"),
    "captions in json": (pairs(["a"], ("jpg", "json")), "without a text .*end in .jpg, .json.*caption in a .txt"),
    "texts alone": (pairs(["a"], ("txt",)), "sample without an image .*end in .txt.*an image in a member named .jpg"),
    "other images": (pairs(["a"], ("xcf", "txt")), "sample without an image .*end in .xcf, .txt.*named .jpg"),
    "a tar in a tar": (["00000.tar"], r"end in: .tar; skipped: 1 x member of no sample\).*needs an image and a .txt"),
    "two folders": (["i/a.jpg", "t/a.txt"], "without an? (text|image) .1 times.*of the same name and folder"),
    "no endings": (["a", "b"], "end in: no ending; skipped: nothing.*each sample needs an image and a .txt"),
    "nothing": ([], "there are none"),
    "unsafe names": (["/a.jpg", "/a.txt"], "skipped: 2 x unsafe name"),
}


@pytest.mark.parametrize("case", MISSING_PARTS)
def test_shards_without_a_complete_sample_name_the_missing_part(tmp_path: Path, case: str) -> None:
    names, message = MISSING_PARTS[case]
    write(tmp_path / "0.tar", names)
    for allow_bad in (False, True):
        with pytest.raises(UserError, match=f"has 1 tars but no complete sample.*{message}") as error:
            load_index(tmp_path, allow_bad=allow_bad)
        assert "batch" not in str(error.value)


def test_shards_for_classification_are_refused_for_training_by_their_missing_captions(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", pairs([f"k{i}" for i in range(10)], ("jpg", "cls")))
    message = r"10 samples with an image and a class \(.cls\) but none with a caption"
    with pytest.raises(UserError, match=message) as error:
        stream(load_index(tmp_path))
    assert "smaller batch" not in str(error.value)
    write(tmp_path / "1.tar", pairs(["p"], ("jpg", "txt")))
    with pytest.raises(UserError, match=r"1 usable samples of 11 \(10 without a caption\), expected"):
        stream(load_index(tmp_path))


@pytest.mark.parametrize("lost", [1, 2])
def test_five_percent_of_lost_samples_are_the_limit(
    tmp_path: Path, lost: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """19 good samples over two tars and one lost is exactly 5 %."""
    write(tmp_path / "s" / "0.tar", pairs([f"a{i}" for i in range(10)]))
    half = pairs([f"c{i}" for i in range(lost)], ("jpg",))
    write(tmp_path / "s" / "1.tar", pairs([f"b{i}" for i in range(9)]) + half)
    caplog.set_level("INFO")
    if lost == 1:
        assert index_shards.main([str(tmp_path / "s")]) == 0
        output = capsys.readouterr().out
        assert "2 shards, 19 samples used, 1 not used (1 x sample without a text)" in output
        assert "  sample without a text: a sample needs a caption in" in output
        assert "1.tar: skipped 1 (sample without a text): c0; a sample needs a caption" in caplog.text
        return
    with pytest.raises(UserError, match=r"2 of 21 samples cannot be used, expected at most 5%"):
        index_shards.main([str(tmp_path / "s")])
    assert not (tmp_path / "s" / "index" / "index.json").exists()
    assert index_shards.main([str(tmp_path / "s"), "--allow-bad"]) == 0
    assert load_index(tmp_path / "s").num_samples == 19  # the decision was stored
    write(tmp_path / "s" / "2.tar", pairs(["z"]))
    assert load_index(tmp_path / "s").num_samples == 20  # and holds when a tar is added
    write(tmp_path / "s" / "3.tar", pairs(["y"]) + pairs(["n"], ("jpg",)))
    with pytest.raises(UserError, match="1 of 2 samples in tars that were added or changed cannot be used"):
        load_index(tmp_path / "s")


def test_the_largest_reason_is_the_one_that_is_named(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", pairs(["a", "b"]) + pairs(["c", "d"], ("jpg",)) + pairs(["e.1", "e.2", "e.3"]))
    with pytest.raises(UserError, match=r"5 of 7 .*mostly because of: key with a dot \(3 times, such as e.1 in 0.tar"):
        load_index(tmp_path)


def test_a_folder_that_cannot_be_written_gets_a_remedy_that_works(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", pairs(["a", "b"]) + pairs(["c"], ("jpg",)))
    (tmp_path / "index").write_text("in the way")
    with pytest.raises(UserError, match="--max-lost 1 to use the other 2 in a writable folder of links to the tars"):
        load_index(tmp_path)


COMPRESSED = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: b"\x28\xb5\x2f\xfd" + data,
    "lz4": lambda data: b"\x04\x22\x4d\x18" + data,
    "zip": lambda data: b"PK\x03\x04" + data,
    "parquet": lambda data: b"PAR1" + data,
    "Git LFS": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_file_of_another_kind_named_tar_says_what_it_is(tmp_path: Path, kind: str) -> None:
    make_tar(tmp_path / "0.tar", ["a", "b"])
    (tmp_path / "1.tar").write_bytes(COMPRESSED[kind]((tmp_path / "0.tar").read_bytes()))
    with pytest.raises(UserError, match=rf"1.tar is .*{kind}.*, expected a plain tar") as error:
        load_index(tmp_path)
    assert "damaged" not in str(error.value)
    assert load_index(tmp_path, allow_bad=True).sizes.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.tar.gz", "2.tgz", "3.tar.zst"], "3 compressed tars (such as 1.tar.gz): decompress them"),
        (["1.TAR", "2.tar.part"], "2 files that do not end in .tar (such as 1.TAR): complete or rename them"),
        (["x/1.tar", "x/2.tar", "y/z/3.tar"], "3 tars in 2 subfolders (such as x): give that folder"),
        ([".1.tar", "1.tar.sha256", "0.idx", "0_stats.json", ".x/1.tar", "x/1.txt"], None),
    ],
    ids=["compressed", "unfinished", "subfolders", "nothing"],
)
def test_shards_in_another_form_are_counted_not_passed_over(
    tmp_path: Path, names: list[str], message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no .tar file") as error:
        load_index(tmp_path)
    assert (message or "img2dataset") in str(error.value)
    make_tar(tmp_path / "0.tar", ["a", "b"])
    for _ in range(2):  # also when the index is there
        caplog.clear()
        load_index(tmp_path)
        assert f"not used: {message}" in caplog.text if message else "not used: " not in caplog.text
