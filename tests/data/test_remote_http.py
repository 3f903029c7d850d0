"""Shards on an HTTP server give the same batches as on a disk, also with faults on the way, or one clear error."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pair_data import make_tar
from remote_data import TAR, Remote, all_same, batches, remote_shards, short_waits, small_steps

from megacid.data import index_build
from megacid.data.index import ShardReader, load_index
from megacid.data.index_verify import verify_index
from megacid.data.remote import ahead
from megacid.distributed.divided_work import Workers
from megacid.errors import UserError
from megacid.storage import object_store as store
from tools import index_shards

pytest.importorskip("aiohttp")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """Six tars on a server; attempts end after half a second, and the first waits are short."""
    short_waits(monkeypatch)
    with remote_shards(tmp_path) as made:
        yield made


SPELLINGS = [
    "URL", "URL/", "URL/*.tar", "URL/{00000..00007}.tar", "URL/0000[0-7]*",
    "URL/{00000..00003}.tar::DISK/0000[4-7].tar",
    "DISK/{00000,00002,00004}.tar::URL/00001.tar::URL/0000{3,5}.tar::DISK/0000[67].tar",
]  # fmt: skip


def test_remote_tars_are_found_however_they_are_named(remote: Remote) -> None:
    want = batches(remote.local)
    for spelling in SPELLINGS:
        shards = spelling.replace("URL", remote.url).replace("DISK", str(remote.root / "store"))
        index = remote.index(shards=shards)
        assert index.digest == remote.local.digest and index.names == remote.local.names
        assert remote.index(shards=index.paths.source).digest == index.digest
        assert all_same(want, batches(index))
    assert set(remote.server.gets.values()) == {1}  # one transfer for index and reading


def test_a_forked_process_leaves_the_connections_of_its_parent_alone(remote: Remote) -> None:
    """The event loops of both watch the same connections."""
    store.list_tars(remote.url)
    child = multiprocessing.get_context("fork").Process(target=store.list_tars, args=(remote.url,))
    child.start()
    child.join(20)
    assert child.exitcode == 0 and len(store.list_tars(remote.url)) == 8


def test_a_start_with_an_index_asks_the_server_for_nothing(remote: Remote) -> None:
    remote.index()
    heads, gets = remote.server.heads.copy(), remote.server.gets.copy()
    remote.index(shards=f"{remote.url}/{{00000..00007}}.tar", fetch_limit=0)
    assert (remote.server.heads, remote.server.gets) == (heads, gets)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_small_cache_gives_the_same_batches_and_keeps_its_size(remote: Remote, workers: int) -> None:
    index = remote.index(name="small", tars=5)
    remote.forget("small")
    directory, most = remote.root / "small", 0
    got = []
    for batch in small_steps(index, total_steps=40, workers=workers, prefetch=1):
        got.append(batch)
        # Files of the content and those that are being fetched; a worker reads removed ones to their end.
        most = max(most, sum(_size(path) for path in directory.glob("*/*") if path.suffix in (".tar", ".part")))
    assert all_same(batches(remote.local, total_steps=40), got)
    assert 0 < most <= 5 * TAR and min(remote.server.gets.values()) > 1


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


PASSING = [["503"], ["cut"], ["short length"], ["long length"], ["no length"], ["slow"], ["503", "cut"], []]


def test_faults_that_pass_change_no_bit(remote: Remote) -> None:
    index = remote.index()
    remote.forget()
    remote.server.slow_s = 0.2
    remote.server.faults = {f"{name}.tar": list(faults) for name, faults in zip(index.names, PASSING)}
    assert all_same(batches(remote.local), batches(index, workers=1))
    assert not any(remote.server.faults.values())  # all of them happened


STAYING = {
    "404": "/0000{shard}.tar does not exist in its store (FileNotFoundError",
    "403": "/0000{shard}.tar may not be read (ClientResponseError: 403, message='Forbidden'",
    "503": "/0000{shard}.tar cannot be read, tried",
    "cut": "/0000{shard}.tar cannot be read, tried",
    "hang": "/0000{shard}.tar cannot be read, tried",
    "long length": "/0000{shard}.tar cannot be read, tried",
    "short length": "/0000{shard}.tar has changed (15,360 bytes with sha256",
    "no length": "/0000{shard}.tar has changed (15,360 bytes with sha256",
}


@pytest.mark.parametrize(
    "fault", [f if f in ("404", "hang", "short length") else pytest.param(f, marks=pytest.mark.slow) for f in STAYING]
)
def test_faults_that_stay_end_the_stream_with_the_url(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    index = remote.index()
    remote.forget()
    monkeypatch.setattr(store, "RETRY_S", 0.6)
    monkeypatch.setattr(store, "SILENCE_S", 0.5)
    _, _, (shard, *_) = next(small_steps(index).readers[0].order.blocks(0))
    remote.server.faults = {f"{index.names[shard]}.tar": fault}
    began = time.monotonic()
    got = batches(index, workers=1)
    assert time.monotonic() - began < 20
    failures = {batch.failure for batch in got[-2:]}
    assert len(failures) == 1 and STAYING[fault].format(shard=shard) in str(failures.pop())


def test_the_store_says_where_credentials_are_found(remote: Remote) -> None:
    remote.server.faults = {"00003.tar": "403"}
    with pytest.raises(UserError, match=r"/00003.tar may not be read .*: the store finds credentials in the v"):
        remote.index(ask=True)
    with pytest.raises(UserError, match=r"^http://...@127.0.0.1:.*/ has a user name or password") as error:
        remote.index(shards=remote.url.replace("//", "//me:secret@") + "/")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("same_size", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_object_that_changed_is_named_and_only_indexed_again_when_told(remote: Remote, same_size: bool) -> None:
    index = remote.index()
    remote.forget()
    changed = remote.root / "store" / "00002.tar"
    shutil.copy(remote.root / "store" / "00005.tar", changed)
    if not same_size:
        make_tar(changed, [f"key{number}" for number in range(40)])
    # Without a listing that tells, the fetch notices.
    got = batches(index)
    assert "/00002.tar has changed (" in str(got[-1].failure)
    with pytest.raises(UserError, match=r"/00002.tar has changed since it was indexed: put it back, or run MEGACID"):
        remote.index(ask=True, fetch_limit=10**9)
    assert any("/00002.tar has " in line for line in _verified(remote))
    again = remote.index(ask=True)
    assert again.digest != index.digest and _verified(remote) == []


def _verified(remote: Remote) -> list[str]:
    os.environ["MEGACID_CACHE_DIR"] = str(remote.root / "cache")
    try:
        return verify_index(remote.url)
    finally:
        del os.environ["MEGACID_CACHE_DIR"]


def test_verify_reports_no_mismatch_when_a_tar_cannot_be_fetched(remote: Remote) -> None:
    remote.index()
    remote.forget()
    remote.server.faults = {"00002.tar": ["503"] * 100}
    with pytest.raises(UserError, match=r"/00002.tar cannot be read, tried for "):
        _verified(remote)


def test_verify_uses_as_few_processes_as_an_index_build(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "_PROCESS_BYTES", 1.0)
    used: list[int] = []
    divide = Workers.divide
    monkeypatch.setattr(Workers, "divide", lambda self, *args: used.append(args[2]) or divide(self, *args))
    monkeypatch.setenv("MEGACID_CACHE_DIR", str(remote.root / "new"))
    monkeypatch.setenv("MEGACID_CACHE_GB", "0.0001")  # three tars
    load_index(remote.url, workers=Workers(processes=8))
    assert verify_index(remote.url, workers=Workers(processes=8)) == []
    assert used[1:] == [0, 0]  # of the build and of the verification: this process alone


def test_a_run_does_not_begin_with_a_long_index(remote: Remote) -> None:
    with pytest.raises(
        UserError, match=r"^8 remote tars of http.* are not indexed, of at least .* GB.*index_shards.py"
    ):
        remote.index(fetch_limit=7 * TAR)
    assert not remote.server.gets
    assert remote.index(fetch_limit=8 * TAR).digest == remote.local.digest


def test_the_tool_indexes_a_url(remote: Remote, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("MEGACID_CACHE_DIR", str(remote.root / "new" / "cache"))
    monkeypatch.setenv("MEGACID_CACHE_GB", "0.00007")  # two tars
    assert index_shards.main([remote.url]) == 0
    assert f"{remote.url}: 8 shards, 63 samples used" in capsys.readouterr().out
    assert index_shards.main([remote.url, "--verify"]) == 0
    assert load_index(remote.url).digest == remote.local.digest
    monkeypatch.setenv("MEGACID_CACHE_DIR", str(remote.root / "other"))
    monkeypatch.setenv("MEGACID_CACHE_GB", "0.00002")
    with pytest.raises(UserError, match=r"other is too small: http.*/00000.tar has 30,720 bytes, and 0 are in use"):
        index_shards.main([remote.url])
    monkeypatch.setenv("MEGACID_CACHE_GB", "many")
    with pytest.raises(UserError, match=r"^MEGACID_CACHE_GB is 'many', expected a number of GB above 0"):
        load_index(remote.url)


def test_a_tar_that_is_damaged_in_the_store_is_named_by_its_url(remote: Remote) -> None:
    path = remote.root / "store" / "00001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=rf"^{re.escape(remote.url)}/00001.tar is damaged"):
        remote.index()


def test_the_fetcher_may_be_killed(remote: Remote, caplog: pytest.LogCaptureFixture) -> None:
    index = remote.index(name="small", tars=5)
    remote.forget("small")
    remote.server.slow_s = 0.05
    remote.server.faults = {f"{name}.tar": "slow" for name in index.names}
    source = small_steps(index, total_steps=40, workers=1, prefetch=1)
    got, killed = [], 0
    for batch in source:
        got.append(batch)
        process = source._fetch_ahead._process  # type: ignore[union-attr]
        if len(got) % 4 == 1 and process is not None and process.is_alive():
            os.kill(int(process.pid or 0), signal.SIGKILL)
            process.join()
            killed += 1
    assert killed == ahead._MAX_STARTS and all_same(batches(remote.local, total_steps=40), got)
    assert "ended with exit code -9: starting it again" in caplog.text
    assert not list((remote.root / "small").glob("*/.*"))  # what it left was removed


def test_the_tars_of_the_first_block_may_take_longer_than_a_worker_may_stall(remote: Remote) -> None:
    index = remote.index()
    remote.forget()
    remote.server.slow_s = 0.4
    remote.server.faults = {f"{name}.tar": "slow" for name in index.names}
    options = {"block_shards": 8, "workers": 1, "total_steps": 3}
    assert all_same(batches(remote.local, **options), batches(index, worker_timeout_s=1.0, **options))


def test_a_missing_package_is_named_with_its_extra(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^gs://bucket/laion needs a package .*: pip install 'megacid\[remote\]'$"):
        remote.index(shards="gs://bucket/laion")


def test_a_bucket_of_google_is_read_with_a_time_limit_and_a_refusal_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec, registry = pytest.importorskip("fsspec"), pytest.importorskip("fsspec.registry")
    attempts: list[Any] = []

    class Google(fsspec.AbstractFileSystem):  # what object_store.py uses of gcsfs
        protocol = "gs"

        def __init__(self, requests_timeout: object = None, **options: object) -> None:
            super().__init__(**options)
            self.requests_timeout = requests_timeout

        def get_file(self, path: str, target: str, **options: object) -> None:
            attempts.append(self.requests_timeout)
            raise OSError(f"Forbidden: {path}\nno access")

    monkeypatch.setitem(registry._registry, "gs", Google)
    with pytest.raises(UserError, match=r"^gs://bucket/0.tar may not be read \(OSError: Forbidden: .* GOOGLE_APP"):
        store.download("gs://bucket/0.tar", tmp_path / "0.tar", None, None)
    (timeout,) = attempts
    assert timeout.sock_read == timeout.sock_connect == store.SILENCE_S and timeout.total is None


def test_readers_release_removed_tars(remote: Remote) -> None:
    index = remote.index()
    reader = ShardReader(index)
    first = reader.read(0, 0, "image")
    remote.forget()
    assert reader.read(0, 0, "image") == first and remote.server.gets["00000.tar"] == 1
    reader.read(1, 0, "image")  # fetches, and closes the removed one
    assert reader.read(0, 0, "image") == first and remote.server.gets["00000.tar"] == 2
