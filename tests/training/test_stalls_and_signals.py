"""A rank that stalls, dies or is asked to stop, alone and under the launchers: no rank hangs, the run can resume."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from faultplan import Fault, FaultPlan, kill
from harness import free_port, living

from megacid.training.lifecycle import Lifecycle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stalls")
    toy.write_features(root / "features")
    assert toy.train_toy(2, toy.run_file(root, "whole")) == [0, 0]
    return root


def goes_on_as_if_nothing_had_been(root: Path, name: str) -> None:
    """The same command on two ranks ends with the bits of the run that nothing happened to."""
    assert toy.train_toy(2, root / f"{name}.json") == [0, 0]
    last = f"step-{toy.STEPS:08d}"
    assert toy.differing(toy.tensors(root / "runs" / "whole" / last), toy.tensors(root / "runs" / name / last)) == []


# ---- F12: stalls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "failpoint", "phase"),
    [
        (2, "train:batch", "data"),
        (4, "train:gradients", "backward"),
        (2, "store:before_fsync", "save"),
        (2, "freeze", ""),
    ],
)
def test_a_stalled_rank_is_named_and_every_rank_ends_with_its_stacks_on_disk(
    root: Path, world: int, failpoint: str, phase: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"stall{world}{phase}"
    file = toy.run_file(root, name, run__timeout_s=1.5, run__save_timeout_s=2.5)
    fault = Fault(failpoint, "sleep", rank=1, step=6 if phase == "save" else 8, value=300)
    if failpoint == "freeze":  # a process that cannot even report
        fault = Fault("train:batch", "signal", rank=1, step=8, value=signal.SIGSTOP)
        with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 had not ended"):
            toy.train_toy(world, file, plan=FaultPlan(fault), timeout_s=10)
    else:
        assert toy.train_toy(world, file, plan=FaultPlan(fault)) == [75] * world
    said = capfd.readouterr().err
    assert said.count("error: no progress") == 1
    stacks = root / "runs" / name / "stalled"
    if failpoint == "freeze":
        assert "rank 1 did not report: its process has ended, is stopped or has lost its network" in said
        assert (stacks / "rank-00000.txt").exists()
    else:
        found = re.search(r"no progress: rank 1 \(process \d+ on \S+\) is stalled in (\w+) of step \d+ at (\S+) ", said)
        assert found is not None and found[1] == phase and "faultplan.py" in found[2], said
        others = ", ".join(str(r) for r in range(world) if r != 1)
        assert f"rank {others} waited for it" in said
        for rank in range(world):
            text = (stacks / f"rank-{rank:05d}.txt").read_text()
            assert f"rank {rank}, process" in text and "most recent call first" in text
        assert "faultplan.py" in (stacks / "rank-00001.txt").read_text()
    assert "Run the same command again" in said
    if world == 2:
        goes_on_as_if_nothing_had_been(root, name)


# ---- F13: a rank dies --------------------------------------------------------------------------------------------


POINTS = ["start:ready", "train:batch", "train:gradients", "train:applied", "train:step_end"]
# The default run has every point at two ranks, and four ranks at one.
DEATHS = [
    pytest.param(world, point, marks=pytest.mark.slow if world == 4 and point != "train:gradients" else [])
    for world in (2, 4)
    for point in POINTS
]


@pytest.mark.parametrize(("world", "failpoint"), DEATHS)
def test_when_a_rank_is_killed_the_others_say_so_and_end(
    root: Path, world: int, failpoint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"dead{world}{failpoint.replace(':', '_')}"
    file = toy.run_file(root, name)
    step = 0 if failpoint == "start:ready" else 9
    assert toy.train_toy(world, file, plan=FaultPlan(kill(failpoint, rank=1, step=step))) == [
        75 if r != 1 else -9 for r in range(world)
    ]
    said = capfd.readouterr().err
    assert "error: rank 0 lost contact with the other ranks" in said and "Traceback" not in said
    if world == 2:
        goes_on_as_if_nothing_had_been(root, name)


# ---- F14: asked to stop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "failpoint", "step", "saved"),
    [
        *((signal.SIGTERM, *case) for case in (
            ("start:ready", 0, 1), ("train:batch", 7, 8), ("train:gradients", 7, 8), ("train:applied", 7, 9),
            ("train:step_end", 7, 9), ("store:stage_made", 6, 6), ("store:mid_file", 6, 6),
            ("store:before_rename", 6, 6), ("store:after_rename", 6, 6),
        )),
        (signal.SIGUSR1, "train:batch", 7, 8), (signal.SIGUSR1, "store:mid_file", 6, 6),
        (signal.SIGINT, "train:batch", 7, 8), (signal.SIGINT, "train:applied", 7, 9),
        (signal.SIGINT, "store:mid_file", 6, 6),
    ],
)  # fmt: skip
def test_one_rank_that_is_asked_to_stop_stops_all_after_the_same_saved_step(
    root: Path, number: int, failpoint: str, step: int, saved: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """At most one step after the signal; a signal during a save is heard at its end."""
    name = f"asked{number}{failpoint.replace(':', '_')}"
    file = toy.run_file(root, name)
    rank = 0 if failpoint.startswith("store:") else 1  # only rank 0 publishes
    again = Fault(failpoint, "signal", rank=rank, step=step, value=number)
    plan = FaultPlan(again, again, Fault("store:before_fsync", "signal", rank=0, step=saved, value=number))
    assert toy.train_toy(2, file, plan=plan) == [130 if number == signal.SIGINT else 143] * 2
    assert max(path.name for path in (root / "runs" / name).glob("step-*")) == f"step-{saved:08d}"
    assert f"stopped after step {saved} as requested" in capfd.readouterr().err
    if number != signal.SIGUSR1:
        goes_on_as_if_nothing_had_been(root, name)


def test_asked_to_stop_while_it_is_built_it_ends_at_once_for_there_is_nothing_to_save(root: Path) -> None:
    """Also on the way back from a checkpoint, which stays what it was."""
    file = toy.run_file(root, "building")
    plan = FaultPlan(Fault("start:building", "signal", rank=1, value=signal.SIGTERM))
    assert toy.train_toy(2, file, plan=plan) == [75, -signal.SIGTERM]
    assert list((root / "runs" / "building").glob("step-*")) == []
    assert toy.train_toy(2, file, "--stop-after", "7") == [143, 143]
    assert toy.train_toy(2, file, plan=plan) == [75, -signal.SIGTERM]
    goes_on_as_if_nothing_had_been(root, "building")


@pytest.mark.parametrize("launched", [True, False])
def test_a_ctrl_c_that_a_launcher_passes_on_is_no_second_one(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1") if launched else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    now = time.monotonic()
    try:
        lifecycle = Lifecycle()
        for later_s, ends in ((0.0, False), (0.1, not launched), (3.0, True)):
            monkeypatch.setattr(time, "monotonic", lambda later_s=later_s: now + later_s)
            if not ends:
                os.kill(os.getpid(), signal.SIGINT)
                continue
            with pytest.raises(SystemExit) as ended:
                os.kill(os.getpid(), signal.SIGINT)
            assert ended.value.code == 130
        assert lifecycle.stopped_after(0) == 130
        assert Lifecycle().stopped_after(0) == 143
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_ctrl_c_while_it_is_built_is_one_line_and_changes_nothing(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = toy.run_file(root, "interrupted_building")
    plan = FaultPlan(Fault("start:building", "signal", value=signal.SIGINT))
    assert toy.train_toy(1, file, plan=plan) == [130]
    said = capfd.readouterr().err
    assert said.count("error: interrupted before the first step") == 1 and "Traceback" not in said
    assert list((root / "runs" / "interrupted_building").glob("step-*")) == []
    goes_on_as_if_nothing_had_been(root, "interrupted_building")


# ---- the real launchers ------------------------------------------------------------------------------------------
# A launch takes about 20 s of CPU. The default run has each event once, and each launcher: a rank is killed under
# torchrun; SIGTERM, Ctrl-C and the death of the launcher are tested under deepspeed, whose launchers pass signals on.


def start(launcher: str, file: Path, *faults: Fault) -> subprocess.Popen[bytes]:
    """Two ranks of the toy run under a launcher, or one under python, in a process group of their own. What they say
    goes to a file: a pipe that nobody reads would stop them."""
    folder, port = Path(sys.executable).parent, str(free_port())
    words = {
        "deepspeed": [str(folder / "deepspeed"), "--num_gpus", "2", "--master_port", port],
        "torchrun": [str(folder / "torchrun"), "--nproc_per_node", "2", "--master_port", port],
        "python": [sys.executable],
    }[launcher]
    environment = {**os.environ, "FAULT_PLAN": FaultPlan(*faults).to_json()}
    with open(said_by(file), "wb") as said:
        return subprocess.Popen(
            [*words, "tests/planned.py", "--deepspeed_config", str(file)], cwd=ROOT, env=environment,
            stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def signal_node_launcher(file: Path, number: int) -> None:
    """To DeepSpeed's launch.py of the job with this run file."""
    for pid, line in living(str(file)).items():
        if "deepspeed.launcher.launch" in line:
            os.kill(pid, number)


def said_by(file: Path) -> Path:
    return file.with_suffix(".said")


def wait_until(true: Any, what: str, limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"{what}: not after {limit_s} s"
        time.sleep(0.05)


@pytest.fixture
def slow_run(root: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """(run file, run directory) of a run long enough to be met on its way; whatever is left of it is killed."""
    name = re.sub(r"\W+", "_", request.node.name)
    file = toy.run_file(root, name, run__total_steps=5000, run__save_every=1000)
    yield file, root / "runs" / name
    for pid in living(str(file)):
        os.kill(pid, signal.SIGKILL)


def at_step(run: Path, step: int) -> bool:
    return (run / "log.txt").exists() and f"step {step}/" in (run / "log.txt").read_text()


@pytest.mark.launch
@pytest.mark.parametrize("launcher", [pytest.param("deepspeed", marks=pytest.mark.slow), "torchrun"])
def test_under_a_launcher_a_killed_rank_ends_the_job_and_leaves_nobody(
    slow_run: tuple[Path, Path], launcher: str
) -> None:
    file, _ = slow_run
    job = start(launcher, file, kill("train:batch", rank=1, step=12))
    assert job.wait(timeout=120) != 0
    said = said_by(file).read_text()
    assert "rank 0 lost contact with the other ranks" in said or "SIGTERM" in said or "-9" in said, said
    wait_until(lambda: not living(str(file)), "ranks were left behind", 35)


@pytest.mark.launch
@pytest.mark.parametrize(
    "to",
    [
        pytest.param("launch.py", marks=pytest.mark.slow),
        "process group",
        pytest.param("torchrun", marks=pytest.mark.slow),
    ],
)
def test_under_a_launcher_sigterm_saves_once_and_leaves_nobody(slow_run: tuple[Path, Path], to: str) -> None:
    file, run = slow_run
    job = start("torchrun" if to == "torchrun" else "deepspeed", file)
    wait_until(lambda: at_step(run, 20), "step 20")
    if to == "process group":
        os.killpg(job.pid, signal.SIGTERM)
    elif to == "torchrun":
        os.kill(job.pid, signal.SIGTERM)
    else:
        signal_node_launcher(file, signal.SIGTERM)
    job.wait(timeout=60)
    wait_until(lambda: not living(str(file)), "ranks were left behind", 35)
    saved = [path.name for path in run.glob("step-*")]
    assert len(saved) == 1 and list(run.glob(".tmp-*")) == []
    assert toy.train_toy(2, file, "--stop-after", str(int(saved[0][5:]) + 1)) == [143, 143]
    assert f"resumed from {run / saved[0]}" in (run / "log.txt").read_text()


@pytest.mark.launch
@pytest.mark.parametrize("launcher", ["python", "deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_ctrl_c_saves_once_and_leaves_nobody(slow_run: tuple[Path, Path], launcher: str) -> None:
    """The terminal signals the whole process group, and the launchers pass the signal on."""
    file, run = slow_run
    job = start(launcher, file)
    wait_until(lambda: at_step(run, 20), "step 20")
    os.killpg(job.pid, signal.SIGINT)
    code = job.wait(timeout=60)
    wait_until(lambda: not living(str(file)), "ranks were left behind", 35)
    saved = [path.name for path in run.glob("step-*")]
    assert len(saved) == 1 and list(run.glob(".tmp-*")) == []
    if launcher == "python":
        assert code == 130 and "Traceback" not in said_by(file).read_text()
    world = 1 if launcher == "python" else 2
    assert toy.train_toy(world, file, "--stop-after", str(int(saved[0][5:]) + 1)) == [143] * world
    assert f"resumed from {run / saved[0]}" in (run / "log.txt").read_text()


@pytest.mark.launch
@pytest.mark.parametrize("failpoint", ["train:batch", "store:before_fsync"])
def test_a_second_ctrl_c_ends_it_at_once(root: Path, slow_run: tuple[Path, Path], failpoint: str) -> None:
    """Also while it saves, which leaves the earlier checkpoints as they are."""
    file, run = slow_run
    toy.run_file(root, file.stem, run__total_steps=5000, run__save_every=30)
    job = start("python", file, Fault(failpoint, "sleep", step=30 if "store" in failpoint else 20, value=300))
    slept = (lambda: list(run.glob(".tmp-step-*"))) if "store" in failpoint else (lambda: at_step(run, 20))
    wait_until(slept, "the sleep")
    job.send_signal(signal.SIGINT)
    wait_until(lambda: "press Ctrl-C again" in said_by(file).read_text(), "the first is heard", 10)
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=5) == 130
    assert "ended without a checkpoint" in said_by(file).read_text() and not list(run.glob("step-*"))


@pytest.mark.launch
@pytest.mark.parametrize("who", ["deepspeed", pytest.param("launch.py", marks=pytest.mark.slow)])
def test_when_the_launcher_is_killed_the_ranks_save_and_end_by_themselves(
    slow_run: tuple[Path, Path], who: str
) -> None:
    """The `deepspeed` command does not pass its end on to the per-node launcher, whose ranks would run on unseen."""
    file, run = slow_run
    job = start("deepspeed", file)
    wait_until(lambda: at_step(run, 20), "step 20")
    if who == "deepspeed":
        os.kill(job.pid, signal.SIGKILL)
    else:
        signal_node_launcher(file, signal.SIGKILL)
    wait_until(lambda: not living(str(file)), "ranks were left behind", 35)
    assert len(list(run.glob("step-*"))) == 1 and list(run.glob(".tmp-*")) == []
    job.kill()
    job.wait()


@pytest.mark.launch
def test_without_a_launcher_it_outlives_the_shell_that_started_it(slow_run: tuple[Path, Path]) -> None:
    """As with nohup: the parent ends, the run goes on."""
    file, run = slow_run
    words = f"exec {sys.executable} tests/planned.py --deepspeed_config {file} > {said_by(file)} 2>&1"
    shell = subprocess.Popen(
        ["/bin/sh", "-c", f"({words}) & read wait"], cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True
    )
    wait_until(lambda: at_step(run, 20), "step 20")
    shell.kill()
    shell.wait()
    reached = (run / "log.txt").read_text().count("step ")
    wait_until(lambda: (run / "log.txt").read_text().count("step ") > reached + 100, "it goes on")
    pids = living(str(file))
    assert len(pids) == 1 and not list(run.glob("step-*"))
    os.kill(next(iter(pids)), signal.SIGTERM)
    wait_until(lambda: not living(str(file)), "it stops when it is asked", 35)
    assert len(list(run.glob("step-*"))) == 1
