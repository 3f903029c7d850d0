"""The EMA of the weights is the written recursion in fp32, whatever divides the weights over the ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from small_student import SmallRun, run_file, small_student
from torch import Tensor

from megacid.checkpoint.state import load_student_tensors, restore
from megacid.checkpoint.store import WrittenFile, make_stage, publish, write_tensors
from megacid.config.load import load_run
from megacid.errors import UserError
from megacid.models.freezing import frozen_parameters
from megacid.models.student import Student
from megacid.training.evaluation import weights_of
from megacid.training.memory import student_sizes
from megacid.training.run_settings import changed_settings

DECAY = 0.75
FROZEN = "token_embedding.weight"


def freeze(student: Student) -> None:
    student.freeze(frozen_parameters(student.clip, [FROZEN], ("image", "text")))


def averaged_run(file: Path, settings: list[str], other: list[str]) -> dict[str, Any]:
    """Three updates with a skip after the second; a resume after the second, under other settings, and one update."""
    run = SmallRun(file, settings, freeze)
    states = [run.state()]
    for _ in range(2):
        run.step()
        states.append(run.state())
    saved = states[-1]
    loss = run.engine(*run.inputs(9), seed=9).image.sum()
    run.engine.backward(loss)
    run.engine.gradient_norm()
    run.engine.skip()
    skipped = run.state()
    resumed = SmallRun(file, other, freeze)
    resumed.load(saved, run.updates)
    resumed.engine.load_average(lambda name: saved[f"ema/{name}"])
    loaded = resumed.state()
    run.step(), resumed.step()
    states.append(run.state())
    plain = SmallRun(file, [s for s in settings if "ema" not in s], freeze)
    for _ in range(3):
        plain.step()
    evaluated = {name: value.clone() for name, value in weights_of(run.engine, ema=True)}
    return {
        "states": states, "skipped": skipped, "loaded": loaded, "after": resumed.state(), "plain": plain.state(),
        "evaluated": evaluated,
    }  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_file(tmp_path_factory.mktemp("ema"))


def settings(world: int, stage: int, *more: str) -> list[str]:
    return [
        f"zero_optimization.stage={stage}", f"train_batch_size={world}", f"student.ema_decay={DECAY}", "bf16=null",
        *more,
    ]  # fmt: skip


CASES = [(1, 0, 3)]  # two ranks in the default run: test_observers.py
MORE = [(2, 1, 0), (2, 0, 1), (2, 2, 3), (2, 3, 2), (3, 3, 1), (3, 0, 0), (3, 2, 2)]


@pytest.mark.parametrize(
    ("world", "stage", "other"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]
)
def test_the_average_is_the_recursion_in_float64_and_passes_through_a_checkpoint(
    file: Path, world: int, stage: int, other: int
) -> None:
    for got in run_ranks(averaged_run, world, file, settings(world, stage), settings(world, other)):
        states: list[dict[str, Tensor]] = got["states"]
        names = [key.removeprefix("exp_avg/") for key in states[0] if key.startswith("exp_avg/")]
        assert len(names) > 20 and f"ema/clip.{FROZEN}" not in states[0] and f"param/clip.{FROZEN}" in states[0]
        for name in names:
            expected = states[0][f"param/{name}"].double()
            assert torch.equal(states[0][f"ema/{name}"], states[0][f"param/{name}"])
            for state in states[1:]:
                expected = DECAY * expected + (1 - DECAY) * state[f"param/{name}"].double()
                assert torch.allclose(state[f"ema/{name}"].double(), expected, rtol=1e-6, atol=1e-8), name
            assert torch.equal(got["skipped"][f"ema/{name}"], states[2][f"ema/{name}"]), name
            assert torch.equal(got["loaded"][f"ema/{name}"], states[2][f"ema/{name}"]), name
            if stage == other:
                assert torch.equal(got["after"][f"ema/{name}"], states[3][f"ema/{name}"]), name
            expected = DECAY * states[2][f"ema/{name}"] + (1 - DECAY) * got["after"][f"param/{name}"]
            assert torch.allclose(got["after"][f"ema/{name}"], expected, rtol=1e-6, atol=1e-8), name
        moved = [n for n in names if not torch.equal(states[3][f"ema/{n}"], states[3][f"param/{n}"])]
        assert len(moved) > 20
        averaged = {name: states[3][f"ema/{name}"] for name in names}
        averaged[f"clip.{FROZEN}"] = states[3][f"param/clip.{FROZEN}"]
        assert got["evaluated"].keys() >= averaged.keys()
        assert all(torch.equal(value, got["evaluated"][name]) for name, value in averaged.items())
        # The average changes no bit of the training.
        assert all(torch.equal(value, states[3][key]) for key, value in got["plain"].items())
        assert {key.split("/")[0] for key in states[3].keys() - got["plain"].keys()} == {"ema"}


def checkpoint(root: Path, state: dict[str, Tensor]) -> Path:
    """A published checkpoint of one rank."""
    stage = make_stage(root, 1)
    tensors = {f"{key.split('/')[0]}/{key.split('/')[1].removeprefix('clip.')}": t for key, t in state.items()}
    files: list[WrittenFile] = [write_tensors(stage, "student-00000.safetensors", tensors, step=1)]
    return publish(root, stage, 1, files, {"num_classes": 0, "embed_dim": 24, "updates": 1, "world": 1})


def switched(file: Path, root: str) -> dict[str, Any]:
    """A checkpoint with an average into a run without one, and the other way round."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megacid")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    result: dict[str, Any] = {"messages": messages}
    for name, first, second in (("off", DECAY, None), ("on", None, DECAY)):
        sides = []
        for decay in (first, second):
            more = [] if decay is None else [f"student.ema_decay={decay}"]
            sides.append(SmallRun(file, ["zero_optimization.stage=0", "train_batch_size=1", "bf16=null", *more]))
        source, target = sides
        source.step()
        path = checkpoint(Path(root) / name, source.state())
        target.engine.materialise_state((3, 32, 32), 16, 1)
        restore(path, target.engine, {}, {"num_classes": 0, "embed_dim": 24})
        result[name] = (source.state(), target.state(), str(path))
    return result


def test_switching_the_average_on_or_off_at_a_resume_says_what_happens(file: Path, tmp_path: Path) -> None:
    (got,) = run_ranks(switched, 1, file, str(tmp_path))
    before, after, path = got["off"]
    assert not any(key.startswith("ema/") for key in after) and any(key.startswith("ema/") for key in before)
    averaged = load_student_tensors(path, ema=True)
    assert torch.equal(averaged["visual.proj"], before["ema/clip.visual.proj"])
    assert not torch.equal(averaged["visual.proj"], load_student_tensors(path)["visual.proj"])
    before, after, path = got["on"]
    assert torch.equal(after["ema/clip.visual.proj"], before["param/clip.visual.proj"])
    with pytest.raises(UserError, match=r"has no EMA of the weights: .*student\.ema_decay"):
        load_student_tensors(path, ema=True)
    assert sum("is dropped" in line for line in got["messages"]) == 1
    assert sum("starts with the loaded weights" in line for line in got["messages"]) == 1


def test_the_decay_may_change_between_the_starts_of_a_run_and_is_checked(file: Path) -> None:
    run = load_run(file, ["student.ema_decay=0.9"], world=1)
    other = load_run(file, ["student.ema_decay=0.99"], world=1)
    assert changed_settings(other, {"resolved": run.resolved()}) == []
    for value in ("0", "1", "-0.5", "1.5"):
        with pytest.raises(UserError, match=r"student\.ema_decay"):
            load_run(file, [f"student.ema_decay={value}"], world=1)


def test_the_estimate_counts_four_bytes_per_trained_parameter_over_the_ranks(file: Path) -> None:
    parameters = sum(p.numel() for p in small_student().parameters())
    run = load_run(file, ["student.ema_decay=0.9"], world=1)
    sizes = student_sizes(run, parameters, 4, "cuda", 1000)
    assert sizes["EMA of the student"] == parameters - 1000
    assert "EMA of the student" not in student_sizes(load_run(file, [], world=1), parameters, 4, "cuda")
