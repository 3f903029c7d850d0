"""The start of several ranks when some are late, missing, doubled, or disagree about their number."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import free_port

from megacid.distributed import parallel, rendezvous
from megacid.errors import UserError


def start(
    folder: Path, ranks: list[tuple[int, int]], timeout_s: float = 20.0, late_s: float = 0.0, report_s: float = 0.3
) -> list[str]:
    """What each process got: "joined SUM", or its error. ranks: (RANK, WORLD_SIZE) by process; the last is late."""
    port = free_port()
    pids = []
    for number, (rank, world) in enumerate(ranks):
        if (pid := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.stderr = (folder / f"{number}.err").open("w")
            rendezvous._REPORT_EVERY_S = report_s
            _join(folder / f"{number}.txt", timeout_s, late_s if number + 1 == len(ranks) else 0.0)
        pids.append(pid)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    return [(folder / f"{number}.txt").read_text() for number in range(len(ranks))]


def _join(file: Path, timeout_s: float, late_s: float) -> None:
    torch.set_num_threads(1)
    try:
        time.sleep(late_s)
        group = parallel.init(timeout_s=20, start_timeout_s=timeout_s).group
        number = torch.tensor(dist.get_rank() + 1)
        dist.all_reduce(number, group=group)
        file.write_text(f"joined {int(number)}")
        parallel.shutdown()
    except UserError as error:
        file.write_text(f"{error} [{error.on_every_rank}]")
    except BaseException as error:
        file.write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


def test_ranks_that_start_together_join_without_a_line(tmp_path: Path) -> None:
    # A loaded machine may start one of the processes late.
    assert start(tmp_path, [(0, 3), (2, 3), (1, 3)], report_s=10.0) == ["joined 6"] * 3
    assert all(file.read_text() == "" for file in tmp_path.glob("*.err"))


def test_a_late_rank_is_named_until_it_comes(tmp_path: Path) -> None:
    assert start(tmp_path, [(0, 2), (1, 2)], late_s=1.0) == ["joined 3"] * 2
    lines = (tmp_path / "0.err").read_text().splitlines()
    assert lines and all(line.startswith("waiting for rank 1 of 2 to start, ") for line in lines)


def test_a_rank_that_never_starts_ends_all_others_with_one_message(tmp_path: Path) -> None:
    got = start(tmp_path, [(0, 4), (2, 4)], timeout_s=3.0)
    assert len(set(got)) == 1
    assert got[0].startswith("rank 1, 3 of 4 did not start within 3 s: see the output of those ranks")
    assert got[0].endswith("megacid.run.start_timeout_s in training) [True]")


def test_without_rank_0_the_others_say_where_they_looked(tmp_path: Path) -> None:
    (got,) = start(tmp_path, [(1, 2)], timeout_s=1.0)
    assert got.startswith("rank 1 could not reach rank 0 at 127.0.0.1:") and got.endswith("[False]")
    assert "rank 1 cannot reach rank 0 at 127.0.0.1:" in (tmp_path / "0.err").read_text()


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([(0, 3), (1, 3), (1, 3)], "two processes are rank 1 of 3, expected one: give every process its own RANK"),
        ([(0, 2), (1, 3)], "expected the same on all"),
    ],
)
def test_processes_that_contradict_each_other_all_end(
    tmp_path: Path, ranks: list[tuple[int, int]], message: str
) -> None:
    got = start(tmp_path, ranks)
    assert all(message in one for one in got), got


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2, expected 0 <= RANK < WORLD_SIZE"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR and MASTER_PORT are '' and '29500', expected the address of rank 0"),
        ({"MASTER_PORT": "65536"}, "MASTER_ADDR and MASTER_PORT are 'localhost' and '65536', expected"),
        ({"MASTER_PORT": "http"}, "MASTER_ADDR and MASTER_PORT are 'localhost' and 'http', expected"),
    ],
)
def test_an_incomplete_launch_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    launch = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (launch | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message.replace("'", ".")):
        parallel.init()
