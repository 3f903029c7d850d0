"""Embeddings, labels and masks on an HTTP server give the batches that they give on a disk, or one clear error."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pair_data import write_parquet
from remote_data import EMPTY, Remote, check_same, read, remote_shards, short_waits, tables, write_side_tables

from megacid.data.joined import JoinSources
from megacid.data.joined_build import open_joined
from megacid.data.pipes.commands import find_pipes
from megacid.data.pipes.side_files import SideFiles
from megacid.data.side_tables import LabelTable
from megacid.data.sources import check_sources_agree
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError
from tools import index_shards

pytest.importorskip("aiohttp")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """Eight tars and their side tables on a server; attempts end after half a second."""
    short_waits(monkeypatch)
    with remote_shards(tmp_path) as made:
        write_side_tables(tmp_path / "store", made.local)
        yield made


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("tars", ["remote", "local"])
def test_the_batches_are_those_of_side_tables_on_a_disk(remote: Remote, tars: str, workers: int) -> None:
    want = read(remote.local, tables(remote.root / "store", remote.local))
    shown = {int(value) for batch in want for value in batch.teacher_image[:, 0]}
    assert shown == {row for row in range(63) if row % 7 != 3 and not 39 <= row < 48}
    shutil.rmtree(next((remote.root / "store" / "index").glob("joined-*")))  # made again, of the remote files
    index = remote.index() if tars == "remote" else remote.local
    remote.server.gets.clear()
    space = remote.cache(tars=8, name="cache")
    check_same(want, read(index, tables(remote.url, index, space), workers=workers))
    fetched = {name for name in remote.server.gets if name.endswith(".npy")}
    assert {f"{kind}_emb_{number:05d}.npy" for kind in ("img", "text") for number in (0, 1, 7)} <= fetched
    assert not fetched & {"img_emb_00005.npy", "centroids.npy"}


def test_a_join_of_remote_files_has_the_bytes_of_one_of_local_files(remote: Remote, monkeypatch: Any) -> None:
    """And it reads no embeddings."""
    monkeypatch.setenv("MEGACID_CACHE_DIR", str(remote.root / "cache"))
    made = []
    for where in (str(remote.root / "store"), remote.url):
        folders = (f"{where}/{name}" for name in ("teacher", "clusters", "balance"))
        options = [word for pair in zip(("--teacher", "--labels", "--keep"), folders) for word in pair]
        assert index_shards.main([str(remote.root / "store"), "--join", *options]) == 0
        (folder,) = (remote.root / "store" / "index").glob("joined-*")
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
        shutil.rmtree(folder)
    assert made[0] == made[1] and {"tars.npy", "rows-00000.npy"} <= made[0].keys()
    assert not [name for name in remote.server.gets if "_emb_" in name]


def test_faults_on_the_way_change_nothing(remote: Remote) -> None:
    want = read(remote.local, tables(remote.root / "store", remote.local))
    shutil.rmtree(next((remote.root / "store" / "index").glob("joined-*")))
    remote.server.faults = {
        "meta.json": ["503"], "metadata_00000.parquet": ["cut"], "00001.parquet": ["503"], "00002.npy": ["cut"],
        "img_emb_00000.npy": ["cut"], "text_emb_00001.npy": ["503"], "img_emb_00002.npy": ["short length"],
    }  # fmt: skip
    check_same(want, read(remote.local, tables(remote.url, remote.local, remote.cache()), workers=1))
    assert not any(remote.server.faults.values())


def test_embeddings_that_are_missing_or_changed_end_the_run_with_their_url(remote: Remote) -> None:
    side = tables(remote.url, remote.local, remote.cache())
    path = remote.root / "store" / "teacher" / "img_emb" / "img_emb_00003.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x7f")
    failures = {batch.failure for batch in read(remote.local, side)} - {None}
    (failure,) = failures
    url = f"{remote.url}/teacher/img_emb/img_emb_00003.npy"
    assert str(failure).startswith(f"{url} has changed ({len(whole):,} bytes with sha256 ")
    assert str(failure).endswith("put back the file that its stage has written, or run the stage again")
    path.unlink()
    (failure,) = {batch.failure for batch in read(remote.local, side)} - {None}
    assert str(failure).startswith(f"{url} does not exist in its store")


MISSING = {
    "teacher/meta.json": "run tools/embed.py first and copy its whole output there, or correct the URL",
    "teacher/metadata/metadata_00002.parquet": "run tools/embed.py again",
    "clusters/labels/00004.parquet": "run tools/cluster.py again",
    "balance/keep/00006.npy": "run tools/balance.py again",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_file_that_the_join_needs_is_named_by_its_url(remote: Remote, name: str) -> None:
    path = remote.root / "store" / name
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError) as error:
        open_joined(JoinSources(remote.local, **tables(remote.url, remote.local, remote.cache())))
    missing = f"{remote.url}/{name} does not exist in its store, expected a file of a finished stage: {MISSING[name]}"
    assert str(error.value) == missing
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=re.escape(f"{remote.url}/{name}")):
        open_joined(JoinSources(remote.local, **tables(remote.url, remote.local, remote.cache())))


def test_what_an_earlier_version_wrote_has_no_sha256_and_is_refused(remote: Remote) -> None:
    folder = remote.root / "store"
    for number in range(8):
        keys = [f"k{row}" for row in range(*remote.local.starts[number : number + 2])][::-1]
        if number != int(EMPTY):
            write_parquet(folder / "teacher" / "metadata" / f"metadata_{number:05d}.parquet", image_path=keys)
    local = tables(folder, remote.local)
    read(remote.local, local)  # as before
    side = tables(remote.url, remote.local, remote.cache())
    for _ in range(2):  # with and without a joined table
        with pytest.raises(UserError, match=r"img_emb_00000.npy have no record of its sha256.*copy the embeddings to"):
            read(remote.local, side)
        shutil.rmtree(next((folder / "index").glob("joined-*")), ignore_errors=True)
    meta = json.loads((folder / "clusters" / "meta.json").read_text())
    del meta["centroids"]
    (folder / "clusters" / "meta.json").write_text(json.dumps(meta))
    table = LabelTable(f"{remote.url}/clusters", remote.local, cache=remote.cache())
    with pytest.raises(UserError, match=r"has no size and sha256 of centroids.npy.*copy the directory to a disk"):
        table.centroids().__enter__()


def test_a_damaged_record_is_refused(remote: Remote) -> None:
    path = remote.root / "store" / "teacher" / "metadata" / "metadata_00001.parquet"
    table = pq.read_table(path)
    record = table.schema.metadata[b"megacid.arrays"]
    for old, new in ((b'"bytes": 8', b'"bytes": 9'), (b'"sha256": "', b'"sha255": "'), (b"{", b"")):
        assert old in record
        pq.write_table(table.replace_schema_metadata({b"megacid.arrays": record.replace(old, new)}), path)
        with pytest.raises(UserError, match=r"metadata_00001.parquet has a damaged record of its arrays"):
            open_joined(JoinSources(remote.local, tables(remote.url, remote.local, remote.cache())["teacher"]))


def test_the_cache_must_hold_the_embeddings_of_the_blocks_too(remote: Remote) -> None:
    index = remote.index()
    object.__setattr__(index.paths, "cache", remote.cache(tars=5))
    assert len(read(index, tables(remote.root / "store", index))) == 20  # four tars
    side = tables(remote.url, index, remote.cache(tars=5))
    with pytest.raises(UserError, match=r'"megacid.data.cache_gb" is 0.0001536, .* the size of the 12 files that are'):
        read(index, side)


def test_centroids_are_fetched_once_and_compared_by_their_sha256(remote: Remote) -> None:
    tables_ = {where: tables(where, remote.local, remote.cache()) for where in (remote.root / "store", remote.url)}
    local, far = (found["labels"] for found in tables_.values())
    for _ in range(2):
        with local.centroids() as path, far.centroids() as fetched:
            assert path.read_bytes() == fetched.read_bytes() and fetched.is_relative_to(remote.root / "cache")
    assert remote.server.gets["centroids.npy"] == 1 and local.centroids_sha256 == far.centroids_sha256
    sources = {name: JoinSources(remote.local, labels=table) for name, table in (("a", local), ("b", far))}
    check_sources_agree(sources)
    far.meta["centroids"]["sha256"] = "0" * 64
    del far.__dict__["centroids_sha256"]
    with pytest.raises(UserError, match=r"labels of other clusters than .*centroids.npy has other values"):
        check_sources_agree(sources)


def test_commands_take_side_tables_from_a_disk(remote: Remote) -> None:
    with pytest.raises(UserError, match=r"is a URL, and data.shards are commands, whose side tables are read from a"):
        SideFiles.open(find_pipes("pipe:cat 00000.tar"), "txt", [f"{remote.url}/teacher"], None, 1, None)


def test_a_remote_table_without_a_cache_is_refused(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGACID_CACHE_DIR", raising=False)
    with pytest.raises(UserError, match=r"/teacher is remote and has no cache: set MEGACID_CACHE_DIR, or data.cache_d"):
        TeacherTable(f"{remote.url}/teacher", remote.local)
