"""The joined table: made once by any number of processes, and never used for other tars or another run of a stage."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distill_data import data_of, run_file
from harness import run_ranks
from hostile_data import read_pairs
from pair_data import picture, put, remove_joined, save, stream, write_parquet, write_shards

from megacid.data import joined_build
from megacid.data.index import ShardIndex, load_index
from megacid.data.joined import PART, JoinSources
from megacid.data.joined_build import open_joined
from megacid.data.lru import open_file_budget
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.distributed.divided_work import Workers
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.storage.metadata import write_meta
from tools import index_shards

SIZES = {f"{number:05d}": 2 for number in range(2 * PART + 3)}  # three files of rows


def write_stages(folder: Path, index: ShardIndex, add: int = 0) -> None:
    """teacher/, clusters/ and balance/: embeddings (row, add), label (row + add) % 10, every fifth row is not kept."""
    for number, name in enumerate(index.names):
        rows = np.arange(index.starts[number], index.starts[number + 1])
        keys = index.table(number).keys
        emb = np.stack([rows, np.full(len(rows), add)], axis=1).astype(np.float16)
        for kind in ("img", "text"):
            save(folder / f"teacher/{kind}_emb/{kind}_emb_{number:05d}.npy", emb)
        write_parquet(folder / f"teacher/metadata/metadata_{number:05d}.parquet", image_path=keys)
        write_parquet(folder / f"clusters/labels/{name}.parquet", key=keys, label=((rows + add) % 10).tolist())
        save(folder / f"balance/keep/{name}.npy", rows % 5 > 0)
    partitions, digest = {name: number for number, name in enumerate(index.names)}, index.digest
    source = {"add": add}
    write_meta(folder / "teacher", "embed", source, shards_digest=digest, dim=2, partitions=partitions)
    write_meta(folder / "clusters", "cluster", source, shards_digest=digest, k=10)
    write_meta(folder / "balance", "balance", source, shards_digest=digest)


def tables(folder: Path, index: ShardIndex) -> dict[str, Any]:
    return {
        "teacher": TeacherTable(folder / "teacher", index),
        "labels": LabelTable(folder / "clusters", index),
        "keep": KeepTable(folder / "balance", index),
    }


def sources(folder: Path) -> JoinSources:
    index = load_index(folder / "shards")
    return JoinSources(index, **tables(folder, index))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined")
    write_stages(folder, write_shards(folder / "shards", sizes=SIZES))
    return folder


@pytest.fixture
def fresh(data: Path, tmp_path: Path) -> Path:
    """A copy of `data` that has no joined table."""
    shutil.copytree(data, tmp_path / "copy", ignore=shutil.ignore_patterns("joined-*"))
    return tmp_path / "copy"


def contents(folder: Path) -> dict[str, bytes]:
    (joined,) = folder.glob("shards/index/joined-*")
    return {path.name: path.read_bytes() for path in joined.iterdir()}


def check_epoch(folder: Path, add: int = 0, **options: Any) -> None:
    """Every kept sample once, with its own image, caption, label and embeddings."""
    index = load_index(folder / "shards")
    kept = [row for row in range(index.num_samples) if row % 5]
    plan = {"global_batch": 4, "micro_batch": 4, "total_steps": len(kept) // 4}
    seen: list[int] = []
    for batch in stream(index, **plan, **tables(folder, index), **options):
        assert batch.failure is None and not batch.replaced
        rows = batch.sample_id
        assert batch.label is not None and batch.teacher_image is not None and batch.teacher_text is not None
        assert batch.image[:, 0, 0, 0].long().equal(rows) and batch.text[:, 0].equal(rows)
        assert batch.label.equal((rows + add) % 10)
        assert batch.teacher_image.equal(batch.teacher_text)
        assert batch.teacher_image[:, 0].long().equal(rows) and (batch.teacher_image[:, 1] == add).all()
        seen += rows.tolist()
    assert len(seen) == len(set(seen)) and {*seen} <= {*kept}


def in_processes(targets: list[Any]) -> list[int | None]:
    """Exit codes of forked processes that start together."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_in_the_middle_and_runs_at_the_same_time_give_the_same_bytes(data: Path, fresh: Path) -> None:
    check_epoch(data)
    expected = contents(data)
    assert {name[:5] for name in expected} == {"made_", "rows-", "tars-", "tars."} and len(expected) == 8

    def build_and_die() -> None:
        write, make = [], joined_build.write_array
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(joined_build, "write_array", lambda *a: (make(*a), write.append(a), len(write) < 3 or die()))
            open_joined(sources(fresh))

    assert in_processes([build_and_die]) == [-signal.SIGKILL]
    assert sorted(contents(fresh)) == ["made_from.json", "rows-00000.npy", "rows-00001.npy", "tars-00000.npy"]
    assert {name: expected[name] for name in contents(fresh)} == contents(fresh)
    assert in_processes([lambda: open_joined(sources(fresh))] * 2) == [0] * 2
    assert contents(fresh) == expected
    check_epoch(fresh, workers=1)


def join_on_a_rank(folder: str) -> dict[str, bytes]:
    rank, world = dist.get_rank(), dist.get_world_size()
    path = Path(folder.replace("RANK", str(rank)))
    open_joined(sources(path), workers=Workers(Parallel(rank, world, 0, torch.device("cpu"), dist.group.WORLD), 2))
    return contents(path)


@pytest.mark.parametrize("disks", ["shared", "of their own"])
def test_ranks_and_their_processes_write_the_bytes_of_one(
    data: Path, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disks: str
) -> None:
    monkeypatch.setattr(joined_build, "_SAMPLE_S", 1.0)  # is inherited: work that is worth two processes
    folders = [fresh, fresh]
    if disks == "of their own":
        folders = [tmp_path / f"host{rank}" for rank in range(2)]
        for folder in folders:
            shutil.copytree(fresh, folder)
        open_joined(sources(folders[0]))  # complete on one host, missing on the other
    open_joined(sources(data))
    name = "copy" if disks == "shared" else "hostRANK"
    assert run_ranks(join_on_a_rank, 2, str(tmp_path / name)) == [contents(data)] * 2
    check_epoch(folders[1])


def test_a_stage_that_ran_again_gets_another_table(fresh: Path) -> None:
    check_epoch(fresh)
    write_stages(fresh, load_index(fresh / "shards"), add=1)
    check_epoch(fresh, add=1)
    assert len([*fresh.glob("shards/index/joined-*")]) == 2


def test_a_tar_that_changed_gets_another_table(fresh: Path) -> None:
    """Same keys, other places in the tar: the digest of the keys alone would not tell."""
    check_epoch(fresh)
    with tarfile.open(fresh / "shards/00000.tar", "w") as tar:
        for number in (0, 1):
            put(tar, f"k{number}.json", b" " * 20_000)
            put(tar, f"k{number}.png", picture(number))
            put(tar, f"k{number}.txt", str(number).encode())
    check_epoch(fresh)


@pytest.mark.parametrize("of", ["all files", "rows"])
def test_the_files_of_another_stage_under_this_name_are_not_used(fresh: Path, of: str) -> None:
    """They have the same sizes and types, and other labels."""
    old = open_joined(sources(fresh)).folder
    write_stages(fresh, load_index(fresh / "shards"), add=1)
    new = open_joined(sources(fresh)).folder
    for path in old.glob("*" if of == "all files" else "rows-*"):
        shutil.copy(path, new / path.name)
    if of == "all files":
        check_epoch(fresh, add=1)  # made again
        return
    index = load_index(fresh / "shards")
    with pytest.raises(UserError, match=r"rows-0000\d.npy is damaged, its row .* is not as written: delete .*joined-"):
        read_pairs(index, **tables(fresh, index))


@pytest.mark.parametrize("name", ["rows-00001.npy", "tars.npy"])
@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_a_table_that_is_cut_is_made_again(fresh: Path, name: str, damage: str) -> None:
    folder = open_joined(sources(fresh)).folder
    before, data = contents(fresh), (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(data[:-3] if damage == "cut" else b"")
    check_epoch(fresh)
    assert contents(fresh) == before


def test_every_changed_byte_of_a_row_is_an_error_that_names_it(fresh: Path) -> None:
    joined = open_joined(sources(fresh))
    path, size = joined.folder / "rows-00000.npy", joined.sources.row_dtype.itemsize
    whole = path.read_bytes()
    first = len(whole) - size * int(joined.counts[:PART, 0].sum())  # byte of row 0 of the first tar
    for at in range(first, first + size):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"its row 0 of 00000\.tar is not as written"):
            joined.rows(np.array([0]), np.array([0]))


@pytest.mark.parametrize("name", ["tars.npy", "tars-00001.npy"])
def test_a_changed_entry_of_a_tar_is_made_again(fresh: Path, name: str) -> None:
    """A wrong start of the embeddings would read those of another sample."""
    folder, before = open_joined(sources(fresh)).folder, contents(fresh)
    data = bytearray(before[name])
    data[-20] ^= 2
    (folder / name).write_bytes(data)
    (folder / "rows-00001.npy").unlink()
    open_joined(sources(fresh))
    assert contents(fresh) == before


@pytest.mark.parametrize("change", ["replaced", "missing"])
def test_embeddings_that_changed_since_they_were_joined_are_an_error(fresh: Path, change: str) -> None:
    open_joined(sources(fresh))
    path = fresh / "teacher/img_emb/img_emb_00001.npy"
    path.unlink()
    if change == "replaced":
        np.save(path, np.ones((3, 2), np.float16))
    index = load_index(fresh / "shards")
    with pytest.raises(UserError, match=r"img_emb_00001.npy has 140 bytes, expected 136|has no embeddings of 1 shards"):
        read_pairs(index, **tables(fresh, index))


def test_a_folder_that_cannot_be_written_is_said_and_another_is_used(
    fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = sources(fresh)
    blocked = fresh / "shards/index" / f"joined-{made.digest[:16]}"
    blocked.write_bytes(b"")  # a permission would not stop root
    with pytest.raises(UserError, match=r"joined-.* cannot be written"):
        open_joined(made)
    caplog.clear()
    first = open_joined(made, fallback=fresh / "runs")
    assert first.folder == fresh / "runs" / blocked.name
    assert f"{blocked} cannot be written" in caplog.text and caplog.text.count("cannot be written") == 1
    assert f"with their side tables in {first.folder}" in caplog.text
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined_build, "join_tar", lambda *_: pytest.fail("joined twice"))
        assert (open_joined(made, fallback=fresh / "runs").counts == first.counts).all() and not caplog.text


def test_training_uses_the_folder_of_the_runs_where_the_index_is_read_only(fresh: Path) -> None:
    index = load_index(fresh / "shards")
    made = tables(fresh, index)
    digest = JoinSources(index, made["teacher"], None, made["keep"]).digest[:16]  # a run without the cluster term
    (fresh / f"shards/index/joined-{digest}").write_bytes(b"")
    settings = ["data.augment=none", f"data.teacher={fresh / 'teacher'}", f"data.keep={fresh / 'balance'}"]
    run = run_file(fresh, *settings)
    assert data_of(run).epoch_samples == sum(row % 5 > 0 for row in range(2 * len(SIZES)))
    assert (Path(run.megacid.run.dir) / f"joined-{digest}" / "tars.npy").is_file()


@pytest.mark.parametrize("block_shards", [1, 1000])
def test_the_order_does_not_depend_on_how_many_files_stay_open(data: Path, block_shards: int) -> None:
    check_epoch(data, block_shards=block_shards)


def test_the_command_of_the_message_makes_the_table_ahead(
    fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(joined_build, "_ANNOUNCED_MIN", 0.0)
    open_joined(sources(fresh))
    (message,) = [record.getMessage() for record in caplog.records if "takes about" in record.getMessage()]
    before = contents(fresh)
    remove_joined(load_index(fresh / "shards"))
    _, _, command = message.partition("does it: tools/index_shards.py ")
    assert index_shards.main(shlex.split(command)) == 0
    assert contents(fresh) == before and "56 usable samples, 0 without an embedding" in capsys.readouterr().out
    monkeypatch.setattr(joined_build, "join_tar", lambda *_: pytest.fail("joined twice"))
    open_joined(sources(fresh))


@pytest.mark.parametrize("options", [["--teacher", "t"], ["--join", "--verify"]], ids=str)
def test_options_that_would_have_no_effect_are_refused(fresh: Path, options: list[str]) -> None:
    with pytest.raises(UserError, match="leave"):
        index_shards.main([str(fresh / "shards"), *options])


def test_files_stay_open_within_the_limit_of_the_process() -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
        assert open_file_budget(20) == 20 and resource.getrlimit(resource.RLIMIT_NOFILE) == (100, 300)
        assert open_file_budget(50) == 50 and resource.getrlimit(resource.RLIMIT_NOFILE) == (200, 300)
        assert open_file_budget(1000) == 75 and resource.getrlimit(resource.RLIMIT_NOFILE) == (300, 300)
        assert open_file_budget(1000, caches=3) == 25  # the caches of three sources share a quarter

    assert in_processes([limited]) == [0]
