"""A rank with a non-finite step, or a spike, is one decision of all ranks; a skipped step changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toy
from faultplan import Fault, FaultPlan, read_trace, trace

NAN = {
    "a sample": Fault("train:batch", "nan_batch", step=5),
    "a class row's gradient": Fault("train:gradients", "nan_rows", step=5),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guard")
    toy.write_features(root / "features")
    return root


# The default run has every number of ranks and every ZeRO stage with one of the two faults in turn.
CASES = [
    pytest.param(world, stage, what, marks=[] if what == brief else pytest.mark.slow, id=f"{world}-{stage}-{what}")
    for world, stage, brief in (
        *((1, 1, "a class row's gradient"), (2, 0, "a sample"), (2, 1, "a class row's gradient"), (2, 2, "a sample")),
        *((2, 3, "a class row's gradient"), (4, 1, "a sample")),
    )
    for what in NAN
]


@pytest.mark.parametrize(("world", "stage", "what"), CASES)
def test_a_step_that_is_not_finite_on_the_last_rank_changes_no_bit_on_any(
    root: Path, world: int, stage: int, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of two runs that end at step 6, one with step 5 poisoned: its state after step 6 is that after step 5."""
    name = f"nan{world}{stage}{list(NAN).index(what)}"
    file = toy.run_file(root, name, run__save_every=1, run__total_steps=8, zero_optimization={"stage": stage})
    fault = NAN[what]
    plan = FaultPlan(Fault(fault.at, fault.do, rank=world - 1, step=5), trace(root / name))
    assert toy.train_toy(world, file, "--stop-after", "6", plan=plan) == [143] * world
    run = root / "runs" / name
    before, after = toy.tensors(run / "step-00000005"), toy.tensors(run / "step-00000006")
    # What a rank counts about its classes is not state of the optimization.
    assert [n for n in toy.differing(before, after) if n != "head/hits"] == []
    said = capfd.readouterr().err
    assert said.count("step 5 has a non-finite loss or gradient and is skipped on all ranks") == 1
    assert f"on all ranks. rank {world - 1}: loss" in said
    ids = read_trace(root / name, world)[5]["ids"]
    if what == "a sample":
        assert f"samples with a non-finite embedding {', '.join(map(str, ids[-(8 // world) :]))}" in said
    steps = read_trace(root / name, world)
    assert [steps[s]["applied"] for s in (4, 5)] == [[True] * world, [False] * world]
    assert toy.train_toy(world, file) == [0] * world  # and it goes on from there
    assert toy.differing(after, toy.tensors(run / "step-00000008"))


def test_without_an_end_of_it_the_run_ends_with_its_own_code_and_the_last_good_checkpoint(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = toy.run_file(root, "persistent", run__save_every=4)
    plan = FaultPlan(*(Fault("train:batch", "nan_batch", rank=1, step=s) for s in range(6, 24)))
    assert toy.train_toy(2, file, plan=plan) == [65, 65]
    assert "5 steps in a row up to step 10 had a non-finite loss or gradient" in capfd.readouterr().err
    saved = sorted(path.name for path in (root / "runs" / "persistent").glob("step-*"))
    assert saved == ["step-00000004", "step-00000008"]  # saved at 8, after two skips: the state of step 6
    assert all(t.isfinite().all() for t in toy.tensors(root / "runs" / "persistent" / "step-00000008").values())


SPIKED: dict[str, Any] = {
    "classifier__sample_rate": 1.0, "run__total_steps": 60, "classifier__lr": 5e-3,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}  # fmt: skip


@pytest.fixture(scope="module")
def calm(root: Path) -> dict[int, dict[str, Any]]:
    """The trace of a run without a spike, and without a policy that could see one."""
    file = toy.run_file(root, "calm", **SPIKED, guard__spike="off")
    assert toy.train_toy(2, file, plan=FaultPlan(trace(root / "trace_calm"))) == [0, 0]
    return read_trace(root / "trace_calm", 2)


@pytest.mark.parametrize(("policy", "code"), [("off", 0), ("skip", 0), ("lower", 0), ("abort", 65)])
def test_a_spike_on_one_rank_is_the_same_decision_on_all(
    root: Path, calm: dict[int, dict[str, Any]], policy: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Samples that are the opposite of what was learned about them, on one rank: the loss of the whole batch rises."""
    deviations = {} if policy == "off" else {"guard__spike_deviations": 3.5}
    file = toy.run_file(root, f"spike_{policy}", **SPIKED, guard__spike=policy, **deviations)
    plan = FaultPlan(Fault("train:batch", "negate_batch", rank=1, step=55), trace(root / f"trace_{policy}"))
    assert toy.train_toy(2, file, plan=plan) == [code] * 2
    said = capfd.readouterr().err
    spike = read_trace(root / f"trace_{policy}", 2)
    assert [spike[s] for s in range(55)] == [calm[s] for s in range(55)]
    assert ("has a loss spike" in said) == (policy != "off")
    if policy == "abort":
        assert 55 not in spike and "guard.spike is abort" in said
        return
    assert float(spike[55]["loss"]) > 4 * float(calm[55]["loss"])
    assert spike[55]["applied"] == [policy != "skip"] * 2
