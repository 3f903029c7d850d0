"""Three hundred seeded faults of every kind in a row, and what must hold after each. Takes minutes: -m slow."""

from __future__ import annotations

import errno
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import toy
from faultplan import Fault, FaultPlan, kill

from megacid.checkpoint import store

FAULTS, STEPS, SAVE_EVERY, WORLD = 300, 60, 3, 2
# A sample that is not finite changes the run, so it is part of what is compared: the same steps in every run.
POISONED = (Fault("train:batch", "nan_batch", rank=1, step=17), Fault("train:gradients", "nan_rows", rank=0, step=41))
TRAIN = ("train:batch", "train:gradients", "train:applied", "train:step_end")
ALL_RANKS_SAVE = (
    "store:stage_made",
    "store:mid_file",
    "store:before_fsync",
    "store:after_fsync",
    "store:files_written",
)
RANK_0_SAVE = (
    "store:before_manifest",
    "store:before_rename",
    "store:after_rename",
    "store:during_prune",
    "store:after_prune",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("soak")
    toy.write_features(root / "features")
    return root


def run_file(root: Path, name: str, **changes: Any) -> Path:
    settings: dict[str, Any] = {"run__total_steps": STEPS, "run__save_every": SAVE_EVERY, "run__log_every": 5,
        "run__timeout_s": 2.0,
                                "run__save_timeout_s": 6.0, "guard__spike": "skip", **changes}  # fmt: skip
    return toy.run_file(root, name, **settings)


def draw(chance: random.Random, at: int) -> tuple[str, Fault | None]:
    """A kind of fault, and the fault; `at` is the step that the run will begin with."""
    step = at + chance.randrange(1, 8)
    saved = step - step % SAVE_EVERY + SAVE_EVERY
    rank = chance.randrange(WORLD)
    kinds = {
        "kill": lambda: kill(chance.choice(TRAIN), rank=rank, step=step),
        "kill in a save": lambda: kill(chance.choice(ALL_RANKS_SAVE), rank=rank, step=saved),
        "kill while publishing": lambda: kill(chance.choice(RANK_0_SAVE), rank=0, step=saved),
        "stop": lambda: Fault(chance.choice(TRAIN), "signal", rank=rank, step=step, value=signal.SIGTERM),
        "stop in a save": lambda: Fault(
            chance.choice(ALL_RANKS_SAVE), "signal", rank=rank, step=saved, value=signal.SIGUSR1),
        "disk": lambda: Fault(
            chance.choice(("store:mid_file", "store:before_fsync", "store:before_rename")), "os_error",
            rank=0, step=saved, value=chance.choice((errno.ENOSPC, errno.EIO, errno.EFBIG)),
        ),
        "slow disk": lambda: Fault("store:before_fsync", "sleep", rank=rank, step=saved, value=0.3),
        "stall": lambda: Fault(chance.choice(TRAIN), "sleep", rank=rank, step=step, value=100),
        "a flipped byte": lambda: None, "a cut file": lambda: None, "a lost file": lambda: None,
        "rubbish": lambda: None,
    }  # fmt: skip
    weights = [6, 6, 6, 3, 2, 3, 1, 1, 2, 1, 1, 1]
    kind = chance.choices(list(kinds), weights)[0]
    return kind, kinds[kind]()


def harm(run: Path, kind: str, chance: random.Random) -> None:
    """Damage the newest checkpoint, unless it is the only one; or leave something that is no checkpoint."""
    if kind == "rubbish":
        (run / ".tmp-step-00000099").mkdir(exist_ok=True)
        (run / ".tmp-step-00000099" / "student-00000.safetensors").write_bytes(b"half")
        (run / "step-notes").mkdir(exist_ok=True)
        return
    whole = [path for _, path in store.list_steps(run) if is_whole(path)]
    if len(whole) < 2:
        return
    victim = chance.choice(sorted(whole[-1].iterdir()))
    data = bytearray(victim.read_bytes())
    if kind == "a flipped byte":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        victim.write_bytes(data)
    elif kind == "a cut file":
        victim.write_bytes(data[: chance.randrange(len(data))])
    else:
        victim.unlink()
    assert not is_whole(whole[-1]), f"{kind} in {victim} was not found"


def is_whole(path: Path) -> bool:
    try:
        store.verify(path)
    except ValueError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_three_hundred_faults_and_the_run_is_the_one_that_nothing_happened_to(root: Path, background: bool) -> None:
    chance, faults, name, seen = random.Random(30 + background), 0, 0, set()
    whole = run_file(root, f"whole{background}")
    assert toy.train_toy(WORLD, whole, plan=FaultPlan(*POISONED)) == [0] * WORLD
    want = toy.tensors(root / "runs" / f"whole{background}" / f"step-{STEPS:08d}")
    while faults < FAULTS // 2:
        name += 1
        file = run_file(root, f"soaked{background}{name}", run__save_in_background=background)
        run = root / "runs" / f"soaked{background}{name}"
        while True:
            newest, _ = store.newest_valid(run)
            at = int(newest.name[5:]) if newest else 0
            kind, fault = draw(chance, at)
            seen.add(kind)
            faults += 1
            if fault is None:
                if at:
                    harm(run, kind, chance)
                continue
            codes = toy.train_toy(WORLD, file, plan=FaultPlan(*POISONED, fault), timeout_s=60)
            assert set(codes) <= {0, 143, 75, -9}, (kind, fault, codes)
            after, _ = store.newest_valid(run)
            # Never behind where it was, and never behind the fault by more than an interval (a failed save: by two).
            if newest is not None:
                assert after is not None and int(after.name[5:]) >= at, (kind, fault)
            reached = fault.step if fault.step is not None and fault.step <= STEPS else STEPS
            intervals = 3 if background else 2
            assert (int(after.name[5:]) if after else 0) > reached - intervals * SAVE_EVERY - 1, (kind, fault)
            if codes == [0] * WORLD:
                break
        assert toy.differing(want, toy.tensors(run / f"step-{STEPS:08d}")) == [], name
        assert list(run.glob(".tmp-*")) == []
    assert len(seen) == 12


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps(root: Path) -> None:
    """Resident memory of rank 0 over the second thousand of 2000 steps with a checkpoint at each twentieth."""
    file = run_file(root, "long", run__total_steps=2000, run__save_every=20, run__timeout_s=60.0)
    plan = FaultPlan(Fault("train:step_end", "rss", rank=0, nth=0, path=str(root / "rss")))
    assert toy.train_toy(WORLD, file, plan=plan, timeout_s=300) == [0] * WORLD
    grown = [float(line) for line in (root / "rss").read_text().splitlines()]
    assert len(grown) == 2000
    # Medians, since a checkpoint makes a step larger than its neighbours.
    assert sorted(grown[1900:])[50] - sorted(grown[900:1000])[50] < 10, "MiB in 1000 steps: 1 in 100 is the limit"
