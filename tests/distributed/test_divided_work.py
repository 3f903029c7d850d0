"""Work that is divided over ranks and processes: same results everywhere, and errors of one rank end all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from megacid.distributed import divided_work
from megacid.distributed.divided_work import ALONE, Workers
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Stopped
from megacid.errors import UserError

LATER = "run the same command again to continue"


def here(group: dist.ProcessGroup | None = None) -> Parallel:
    return Parallel(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), group or dist.group.WORLD)


def square(item: int) -> int:
    return item * item


def nap(item: int, seconds: float = 0.4) -> int:
    time.sleep(seconds)
    return item


def long_first(item: int) -> int:
    return nap(item, 0.0 if item else 5.0)


def kill_itself(item: int) -> int:
    if item == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def refuse(item: int) -> int:
    if item == 11:
        raise UserError("item is 11, expected another: correct it")
    return nap(item, 0.05)


def share(total: int) -> dict[int, int]:
    return {number: number + 10 for number in range(dist.get_rank(), total, dist.get_world_size())}


def on_ranks(work: Callable[[int], int], total: int, processes: int) -> dict[int, int]:
    return Workers(here()).divide(work, share(total), processes)


def message_on_ranks(work: Callable[[int], int], total: int, processes: int) -> str:
    with pytest.raises(UserError) as error:
        on_ranks(work, total, processes)
    return str(error.value)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [0, 2])
def test_every_rank_gets_the_results_of_all(world: int, processes: int) -> None:
    for total in (0, 7):  # 0: no rank has work
        results = run_ranks(on_ranks, world, square, total, processes)
        assert results == [{number: (number + 10) ** 2 for number in range(total)}] * world


@pytest.mark.parametrize("processes", [0, 3])
def test_a_process_alone_reports_every_result_once(processes: int) -> None:
    seen: list[int] = []
    results = ALONE.divide(square, dict(enumerate(range(20))), processes, seen.extend)
    assert sorted(seen) == list(range(20)) and results == {n: n * n for n in range(20)}


def _slow_on_rank_0() -> dict[int, int]:
    short = dist.new_group(timeout=timedelta(seconds=4))
    own = {number: number for number in range(16)} if dist.get_rank() == 0 else {16: 16}
    return Workers(here(short)).divide(nap, own, 0)


def test_work_longer_than_the_time_limit_of_a_collective_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divided_work, "_ROUND_S", 0.5)
    assert run_ranks(_slow_on_rank_0, 2) == [{number: number for number in range(17)}] * 2


def _one_long_item_on_rank_0(processes: int) -> dict[int, int]:
    short = dist.new_group(timeout=timedelta(seconds=3))
    own = {0: 0} if dist.get_rank() == 0 else {1: 1}
    return Workers(here(short)).divide(long_first, own, processes)


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_item_longer_than_the_time_limit_of_a_collective_ends(
    monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(divided_work, "_ROUND_S", 0.5)
    assert run_ranks(_one_long_item_on_rank_0, 2, processes) == [{0: 0, 1: 1}] * 2


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_of_one_rank_is_the_same_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, world: int, processes: int
) -> None:
    monkeypatch.setattr(divided_work, "_ROUND_S", 0.2)
    total = 20 * world * max(1, processes)  # a second on every rank
    messages = run_ranks(message_on_ranks, world, refuse, total, processes)
    assert messages == ["item is 11, expected another: correct it"] * world


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_process_is_one_error_on_every_rank(world: int) -> None:
    for message in run_ranks(message_on_ranks, world, kill_itself, 4, 2):
        assert message.startswith("a process was killed, such as for lack of memory, expected") and LATER in message


def _stopped_on_rank_1(processes: int) -> int:
    def poll() -> None:
        if dist.get_rank() == 1:
            raise Stopped(143)

    with pytest.raises(Stopped) as stopped:
        Workers(here(), poll=poll).divide(nap, share(40), processes)
    return stopped.value.code


@pytest.mark.parametrize("processes", [0, 1])
def test_a_request_to_stop_one_rank_stops_all(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr(divided_work, "_ROUND_S", 0.2)
    assert run_ranks(_stopped_on_rank_1, 2, processes) == [143, 143]


def _write_later(folder: Path) -> None:
    (folder / "started").touch()
    time.sleep(3)
    (folder / "finished").touch()


def test_a_request_to_stop_does_not_wait_for_items_that_are_running(tmp_path: Path) -> None:
    def poll() -> None:
        if (tmp_path / "started").exists():
            raise Stopped(143)

    with pytest.raises(Stopped):
        Workers(poll=poll).divide(_write_later, {0: tmp_path}, 1)
    time.sleep(3)  # longer than the item would take
    assert not (tmp_path / "finished").exists()


def test_no_process_outlives_its_parent() -> None:
    def parent(seconds: float) -> None:
        ALONE.divide(partial(nap, seconds=seconds), {0: 0, 1: 1}, 2)

    pid = os.fork()
    if pid == 0:
        parent(60.0)
        os._exit(0)
    children = _wait_for(lambda: _children(pid), lambda found: len(found) == 2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(children) == 2
    assert _wait_for(lambda: [child for child in children if _is_alive(child)], lambda left: not left) == []


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def _wait_for(value: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    end = time.monotonic() + 20
    while not good(found := value()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_the_ranks_of_a_host_share_its_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert ALONE.max_processes() == cores and Workers(processes=3).max_processes() == 3
    assert run_ranks(lambda: Workers(here()).max_processes(), 2) == [max(1, cores // 2)] * 2
