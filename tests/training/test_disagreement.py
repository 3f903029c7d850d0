"""Changed settings are refused, and ranks with different settings, data or weights are detected and named."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import toy
from faultplan import Fault, FaultPlan
from harness import run_ranks

from megacid import train
from megacid.config.schema import SECTIONS, RunFile, defaults
from megacid.errors import UserError
from megacid.training.run_settings import MAY_CHANGE, check_same_settings, write_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("disagreement")
    toy.write_features(root / "features")
    return root


# ---- F22: the settings of a run ----------------------------------------------------------------------------------

FIELDS = [f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields]


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, (tuple, list)):
        return [other(v) for v in value] or ["image"]
    return "something else" if value is None else f"{value}x"


@pytest.fixture(scope="module")
def begun(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFile, Path]:
    """A run file and the directory of a run that was begun with it."""
    from megacid.config.load import load_run

    run = load_run(toy.run_file(root, "begun"), world=1)
    directory = tmp_path_factory.mktemp("run")
    write_config(run, directory, world=1)
    return run, directory


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("path", FIELDS)
def test_every_setting_of_the_block_is_either_free_or_refused_with_both_values(
    begun: tuple[RunFile, Path], path: str
) -> None:
    run, directory = begun
    section, name = path.split(".")
    block = getattr(run.megacid, section)
    before, now = getattr(block, name), other(getattr(block, name))
    changed = run.megacid.model_copy(update={section: block.model_copy(update={name: now})})
    drifted = dataclasses.replace(run, megacid=changed)
    if any(f"megacid.{path}" == free or f"megacid.{path}".startswith(free + ".") for free in MAY_CHANGE):
        check_same_settings(drifted, directory)
        return
    shown = [list(v) if isinstance(v, tuple) else v for v in (before, now)]
    with pytest.raises(UserError) as refused:
        check_same_settings(drifted, directory)
    assert f"megacid.{path}: {shown[0]!r} -> {shown[1]!r}" in str(refused.value)


def test_a_run_that_runs_out_of_memory_may_lower_the_classifiers_budget(begun: tuple[RunFile, Path]) -> None:
    run, directory = begun
    classifier = run.megacid.classifier.model_copy(update={"memory_budget_gb": 0.5})
    lower = run.megacid.model_copy(update={"classifier": classifier})
    check_same_settings(dataclasses.replace(run, megacid=lower), directory)


def test_what_may_change_is_named_by_settings_that_exist() -> None:
    known = {f"megacid.{path}" for path in FIELDS} | {f"megacid.{section}" for section in defaults()}
    assert {key for key in MAY_CHANGE if key.startswith("megacid.")} <= known


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_batch_size", 16),
        ("gradient_clipping", 2.0),
        ("bf16", {"enabled": True}),
    ],
)
def test_settings_of_deepspeed_that_change_a_result_are_refused(
    begun: tuple[RunFile, Path], key: str, value: Any
) -> None:
    run, directory = begun
    drifted = dataclasses.replace(run, deepspeed={**run.deepspeed, key: value})
    with pytest.raises(UserError, match=key):
        check_same_settings(drifted, directory)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"resolved": 7}', '{"resolved": [1]}', "{", '"' + "x" * 10, "[" * 100_000]
)
def test_a_damaged_record_of_the_settings_is_one_error(
    begun: tuple[RunFile, Path], tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        check_same_settings(begun[0], tmp_path)


# ---- F23: ranks that were started differently --------------------------------------------------------------------


def _differently(argv: list[list[str]], environment: list[dict[str, str]]) -> int:
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(rank), **environment[rank])
    return train.main(argv[rank])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_other_settings_end_at_the_start_and_name_both_values(
    root: Path, world: int, capfd: pytest.CaptureFixture[str]
) -> None:
    file = toy.run_file(root, f"differ{world}")
    argv = [["--deepspeed_config", str(file)] for _ in range(world)]
    argv[-1] += ["--set", "run.seed=7", "--set", "classifier.scale=8.0"]
    assert run_ranks(_differently, world, argv, [{}] * world) == [70] * world
    said = capfd.readouterr().err
    assert "the ranks disagree about the run" in said and said.count("error: ") == 1
    assert (
        f"megacid.run.seed is 0 on rank 0, {'0 on rank 1, 0 on rank 2, ' if world == 4 else ''}7 on rank {world - 1}"
        in said
    )
    assert "megacid.classifier.scale is 16.0 on rank 0" in said
    assert not (root / "runs" / f"differ{world}").exists()


def test_ranks_with_other_data_end_at_the_start(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same path on two nodes, but not the same files."""
    import shutil

    file = toy.run_file(root, "other_data")
    shutil.copytree(root / "features", tmp_path / "there")
    meta = json.loads((tmp_path / "there" / "meta.json").read_text())
    (tmp_path / "there" / "meta.json").write_text(json.dumps({**meta, "source": {"seed": 8}}))
    assert run_ranks(
        _elsewhere, 2, ["--deepspeed_config", str(file)], str(root / "features"), str(tmp_path / "there")
    ) == [70, 70]
    assert "the ranks disagree about the content of" in capfd.readouterr().err


def _elsewhere(argv: list[str], asked: str, given: str) -> int:
    from megacid.data.features import FeatureSet
    from megacid.training import open_data

    if dist.get_rank() == 1:
        open_data.FeatureSet = lambda directory: FeatureSet(given if directory == asked else directory)  # type: ignore[assignment,misc]
    return _differently([argv, argv], [{}, {}])


# ---- F24: replicas that drift apart ------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "stage"), [(2, 0), (2, 1), (2, 2), (4, 1)])
def test_one_bit_of_difference_between_replicas_is_found_at_the_next_check(
    root: Path, world: int, stage: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """2^-20 on a weight of one rank, after the step, since ZeRO 1 and 2 overwrite all replicas in each step."""
    file = toy.run_file(root, f"drift{world}{stage}", run__check_every=4, zero_optimization={"stage": stage})
    plan = FaultPlan(Fault("train:applied", "perturb_student", rank=world - 1, step=7, value=2.0**-20))
    assert toy.train_toy(world, file, plan=plan) == [70] * world
    said = capfd.readouterr().err
    assert "the ranks disagree about the student's weights after step 8" in said and f"on rank {world - 1}" in said
    assert not (root / "runs" / f"drift{world}{stage}" / "step-00000012").exists()


def test_without_a_fault_the_checks_find_nothing(root: Path) -> None:
    assert toy.train_toy(4, toy.run_file(root, "calm", run__check_every=1)) == [0] * 4
