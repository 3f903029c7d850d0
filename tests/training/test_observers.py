"""What watches a run leaves its weights as they are: a run with every observer ends with the bits of one without."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from trackio_stand_in import Trackio
from train_run import Pipeline, losses, tensors, train_rank
from wandb_files import offline_starts

# Observer -> (changes of the run file, options of train.py). All are switched on in one run.
OBSERVERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "trackers": ({"run__trackers": ["tensorboard", "wandb", "trackio"]}, []),
}
STEPS = 6


@dataclass(frozen=True)
class Runs:
    plain: Path
    observed: Path  # stopped after step 3 and resumed
    trackio: list[Any]  # calls


def train_with_trackio(argv: list[str], trackio: Trackio) -> int:
    sys.modules["trackio"] = trackio
    return train_rank(argv)


@pytest.fixture(scope="module")
def runs(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    changes = {key: value for settings, _ in OBSERVERS.values() for key, value in settings.items()}
    options = [word for _, words in OBSERVERS.values() for word in words]
    plain = pipeline.run_file("unobserved", run__trackers=[])
    observed = pipeline.run_file("observed", **changes)
    trackio = Trackio(tmp_path_factory.mktemp("trackio") / "calls")
    argv = ["--deepspeed_config", str(observed), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert run_ranks(train_rank, 2, ["--deepspeed_config", str(plain)], timeout_s=120) == [0, 0]
        for more, code in ((["--stop-after", "3"], 143), ([], 0)):
            assert run_ranks(train_with_trackio, 2, [*argv, *more], trackio, timeout_s=120) == [code, code]
    folder = pipeline.root / "runs"
    return Runs(folder / "unobserved", folder / "observed", trackio.read())


def test_a_run_with_every_observer_ends_with_the_bits_of_one_without(runs: Runs) -> None:
    want, got = (tensors(run / f"step-{STEPS:08d}") for run in (runs.plain, runs.observed))
    assert len(want) > 20
    assert [name for name in want if not want[name].equal(got[name])] == []


def test_wandb_shows_what_tensorboard_shows_and_a_resume_continues_its_run(runs: Runs) -> None:
    starts = offline_starts(runs.observed)
    identity = json.loads((runs.observed / "trackers.json").read_text())["wandb"]
    assert [name for name, _, _ in starts] == [identity, identity]
    config = [settings.get("megacid", {}).get("run", {}).get("total_steps") for _, settings, _ in starts]
    assert config == [STEPS, None]  # logged once
    history = [step for _, _, steps in starts for step in steps]
    assert [step["_step"] for step in history] == [2, 3, 4, 6]  # step 3: the classes with the checkpoint
    assert {step["_step"]: step["train/loss"] for step in history if "train/loss" in step} == pytest.approx(
        losses(runs.observed)
    )
    assert history[1].keys() >= {"classes/never_hit", "classes/hits/bins"}


def test_trackio_gets_the_same_and_a_resume_continues_its_run(runs: Runs) -> None:
    first, second = (call for call in runs.trackio if call[0] == "init")
    assert first[1] == "megacid" and first[2].startswith("observed-") and first[4] == "allow"
    assert first[3]["megacid"]["run"]["total_steps"] == STEPS
    assert second == [*first[:3], None, "allow"]
    logged = [call for call in runs.trackio if call[0] == "log" and "train/loss" in call[1]]
    assert {step: values["train/loss"] for _, values, step in logged} == pytest.approx(losses(runs.observed))
    assert sum(call == ["finish"] for call in runs.trackio) == 2
