"""The fp32 weights that DeepSpeed keeps by name, which checkpoints hold, are the student's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from megacid.distributed import engine

ZERO: dict[str, dict[str, Any]] = {
    "stage 1 in small buckets": {"stage": 1, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000},
    "stage 2 without overlap": {"stage": 2, "overlap_comm": False, "contiguous_gradients": False},
    "stage 2 offloaded": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "stage 3 in small groups": {"stage": 3, "sub_group_size": 1000, "stage3_param_persistence_threshold": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names")
    toy.write_features(root / "features")
    return root


def trained(root: Path, name: str, zero: dict[str, Any]) -> dict[str, torch.Tensor]:
    file = toy.run_file(root, name, zero_optimization=zero, run__total_steps=4, student__layers=3)
    assert toy.train_toy(2, file) == [0, 0]
    return toy.tensors(root / "runs" / name / "step-00000004")


@pytest.mark.parametrize("case", ZERO)
def test_a_checkpoint_of_any_zero_settings_holds_what_plain_training_holds(root: Path, case: str) -> None:
    plain, zero = trained(root, "plain", {"stage": 0}), trained(root, f"zero{list(ZERO).index(case)}", ZERO[case])
    for name in plain:
        torch.testing.assert_close(zero[name], plain[name], rtol=0, atol=2e-3)


def test_weights_under_other_names_are_refused_before_the_first_step(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with DeepSpeed's round_robin_gradients, which a run file cannot set: its offsets are of another order."""
    initialize = engine.deepspeed.initialize

    def reordered(*args: Any, config: dict[str, Any], **options: Any) -> Any:
        config["zero_optimization"]["round_robin_gradients"] = True
        return initialize(*args, config=config, **options)

    monkeypatch.setattr(engine.deepspeed, "initialize", reordered)
    file = toy.run_file(root, "reordered", student__layers=3, zero_optimization={"stage": 2})
    assert toy.train_toy(2, file) == [2, 2]
    assert "DeepSpeed has other fp32 weights than the student's under the name" in capfd.readouterr().err
    assert not list((root / "runs" / "reordered").glob("step-*"))
