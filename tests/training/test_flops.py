"""The arithmetic of a step, by torch's counter and by formula, and the peaks of known GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy
from torch import nn

from megacid.config.load import load_run
from megacid.models.feature_tower import FeatureTower
from megacid.models.student import build_student
from megacid.training.flops import classifier_flops, peak_tflops, step_flops, student_flops


def test_count_of_an_mlp_is_that_of_its_matrices() -> None:
    tower = FeatureTower(24, 16, hidden=40, layers=2)
    products = [24 * 40, 40 * 40, 40 * 16]
    # Forward, the gradient of each weight, and of each input but the first.
    assert student_flops(tower) == 2 * (3 * sum(products) - products[0])


def test_counting_changes_neither_the_student_nor_a_random_generator() -> None:
    student = build_student("digits-student", embed_dim=None, seed=0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    plain = student_flops(student)
    assert torch.get_rng_state().equal(state) and all(p.grad is None for p in student.parameters())
    assert all(value.equal(before[name]) and value.device.type == "cpu" for name, value in student.state_dict().items())
    student.clip.set_grad_checkpointing(True)
    assert student_flops(student, recomputes=True) == plain
    assert student.clip.visual.transformer.grad_checkpointing


def test_frozen_parameters_need_no_gradient() -> None:
    student = build_student("digits-student", embed_dim=None, seed=0)
    whole = student_flops(student)
    student.clip.visual.requires_grad_(False)
    assert student_flops(student) < 0.8 * whole


@pytest.mark.slow
def test_count_of_a_vit_b_32_is_the_published_one() -> None:
    """open_clip's docs/model_profile.csv: 14.78 GFLOPs for the forward of a pair."""
    student = build_student("ViT-B-32", embed_dim=None, seed=0)
    assert student_flops(student) == pytest.approx(3 * 14.78e9, rel=0.01)


def test_classifier_by_formula(tmp_path: Path) -> None:
    run = load_run(toy.run_file(tmp_path, "toy"), ["classifier.sample_rate=0.5"], world=1)
    assert classifier_flops(run, 1000, 32) == 3 * 2 * 500 * 32


def test_a_student_that_cannot_be_counted_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(FeatureTower):
        def forward(self, image: torch.Tensor, text: torch.Tensor) -> nn.Module:  # type: ignore[override]
            return super().forward(image * image.sum().item(), text)  # type: ignore[return-value]

    run = load_run(toy.run_file(tmp_path, "toy"), world=1)
    assert step_flops(run, Stubborn(24, 16), None) is None
    assert "the arithmetic of student feature-mlp cannot be counted" in caplog.text


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", None), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA GeForce GTX 1080", None),
    ],
)  # fmt: skip
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
