"""Ranks whose folders differ: other disks, other names, folders that only some can write. All know the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from pair_data import make_tar
from remote_data import remote_shards

from megacid.data import index_build
from megacid.data.index import load_index
from megacid.data.index_verify import verify_index
from megacid.distributed.consensus import RanksDisagree
from megacid.distributed.divided_work import Workers
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError

STEMS = [f"{number:05d}" for number in range(7)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folders host0 and host1, which have the same tars."""
    for host in ("host0", "host1"):
        (tmp_path / host).mkdir()
        for number, stem in enumerate(STEMS):
            make_tar(tmp_path / host / f"{stem}.tar", [f"{number}_{row}" for row in range(1 + number % 3)])
    return tmp_path


def workers() -> Workers:
    rank, world = dist.get_rank(), dist.get_world_size()
    return Workers(Parallel(rank, world, 0, torch.device("cpu"), dist.group.WORLD), 1)


def build(spec: str, **options: Any) -> tuple[str, list[tuple[list[str], list[Any]]]]:
    index = load_index(spec.replace("RANK", str(dist.get_rank())), workers=workers(), **options)
    tables = [index.table(shard) for shard in range(len(index.names))]
    return index.digest, [(table.keys, table.members.tolist()) for table in tables]


def message(kind: type[Exception], spec: str) -> str:
    with pytest.raises(kind) as error:
        build(spec)
    return str(error.value)


def verify(spec: str) -> list[str]:
    return verify_index(spec.replace("RANK", str(dist.get_rank())), workers=workers())


@pytest.mark.parametrize("shared_first", [True, False])
def test_a_shared_folder_and_one_of_each_host_are_both_indexed(root: Path, shared_first: bool) -> None:
    (root / "shared").mkdir()
    for stem in STEMS[:3] if shared_first else STEMS[4:]:
        (root / "host0" / f"{stem}.tar").rename(root / "shared" / f"{stem}.tar")
        (root / "host1" / f"{stem}.tar").unlink()
    results = run_ranks(build, 2, f"{root}/shared::{root}/hostRANK")
    assert results[0] == results[1] and len(results[0][1]) == len(STEMS)
    files = [{path.name: path.read_bytes() for path in (root / f"host{rank}" / "index").iterdir()} for rank in range(2)]
    assert files[0] == files[1] and len(files[0]) == 2 * len(list((root / "host0").glob("*.tar"))) + 1


def test_a_folder_that_one_rank_can_write_is_indexed_by_both(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "is_writable", lambda folder: folder.mkdir(exist_ok=True) or dist.get_rank() == 1)
    results = run_ranks(build, 2, f"{root}/host0")
    assert results[0] == results[1] and len(results[0][1]) == len(STEMS)
    assert len(list((root / "host0" / "index").iterdir())) == 2 * len(STEMS) + 1


@pytest.mark.parametrize("change", ["fewer", "renamed"])
def test_tars_of_other_names_are_the_same_error_on_every_rank(root: Path, change: str) -> None:
    tar = root / "host1" / f"{STEMS[3]}.tar"
    tar.unlink() if change == "fewer" else tar.rename(root / "host1" / "x.tar")
    texts = run_ranks(message, 2, RanksDisagree, f"{root}/hostRANK/*.tar")
    assert texts[0] == texts[1].replace("host1", "host0")
    assert "the ranks disagree about the tars of " in texts[0] and "'7 names with sha256 " in texts[0]
    assert not list(root.glob("*/index"))


def test_each_copy_of_the_tars_is_verified(root: Path) -> None:
    for rank in range(2):
        load_index(root / f"host{rank}")
    assert run_ranks(verify, 2, f"{root}/hostRANK") == [[], []]
    with open(root / "host1" / f"{STEMS[2]}.tar", "rb+") as file:
        file.seek(600)
        file.write(b"x")
    (root / "host0" / f"{STEMS[3]}.tar").unlink()
    (root / "host1" / "index" / "index.json").rename(root / "kept.json")
    missing = f"rank 1: {root}/host1/index/index.json is missing or unreadable"
    first = "rank 0: 00003.tar is in the index but not on disk"
    assert run_ranks(verify, 2, f"{root}/hostRANK") == [[first, missing]] * 2
    (root / "kept.json").rename(root / "host1" / "index" / "index.json")
    second = "rank 1: 00002.tar has the right size but another sha256"
    assert run_ranks(verify, 2, f"{root}/hostRANK") == [[first, second]] * 2
    assert not list(root.glob("*/index/.tmp-*"))


def test_a_node_whose_cache_has_no_index_does_not_fetch_all_tars_at_the_start(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")

    def start() -> str:
        with pytest.raises(UserError) as error:
            build(remote.url, cache=remote.cache(name=f"cache{dist.get_rank()}"), fetch_limit=0)
        return str(error.value)

    with remote_shards(tmp_path) as remote:
        remote.index(name="cache0")
        gets = remote.server.gets.copy()
        texts = run_ranks(start, 2)
        assert texts[0] == texts[1] and texts[0].startswith(f"8 remote tars of {remote.url} are not indexed")
        assert f"run MEGACID_CACHE_DIR={tmp_path}/cache1 tools/index_shards.py" in texts[0]
        assert remote.server.gets == gets


def test_one_rank_asks_the_store(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    with remote_shards(tmp_path) as remote:
        digest = remote.index().digest
        remote.server.heads.clear()
        for shards in (remote.url, f"{remote.url}/{{00000..00007}}.tar"):
            found = run_ranks(lambda shards=shards: build(shards, cache=remote.cache(), ask=True)[0], 2)
            assert found == [digest] * 2
        assert remote.server.heads == {f"{number:05d}.tar": 2 for number in range(8)}
