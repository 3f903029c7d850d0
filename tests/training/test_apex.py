"""NVIDIA Apex's optimizers, by a stand-in with their signature, which counts steps by parameter group as they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apex_stand_in
import pytest
import timm.optim  # noqa: F401  imported once here, inherited by forked ranks
import torch
import toy
from faultplan import Fault, FaultPlan

PEERS = {"apex_fused_adam": "AdamW", "apex_fused_lamb": "Lamb"}
CASES = [("apex_fused_adam", 0), ("apex_fused_adam", 1), ("apex_fused_lamb", 0)]


@pytest.mark.parametrize(("kind", "stage"), [*CASES, pytest.param("apex_fused_adam", 2, marks=pytest.mark.slow)])
def test_apex_counts_its_steps_over_a_skip_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stage: int
) -> None:
    """The run ends with the bits of one without a stop, and with the weights of the same optimizer from elsewhere."""
    apex_stand_in.install(monkeypatch)
    toy.write_features(tmp_path / "features")
    plan = FaultPlan(Fault("train:batch", "nan_batch", step=2))
    ends = []
    for name, kind_ in (("peer", PEERS[kind]), ("whole", kind), ("parts", kind)):
        params: dict[str, Any] = {"lr": 3e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
        file = toy.run_file(tmp_path, name, optimizer={"type": kind_, "params": params}, run__total_steps=8,
                            zero_optimization={"stage": stage}, guard__max_skipped_share=1.0)  # fmt: skip
        if name == "parts":
            assert toy.train_toy(2, file, "--stop-after", "5", plan=plan) == [143, 143]
        assert toy.train_toy(2, file, plan=plan) == [0, 0]
        ends.append(toy.tensors(tmp_path / "runs" / name / "step-00000008"))
    assert toy.differing(ends[1], ends[2]) == []
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=2e-3)


@pytest.mark.parametrize("grad_averaging", [True, False])
def test_the_parameters_of_the_run_file_reach_apex_and_its_own_clipping_is_off(
    monkeypatch: pytest.MonkeyPatch, grad_averaging: bool
) -> None:
    from megacid.distributed.optimizers import make_optimizer

    apex_stand_in.install(monkeypatch)
    params = {"lr": 1e-2, "use_nvlamb": True, "grad_averaging": grad_averaging}
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = make_optimizer({"optimizer": {"type": "apex_fused_lamb", "params": params}}, [{"params": [p]}])
    assert isinstance(optimizer, apex_stand_in.FusedLAMB) and optimizer.use_nvlamb
    p.grad = torch.full_like(p, 1e6)
    optimizer.step()
    mean = optimizer.state[p]["exp_avg"]
    torch.testing.assert_close(mean, torch.full_like(p, 1e5 if grad_averaging else 1e6))
