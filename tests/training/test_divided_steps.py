"""Runs whose steps are divided into micro-batches: faults in the middle of a step, resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toy
from faultplan import Fault, FaultPlan, kill, read_trace, trace
from harness import rank_fates, run_ranks
from torch import nn

from megacid.training import components

DIVIDED: dict[str, Any] = {
    "gradient_accumulation_steps": 4,
    "run__total_steps": 8,
    "run__save_every": 3,
    "run__keep_last": 10,
}


class RandomTower(components.FeatureTower):
    """A feature tower with dropout."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.body.append(nn.Dropout(0.3))


class NormalizedTower(components.FeatureTower):
    """A feature tower with batch normalisation."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.body.append(nn.BatchNorm1d(32))


def train_tower(tower: type[components.FeatureTower], file: Path, plan: FaultPlan) -> int:
    components.FeatureTower = tower  # type: ignore[misc]  in this forked process only
    return toy.train_here(["--deepspeed_config", str(file)], plan.to_json())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("divided")
    toy.write_features(root / "features")
    return root


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_with_dropout_killed_in_the_middle_of_a_step_is_resumed_with_the_same_bits(
    root: Path, stage: int
) -> None:
    changes = DIVIDED | {"train_batch_size": 16, "zero_optimization": {"stage": stage}}
    names = f"whole{stage}", f"killed{stage}"
    whole, killed = (toy.run_file(root, name, **changes) for name in names)
    run_ranks(train_tower, 2, RandomTower, whole, FaultPlan(trace(root / f"a{stage}")))
    # The third of the four micro-batches of step 4: two are embedded.
    plan = FaultPlan(kill("train:batch", rank=1, step=4, nth=3), trace(root / f"b{stage}"))
    assert -9 in rank_fates(train_tower, 2, RandomTower, killed, plan)
    assert run_ranks(train_tower, 2, RandomTower, killed, FaultPlan(trace(root / f"c{stage}"))) == [0, 0]
    want, resumed = read_trace(root / f"a{stage}", 2), read_trace(root / f"c{stage}", 2)
    assert list(want) == list(range(8)) and resumed == {step: want[step] for step in range(3, 8)}
    ends = [toy.tensors(root / "runs" / name / "step-00000008") for name in names]
    assert toy.differing(*ends) == []


def test_half_the_ranks_go_on_with_twice_the_micro_batches(root: Path) -> None:
    """The same samples and losses as on two ranks throughout, with a micro-batch of the same size."""
    changes = {"run__total_steps": 8, "run__save_every": 4, "train_batch_size": 16, "classifier__lr": 1e-3}
    whole, moved = (toy.run_file(root, name, **changes) for name in ("two", "moved"))
    assert toy.train_toy(2, whole, plan=FaultPlan(trace(root / "t"))) == [0, 0]
    assert toy.train_toy(2, moved, "--stop-after", "4") == [143, 143]
    options = ("--set", "gradient_accumulation_steps=2")
    assert toy.train_toy(1, moved, *options, plan=FaultPlan(trace(root / "m"))) == [0]
    want, got = read_trace(root / "t", 2), read_trace(root / "m", 1)
    assert list(got) == list(range(4, 8))
    for step, at in got.items():
        assert sorted(at["ids"]) == sorted(want[step]["ids"])
        assert float(at["loss"]) == pytest.approx(float(want[step]["loss"]), rel=1e-6)


def test_a_bad_micro_batch_is_named_and_skips_the_step(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = toy.run_file(root, "bad", train_batch_size=16, **DIVIDED | {"run__save_every": 1, "run__total_steps": 4})
    fault = Fault("train:batch", "nan_batch", rank=1, step=2, nth=3)
    assert toy.train_toy(2, file, plan=FaultPlan(fault, trace(root / "bad"))) == [0, 0]
    said = capfd.readouterr().err
    # Rank 1 has the last two samples of each micro-batch of four.
    bad = read_trace(root / "bad", 2)[2]["ids"][8:][4:6]
    assert f"samples with a non-finite embedding {bad[0]}, {bad[1]}\n" in said
    assert [at["applied"] for at in read_trace(root / "bad", 2).values()] == [[True] * 2] * 2 + [
        [False] * 2,
        [True] * 2,
    ]
    want, got = (toy.tensors(root / "runs" / "bad" / f"step-{step:08d}") for step in (2, 3))
    assert [name for name in toy.differing(want, got) if name != "head/hits"] == []


@pytest.mark.parametrize("accumulation", [1, 4])
def test_batch_normalisation_is_refused_when_a_step_is_divided(
    root: Path, accumulation: int, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = DIVIDED | {"gradient_accumulation_steps": accumulation, "run__total_steps": 4}
    file = toy.run_file(root, f"norm{accumulation}", **changes)
    code = 0 if accumulation == 1 else 2
    assert run_ranks(train_tower, 2, NormalizedTower, file, FaultPlan()) == [code] * 2
    said = capfd.readouterr().err
    assert said.count("error: ") == (accumulation > 1)
    assert ('"gradient_accumulation_steps" is 4, expected 1' in said) == (accumulation > 1), said
