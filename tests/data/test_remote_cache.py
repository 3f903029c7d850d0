"""The cache of remote tars: shared between processes, bounded, and never in the way of what is in use."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_data import TAR, Remote, batches, cached, remote_shards, small_steps

from megacid.data.index import ShardReader
from megacid.data.index_verify import verify_index
from megacid.data.remote import cache as module
from megacid.data.remote.cache import CachedFile, ShardCache
from megacid.data.tar_bytes import TarBytes
from megacid.errors import UserError
from megacid.storage import object_store as store

pytest.importorskip("aiohttp")
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setattr(store, "RETRY_S", 0.6)
    monkeypatch.setattr(store, "_BACKOFF_S", 0.1)
    monkeypatch.setattr(module, "ROOM_S", 0.5)
    with remote_shards(tmp_path) as made:
        yield made


@pytest.fixture
def tars(remote: Remote) -> list[CachedFile]:
    index = remote.index(name="first")
    found = [index.paths.cached(tar, entry) for tar, entry in zip(index.paths.tars, index.shards)]
    remote.server.gets.clear()
    return [tar for tar in found if tar is not None]


def names(cache: ShardCache) -> list[str]:
    return [path.name[:5] for path in cached(cache.directory)]


def test_the_tar_that_was_not_used_for_longest_makes_room(remote: Remote, tars: list[CachedFile]) -> None:
    cache = remote.cache(3)
    for tar in tars[:3]:
        os.close(cache.open_file(tar))
    cache.mark(tars[0])
    os.close(cache.open_file(tars[3]))
    assert names(cache) == ["00000", "00002", "00003"]


def test_prefetched_tars_go_last_and_first_those_that_are_needed_last(remote: Remote, tars: list[CachedFile]) -> None:
    cache = remote.cache(3)
    for tar in tars[:3]:
        assert cache.fetch(tar, remove_prefetched=False)
    cache.mark(tars[0], 2)
    cache.mark(tars[1], 1)
    assert cache.fetch(tars[3], remove_prefetched=False) and names(cache) == ["00000", "00001", "00003"]
    cache.mark(tars[3], 0)
    assert not cache.fetch(tars[4], remove_prefetched=False)  # nothing else than what is prefetched
    assert cache.fetch(tars[4], remove_prefetched=True) and names(cache) == ["00001", "00003", "00004"]


def test_a_tar_that_is_held_is_never_removed_and_the_error_says_the_least_size(
    remote: Remote, tars: list[CachedFile]
) -> None:
    cache = remote.cache(2.9)
    with cache.local(tars[0]) as first, cache.local(tars[1]):
        assert not cache.fetch(tars[2], remove_prefetched=True)
        with pytest.raises(UserError, match=r"/00002.tar has 30,720 bytes, and 61,440 are in use") as error:
            cache.open_file(tars[2])
        assert "expected a cache of at least 9.22e-05 GB: raise data.cache_gb" in str(error.value)
        assert first.read_bytes() == (remote.root / "store" / "00000.tar").read_bytes()
    os.close(cache.open_file(tars[2]))
    assert len(names(cache)) == 2


def test_a_waiting_reader_gets_the_room_that_another_releases(
    remote: Remote, tars: list[CachedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROOM_S", 10.0)
    cache = remote.cache(1)
    held = cache.hold(tars[0]) or (os.close(cache.open_file(tars[0])) or cache.hold(tars[0]))
    reader = FORK.Process(target=lambda: (os.close(held), os.close(cache.open_file(tars[1]))))
    reader.start()
    time.sleep(0.3)
    assert names(cache) == ["00000"]
    os.close(held)
    reader.join(10)
    assert reader.exitcode == 0 and names(cache) == ["00001"]


def test_several_processes_fetch_a_tar_once(remote: Remote, tars: list[CachedFile]) -> None:
    cache = remote.cache()
    remote.server.slow_s = 0.2
    remote.server.faults = {"00000.tar": "slow"}
    processes = [FORK.Process(target=cache.open_file, args=(tars[0],)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4 and remote.server.gets["00000.tar"] == 1


def test_a_tar_whose_fetcher_was_killed_is_fetched_again(remote: Remote, tars: list[CachedFile]) -> None:
    cache = remote.cache(1)
    remote.server.slow_s = 30
    remote.server.faults = {"00000.tar": ["slow"]}
    killed = FORK.Process(target=cache.open_file, args=(tars[0],))
    killed.start()
    assert remote.server.started.wait(10)
    assert len(list(cache.directory.glob("*/.*.lock"))) == 1
    assert not cache.fetch(tars[1], remove_prefetched=True)  # its space is taken
    os.kill(int(killed.pid or 0), signal.SIGKILL)
    killed.join()
    assert cache.fetch(tars[1], remove_prefetched=True)
    assert not list(cache.directory.glob("*/.*"))
    os.close(cache.open_file(tars[0]))
    assert names(cache) == ["00000"]


def test_a_cached_tar_that_somebody_cut_is_fetched_again(remote: Remote, tars: list[CachedFile]) -> None:
    cache = remote.cache()
    os.close(cache.open_file(tars[0]))
    os.truncate(cache.path(tars[0]), 100)
    descriptor = cache.open_file(tars[0])
    assert os.fstat(descriptor).st_size == TAR and remote.server.gets["00000.tar"] == 2
    os.close(descriptor)


@pytest.mark.slow
def test_the_cache_is_shared_by_runs_with_their_own_order(remote: Remote) -> None:
    index = remote.index(tars=100)
    remote.forget()
    remote.server.gets.clear()
    for seed in (1, 2):
        batches(index, seed=seed, workers=1)
    assert set(remote.server.gets.values()) == {1}


def test_a_cache_that_is_too_small_for_the_blocks_is_refused_at_the_start(remote: Remote) -> None:
    index = remote.index(tars=5)
    with pytest.raises(UserError) as error:
        small_steps(index, block_shards=4)
    assert str(error.value) == (
        '"megacid.data.cache_gb" is 0.0001536, expected at least 0.000246, the size of the 8 files that are read and '
        "fetched at a time: raise it, or lower data.block_shards, data.workers or data.prefetch"
    )


def test_a_directory_of_something_else_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"/run is not a cache of shards, it has config.json: name an empty directory"):
        ShardCache.open(tmp_path / "run", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="/file cannot be written"):
        ShardCache.open(tmp_path / "file", 1)
    cache = ShardCache.open(tmp_path / "new" / "cache", 1)
    assert ShardCache.open(tmp_path / "new" / "cache", 2).directory == cache.directory
    (cache.directory / "shard_cache.json").write_text('{"version": 2}')
    with pytest.raises(UserError, match="is not a cache of shards"):
        ShardCache.open(cache.directory, 1)


def test_a_full_disk_is_one_error(remote: Remote, tars: list[CachedFile], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = remote.cache()

    def full(url: str, path: str) -> None:
        Path(path).write_bytes(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._open_store(tars[0].url)[0], "get_file", full)
    with pytest.raises(UserError, match=r"/00000.tar cannot be stored \(OSError: .* free space on the disk"):
        cache.open_file(tars[0])
    assert not list(cache.directory.glob("*/.*")) and names(cache) == []


def test_locks_end_with_their_holder(remote: Remote, tars: list[CachedFile]) -> None:
    cache = remote.cache()
    with cache.local(tars[0]) as path, open(path, "rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _fails(number: int) -> Any:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("fault", ["rename", "lock", "marker"])
def test_a_fault_of_the_cache_is_no_bad_sample(remote: Remote, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    reader = ShardReader(remote.index())
    remote.forget()
    if fault == "rename":
        monkeypatch.setattr(os, "replace", _fails(errno.EIO))
    elif fault == "lock":
        monkeypatch.setattr(fcntl, "flock", _fails(errno.ENOLCK))
    else:
        (remote.root / "cache" / "shard_cache.json").unlink()
    with pytest.raises(store.RemoteError, match=r"/cache cannot be used \(.*: check its disk, its permissions"):
        reader.read(0, 0, "image")
    assert not list((remote.root / "cache").glob("*/.*.part"))


def test_files_are_open_for_writing_when_they_are_locked_as_nfs_demands(
    remote: Remote, tars: list[CachedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    cache = remote.cache(1)
    for tar in tars[:2]:
        os.close(cache.open_file(tar))
    assert names(cache) == ["00001"]


def test_tars_of_another_user_are_read_and_removed(
    remote: Remote, tars: list[CachedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, real = remote.cache(1), os.open
    os.close(cache.open_file(tars[0]))

    def open_(path: Any, flags: int, *mode: int) -> int:
        return _fails(errno.EACCES)() if flags & os.O_RDWR and str(path).endswith(".tar") else real(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "utime", _fails(errno.EPERM))
    assert cache.mark(tars[0]) and not cache.mark(tars[1])
    os.close(cache.open_file(tars[0]))
    os.close(cache.open_file(tars[1]))
    assert names(cache) == ["00001"]


def test_a_tar_that_is_indexed_again_while_runs_use_it(remote: Remote, tars: list[CachedFile]) -> None:
    cache = remote.cache()
    os.close(cache.open_file(tars[0]))
    held = cache.hold(tars[0])
    assert held is not None
    with cache.added(tars[0].url) as (path, _), TarBytes(path, hashed=True) as tar:
        cache.mark(tars[0])
        assert tar.sha256() == tars[0].sha256
    assert os.fstat(held).st_nlink == 1 and not list(cache.directory.glob("*/.*"))
    os.close(held)


def test_verify_reads_what_is_in_the_cache(
    remote: Remote, tars: list[CachedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = remote.cache(name="first")
    monkeypatch.setenv("MEGACID_CACHE_DIR", str(cache.directory))
    assert verify_index(remote.url) == []
    path = cache.path(tars[2])
    path.write_bytes(b"x" + path.read_bytes()[1:])
    (problem,) = verify_index(remote.url)
    assert problem == f"{path} has the right size but another sha256, remove it: {tars[2].url} is fetched again"
    path.unlink()
    assert verify_index(remote.url) == []


def test_a_tar_that_is_opened_counts_as_used(remote: Remote, tars: list[CachedFile]) -> None:
    cache = remote.cache(2)
    for tar in (*tars[:2], tars[0], tars[2]):
        os.close(cache.open_file(tar))
    assert names(cache) == ["00000", "00002"]


def test_prefetched_tars_of_a_run_that_has_ended_can_be_removed_an_hour_later(
    remote: Remote, tars: list[CachedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, real = remote.cache(1), time.time
    os.close(cache.open_file(tars[0]))
    cache.mark(tars[0], 0)
    assert not cache.fetch(tars[1], remove_prefetched=False)
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    assert cache.fetch(tars[1], remove_prefetched=False)
