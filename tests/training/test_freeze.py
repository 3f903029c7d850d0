"""Frozen parameters stay bit-equal, without gradient, decay and optimizer state, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from small_student import SmallRun, run_file, small_student
from torch import Tensor, nn
from toy import differing

from megacid.config.load import load_run
from megacid.errors import UserError
from megacid.models.clip import StudentSpec
from megacid.models.freezing import frozen_parameters
from megacid.models.student import Student, build_student
from megacid.models.towers import check_towers
from megacid.training.components import refuse_batch_norm, trained_outputs
from megacid.training.memory import student_sizes
from megacid.training.schedule import parameter_groups

PATTERNS = ("image", "transformer.resblocks.0.*", "token_embedding.weight")


def freeze(student: Student) -> None:
    student.freeze(frozen_parameters(student.clip, PATTERNS, ("image", "text")))


def frozen_run(file: Path, settings: list[str]) -> dict[str, Any]:
    """Two steps, a checkpoint, a resume in a new engine, one more step; with and without the resume."""
    run = SmallRun(file, settings, freeze)
    before = dict(run.weights())
    losses = [run.step() for _ in range(2)]
    saved = run.state()
    resumed = SmallRun(file, settings, freeze)
    with torch.no_grad():
        for p in resumed.student.parameters():
            p.data.zero_()  # ZeRO 3 has empty tensors here, and its parts keep their values
    resumed.load(saved, run.updates)
    losses += [run.step(), resumed.step()]
    want, got = run.state(), resumed.state()
    return {
        "losses": losses, "same": differing(want, got) == [], "before": before, "after": dict(run.weights()),
        "resumed": dict(resumed.weights()), "saved": saved, "graph": run.engine(*run.inputs(0), seed=0).image.grad_fn,
        "gradients": [name for name, p in run.student.named_parameters() if p.grad is not None],
        "digest": run.engine.replica_digest(),
    }  # fmt: skip


def names(student: Student) -> set[str]:
    return {name for name, p in student.named_parameters() if not p.requires_grad}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_file(tmp_path_factory.mktemp("freeze"))


@pytest.fixture(scope="module")
def frozen() -> set[str]:
    student = small_student()
    freeze(student)
    return names(student)


CASES = [(1, 0, False), (2, 2, True), (1, 3, False)]
MORE = [(2, 0, False), (2, 1, False), (1, 1, True), (2, 2, False), (2, 3, False), (2, 3, True)]


@pytest.mark.parametrize(
    ("world", "stage", "bf16"),
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE],
)
def test_frozen_parameters_stay_through_steps_checkpoint_and_resume(
    file: Path, frozen: set[str], world: int, stage: int, bf16: bool
) -> None:
    settings = [f"zero_optimization.stage={stage}", f"bf16.enabled={str(bf16).lower()}", f"train_batch_size={world}"]
    for got in run_ranks(frozen_run, world, file, settings):
        assert got["same"] and got["losses"][2] == got["losses"][3] and got["graph"] is None
        first = dict(small_student().named_parameters())
        for name, value in got["before"].items():
            kept = got["saved"][f"param/{name}"]
            assert torch.equal(value, got["after"][name]) == (name in frozen), name
            assert torch.equal(got["after"][name], got["resumed"][name]), name
            moments = {kind for kind in ("exp_avg", "exp_avg_sq") if f"{kind}/{name}" in got["saved"]}
            if name in frozen:  # a checkpoint has the fp32 values also under bf16
                assert torch.equal(kept, first[name]) and not moments, name
            else:
                assert len(moments) == 2, name
        assert not set(got["gradients"]) & frozen


def test_no_optimizer_group_has_a_frozen_parameter(frozen: set[str]) -> None:
    student = small_student()
    freeze(student)
    grouped = {id(p) for group in parameter_groups(student, 0.1) for p in group["params"]}
    assert grouped == {id(p) for name, p in student.named_parameters() if name not in frozen}
    assert "clip.visual.proj" in frozen and "clip.transformer.resblocks.1.ln_1.weight" not in frozen


def refused(patterns: list[str], *words: str, trained: set[str] | None = None) -> None:
    with pytest.raises(UserError) as caught:
        check_towers(StudentSpec("digits-student"), freeze=patterns, trained=trained or {"image", "text"})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def test_a_pattern_without_parameters_and_a_student_without_gradient_are_named_before_the_data() -> None:
    refused(["image", "visual.con1.weight"], "'visual.con1.weight'", "matches no parameter", "visual.conv1.weight")
    refused(["image", "text"], "leaves no parameter of a tower with a gradient")
    refused(["*"], "leaves no parameter of a tower with a gradient")
    refused(["visual.*"], "the objective trains the image tower", trained={"image"})
    check_towers(StudentSpec("digits-student"), freeze=["text"], trained={"image"})


def test_the_objective_says_what_it_trains(file: Path) -> None:
    for loss, want in (
        ('{"cluster": 1.0}', {"image"}),
        ('{"cluster": 1.0, "alpha": 0.0, "beta": 1.0}', set()),
        ('{"mse": 1.0}', {"image", "text"}),
        ('{"contrastive": 1.0, "temperature": 0.1}', {"image", "text"}),
        ('{"affinity": 1.0}', {"image", "text", "logit_scale"}),
        ('{"instance": 1.0, "form": "sigmoid"}', {"image", "text", "logit_scale", "logit_bias"}),
    ):
        settings = [f"loss={loss}"]
        if "cluster" not in loss:
            settings += ["data.labels=null", "classifier=null"]
        if not any(word in loss for word in ("beta", "mse", "affinity", "instance")):
            settings.append("data.teacher=null")
        assert trained_outputs(load_run(file, settings, world=1).megacid.loss) == want, loss


def test_frozen_layers_do_not_update_statistics_and_do_not_drop_out(file: Path) -> None:
    student = small_student()
    student.clip.visual = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    student.freeze(frozen_parameters(student.clip, ["image"], ("text",)))
    student.eval().train()
    image = torch.randn(2, 3, 8, 8)
    first: Tensor = student.clip.visual(image)
    assert torch.equal(first, student.clip.visual(image)) and student.clip.visual[1].num_batches_tracked == 0
    assert student.clip.transformer.training and not student.clip.visual.training  # type: ignore[union-attr]
    run = load_run(file, ["gradient_accumulation_steps=2"], world=1)
    refuse_batch_norm(student, run)
    student.clip.visual[1].weight.requires_grad_()
    with pytest.raises(UserError, match="batch normalisation"):
        refuse_batch_norm(student.train(), run)


def test_the_estimate_counts_gradients_and_moments_of_the_others_only(file: Path) -> None:
    run = load_run(file, [], world=1)
    none, half = (student_sizes(run, 1 << 20, 1, "cuda", frozen) for frozen in (0, 1 << 19))
    assert half["student weights"] == none["student weights"]
    for part in ("student gradients", "student optimizer"):
        assert half[part] == none[part] / 2


def test_a_student_without_the_setting_is_in_training_mode_throughout() -> None:
    student = build_student("digits-student", embed_dim=None, seed=0)
    assert all(module.training for module in student.eval().train().modules()) and names(student) == set()
