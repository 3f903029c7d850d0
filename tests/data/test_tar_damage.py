"""F16: tars that are cut, overwritten or unusual. Picture and caption both name their sample, which shows a mixture."""

from __future__ import annotations

import os
import random
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from pair_data import peak_mib, picture, put, stream

from megacid.data.index import ShardReader, load_index
from megacid.data.index_verify import verify_index
from megacid.data.tar_headers import MAX_MEMBERS
from megacid.errors import UserError

PER_TAR, TARS = 8, 3
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def key_of(number: int, long: bool = False) -> str:
    return f"s{number:03d}" + ("_" + "x" * 140 if long else "")


def write(folder: Path, form: int = tarfile.USTAR_FORMAT, long: bool = False) -> None:
    folder.mkdir()
    for shard in range(TARS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=form) as tar:
            for row in range(PER_TAR):
                number = shard * PER_TAR + row
                put(tar, f"{key_of(number, long)}.png", picture(number))
                put(tar, f"{key_of(number, long)}.txt", f"{number}".encode())
                put(tar, f"{key_of(number, long)}.json", b'{"number": %d}' % number)


def check(folder: Path, world: int, damaged: str, complete: set[str]) -> None:
    """Read everything through the index and through the stream: whole samples, each with its own picture and text, and
    every key that is missing has been named or lies behind the damage."""
    index = load_index(folder, allow_bad=True)
    reader = ShardReader(index)
    used = set()
    for shard, name in enumerate(index.names):
        for row, key in enumerate(index.table(shard).keys):
            number = int(key[1:4])
            assert reader.read(shard, row, "text") == f"{number}".encode(), "a text of another sample"
            assert reader.read(shard, row, "image") == picture(number), "a picture of another sample"
            assert reader.read(shard, row, "json") == b'{"number": %d}' % number, "a partial sample"
            used.add(key)
        if name != damaged:
            assert len(index.table(shard).keys) == PER_TAR
    named = {key for entry in index.shards for names in entry["dropped_names"].values() for key in names}
    assert not used & named
    entry = next(entry for entry in index.shards if entry["name"] == damaged)
    assert entry["damage"]
    assert complete <= used, "an intact sample before the damage is not used"
    order = []
    for rank in range(world):
        batches = stream(index, global_batch=4, micro_batch=4 // world, rank=rank, world=world, total_steps=8)
        for batch in batches:
            assert batch.failure is None and batch.image[:, 0, 0, 0].long().equal(batch.text[:, 0])
            order += batch.text[:, 0].tolist()
    assert {key_of(number) for number in order} <= {key[:4] for key in used}


def offsets(path: Path, count: int) -> list[int]:
    """Seeded places to cut: headers, payloads and padding in turn."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    chosen = random.Random(16)
    places = []
    for i in range(count):
        member = chosen.choice(members)
        end = member.offset_data + member.size
        low, high = [
            (member.offset, member.offset_data - 1),
            (member.offset_data, end - 1),
            (end, end + (-member.size) % 512),
        ][i % 3]
        places.append(chosen.randint(low, high))
    return places


@pytest.mark.parametrize("form", FORMATS)
def test_no_cut_of_fifty_mixes_or_halves_a_sample(tmp_path: Path, form: str) -> None:
    long = form != "ustar"  # which cannot hold such names: the others write extended headers
    write(tmp_path / "whole", FORMATS[form], long)
    path = tmp_path / "whole" / "00001.tar"
    with tarfile.open(path) as tar:
        ends = {m.name.partition(".")[0]: m.offset_data + -(-m.size // 512) * 512 for m in tar if m.name[-4:] == "json"}
    data = path.read_bytes()
    for number, cut in enumerate(offsets(path, 50)):
        folder = tmp_path / f"cut{number}"
        folder.mkdir()
        for name in ("00000.tar", "00002.tar"):
            (folder / name).symlink_to(tmp_path / "whole" / name)
        (folder / "00001.tar").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"00001.tar is damaged \(.*\) after \d+ intact samples: .* --allow-bad"):
            load_index(folder)
        complete = {key for key, end in ends.items() if end <= cut}
        # Of a tar's very first sample nothing tells how many members it should have had.
        check(folder, 1 + number % 2, "00001", complete if len(complete) > 1 else set())
        entry = load_index(folder).shards[1]
        assert entry["damage"] and str(cut) in entry["damage"]
        begun = {key for names in entry["dropped_names"].values() for key in names}
        assert len(begun) <= 1 and (begun <= ends.keys() - complete or len(complete) == 1)


@pytest.mark.parametrize("filler", [b"\0", b"\xff", b"\xa5<html>"])
def test_a_block_of_garbage_over_a_header_is_found_and_nothing_behind_it_is_used(tmp_path: Path, filler: bytes) -> None:
    for number in (0, 7, 11, 23):
        folder = tmp_path / f"at{number}"
        write(folder)
        path = folder / "00001.tar"
        with tarfile.open(path) as tar:
            at = tar.getmembers()[number].offset
        data = path.read_bytes()
        path.write_bytes(data[:at] + (filler * 512)[:512] + data[at + 512 :])
        with pytest.raises(UserError, match=rf"00001.tar is damaged \(.* at byte {at}"):
            load_index(folder)
        check(folder, 2, "00001", {key_of(PER_TAR + row) for row in range(number // 3)})


def test_garbage_inside_a_picture_is_found_when_it_is_decoded_and_by_verify(tmp_path: Path) -> None:
    write(tmp_path / "shards")
    index = load_index(tmp_path / "shards")
    offset, size = index.table(1).image[3].tolist()
    with open(index.tar_path(1), "r+b") as file:
        file.seek(offset + size // 2)
        file.write(random.Random(1).randbytes(size // 2))
    assert verify_index(index.root) == ["00001.tar has the right size but another sha256"]
    batches = list(stream(load_index(index.root), total_steps=3))
    assert all(b.image[:, 0, 0, 0].long().equal(b.text[:, 0]) for b in batches)
    replaced = [sentence for batch in batches for sentence in batch.replaced]
    assert len(replaced) == 1 and replaced[0].startswith(f"00001/{key_of(PER_TAR + 3)}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"\0" * 100, "inside a header"), (b"<html>not found</html>" * 60, "no valid header")],
    ids=["empty", "short", "html"],
)
def test_a_file_that_is_no_tar(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path / "shards")
    (tmp_path / "shards" / "00001.tar").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_index(tmp_path / "shards")
    check(tmp_path / "shards", 1, "00001", set())


def test_an_end_mark_without_members_is_an_empty_shard(tmp_path: Path) -> None:
    write(tmp_path / "shards")
    (tmp_path / "shards" / "00001.tar").write_bytes(bytes(1024))
    assert load_index(tmp_path / "shards").sizes.tolist() == [PER_TAR, 0, PER_TAR]


def test_a_second_archive_behind_the_first_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "shards")
    path = tmp_path / "shards" / "00001.tar"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match="data behind the end-of-archive mark"):
        load_index(tmp_path / "shards")


def test_odd_orders_of_members_never_mix(tmp_path: Path) -> None:
    """Interleaved and repeated keys, members that lack their partner: dropped and named."""
    folder = tmp_path / "shards"
    write(folder)
    with tarfile.open(folder / "00003.tar", "w") as tar:
        for name, number in [
            ("a.png", 1), ("b.png", 2), ("a.txt", 1), ("b.txt", 2),  # interleaved
            ("c.png", 3), ("c.txt", 3), ("d.png", 4), ("d.txt", 4), ("c.png", 5), ("c.txt", 5),  # c again
            ("e.png", 6), ("e.png", 7), ("e.txt", 7),  # two pictures
            ("f.txt", 8), ("g.png", 9), ("h.json", 10),
            ("i.png", 11), ("i.txt", 11),
        ]:  # fmt: skip
            put(tar, name, picture(number) if name[-3:] == "png" else f"{number}".encode())
    index = load_index(folder, allow_bad=True)
    assert index.table(3).keys == ["c", "d", "e", "i"]
    assert index.shards[3]["dropped_names"] == {
        "members not adjacent": ["a", "b"],
        "sample without a text": ["e", "g"],
        "sample without an image": ["f", "h"],
        "duplicate key": ["c"],
    }
    for batch in stream(index, global_batch=4, micro_batch=4, total_steps=7):
        assert batch.image[:, 0, 0, 0].long().equal(batch.text[:, 0])


# ---- a tar that changes after it was indexed ---------------------------------------------------------------------


def test_a_tar_cut_after_indexing_is_indexed_again_or_gives_bad_samples(tmp_path: Path) -> None:
    write(tmp_path / "shards")
    index = load_index(tmp_path / "shards")
    cut = int(index.table(1).text[5, 0]) + 1
    os.truncate(index.tar_path(1), cut)
    # A reader that already has the index: what is gone is replaced, nothing else is read in its place.
    batches = list(stream(index, total_steps=3, error_budget=1.0))
    assert all(b.image[:, 0, 0, 0].long().equal(b.text[:, 0]) for b in batches)
    replaced = {s.partition(":")[0] for b in batches for s in b.replaced}
    assert replaced == {f"00001/{key_of(PER_TAR + row)}" for row in (5, 6, 7)}
    assert all("the tar was cut" in s for b in batches for s in b.replaced)
    # The next start sees another size.
    with pytest.raises(UserError, match=r"00001.tar is damaged .* after 5 intact samples"):
        load_index(tmp_path / "shards")
    check(tmp_path / "shards", 2, "00001", {key_of(PER_TAR + row) for row in range(5)})


# ---- headers made to do harm -------------------------------------------------------------------------------------


def header(name: str, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    block = bytearray(512)
    block[:100] = name.encode().ljust(100, b"\0")
    block[100:108], block[124:136], block[156:157], block[257:265] = b"0000644\0", size.ljust(12, b"\0"), kind, magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")


HOSTILE = {
    "3 GiB member": (header("a.png", octal(3 << 30)), "a.png has 3221225472 bytes"),
    "2^80 bytes": (header("a.png", octal(1 << 80)), "but the file ends at byte"),
    "negative size": (header("a.png", b"\xff" * 12), "its size is"),
    "signed octal": (header("a.png", b"-0000000777"), "its size is"),
    "underscores": (header("a.png", b"0_0"), "its size is"),
    "3 GiB long name": (header("x", octal(3 << 30), b"L", b"ustar  \0"), "an extended header of 3221225472 bytes"),
    "3 GiB pax": (header("x", octal(3 << 30), b"x"), "an extended header of 3221225472 bytes"),
    "pax loop": (header("x", octal(512), b"x") + b"0 path=a\n".ljust(512, b"\0"), "a pax header that cannot be read"),
    "pax size": (header("x", octal(512), b"x") + b"18 size=1234567890123456789012345\n".ljust(512), "pax header"),
    "many long names": (header("x", octal(0), b"L", b"ustar  \0") * 5000, "no end-of-archive mark"),
    "sparse for ever": (header("x", octal(0), b"S", b"ustar  \0")[:482] + b"\1" + bytes(29), "no valid header"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_made_to_do_harm_is_refused_without_memory(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "x.tar").write_bytes(content)
    before = peak_mib(reset=True)
    with pytest.raises(UserError) as error:
        load_index(tmp_path)
    assert "x.tar is damaged" in str(error.value) and message in str(error.value)
    assert peak_mib() - before < 50


def test_more_members_than_a_shard_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_MEMBERS == 1_000_000
    monkeypatch.setattr("megacid.data.tar_headers.MAX_MEMBERS", 10)
    write(tmp_path / "shards")
    with pytest.raises(UserError, match="more than 10 members"):
        load_index(tmp_path / "shards")


def test_pax_records_decide_name_and_size_as_they_do_for_the_standard_reader(tmp_path: Path) -> None:
    name = "ünï/" + "y" * 120 + ".png"
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}) as tar:
        put(tar, name, picture(3), pax_headers={"size": str(len(picture(3)))})
        put(tar, name[:-3] + "txt", b"3", mtime=1.5)  # a fraction needs a record as well
        put(tar, "b.png", picture(4))
        put(tar, "b.txt", b"4")
    index = load_index(tmp_path)
    assert index.table(0).keys == [name[:-4], "b"]
    assert ShardReader(index).read(0, 0, "image") == picture(3) and ShardReader(index).read(0, 1, "text") == b"4"


@pytest.mark.parametrize("length, text", [(11, [2560, 1]), (25, [-1, -1])])
def test_a_time_in_a_pax_header_hides_no_other_record(tmp_path: Path, length: int, text: list[int]) -> None:
    # With the length 25 the rest belongs to the value of the time.
    records = b"%d mtime=1\n14 path=b.txt\n" % length
    members = header("b.png", octal(1)), header("x", octal(len(records)), b"x"), header("b.cls", octal(1))
    data = b"x", records, b"0"
    blob = b"".join(member + content.ljust(512, b"\0") for member, content in zip(members, data))
    (tmp_path / "x.tar").write_bytes(blob + bytes(1024))
    assert load_index(tmp_path).table(0).text.tolist() == [text]


def test_names_that_are_no_text_are_dropped_and_can_be_logged(tmp_path: Path) -> None:
    raw = b"\xff\xfe.png"
    blob = header("ok.png", octal(1)) + b"x".ljust(512, b"\0") + header("ok.txt", octal(1)) + b"x".ljust(512, b"\0")
    bad = bytearray(header("Z.png", octal(0)))
    bad[:100] = raw.ljust(100, b"\0")
    bad[148:156] = b" " * 8
    bad[148:156] = b"%06o\0 " % sum(bad)
    (tmp_path / "x.tar").write_bytes(bytes(bad) + header("a\nb.png", octal(0)) + blob + bytes(1024))
    index = load_index(tmp_path)
    assert index.table(0).keys == ["ok"] and index.dropped == {"unsafe name": 2}
    assert index.shards[0]["dropped_names"]["unsafe name"] == ["\\udcff\\udcfe.png", "a\\nb.png"]


def test_a_member_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    from megacid.data.decode import BadSample

    with open(tmp_path / "x.tar", "wb") as file:
        file.write(header("a.png", octal(3 << 30)))
        file.truncate(512 + (3 << 30))  # a hole: the file is as long as it says, and takes no disk
        file.seek(0, os.SEEK_END)
        file.write(header("a.txt", octal(1)) + b"7".ljust(512, b"\0") + bytes(1024))
    from megacid.data.tar_samples import scan_tar

    scan = scan_tar(tmp_path / "x.tar")
    assert scan.keys == ["a"] and scan.damage is None
    write(tmp_path / "shards")
    index = load_index(tmp_path / "shards")
    index.table(0).members[0] = scan.members[0]
    (tmp_path / "shards" / "00000.tar").unlink()
    (tmp_path / "shards" / "00000.tar").symlink_to(tmp_path / "x.tar")
    before = peak_mib(reset=True)
    with pytest.raises(BadSample, match=rf"image of {3 << 30} bytes, more than {64 << 20}"):
        ShardReader(index).read(0, 0, "image")
    assert peak_mib() - before < 50


# ---- webdataset itself -------------------------------------------------------------------------------------------


def test_our_reader_agrees_with_webdataset_on_what_its_writer_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=5, verbose=0) as sink:
        for number in range(12):
            key = f"dir/{number:04d}" if number % 2 else "k" * 110 + f"{number}"
            sink.write({"__key__": key, "png": picture(number), "txt": f"text {number}", "json": {"n": number}})
    index = load_index(folder)
    reader = ShardReader(index)
    ours, theirs = [], []
    for shard in range(len(index.names)):
        for row, key in enumerate(index.table(shard).keys):
            ours.append((key, *(reader.read(shard, row, kind) for kind in ("image", "text", "json"))))
        for sample in wds.WebDataset(str(index.tar_path(shard)), shardshuffle=False):
            theirs.append((sample["__key__"], sample["png"], sample["txt"], sample["json"]))
    assert ours == theirs and len(ours) == 12 and index.names == ["00000", "00001", "00002"]
