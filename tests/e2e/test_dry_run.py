"""What `--dry-run` passes, starts: mistakes that training would meet at its first step end it, alike on each rank."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from train_run import Pipeline, losses, run_train, train_rank

from megacid.models.student import build_student


def error_of(capfd: pytest.CaptureFixture[str], *words: str) -> None:
    """Of all ranks together there is one error, on one line, and no traceback."""
    error = capfd.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in error and all(word in line for word in words), error


def test_the_loss_of_a_dry_run_is_that_of_the_first_step_of_training(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    file = pipeline.run_file("first", run__log_every=1, zero_optimization={"stage": 2})
    run_train(2, file, "--dry-run")
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "loss of the first micro-batch: " in line]
    assert not (pipeline.root / "runs" / "first").exists()
    run_train(2, file, "--stop-after", "1", expect=143)
    assert float(said.split("micro-batch: ")[1].split()[0]) == pytest.approx(
        losses(pipeline.root / "runs" / "first")[1], rel=1e-5
    )


def test_a_tower_without_projection_is_refused_before_the_data_are_opened(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    file = pipeline.run_file("widths", student__model="ViT-B-16-SigLIP", data__shards="/nowhere")
    for ranks, option in ((2, "--dry-run"), (1, "--stop-after=1")):
        run_train(ranks, file, option, expect=2)
        error_of(capfd, 'student "ViT-B-16-SigLIP" gives images of width 768', 'set "student.projection": true')


EARLY: dict[str, tuple[dict[str, Any], str]] = {
    "a projection that adds nothing": ({"student__projection": True}, '"student.projection" is true, but both towers'),
    "weights of another activation": (
        {"student__model": "ViT-B-32", "student__pretrained": "openai"}, 'use the model "ViT-B-32-quickgelu"',
    ),
    "weights of another width": (
        {"student__model": "ViT-B-16-SigLIP", "student__pretrained": "webli"}, "gives images of width 768",
    ),
    "checkpointing without effect": (
        {"student__model": "RN50", "student__grad_checkpointing": True}, 'which the image tower of "RN50"',
    ),
    "an image size below the patch": ({"student__image_size": 4}, "cannot take images of 4 x 4 pixels"),
    "a run directory below a file": ({"run__dir": "/etc/passwd"}, "/etc/passwd is not a directory"),
    "NVMe without async_io": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}, "libaio-dev",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EARLY)
def test_settings_that_cannot_start_are_one_error(
    pipeline: Pipeline, case: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megacid.distributed import engine

    monkeypatch.setattr(engine.AsyncIOBuilder, "is_compatible", lambda *args, **options: False)
    changes, said = EARLY[case]
    run_train(1, pipeline.run_file(f"early_{list(EARLY).index(case)}", **changes), "--dry-run", expect=2)
    error_of(capfd, said)


@pytest.mark.parametrize(("name", "world"), [("DeepSpeedConfig", 2), ("initialize", 1)])
def test_settings_that_deepspeed_itself_refuses_are_one_error_also_of_several_ranks(
    pipeline: Pipeline, name: str, world: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from megacid.distributed import engine

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("ZeRO stage 2 with contiguous gradients is not supported")

    monkeypatch.setattr(engine.deepspeed, name, refuse)
    for option in ("--dry-run", "--stop-after=1"):
        run_train(world, pipeline.run_file("combined"), option, expect=2)
        error_of(capfd, "DeepSpeed", "AssertionError" if name == "initialize" else "refuses its settings", "contiguous")


def test_embeddings_and_weights_that_are_not_finite_are_found_by_the_first_loss(
    pipeline: Pipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pipeline.teacher, tmp_path / "teacher")
    for file in (tmp_path / "teacher" / "img_emb").glob("*.npy"):
        np.save(file, np.full_like(np.load(file), np.nan))
    run_train(1, pipeline.run_file("nan_teacher", data__teacher=str(tmp_path / "teacher")), "--dry-run", expect=2)
    error_of(capfd, "the loss of the first micro-batch is nan", "data.teacher")
    weights = build_student("digits-student", embed_dim=32, seed=0).clip.state_dict()
    weights["visual.proj"].fill_(float("nan"))
    torch.save({"state_dict": weights}, tmp_path / "nan.pt")
    run_train(1, pipeline.run_file("nan_weights", student__pretrained=str(tmp_path / "nan.pt")), "--dry-run", expect=2)
    error_of(capfd, "the loss of the first micro-batch is nan", "student.pretrained")


def _failing_forward(argv: list[str]) -> int:
    """The forward of rank 1 alone fails, as when one GPU is short of memory."""
    from megacid.models.student import Student

    if dist.get_rank() == 1:

        def fail(*args: Any) -> None:
            raise RuntimeError("out of memory")

        Student.forward = fail  # type: ignore[method-assign,assignment]
    return train_rank(argv)


def test_a_forward_that_fails_on_one_rank_is_the_same_error_on_all(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    file = pipeline.run_file("one_rank")
    assert run_ranks(_failing_forward, 2, ["--deepspeed_config", str(file), "--dry-run"], timeout_s=120) == [2, 2]
    error_of(capfd, "the student's forward fails (RuntimeError: out of memory)")
