"""The same command continues with the same bits from every step, at every number of ranks."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from faultplan import Fault, FaultPlan, kill, read_trace, trace
from harness import rank_fates
from safetensors import safe_open
from safetensors.torch import save_file

from megacid.checkpoint import store

EVERY_STEP: dict[str, Any] = {"run__save_every": 1, "run__keep_last": 100}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    toy.write_features(root / "features")
    return root


def losses(run: Path) -> list[tuple[int, str]]:
    """(step, loss) of the curve; as text, so that a NaN equals a NaN."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, repr(event.value)) for event in events.Scalars("train/loss")]


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_stopped_and_resumed_at_every_step_it_is_the_same_run(root: Path, world: int) -> None:
    """24 stops in one run: across an epoch's end (step 15), before a skipped step (9) and right after it.

    A step has two micro-batches. Every checkpoint has the uninterrupted run's bits, every step its samples and loss.
    """
    changes = {**EVERY_STEP, "gradient_accumulation_steps": 2, "classifier__lazy": "decay", "guard__spike": "skip"}
    fault = Fault("train:batch", "nan_batch", rank=world - 1, step=9)
    whole, pieces = (toy.run_file(root, f"{name}{world}", **changes) for name in ("whole", "pieces"))
    assert toy.train_toy(world, whole, plan=FaultPlan(fault, trace(root / f"w{world}"))) == [0] * world
    for stop in range(1, toy.STEPS + 1):
        code = 0 if stop == toy.STEPS else 143
        plan = FaultPlan(fault, trace(root / f"p{world}"))
        assert toy.train_toy(world, pieces, "--stop-after", str(stop), plan=plan) == [code] * world
    for step in range(1, toy.STEPS + 1):
        want, got = (toy.tensors(root / "runs" / f"{n}{world}" / f"step-{step:08d}") for n in ("whole", "pieces"))
        assert toy.differing(want, got) == [], step
    want_steps, got_steps = read_trace(root / f"w{world}", world), read_trace(root / f"p{world}", world)
    assert want_steps == got_steps and list(got_steps) == list(range(toy.STEPS))
    assert [step for step, at in got_steps.items() if not all(at["applied"])] == [9]
    # An epoch is every sample once: 15 steps of 8.
    assert sorted(itertools.chain(*(got_steps[s]["ids"] for s in range(15)))) == list(range(sum(toy.SIZES)))
    # The curve has every step once, in order, whatever was begun and not finished.
    want_curve, got_curve = losses(root / "runs" / f"whole{world}"), losses(root / "runs" / f"pieces{world}")
    assert got_curve == want_curve and [step for step, _ in got_curve] == list(range(1, toy.STEPS + 1))


STEPS, BATCH, HANDOVER = 58, 12, 8
# Slow enough that the loss stays of the size of its logits, whose rounding is what 1e-6 of it means.
SLOWLY: dict[str, Any] = {
    "train_batch_size": BATCH, "run__total_steps": STEPS, "run__log_every": STEPS, "classifier__lr": 1e-3,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
}  # fmt: skip


@pytest.fixture(scope="module")
def one_rank(root: Path) -> dict[int, dict[str, Any]]:
    """The trace of one rank alone, without a stop."""
    file = toy.run_file(root, "elastic1", **SLOWLY)
    assert toy.train_toy(1, file, plan=FaultPlan(trace(root / "t1"))) == [0]
    return read_trace(root / "t1", 1)


# The default run has each number of ranks once before the change of hands and once after it.
BRIEF = {(1, 3), (3, 4), (4, 2), (2, 1)}
CHANGES = [
    pytest.param(*pair, marks=[] if pair in BRIEF else pytest.mark.slow)
    for pair in itertools.permutations((1, 2, 3, 4), 2)
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_another_number_of_ranks_goes_on_with_the_same_samples_and_losses(
    root: Path, one_rank: dict[int, dict[str, Any]], before: int, after: int
) -> None:
    """50 steps after the change of hands, sampling 30 % of 1001 classes that no number of ranks divides."""
    name = f"from{before}to{after}"
    file = toy.run_file(root, name, **SLOWLY)
    halt = ("--stop-after", str(HANDOVER))
    assert toy.train_toy(before, file, *halt, plan=FaultPlan(trace(root / f"{name}a"))) == [143] * before
    plan = FaultPlan(trace(root / f"{name}b"))
    assert toy.train_toy(after, file, plan=plan) == [0] * after
    steps = {**read_trace(root / f"{name}a", before), **read_trace(root / f"{name}b", after)}
    assert list(steps) == list(range(STEPS))
    for step, at in steps.items():
        assert at["ids"] == one_rank[step]["ids"], step
        assert float(at["loss"]) == pytest.approx(float(one_rank[step]["loss"]), rel=1e-6), step


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_written_by_four_ranks_are_the_same_rows_at_any_number_of_ranks(root: Path, world: int) -> None:
    """A run resumed for one step, which is skipped, saves what it has loaded."""
    source = toy.run_file(root, f"rows{world}", train_batch_size=BATCH, run__total_steps=6, run__save_every=5)
    assert toy.train_toy(4, source, "--stop-after", "5") == [143] * 4
    run = root / "runs" / f"rows{world}"
    plan = FaultPlan(Fault("train:batch", "nan_batch", rank=0, step=5))
    assert toy.train_toy(world, source, plan=plan) == [0] * world
    want, got = (toy.tensors(run / f"step-{step:08d}") for step in (5, 6))
    assert [name for name in toy.differing(want, got) if name != "head/hits"] == []


def test_a_number_of_ranks_that_does_not_divide_the_batch_is_refused_with_those_that_do(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = toy.run_file(root, "odd", train_batch_size=6)
    assert toy.train_toy(4, file) == [2] * 4
    said = capfd.readouterr().err
    assert "numbers of ranks that divide it: 1, 2, 3, 6" in said and said.count("error: ") == 1
    assert not (root / "runs" / "odd").exists()


@pytest.mark.parametrize("number", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_random_kills_leave_the_same_run(root: Path, number: int) -> None:
    """SIGKILL to both ranks after random times: the run resumes each time and ends with the bits of an undisturbed run.

    A run takes about a second. The times are seeded, but the machine decides what they hit.
    """
    changes: dict[str, Any] = {"run__save_every": 2, "run__total_steps": 60, "run__log_every": 1}
    killed_name, whole_name = f"killed{number}", f"undisturbed{number}"
    whole, killed = toy.run_file(root, whole_name, **changes), toy.run_file(root, killed_name, **changes)
    assert toy.train_toy(2, whole) == [0, 0]
    chance, kills, finished = random.Random(20), 0, 0
    run = root / "runs" / killed_name
    while kills < number:
        wait = chance.uniform(0.05, 1.0)

        def shoot(pids: list[int], wait: float = wait) -> None:
            def later() -> None:
                time.sleep(wait)
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)

            threading.Thread(target=later, daemon=True).start()

        argv = ["--deepspeed_config", str(killed)]
        fates = rank_fates(toy.train_here, 2, argv, timeout_s=60, meanwhile=shoot)
        kills += -9 in fates
        if fates == [0, 0]:  # it was too quick: begin anew, so that there are enough kills
            finished += 1
            assert (
                toy.differing(
                    toy.tensors(root / "runs" / whole_name / "step-00000060"), toy.tensors(run / "step-00000060")
                )
                == []
            )
            for path in sorted(run.glob("step-*"))[1:]:
                path.rename(run / f"gone-{finished}-{path.name}")
    assert toy.train_toy(2, killed) == [0, 0]
    want, got = (toy.tensors(root / "runs" / name / "step-00000060") for name in (whole_name, killed_name))
    assert toy.differing(want, got) == []
    assert [path.name for path in run.glob(".tmp-*")] == []
    curve = losses(run)
    assert [step for step, _ in curve] == list(range(1, 61)) and curve == losses(root / "runs" / whole_name)


def test_a_run_that_is_sent_back_goes_on_from_there_also_at_the_next_start(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = toy.run_file(root, "back", **EVERY_STEP)
    assert toy.train_toy(1, file) == [0]
    run = root / "runs" / "back"
    want = toy.tensors(run / "step-00000024")
    options = ("--resume", str(run / "step-00000005"))
    assert toy.train_toy(1, file, *options, "--stop-after", "7") == [143]
    assert f"going back to step 5: moved {run / 'step-00000006'} to" in capfd.readouterr().err
    assert [path.name for path in sorted(run.glob("step-*"))][-1] == "step-00000007"
    assert toy.train_toy(1, file) == [0]
    assert f"resumed from {run / 'step-00000007'}" in capfd.readouterr().err
    assert toy.differing(want, toy.tensors(run / "step-00000024")) == []
    other = toy.run_file(root, "begun_elsewhere")
    assert toy.train_toy(1, other, "--stop-after", "1") == [143]
    assert toy.train_toy(1, other, *options) == [2]
    assert "belongs to another run" in capfd.readouterr().err


REFUSED: dict[str, tuple[list[str], FaultPlan | None, list[int]]] = {
    "another seed": (["--set", "run.seed=5"], None, [2, 2]),
    "another width": (["--set", "student.embed_dim=16"], None, [2, 2]),
    "another batch": (["--set", "train_batch_size=16"], None, [2, 2]),
    "missing data": (["--set", "data.features=/nowhere"], None, [2, 2]),
    "one rank fails": ([], FaultPlan(Fault("start:building", "os_error", rank=1)), [1, 1]),
    "one rank is killed": ([], FaultPlan(kill("start:building", rank=1)), [75, -9]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_resume_from_a_path_changes_no_checkpoint_of_the_run(
    root: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options, plan, codes = REFUSED[case]
    file, run = toy.run_file(root, "refused", **EVERY_STEP), root / "runs" / "refused"
    if not run.exists():
        assert toy.train_toy(2, file, "--stop-after", "6") == [143, 143]
    ours = ("log.txt", ".lock")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in ours}
    start = ("--resume", str(run / "step-00000002"))
    assert toy.train_toy(2, file, *start, *options, plan=plan) == codes
    if codes == [2, 2]:
        assert "Traceback" not in capfd.readouterr().err
    assert "going back" not in (run / "log.txt").read_text()
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in ours}
    assert before == after and list(run.glob(".abandoned-*")) == []


@pytest.mark.parametrize("how", ["a file", "no such place"])
def test_a_run_directory_that_cannot_be_made_is_an_error_before_the_first_step(
    root: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (root / "a file").write_text("")
    place = root / "a file" if how == "a file" else Path("/proc/nowhere")
    file = toy.run_file(root, "unwritable", run__dir=str(place))
    assert toy.train_toy(2, file) == [2, 2]
    said = capfd.readouterr().err
    assert f"cannot write to the run directory {place / 'unwritable'}" in said and "Traceback" not in said


def test_the_first_loss_after_resuming_is_compared_with_what_it_was(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that misses something loads without an error; the loss tells."""
    file = toy.run_file(root, "continuity", run__save_every=4)
    assert toy.train_toy(1, file, "--stop-after", "6") == [143]
    run = root / "runs" / "continuity"
    for path in sorted(run.glob("step-*"))[1:]:
        path.rename(run / ("gone-" + path.name))
    assert toy.train_toy(1, file, "--stop-after", "5") == [143]
    said = capfd.readouterr().err
    assert "the first loss after resuming is" in said and "the checkpoint is incomplete" not in said
    # Student weights that were never trained, under a manifest that verifies.
    for path in sorted(run.glob("step-*"))[1:]:
        path.rename(run / ("again-" + path.name))
    (run / "next_loss.json").write_text((run / "next_loss.json").read_text().replace('"step": 5', '"step": 4'))
    step = run / "step-00000004"
    with safe_open(step / "student-00000.safetensors", "pt") as handle:
        held = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    save_file(
        {n: torch.zeros_like(t) if n.startswith("param/") else t for n, t in held.items()},
        step / "student-00000.safetensors",
    )
    manifest = store.read_manifest(step)
    data = (step / "student-00000.safetensors").read_bytes()
    for entry in manifest["files"]:
        if entry["name"].startswith("student"):
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (step / store.MANIFEST).write_bytes(store.seal(manifest))
    assert toy.train_toy(1, file, "--stop-after", "5") == [143]
    assert "the checkpoint is incomplete" in capfd.readouterr().err
