"""The student's AdamW where no compiler is installed, which is every host that was set up by pip alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.utils.cpp_extension
import toy

from megacid.distributed.optimizers import adamw_params, check_host
from megacid.errors import UserError


def test_a_gpu_host_without_nvcc_gets_pytorchs_fused_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    params = {"lr": 1e-3, "betas": [0.9, 0.98]}
    assert adamw_params(params) == {**params, "torch_adam": True, "fused": True}
    assert params == {"lr": 1e-3, "betas": [0.9, 0.98]}
    for device in ("cuda", "cpu"):
        check_host({"type": "AdamW", "params": params}, device)


def test_deepspeeds_fused_adam_is_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    asked = {"lr": 1e-3, "torch_adam": False}
    assert adamw_params(asked) == asked
    check_host({"type": "AdamW", "params": asked}, "cuda")


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "the CUDA compiler nvcc, which builds FusedAdam, was not found"), ("cpu", "a GPU")]
)
def test_fused_adam_that_cannot_be_built_is_one_line(
    monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    with pytest.raises(UserError, match=f'"optimizer.params.torch_adam" is false.*{message}.*remove'):
        check_host({"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": False}}, device)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_pytorchs_fused_adamw_resumes_with_the_same_bits(tmp_path: Path, stage: int) -> None:
    toy.write_features(tmp_path / "features")
    changes: dict[str, Any] = {"zero_optimization": {"stage": stage}, "run__total_steps": 12}
    whole, parts = (toy.run_file(tmp_path, name, **changes) for name in ("whole", "parts"))
    assert toy.train_toy(2, whole) == [0, 0]
    assert toy.train_toy(2, parts, "--stop-after", "5") == [143, 143]
    assert toy.train_toy(2, parts) == [0, 0]
    ends = [toy.tensors(tmp_path / "runs" / name / "step-00000012") for name in ("whole", "parts")]
    assert toy.differing(*ends) == []
