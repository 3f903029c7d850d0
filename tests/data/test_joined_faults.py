"""The joined table where files cannot be read, tars have nothing to use, or a decision on the shards has changed."""

from __future__ import annotations

import errno
import json
import os
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pair_data import picture, put, save, stream, write_shards
from test_joined import contents, in_processes, sources, write_stages

from megacid.data import index_files, joined, joined_build
from megacid.data.index import load_index
from megacid.data.joined import JoinedTable, JoinSources
from megacid.data.joined_build import open_joined
from megacid.errors import UserError

SIZES = {f"{number:05d}": 3 for number in range(40)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 tars with their stages."""
    write_stages(tmp_path, write_shards(tmp_path / "shards", sizes=SIZES))
    return tmp_path


def test_more_parts_than_descriptors_are_joined(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "PART", 1)
    monkeypatch.setattr(joined_build, "PART", 1)

    def limited() -> None:
        limit = max(map(int, os.listdir("/proc/self/fd"))) + 20
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        assert open_joined(sources(folder)).counts[:, 0].sum() == 96

    assert in_processes([limited]) == [0]
    assert len(contents(folder)) == 2 * 40 + 2


def test_a_part_that_is_damaged_after_it_was_made_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = joined_build._make_parts

    def damaged(made: JoinSources, target: Path, *args: object) -> None:
        make(made, target, *args)  # type: ignore[arg-type]
        path = target / "tars-00001.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    monkeypatch.setattr(joined_build, "_make_parts", damaged)
    with pytest.raises(UserError, match=r"tars-00001.npy is missing, or is not as it was written"):
        open_joined(sources(folder))
    monkeypatch.undo()
    assert open_joined(sources(folder)).counts[:, 0].sum() == 96


def test_a_tar_without_a_usable_sample_is_joined_with_views(folder: Path) -> None:
    meta = json.loads((folder / "teacher/meta.json").read_text())
    meta["views"] = {"count": 2, "seed": 3, "crops": "x"}
    (folder / "teacher/meta.json").write_text(json.dumps(meta))
    for number in range(40):
        save(folder / f"teacher/view_emb/view_emb_{number:05d}.npy", np.ones((6, 2), np.float16))
    save(folder / "balance/keep/00001.npy", np.zeros(3, bool))
    table = open_joined(sources(folder))
    assert table.counts[:3, 0].tolist() == [2, 0, 3] and len(table.tar(1)) == 0
    assert len(set(table.tar(2)["seeds"].ravel().tolist())) == 6


def test_another_decision_on_blank_captions_gets_another_table(tmp_path: Path) -> None:
    """A sample with a class stays in the index either way, so the keys do not tell."""
    (tmp_path / "shards").mkdir()
    for name, blank in (("0", b" "), ("1", b"1")):
        with tarfile.open(tmp_path / f"shards/{name}.tar", "w") as tar:
            for number, caption in enumerate((blank, b"2")):
                put(tar, f"k{number}.png", picture(number))
                put(tar, f"k{number}.cls", b"0")
                put(tar, f"k{number}.txt", caption)

    def usable(keep_blank: bool) -> tuple[str, list[int]]:
        made = JoinSources(load_index(tmp_path / "shards", keep_blank=keep_blank))
        return made.digest, open_joined(made).counts[:, 0].tolist()

    without, kept = usable(False), usable(True)
    assert (without[1], kept[1]) == ([1, 2], [2, 2]) and without[0] != kept[0]
    (tmp_path / "shards/0.tar").unlink()  # the other tar has no blank caption
    assert usable(False) == usable(True)


def test_another_version_of_the_index_gets_another_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sources(folder)
    digest = made.digest
    monkeypatch.setattr(index_files, "VERSION", index_files.VERSION + 1)
    assert JoinSources(made.index, made.teacher, made.labels, made.keep).digest != digest


def read_a_sample(table: JoinedTable) -> None:
    shards, rows = np.array([1]), table.rows(np.array([1]), np.array([0]))
    table.embeddings(shards, rows, np.zeros((1, 2), np.int64))


@pytest.mark.parametrize("call", ["preadv", "pread"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE], ids=["EIO", "ESTALE"])
def test_a_read_that_fails_names_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    table = open_joined(sources(folder))
    read_a_sample(table)

    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fails)
    name = {"preadv": "rows-00000.npy", "pread": "img_emb_00001.npy"}[call]
    with pytest.raises(UserError, match=rf"{name} cannot be read \({os.strerror(code)}\): .*check that disk"):
        read_a_sample(table)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOENT], ids=["EACCES", "EMFILE", "ENOENT"])
def test_only_missing_embeddings_are_to_be_computed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    table, real = open_joined(sources(folder)), os.open

    def fails(path: object, *args: int) -> int:
        if "img_emb" in str(path):
            raise OSError(code, os.strerror(code))
        return real(str(path), *args)

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(UserError, match=r"img_emb_00001.npy") as raised:
        read_a_sample(table)
    assert ("tools/embed.py" in str(raised.value)) == (code == errno.ENOENT)
    assert ("permissions" in str(raised.value)) == (code != errno.ENOENT)


def test_all_rows_of_a_tar_are_one_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, reads, real = open_joined(sources(folder)), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: reads.append(args) or real(*args))
    assert table.tar(4)["row"].tolist() == [0, 1, 2] and len(reads) == 1
    assert (table.tar(4) == table.rows(np.full(3, 4), np.arange(3))).all()


def test_a_bad_sample_is_named_by_its_row_when_its_index_is_gone(folder: Path) -> None:
    write_shards(folder / "damaged", damaged={1}, sizes={"0": 4})
    open_joined(JoinSources(load_index(folder / "damaged")))
    batches = stream(load_index(folder / "damaged"), global_batch=2, micro_batch=2, total_steps=2)
    (folder / "damaged/index/0.keys.json").unlink()
    received = list(batches)
    assert not any(batch.failure for batch in received)
    assert any("0/row 1" in reason for batch in received for reason in batch.replaced)
