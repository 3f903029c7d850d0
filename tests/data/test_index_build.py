"""Building an index on several ranks and processes: the same bytes, also after kills and errors."""

from __future__ import annotations

import errno
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import rank_fates, run_ranks
from pair_data import make_tar

from megacid.data import index_build
from megacid.data.index import ShardIndex, load_index
from megacid.data.index_verify import verify_index
from megacid.distributed.divided_work import Workers
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import StopRequest
from megacid.errors import UserError
from tools import index_shards

TARS = 7
STEMS = [f"{number:05d}" for number in range(TARS)]


def keys(number: int) -> list[str]:
    return [f"{number}_{row}" for row in range(1 + number % 3)]


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tars without an index. Any amount of work is worth a process."""
    monkeypatch.setattr(index_build, "_PROCESS_BYTES", 1e-3)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, stem in enumerate(STEMS):
        make_tar(folder / f"{stem}.tar", keys(number))
    return folder


@pytest.fixture
def expected(shards: Path) -> dict[str, bytes]:
    """The files of the index as this process alone writes them. They are removed again."""
    load_index(shards, workers=Workers(processes=1))
    files = take(shards)
    assert len(files) == 2 * TARS + 1
    return files


def take(folder: Path) -> dict[str, bytes]:
    """The files of an index, which are removed."""
    files = {path.name: path.read_bytes() for path in (folder / "index").iterdir()}
    for name in files:
        (folder / "index" / name).unlink()
    return files


def on_ranks(processes: int | None) -> Workers:
    rank, world = dist.get_rank(), dist.get_world_size()
    return Workers(Parallel(rank, world, 0, torch.device("cpu"), dist.group.WORLD), processes)


def content(index: ShardIndex) -> tuple[str, list[tuple[list[str], list[Any]]]]:
    tables = [index.table(shard) for shard in range(len(index.names))]
    return index.digest, [(table.keys, table.members.tolist()) for table in tables]


def build(folder: str, processes: int | None) -> tuple[str, list[tuple[list[str], list[Any]]]]:
    return content(load_index(folder.replace("RANK", str(dist.get_rank())), workers=on_ranks(processes)))


def message(folder: str, processes: int | None) -> str:
    with pytest.raises(UserError) as error:
        build(folder, processes)
    return str(error.value)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_write_the_bytes_of_one(shards: Path, expected: dict[str, bytes], processes: int) -> None:
    load_index(shards, workers=Workers(processes=processes))
    assert take(shards) == expected


@pytest.mark.parametrize(
    ("world", "processes"),
    [(2, 1), (2, None), (4, 1), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_ranks_write_the_bytes_of_one(
    shards: Path, expected: dict[str, bytes], world: int, processes: int | None
) -> None:
    load_index(shards, workers=Workers(processes=1))
    one = content(load_index(shards))
    take(shards)
    assert run_ranks(build, world, str(shards), processes) == [one] * world
    assert take(shards) == expected


def age_temporary_files(shards: Path) -> None:
    """Make what killed processes left old enough for the next build to remove it."""
    for path in (shards / "index").glob(".tmp-*"):
        os.utime(path, (1, 1))


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_process_is_an_error_and_the_next_start_gives_the_same_bytes(
    shards: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    def killed(folder: Path, entry: dict[str, Any], table: object) -> None:
        if entry["name"] == STEMS[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        save(folder, entry, table)

    save = index_build.save_table
    with monkeypatch.context() as patch:
        patch.setattr(index_build, "save_table", killed)
        for text in run_ranks(message, world, str(shards), 2):
            assert text.startswith("a process was killed") and "run the same command again" in text
    assert not (shards / "index" / "index.json").exists()
    age_temporary_files(shards)
    run_ranks(build, world, str(shards), 2)
    assert take(shards) == expected


def test_old_temporary_files_are_removed_and_young_ones_stay(shards: Path, expected: dict[str, bytes]) -> None:
    for name in (".tmp-1-00000.keys.json", ".tmp-2-00000.keys.json"):
        (shards / "index" / name).touch()
    os.utime(shards / "index" / ".tmp-1-00000.keys.json", (1, 1))
    load_index(shards)
    assert take(shards) == expected | {".tmp-2-00000.keys.json": b""}


def test_a_killed_rank_ends_the_other_and_the_next_start_gives_the_same_bytes(
    shards: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_build, "_PROCESS_BYTES", 1e18)  # one process of every rank: at most one tar at a time

    def killed(path: Path, *args: object, **options: object) -> object:
        if path.stem == STEMS[3]:
            os.kill(os.getppid(), signal.SIGKILL)  # the rank, whose process this is
        return scan(path, *args, **options)

    scan = index_build.scan_tar
    with monkeypatch.context() as patch:
        patch.setattr(index_build, "scan_tar", killed)
        assert rank_fates(lambda: build(str(shards), 1), 2) == [1, -signal.SIGKILL]
    assert not (shards / "index" / "index.json").exists() and (shards / "index" / "00001.keys.json").exists()
    age_temporary_files(shards)
    assert len(run_ranks(build, 2, str(shards), 1)) == 2
    assert take(shards) == expected


@pytest.mark.parametrize("fault", ["full disk", "damaged tar"])
def test_a_fault_of_one_rank_is_the_same_error_on_every_rank(
    shards: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def full(folder: Path, entry: dict[str, Any], table: object) -> None:
        if entry["name"] == STEMS[3]:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, entry, table)

    save = index_build.save_table
    if fault == "full disk":
        monkeypatch.setattr(index_build, "save_table", full)
    else:
        (shards / f"{STEMS[3]}.tar").write_bytes(b"not a tar" * 100)
    texts = run_ranks(message, 2, str(shards), 2)
    assert texts[0] == texts[1]
    assert ("index cannot be written ([Errno 28]" if fault == "full disk" else "00003.tar is damaged") in texts[0]
    assert not (shards / "index" / "index.json").exists()


def test_ranks_share_what_a_read_only_folder_lacks(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_index(shards / f"{STEMS[0]}.tar")
    stored = {path.name for path in (shards / "index").iterdir()}
    one = content(load_index(shards))
    for name in {path.name for path in (shards / "index").iterdir()} - stored | {"index.json"}:
        (shards / "index" / name).unlink()
    monkeypatch.setattr(index_build, "is_writable", lambda folder: False)
    assert run_ranks(build, 2, str(shards), 2) == [one] * 2
    assert not (shards / "index" / "index.json").exists()


def test_ranks_with_disks_of_their_own_build_an_index_on_each(
    shards: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / f"host{rank}").mkdir()
        for stem in STEMS:
            (tmp_path / f"host{rank}" / f"{stem}.tar").hardlink_to(shards / f"{stem}.tar")
    results = run_ranks(build, 2, str(tmp_path / "hostRANK"), 2)
    assert results[0] == results[1]
    assert take(tmp_path / "host0") == take(tmp_path / "host1") == expected


def test_only_one_rank_has_to_lack_an_index(shards: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"host{rank}").mkdir()
        for stem in STEMS:
            (tmp_path / f"host{rank}" / f"{stem}.tar").hardlink_to(shards / f"{stem}.tar")
    load_index(tmp_path / "host1")
    results = run_ranks(build, 2, str(tmp_path / "hostRANK"), 1)
    assert results[0] == results[1]
    assert take(tmp_path / "host0") == take(tmp_path / "host1") == expected


def _alone_on_a_rank(folder: str) -> str:
    with pytest.raises(UserError) as error:
        load_index(folder)
    return str(error.value)


def test_every_rank_for_itself_does_not_start_a_long_build(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "_ALONE_S", 0.0)
    texts = run_ranks(_alone_on_a_rank, 2, str(shards))
    assert texts[0] == texts[1]
    assert f"the index lacks 7 of the 7 tars of {shards}, 0.0 GB, and every rank" in texts[0]
    assert f"run tools/index_shards.py {shards} first" in texts[0]
    assert load_index(shards).num_samples == sum(len(keys(number)) for number in range(TARS))  # no other rank here


def test_a_long_build_says_how_long_before_it_starts(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load_index(f"{shards}/{STEMS[0]}.tar")
    assert "indexing" not in caplog.text
    monkeypatch.setattr(index_build, "_LONG_S", 0.0)
    load_index(shards, workers=Workers(processes=2))
    assert (
        f"indexing 6 of the 7 tars of {shards}, 0.0 GB, with 2 processes on each of 1 ranks: about 1 min" in caplog.text
    )


def verify(folder: str, processes: int | None) -> list[str]:
    return verify_index(folder, workers=on_ranks(processes))


def test_ranks_share_the_verification_and_all_know_its_result(shards: Path) -> None:
    load_index(shards)
    assert run_ranks(verify, 2, str(shards), 2) == [[], []]
    with open(shards / f"{STEMS[3]}.tar", "rb+") as file:
        file.seek(600)
        file.write(b"x")
    (shards / f"{STEMS[4]}.tar").unlink()
    problems = ["00003.tar has the right size but another sha256", "00004.tar is in the index but not on disk"]
    assert run_ranks(verify, 2, str(shards), 2) == [problems, problems]


def test_the_tool_writes_no_stop_file_next_to_the_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[Path] = []
    monkeypatch.setattr(StopRequest, "share", lambda self, out, parallel: shared.append(out))
    assert index_shards.main([str(shards)]) == 0 and shared == []


def test_the_tool_takes_a_number_of_processes(
    shards: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert index_shards.main([str(shards), "--workers", "3"]) == 0
    assert "7 shards, 13 samples used" in capsys.readouterr().out
    assert index_shards.main([str(shards), "--verify", "--workers", "3"]) == 0
    assert take(shards) == expected
    with pytest.raises(UserError, match="--workers is 0, expected a whole number, 1 or more"):
        index_shards.main([str(shards), "--workers", "0"])
