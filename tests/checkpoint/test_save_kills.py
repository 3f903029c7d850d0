"""Ranks killed at every point of a save: the same command continues and ends with the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from faultplan import FaultPlan, kill
from torch import Tensor

import megacid.train  # noqa: F401  imported once here, inherited by forked ranks
from megacid.checkpoint import store

STEPS, EVERY = 8, 3  # saved at 3, 6 and 8; the save at 8 removes 3
# (failpoint, the how-manieth visit of a save: a rank writes two files)
OF_A_RANK = [
    ("stage_made", 1), ("mid_file", 1), ("mid_file", 2), ("before_fsync", 1), ("before_fsync", 2), ("after_fsync", 1),
    ("after_fsync", 2), ("files_written", 1),
]  # fmt: skip
OF_THE_FIRST = ["before_manifest", "before_rename", "after_rename", "during_prune", "after_prune"]

Case = tuple[int, int | None, str, int]  # ranks, victim (None: all), failpoint, visit
FOREGROUND: list[Case] = [
    *((1, 0, *point) for point in OF_A_RANK),
    *((2, victim, *point) for point in OF_A_RANK for victim in (0, 1, None)),
    *((4, victim, *point) for point in OF_A_RANK for victim in (2, None)),
    *((world, 0, point, 1) for world in (1, 2, 4) for point in OF_THE_FIRST),
]
BACKGROUND: list[Case] = [
    *((2, victim, *point) for point in OF_A_RANK[::2] for victim in (1, None)),
    *((2, 0, point, 1) for point in OF_THE_FIRST),
    (1, 0, "mid_file", 2), (4, 3, "before_fsync", 1),
]  # fmt: skip
assert len(FOREGROUND) >= 60
# The default run has every point at one rank and at two, every victim, and four ranks once for a rank's point and once
# for the first rank's; in a thread every point once and every victim. The slow run has every pair of victim and point.
BRIEF: list[Case] = [
    *(case for case in FOREGROUND if case[0] == 1),
    *((2, (0, 1, None)[at % 3], *point) for at, point in enumerate(OF_A_RANK)),
    *((2, 0, point, 1) for point in OF_THE_FIRST),
    (4, 2, "mid_file", 2), (4, 0, "before_rename", 1),
]  # fmt: skip
BRIEF_BACKGROUND: list[Case] = [
    *((2, (1, None)[at % 2], *point) for at, point in enumerate(OF_A_RANK[::2])),
    *((2, 0, point, 1) for point in OF_THE_FIRST),
    (1, 0, "mid_file", 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kills")
    toy.write_features(root / "features")
    return root


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Iterator[Callable[[int], dict[str, Tensor]]]:
    """world -> what its run ends with when nobody disturbs it."""
    ends: dict[int, dict[str, Tensor]] = {}

    def end(world: int) -> dict[str, Tensor]:
        if world not in ends:
            name = f"whole{world}"
            file = toy.run_file(root, name, run__total_steps=STEPS, run__save_every=EVERY)
            assert toy.train_toy(world, file) == [0] * world
            ends[world] = toy.tensors(root / "runs" / name / store.step_name(STEPS))
        return ends[world]

    yield end


def begins(run: Path) -> list[int]:
    """The steps that the starts of a run resumed from."""
    return [int(step) for step in re.findall(r"resumed from \S+/step-0*(\d+)", (run / "log.txt").read_text())]


def killed_and_started_again(root: Path, case: Case, want: dict[str, Tensor], *, background: bool) -> None:
    world, victim, point, nth = case
    # Only the last save has something to remove.
    step = STEPS if "prune" in point else 2 * EVERY
    name = f"{'b' if background else 'f'}{world}{victim}{point}{nth}"
    file = toy.run_file(
        root, name, run__total_steps=STEPS, run__save_every=EVERY, run__save_in_background=background
    )  # fmt: skip
    run = root / "runs" / name
    plan = FaultPlan(kill(f"store:{point}", rank=victim, step=step, nth=nth))
    fates = toy.train_toy(world, file, plan=plan)
    assert 0 not in fates
    if victim is not None:
        assert fates[victim] == -9
    elif background:  # a rank may learn of another's end before its own thread gets there
        assert -9 in fates
    else:
        assert fates == [-9] * world

    published = point in ("after_rename", "during_prune", "after_prune")
    last = step if published else EVERY
    assert store.newest_valid(run) == (run / store.step_name(last), [])

    assert toy.train_toy(world, file) == [0] * world
    assert begins(run) == ([] if last == STEPS else [last])
    assert list(run.glob(".tmp-*")) == []
    assert [found for found, _ in store.list_steps(run)] == [2 * EVERY, STEPS]
    for _, directory in store.list_steps(run):
        store.verify(directory)
    assert toy.differing(want, toy.tensors(run / store.step_name(STEPS))) == []


def named(case: Case) -> str:
    world, victim, point, nth = case
    return f"{world}-{'all' if victim is None else victim}-{point}{nth}"


def tiers(cases: list[Case], brief: list[Case]) -> list[Any]:
    assert {*brief} <= {*cases}
    return [pytest.param(case, marks=[] if case in brief else pytest.mark.slow, id=named(case)) for case in cases]


@pytest.mark.parametrize("case", tiers(FOREGROUND, BRIEF))
def test_no_kill_during_a_save_loses_or_mixes_a_checkpoint(
    root: Path, undisturbed: Callable[[int], dict[str, Tensor]], case: Case
) -> None:
    killed_and_started_again(root, case, undisturbed(case[0]), background=False)


@pytest.mark.parametrize("case", tiers(BACKGROUND, BRIEF_BACKGROUND))
def test_no_kill_while_a_thread_saves_loses_or_mixes_a_checkpoint(
    root: Path, undisturbed: Callable[[int], dict[str, Tensor]], case: Case
) -> None:
    killed_and_started_again(root, case, undisturbed(case[0]), background=True)
