"""Captions that are not in .txt members, and captions that are blank: used, or left out with the reason."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hostile_data import BOMBS, teacher
from pair_data import make_tar, picture, put, stream
from pair_data import write_shards as write_pairs

from megacid.data.captions import BAD_JSON, BLANK, NO_FIELD, NOT_A_TEXT, TOO_MANY, CaptionSource, is_blank
from megacid.data.decode import BadSample
from megacid.data.index import ShardReader, load_index
from megacid.data.index_verify import verify_index
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError
from tools import index_shards


def write(path: Path, samples: list[dict[str, bytes]]) -> None:
    """Sample i, with the members {ending: content}, has the key k<i> and an image of its own unless it brings one."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for ending, data in {"png": picture(number), **sample}.items():
                put(tar, f"k{number}.{ending}", data)


def with_fields(**fields: Any) -> dict[str, bytes]:
    return {"json": json.dumps(fields).encode()}


def captions(folder: Path, source: str, **options: Any) -> dict[str, str]:
    index = load_index(folder, caption=source, **options)
    reader = ShardReader(index)
    return {key: reader.caption(0, row) for row, key in enumerate(index.table(0).keys)}


SOURCES = {
    "json:caption": with_fields(caption="a red square", uid="u"),
    "json:top.level": with_fields(**{"top.level": "a red square", "top": {"level": "no"}}),
    "json:meta.text": with_fields(meta={"text": " a red square\n"}),
    "json:captions.0": with_fields(captions=["a red square", "another"]),
    "JSON:Caption": with_fields(Caption="a red square", caption="no"),
    "json:a.1.b": with_fields(a=[{}, {"b": "a red square"}]),
    "json:légende": with_fields(**{"légende": "a red square"}),
    "caption": {"caption": b"a red square"},
    "CAPTION": {"Caption": b"a red square"},
    ".caption": {"caption": "\ufeffa red square".encode()},
    "en.txt": {"en.txt": b"a red square", "fr.txt": b"un carre", "json": b"{}"},
    "txt": {"txt": "a red square".encode("utf-16"), "caption": b"no", "json": b'{"caption": "no"}'},
}


@pytest.mark.parametrize("source", SOURCES)
def test_captions_are_read_from_where_they_are(tmp_path: Path, source: str) -> None:
    write(tmp_path / "0.tar", [SOURCES[source]] * 3)
    for _ in range(2):  # built, then loaded
        assert captions(tmp_path, source) == dict.fromkeys(["k0", "k1", "k2"], "a red square")
    assert verify_index(tmp_path, caption=source) == []


def test_every_source_has_an_index_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "0.tar", [{"txt": b"from txt", **with_fields(a="from a", b="from b")}] * 2)
    expected = {"txt": "from txt", "json:a": "from a", "json:b": "from b"}
    for _ in range(2):
        assert {source: captions(tmp_path, source)["k1"] for source in expected} == expected
    assert "rebuilding" not in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"0.tar", "index", "index-json%3Aa", "index-json%3Ab"}
    digests = {load_index(tmp_path, caption=source).digest for source in expected}
    assert len(digests) == 1  # the same samples: masks and labels can be shared


@pytest.mark.parametrize(
    "source",
    ["", "json", "json:", "json:.*", "cls", "a b", "../x", "x/y", "json:" + "f" * 100, "json:\n", "json:\ud800", "é"],
)
def test_a_caption_source_that_is_none_is_one_line(tmp_path: Path, source: str) -> None:
    make_tar(tmp_path / "0.tar", ["a"])
    with pytest.raises(UserError, match=r"^caption is .*, expected txt, json:FIELD, or the ending"):
        load_index(tmp_path, caption=source)
    assert not list(tmp_path.glob("index*"))


@pytest.mark.parametrize("source", ["jpg", "PNG", ".webp"])
def test_images_are_no_captions(tmp_path: Path, source: str) -> None:
    make_tar(tmp_path / "0.tar", ["a"])
    with pytest.raises(UserError, match="which is the ending of images"):
        load_index(tmp_path, caption=source)


UNUSABLE = {
    "no field": (with_fields(uid="u"), NO_FIELD),
    "field of another case": (with_fields(Caption="x"), NO_FIELD),
    "not a block": ({"json": b'["caption"]'}, NO_FIELD),
    "list": (with_fields(caption=["a", "b"]), NOT_A_TEXT),
    "number": (with_fields(caption=7), NOT_A_TEXT),
    "bool": (with_fields(caption=True), NOT_A_TEXT),
    "block": (with_fields(caption={"en": "x"}), NOT_A_TEXT),
    "null": (with_fields(caption=None), BLANK),
    "NaN of pandas": ({"json": b'{"caption": NaN}'}, BLANK),
    "blank": (with_fields(caption=" "), BLANK),
    "huge json": (with_fields(caption="x", exif="y" * (1 << 20)), BAD_JSON),
    "latin1": ({"json": '{"caption": "crème"}'.encode("latin1")}, BAD_JSON),
    "two documents": ({"json": b'{"caption": "x"}\n{"caption": "y"}'}, BAD_JSON),
    **{f"json: {name}": ({"json": data}, None) for name, data in BOMBS.items()},
    "no json": ({}, "sample without a text"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_samples_without_a_usable_caption_are_left_out_with_the_reason(tmp_path: Path, case: str) -> None:
    sample, reason = UNUSABLE[case]
    write(tmp_path / "0.tar", [*[with_fields(caption=f"text {i}") for i in range(19)], sample])
    index = load_index(tmp_path, caption="json:caption")  # 1 of 20 is within the limit
    assert index.num_samples == 19 and sum(index.dropped.values()) == 1
    assert index.dropped == {reason or next(iter(index.dropped)): 1}
    write(tmp_path / "1.tar", [sample] * 3)
    with pytest.raises(UserError, match=r"4 of 23 samples cannot be used, expected at most 5%") as error:
        load_index(tmp_path, caption="json:caption")
    assert "\n" not in str(error.value)
    assert "tools/index_shards.py --caption json:caption --max-lost 1 to use the other 19" in str(error.value)
    assert load_index(tmp_path, caption="json:caption", max_lost=0.2).sizes.tolist() == [19, 0]


LISTS: dict[str, tuple[object, list[str] | str]] = {
    "two": (["a red square", " another\n"], ["a red square", "another"]),
    "a hundred": ([f"{i}" for i in range(100)], [f"{i}" for i in range(100)]),
    "twice the same": (["a", "a"], ["a", "a"]),
    "with missing values": ([None, "a", "", "nan", float("nan"), "b", "\u200b", "\ufeff"], ["a", "b"]),
    "an unpaired surrogate": (["a", "\ud800"], ["a", "\ufffd" * 3]),
    "only missing values": ([None, " "], BLANK),
    "empty": ([], BLANK),
    "more than a hundred": (["a"] * 101, TOO_MANY),
    "a number": (["a", 7], NOT_A_TEXT),
    "a list": ([["a"]], NOT_A_TEXT),
    "one text": ("a", NOT_A_TEXT),
    "null": (None, NOT_A_TEXT),
    "a block": ({"*": "a"}, NOT_A_TEXT),
}


@pytest.mark.parametrize("keep_blank", [False, True])
@pytest.mark.parametrize("case", LISTS)
def test_all_texts_of_a_list_are_captions_but_blank_ones(tmp_path: Path, case: str, keep_blank: bool) -> None:
    value, expected = LISTS[case]
    write(tmp_path / "0.tar", [*[with_fields(c={"all": ["x"]}) for _ in range(19)], with_fields(c={"all": value})])
    index = load_index(tmp_path, caption="json:c.all.*", keep_blank=keep_blank)
    if isinstance(expected, str):
        assert index.num_samples == 19 and index.dropped == {expected: 1}
        return
    reader = ShardReader(index)
    assert reader.captions(0, 19) == expected and reader.caption(0, 19) == expected[0]
    assert reader.captions(0, 0) == ["x"]


def test_a_json_of_nearly_a_megabyte_holds_a_caption(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [with_fields(caption="text", exif="y" * ((1 << 20) - 100))])
    assert captions(tmp_path, "json:caption") == {"k0": "text"}


def test_captions_that_utf8_cannot_encode_are_replaced_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [{"json": rb'{"caption": "a \ud800 b"}'}])
    index = load_index(tmp_path, caption="json:caption")
    assert ShardReader(index).caption(0, 0).isprintable() and ShardReader(index).caption(0, 0).encode()
    with pytest.raises(BadSample, match="caption is not UTF-8"):
        ShardReader(index).caption(0, 0, strict=True)


def test_shards_with_json_captions_name_the_option(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [with_fields(caption="x")] * 3)
    with pytest.raises(UserError, match=r"--caption \(data.caption in a run file\), such as json:caption"):
        load_index(tmp_path)
    with pytest.raises(UserError, match=r"a caption in a .alt member of the same name"):
        load_index(tmp_path, caption="alt")


def test_keys_with_dots_and_scattered_members_are_named_for_every_source(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for ending, data in (("png", picture(1)), ("json", b'{"caption": "x"}')):
            for key in ("a", "b"):
                put(tar, f"{key}.{ending}", data)
        for ending, data in (("png", picture(1)), ("json", b'{"caption": "x"}')):
            put(tar, f"c.1.{ending}", data)
    with pytest.raises(UserError, match=r"3 times|members not adjacent \(2 times"):
        load_index(tmp_path, caption="json:caption")


# ---- blank captions ----------------------------------------------------------------------------------------------

BLANKS = [
    "", " ", "\n\t ", "\u00a0\u3000", "\u200b\ufeff", "\0\0", "nan", "NaN", " None ", "null", "NULL", "<NA>", "N/A",
    "undefined",
]  # fmt: skip


@pytest.mark.parametrize("text", BLANKS, ids=ascii)
def test_blank_captions_are_left_out_and_counted(tmp_path: Path, text: str) -> None:
    good = [{"txt": b"nancy"}, {"txt": b"none of them"}, {"txt": b"0"}, {"txt": "❤".encode()}] * 5
    write(tmp_path / "0.tar", [*good, {"txt": text.encode()}])
    index = load_index(tmp_path)
    assert index.num_samples == 20 and index.dropped == {BLANK: 1} and "k20" not in index.table(0).keys
    assert is_blank(text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_blank_captions_are_found_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    write(tmp_path / "0.tar", [{"txt": b"x"}] * 20 + [{"txt": " nan\r\n".encode(encoding)}])
    assert load_index(tmp_path).dropped == {BLANK: 1}


def test_many_blank_captions_end_indexing_and_one_option_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "s" / "0.tar", [{"txt": b"x"}] * 8 + [{"txt": b""}, {"txt": b"nan"}])
    with pytest.raises(UserError, match=r"2 of 10 .*blank caption \(2 times, such as k8.*--keep-blank-captions"):
        index_shards.main([str(tmp_path / "s")])
    assert index_shards.main([str(tmp_path / "s"), "--max-lost", "0.2"]) == 0
    assert "8 samples used, 2 not used (2 x blank caption)" in capsys.readouterr().out
    assert load_index(tmp_path / "s").num_samples == 8
    assert index_shards.main([str(tmp_path / "s"), "--keep-blank-captions"]) == 0
    assert "10 samples used, 0 not used" in capsys.readouterr().out
    index = load_index(tmp_path / "s")  # the decision was stored: embedding and training need no option
    assert index.num_samples == 10 and ShardReader(index).caption(0, 8) == ""
    write(tmp_path / "s" / "1.tar", [{"txt": b"x"}])
    assert load_index(tmp_path / "s").sizes.tolist() == [10, 1]  # and holds when a tar is added


def test_blank_lists_are_always_left_out_and_no_option_claims_to_keep_them(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [{"json": b'{"c": ["x"]}'}] * 8 + [{"json": b'{"c": [" "]}'}] * 2)
    options = [str(tmp_path), "--caption", "json:c.*"]
    with pytest.raises(UserError, match=r"2 of 10 .*blank caption.* are left out: correct them(?!, or keep)"):
        index_shards.main(options)
    with pytest.raises(UserError, match=r"--keep-blank-captions is set, but --caption is json:c\.\*.* json:c\.0$"):
        index_shards.main([*options, "--keep-blank-captions"])


def test_keeping_blanks_scans_only_tars_that_have_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megacid.data import index_build as module

    write(tmp_path / "0.tar", [{"txt": b"x"}] * 30)
    write(tmp_path / "1.tar", [{"txt": b"x"}] * 30 + [{"txt": b""}])
    assert load_index(tmp_path).sizes.tolist() == [30, 30]
    scanned, real = [], module.scan_tar
    monkeypatch.setattr(module, "scan_tar", lambda path, *a, **b: scanned.append(path.name) or real(path, *a, **b))
    assert load_index(tmp_path, keep_blank=True).sizes.tolist() == [30, 31] and scanned == ["1.tar"]


def test_a_sample_with_a_class_and_a_blank_caption_stays_for_classification(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [{"cls": b"1", "txt": b"x"}, {"cls": b"1", "txt": b" "}, {"cls": b"1"}])
    index = load_index(tmp_path)
    assert index.table(0).keys == ["k0", "k1", "k2"] and index.without_text == 2 and index.dropped == {}
    assert ShardReader(index).read(0, 1, "cls") == b"1"
    with pytest.raises(BadSample, match="no text member"):
        ShardReader(index).caption(0, 1)


def test_training_never_sees_a_blank_caption_and_is_not_charged_for_it(tmp_path: Path) -> None:
    blank = {2, 5, 11}
    write(tmp_path / "0.tar", [{"txt": b"null" if i in blank else f"{i}".encode()} for i in range(24)])
    batches = stream(load_index(tmp_path, max_lost=0.2), error_budget=0.0, global_batch=7, micro_batch=7)
    texts = [text for batch in batches for text in batch.text[:, 0].tolist()]
    assert set(texts) == {*range(24)} - blank and batches.bad_samples == 0
    assert batches.statistics()["left_out_by_index"] == {BLANK: 3}


# ---- the teacher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("made_from", "read_from"), [("txt", "json:c"), ("json:c", "txt"), ("json:c", "json:d")])
def test_embeddings_of_other_captions_are_refused_with_both_sources(
    tmp_path: Path, made_from: str, read_from: str
) -> None:
    write(tmp_path / "s" / "0.tar", [{"txt": b"1", **with_fields(c="2", d="3")}] * 8)
    index = load_index(tmp_path / "s", caption=made_from)
    folder = teacher(tmp_path / "t", index)
    meta = json.loads((folder / "meta.json").read_text())
    if made_from != "txt":  # earlier versions recorded none
        (folder / "meta.json").write_text(json.dumps({**meta, "caption": made_from}))
    assert (TeacherTable(folder, index).join(0).row_of >= 0).all()
    message = f"from the captions in '{made_from}', this run reads them from '{read_from}': set data.caption to"
    with pytest.raises(UserError, match=message):
        TeacherTable(folder, load_index(tmp_path / "s", caption=read_from))


def test_a_stream_reads_json_captions(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [{"txt": b"99", **with_fields(c=str(i))} for i in range(24)])
    for batch in stream(load_index(tmp_path, caption="json:c"), workers=0):
        assert batch.text[:, 0].equal(batch.image[:, 0, 0, 0].long())


def test_healthy_shards_have_the_digest_of_before(tmp_path: Path) -> None:
    """Embeddings and labels made by earlier versions stay usable."""
    index = write_pairs(tmp_path / "s")
    assert index.digest == "f58ed5abc2e94c43e4bbf5813bd989fc47353c54e26dbd2d84827fd9d39dba6b"
    assert CaptionSource().index_folder == "index"
