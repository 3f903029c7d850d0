"""NVIDIA Apex's optimizers, by a stand-in with their signature, which counts steps by parameter group as they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from faultplan import Fault, FaultPlan

from megacid.distributed import engine


class FusedAdam(torch.optim.Optimizer):
    """AdamW with apex.optimizers.FusedAdam's arguments and state."""

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: Any = (0.9, 0.999), eps: float = 1e-8,
        adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False, set_grad_none: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (first, second), step = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                mean, square = state["exp_avg"] / (1 - first**step), state["exp_avg_sq"] / (1 - second**step)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                    group["lr"] * mean / (square.sqrt() + group["eps"])
                )


@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_apex_counts_its_steps_over_a_skip_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.setattr(engine, "apex_optimizer", lambda kind: FusedAdam)
    toy.write_features(tmp_path / "features")
    plan = FaultPlan(Fault("train:batch", "nan_batch", step=2))
    ends = []
    for name, kind in (("torch", "AdamW"), ("whole", "apex_fused_adam"), ("parts", "apex_fused_adam")):
        optimizer = {"type": kind, "params": {"lr": 3e-3, "betas": [0.9, 0.999]}}
        file = toy.run_file(tmp_path, name, optimizer=optimizer, zero_optimization={"stage": stage},
                            run__total_steps=8, guard__max_skipped_share=1.0)  # fmt: skip
        if name == "parts":
            assert toy.train_toy(2, file, "--stop-after", "5", plan=plan) == [143, 143]
        assert toy.train_toy(2, file, plan=plan) == [0, 0]
        ends.append(toy.tensors(tmp_path / "runs" / name / "step-00000008"))
    assert toy.differing(ends[1], ends[2]) == []
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=2e-3)
