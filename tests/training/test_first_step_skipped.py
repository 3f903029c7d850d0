"""A checkpoint of a run whose steps so far were all skipped, so that its optimizer has no moments yet."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.optim  # noqa: F401  imported once here, inherited by forked ranks
import toy
from faultplan import Fault, FaultPlan


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("AdamW", 0), ("Lamb", 0), ("AdamW", 3), *(pytest.param("AdamW", s, marks=pytest.mark.slow) for s in (1, 2))],
)
def test_a_checkpoint_before_the_first_update_is_saved_and_resumed(tmp_path: Path, kind: str, stage: int) -> None:
    toy.write_features(tmp_path / "features")
    plan = FaultPlan(*(Fault("train:batch", "nan_batch", step=step) for step in range(2)))
    ends = []
    for name, stops in (("whole", []), ("parts", ["--stop-after", "2"])):
        optimizer = {"type": kind, "params": {"lr": 3e-3, "weight_decay": 0.1}}
        file = toy.run_file(tmp_path, name, zero_optimization={"stage": stage}, run__total_steps=6, run__save_every=6,
                            optimizer=optimizer, guard__max_skipped_share=1.0)  # fmt: skip
        assert toy.train_toy(2, file, *stops, plan=plan) == ([143, 143] if stops else [0, 0])
        if stops:
            assert toy.train_toy(2, file) == [0, 0]
        ends.append(toy.tensors(tmp_path / "runs" / name / "step-00000006"))
    assert toy.differing(*ends) == []
