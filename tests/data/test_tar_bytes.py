"""One pass over a tar: what is read while it is hashed, and a tar that is written to meanwhile."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from pair_data import make_tar

from megacid.data import tar_bytes, tar_samples
from megacid.data.index import load_index
from megacid.data.tar_bytes import TarBytes
from megacid.data.tar_samples import MemberGroup, TarScan, scan_tar
from megacid.errors import UserError


@pytest.mark.parametrize("window", [1, 7, 64, 1 << 18])
def test_reads_across_windows_give_the_bytes_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(tar_bytes, "_WINDOW", window)
    data = random.Random(0).randbytes(500)
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    draw = random.Random(1)
    places = sorted(draw.randrange(520) for _ in range(100)) + [draw.randrange(520) for _ in range(20)]  # and backward
    for hashed in (False, True):
        with TarBytes(path, hashed=hashed) as tar:
            for at in places:
                size = draw.randrange(100)
                assert tar.read(at, size) == data[at : at + size]
            if hashed:
                assert tar.sha256() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("window", [512, 700, 1 << 18])  # of a header, across headers, of the whole file
def test_a_hashed_scan_finds_what_a_plain_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(tar_bytes, "_WINDOW", window)
    path = tmp_path / "x.tar"
    make_tar(path, ["a", "b", "k" * 150])
    plain, hashed = scan_tar(path), scan_tar(path, hashed=True)
    assert hashed.keys == plain.keys == ["a", "b", "k" * 150] and hashed.members == plain.members
    assert hashed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and plain.sha256 is None


@pytest.mark.parametrize("change", ["grows", "shrinks", "is overwritten"])
def test_a_tar_that_is_written_to_while_it_is_indexed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    make_tar(tmp_path / "00000.tar", ["a", "b"])
    path, size = tmp_path / "00000.tar", (tmp_path / "00000.tar").stat().st_size
    os.utime(path, (1, 1))  # the clock of the file system may be too coarse for a test
    real = tar_samples.member_groups

    def write_meanwhile(tar: TarBytes, scan: TarScan) -> Iterator[MemberGroup]:
        yield from real(tar, scan)
        if change == "is overwritten":
            with open(path, "rb+") as file:
                file.write(b"x")
        else:
            os.truncate(path, size + 512 if change == "grows" else size - 512)

    monkeypatch.setattr(tar_samples, "member_groups", write_meanwhile)
    with pytest.raises(UserError, match=r"00000.tar was written to while it was read, expected a complete tar: run"):
        load_index(tmp_path)
    assert not list(tmp_path.glob("index/*.json"))
