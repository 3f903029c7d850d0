"""A run with loss.form "sigmoid": its logit bias is learned, logged, averaged, saved, resumed and exported."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from train_run import Pipeline, run_train, scalars, tensors

from megacid.checkpoint.state import load_student_tensors
from megacid.config.load import load_run
from megacid.errors import UserError
from megacid.evaluate.export import export_student, student_from_run
from megacid.models.student import Student, build_student
from megacid.training.run_settings import check_same_settings
from megacid.training.schedule import parameter_groups

NAME = "logit_bias"
SETTINGS = {"loss__form": "sigmoid", "student__ema_decay": 0.5, "run__total_steps": 4, "run__save_every": 2}


def sigmoid_student(**options: str) -> Student:
    return build_student("digits-student", embed_dim=64, sigmoid=True, seed=0, **options)  # type: ignore[arg-type]


def logits_of(student: Student) -> tuple[float, float]:
    scale, bias = (student.clip.get_parameter(name) for name in ("logit_scale", "logit_bias"))
    assert scale.shape == bias.shape == (1,)
    return math.exp(scale.item()), bias.item()


@pytest.fixture(scope="module")
def run(pipeline: Pipeline) -> Path:
    """A run of 2 ranks that has lost its last checkpoint and was resumed; "whole" is a copy from before the loss."""
    file = pipeline.run_file("sigmoid", **SETTINGS)
    run_train(2, file)
    folder = pipeline.root / "runs" / "sigmoid"
    shutil.copytree(folder, folder.with_name("sigmoid-whole"))
    shutil.rmtree(folder / "step-00000004")
    run_train(2, file)
    return folder


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(run: Path) -> None:
    whole = run.with_name("sigmoid-whole")
    for step in ("step-00000002", "step-00000004"):
        want, got = (tensors(folder / step) for folder in (whole, run))
        assert {f"{kind}/{NAME}" for kind in ("param", "exp_avg", "exp_avg_sq")} <= want.keys() == got.keys()
        assert [name for name in want if not want[name].equal(got[name])] == []
        averages = [load_student_tensors(folder / step, ema=True) for folder in (whole, run)]
        assert all(averages[0][name].equal(averages[1][name]) for name in averages[0])


def test_the_bias_starts_at_siglips_value_moves_and_is_logged(run: Path) -> None:
    bias, scale = (scalars(run, f"train/logit_{name}") for name in ("bias", "scale"))
    saved = {step: tensors(run / f"step-{step:08d}")[f"param/{NAME}"].item() for step in (2, 4)}
    assert -10 < bias[2] < saved[2] < bias[4] < saved[4] < -9.9  # a step logs what its forward has used
    assert 0 < abs(scale[2] - 10) < 0.1
    # The own pair of each sample has a logit near -10 at the start, and the others have no loss.
    assert 1 < scalars(run, "train/contrastive")[2] < 20


@pytest.mark.parametrize("ema", [False, True])
def test_the_export_has_the_bias_and_open_clip_computes_the_same_logits(run: Path, tmp_path: Path, ema: bool) -> None:
    student, _ = student_from_run(run, ema=ema)
    export_student(student, tmp_path, name="digits-sigmoid", source={})
    config = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    assert (config["init_logit_bias"], config["init_logit_scale"]) == (-10.0, math.log(10))
    stock = open_clip.create_model(f"local-dir:{tmp_path}", output_dict=True).eval()
    assert stock.logit_bias.shape == () and stock.logit_bias.item() == logits_of(student)[1] != -10
    image, text = torch.randn(2, 3, 32, 32), torch.randint(1, 64, (2, student.text_length))
    ours, theirs = student.eval()(image, text), stock(image, text)
    assert ours.logit_bias.item() == theirs["logit_bias"].item()
    torch.testing.assert_close(
        ours.logit_scale * ours.image @ ours.text.T + ours.logit_bias,
        theirs["logit_scale"] * theirs["image_features"] @ theirs["text_features"].T + theirs["logit_bias"],
    )
    with pytest.raises(UserError, match=r"has init_logit_bias -10.0, which CLIPModel of transformers cannot express"):
        export_student(student, tmp_path, name="digits-sigmoid", source={}, card="card")


def test_the_form_cannot_change_within_a_run(run: Path, pipeline: Pipeline) -> None:
    softmax = load_run(pipeline.run_file("sigmoid", **{**SETTINGS, "loss__form": "softmax"}), [], world=2)
    with pytest.raises(UserError, match=r"other settings \(megacid\.loss\.form: 'sigmoid' -> 'softmax'"):
        check_same_settings(softmax.with_embed_dim(32), run)


def test_weights_without_a_bias_start_with_siglips_scale_and_bias_and_others_with_their_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "megacid")
    drawn, plain = sigmoid_student(), build_student("digits-student", embed_dim=64, seed=1)
    assert logits_of(drawn) == pytest.approx((10, -10))
    out = plain(torch.randn(1, 3, 32, 32), torch.ones(1, 16, dtype=torch.int64))
    assert out.logit_bias.item() == 0 and not out.logit_bias.requires_grad
    file = tmp_path / "weights.pt"
    for student, want, said in ((plain, (10, -10), 1), (drawn, (7, -3), 0)):
        with torch.no_grad():
            student.clip.get_parameter("logit_scale").fill_(math.log(7))
            for bias in (p for name, p in student.clip.named_parameters() if name == "logit_bias"):
                bias.fill_(-3)
        torch.save({"state_dict": student.clip.state_dict()}, file)
        caplog.clear()
        started = sigmoid_student(pretrained=str(file))
        assert logits_of(started) == pytest.approx(want)
        assert torch.equal(started.clip.state_dict()["visual.proj"], student.clip.state_dict()["visual.proj"])
        assert [r.getMessage() for r in caplog.records].count(
            "initial weights: without a logit bias, so logit_scale and logit_bias start at SigLIP's values"
        ) == said


def test_weights_with_a_bias_start_a_student_without_one_only_from_their_own_configuration(tmp_path: Path) -> None:
    student = sigmoid_student()
    export_student(student, tmp_path, name="digits-sigmoid", source={})
    with pytest.raises(UserError, match=r'they have a logit bias.*set "loss.form" to "sigmoid", or "student.model"'):
        build_student("digits-student", embed_dim=64, pretrained=str(tmp_path / "digits-sigmoid.pt"), seed=0)
    again = build_student(f"local-dir:{tmp_path}", embed_dim=None, seed=1).clip.state_dict()
    assert all(torch.equal(again[name], t) for name, t in student.clip.state_dict().items())


def test_the_towers_are_those_of_the_same_seed_without_a_bias() -> None:
    sigmoid, plain = sigmoid_student().clip.state_dict(), build_student("digits-student", embed_dim=64, seed=0).clip
    towers = {name: t for name, t in plain.state_dict().items() if name != "logit_scale"}
    assert sigmoid.keys() - towers.keys() == {"logit_scale", "logit_bias"}
    assert all(torch.equal(sigmoid[name], t) for name, t in towers.items())


def test_the_bias_has_no_weight_decay_and_no_layer_decay() -> None:
    student = sigmoid_student()
    for decay in (1.0, 0.75):
        groups = parameter_groups(student, 0.1, decay)
        (group,) = (group for group in groups if any(p is student.clip.logit_bias for p in group["params"]))
        assert group["weight_decay"] == 0 and group["lr_scale"] == 1
