"""The joined table of several ranks: they divide what they share, and refuse stages that differ between hosts."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from os import utime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from pair_data import write_shards
from test_joined import contents, sources, write_stages

from megacid.data import joined_build
from megacid.data.augmentation import Views
from megacid.data.index import load_index
from megacid.data.joined import PART, JoinSources
from megacid.data.joined_build import open_joined
from megacid.data.remote.cache import ShardCache
from megacid.distributed.consensus import RanksDisagree
from megacid.distributed.divided_work import Workers
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError

SIZES = {f"{number:05d}": 2 for number in range(2 * PART + 3)}  # three files of rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_stages(folder, write_shards(folder / "shards", sizes=SIZES))
    return folder


def hosts(data: Path, tmp_path: Path) -> list[Path]:
    """Copies of the data on the disks of two hosts."""
    folders = [tmp_path / f"host{number}" for number in range(2)]
    for folder in folders:
        shutil.copytree(data, folder, ignore=shutil.ignore_patterns("joined-*"))
    return folders


def join(folder: Path) -> dict[str, bytes] | str:
    """Of this rank: the files, or the error. Ranks 0 and 1 are on host 0, unless there are two ranks alone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    own = folder / f"host{rank * 2 // world}"
    workers = Workers(Parallel(rank, world, 0, torch.device("cpu"), dist.group.WORLD), 1)
    try:
        open_joined(sources(own), workers=workers)
    except RanksDisagree as error:
        return str(error)
    return contents(own)


def test_each_host_makes_every_part_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = tmp_path / "made", joined_build.join_tar

    def recorded(given: JoinSources, shard: int) -> object:
        with open(made, "a") as file:
            print(given.index.root.parent.name, shard, file=file)
        time.sleep(0.02)  # ranks that do not divide the parts would both be at it
        return make(given, shard)

    hosts(data, tmp_path)
    open_joined(sources(data))
    monkeypatch.setattr(joined_build, "join_tar", recorded)
    assert run_ranks(join, 4, tmp_path) == [contents(data)] * 4
    expected = [f"host{host} {shard}" for host in range(2) for shard in range(len(SIZES))]
    assert sorted(made.read_text().splitlines()) == sorted(expected)


def test_another_run_of_a_stage_on_one_host_is_an_error_on_every_rank(data: Path, tmp_path: Path) -> None:
    """Each host would have a complete table, of other samples."""
    _, other = hosts(data, tmp_path)
    write_stages(other, load_index(other / "shards"), add=1)
    (said, *others) = run_ranks(join, 2, tmp_path)
    assert others == [said] and isinstance(said, str)
    assert "the ranks disagree about the shards and the meta.json of data.teacher, data.labels and data.keep: " in said
    assert all(f"{stage} is " in said for stage in ("teachers", "labels", "keep")) and "tars is " not in said
    assert not [*tmp_path.glob("host*/shards/index/joined-*")]


def test_what_a_killed_join_left_is_removed_when_the_table_is_complete(data: Path, tmp_path: Path) -> None:
    folder, _ = hosts(data, tmp_path)
    table = open_joined(sources(folder))
    (table.folder / "tars.npy").unlink()
    for name in (".tmp-old-rows-00000.npy", ".tmp-young-rows-00001.npy"):
        (table.folder / name).write_bytes(b"half")
    utime(table.folder / ".tmp-old-rows-00000.npy", (1, 1))
    open_joined(sources(folder))
    assert [path.name for path in table.folder.glob(".tmp-*")] == [".tmp-young-rows-00001.npy"]


def test_the_estimate_counts_the_seeds_of_views(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = sources(hosts(data, tmp_path)[0])
    assert made.teacher is not None
    monkeypatch.setattr(joined_build, "_SEED_S", 6.0)
    monkeypatch.setattr(Workers, "divide", lambda *_: {})
    monkeypatch.setattr(made.teacher, "views", Views(5, 1, "x"))
    with pytest.raises(UserError, match=r"tars-00000.npy is missing"):
        open_joined(made, workers=Workers(processes=1))
    assert "takes about 35 minutes with 1 ranks" in caplog.text  # 70 samples


def test_the_command_for_remote_shards_names_their_cache(data: Path, tmp_path: Path) -> None:
    index = load_index(data / "shards")
    paths = replace(index.paths, directory=None, source="s3://b/laion", cache=ShardCache.open(tmp_path / "a b", 1))
    command = JoinSources(replace(index, paths=paths)).command
    assert command == f"MEGACID_CACHE_DIR='{tmp_path / 'a b'}' tools/index_shards.py s3://b/laion --join"
