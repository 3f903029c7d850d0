"""The plan of the classifier's step: what a run file may set, where it is shown, and the errors of settings that cannot
be."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy

from megacid.classifier import PartialFC, partial_fc
from megacid.config.load import load_run
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.models.feature_tower import FeatureTower
from megacid.training import components, estimates, memory
from megacid.training.classifier_plan import plan_classifier
from megacid_kernels.engines import torch_engine

CPU = Parallel(0, 1, 0, torch.device("cpu"), None)
DATA: Any = SimpleNamespace(num_classes=toy.CLASSES, centroids=None)


def run_with(tmp_path: Path, *changes: str, world: int = 1) -> Any:
    return load_run(toy.run_file(tmp_path, "planned"), list(changes), world=world)


def head_of(tmp_path: Path, *changes: str) -> PartialFC:
    head, _ = components.make_classifier(run_with(tmp_path, *changes), DATA, toy.DIM, CPU)
    assert head is not None
    return head


def test_the_run_file_sets_the_budget_the_precision_and_the_implementation(tmp_path: Path) -> None:
    changes = "classifier.memory_budget_gb=0.00001 classifier.precision=fp32 classifier.weight_grad=auto".split()
    spec = head_of(tmp_path, *changes)._spec
    assert (spec.memory_budget_bytes, spec.precision, spec.weight_grad) == (10_000, "fp32", "auto")
    assert head_of(tmp_path, "classifier.impl=torch")._spec.impl == "torch"
    default = head_of(tmp_path)._spec
    assert (default.memory_budget_bytes, default.precision, default.impl) == (None, "auto", "auto")


def test_the_head_makes_the_chunks_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 samples of 311 class rows, and 32 numbers for each label's row, in at most 5,500 bytes: 3 chunks."""
    changes = ["classifier.memory_budget_gb=0.0000055", "classifier.sample_rate=1"]
    plan = plan_classifier(run_with(tmp_path, *changes), 311, toy.DIM, 1, "cpu").plan
    assert [part.stop - part.start for part in plan.chunks] == [3, 3, 2] and plan.budget == 5500
    head, _ = components.make_classifier(
        run_with(tmp_path, *changes),
        SimpleNamespace(num_classes=311, centroids=None),
        toy.DIM,
        CPU,  # type: ignore[arg-type]
    )
    assert head is not None
    seen: list[int] = []
    multiply = torch_engine.times_transposed
    monkeypatch.setattr(torch_engine, "times_transposed", lambda a, b: seen.append(len(a)) or multiply(a, b))
    head(torch.randn(8, toy.DIM), torch.arange(8))
    assert seen == [3, 3, 3, 3, 2, 2]  # each chunk with two tiles of class rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "classifier.memory_budget_gb=1e-6",
            'classifier.memory_budget_gb" is 1e-06, expected at least 3.772e-06, the exponentials of one sample with',
        ),
        (
            "classifier.memory_budget_gb=1e-6 classifier.weight_grad=recomputed",
            'classifier.memory_budget_gb" is 1e-06: memory_budget_bytes is 1000, expected at least .*: raise it',
        ),
        ("classifier.precision=fp16", "precision is 'fp16' with impl 'torch', expected 'auto' or 'fp32'"),
        ("classifier.impl=triton", "impl is 'triton' with tensors on cpu, expected 'auto' or 'torch'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(tmp_path: Path, changes: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        head_of(tmp_path, "train_batch_size=512", *changes.split())
    assert "\n" not in str(error.value)


def test_the_budget_that_a_refusal_names_is_accepted(tmp_path: Path) -> None:
    changes = ["train_batch_size=512", "classifier.memory_budget_gb=1e-6"]
    with pytest.raises(UserError, match="expected at least") as error:
        head_of(tmp_path, *changes)
    named = str(error.value).partition("expected at least ")[2].partition(",")[0]
    run = run_with(tmp_path, changes[0], f"classifier.memory_budget_gb={named}")
    plan = plan_classifier(run, toy.CLASSES, toy.DIM, 1, "cpu").plan
    assert plan.samples == 1 and plan.bytes == plan.budget


def test_every_label_of_a_sample_may_be_a_row_of_its_own(tmp_path: Path) -> None:
    """Half of 16,384 classes are drawn on one of 8 ranks; 64 samples with 8 labels each use up to 64 of its others."""
    rows = []
    for labels in (1, 8):
        run = run_with(tmp_path, "train_batch_size=64", "classifier.sample_rate=0.5", world=8)
        data = run.megacid.data.model_copy(update={"labels_per_sample": labels})
        run = replace(run, megacid=run.megacid.model_copy(update={"data": data}))
        rows.append(plan_classifier(run, 16_384, toy.DIM, 8, "cpu").sizes.rows)
    assert rows[1] - rows[0] == 64 - 8


def test_static_shapes_are_planned_in_multiples_of_512_rows(tmp_path: Path) -> None:
    changes = ["train_batch_size=64", "classifier.sample_rate=0.1"]
    rows = [
        plan_classifier(run_with(tmp_path, *changes, f"classifier.static_shapes={static}"), classes, toy.DIM, 1, "cpu")
        .sizes.rows
        for classes in (16_384, 500)
        for static in ("false", "true")
    ]  # fmt: skip
    assert rows == [1638 + 3 + 64, 2048, 50 + 3 + 64, 500]


@pytest.mark.parametrize("changes", ["memory_budget_gb=0", "precision=fp8", "impl=cuda", "weight_grad=both"])
def test_a_value_out_of_range_is_refused_by_its_key(tmp_path: Path, changes: str) -> None:
    with pytest.raises(UserError, match=f'"megacid.classifier.{changes.partition("=")[0]}" is '):
        run_with(tmp_path, f"classifier.{changes}")


def test_ten_million_classes_on_one_gpu_are_planned_without_it(tmp_path: Path) -> None:
    """On one of 80 GB, which is assumed where there is none: "auto" takes slabs for all rows, chunks for a tenth."""
    if torch.cuda.is_available():
        pytest.skip("the plan follows the GPU that is there")
    changes = ["train_batch_size=4096", "classifier.weight_grad=auto", "classifier.feature_rate=1"]
    for rate, kind in ((1, "recomputed"), (0.1, "stored")):
        run = run_with(tmp_path, *changes, f"classifier.sample_rate={rate}")
        plan = plan_classifier(run, 10_000_000, 512, 1, "cuda").plan
        assert plan.kind == kind
        assert len(plan.slabs) == 127 if rate == 1 else plan.samples == 2048
    # Eight ranks have an eighth of the rows each.
    run = run_with(tmp_path, *changes, "classifier.sample_rate=1", world=8)
    assert plan_classifier(run, 10_000_000, 512, 8, "cuda").plan.kind == "stored"


def test_the_default_budget_leaves_the_student_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of what rows, moments, gradient and student leave of 79 GiB; the head of a run plans with the same."""
    if torch.cuda.is_available():
        pytest.skip("the plan follows the GPU that is there")
    run = run_with(tmp_path, "train_batch_size=4096", "classifier.sample_rate=1", "classifier.feature_rate=1")
    alone, with_student = (plan_classifier(run, 5_000_000, 512, 1, "cuda", bytes_).plan for bytes_ in (0, 4 << 30))
    assert alone.budget == ((79 << 30) - 20 * 5_000_000 * 512) // 4 and alone.budget - with_student.budget == 1 << 30
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(partial_fc, "with_available_memory", lambda spec, *sizes: seen.append(sizes) or spec)
    head, _ = components.make_classifier(run_with(tmp_path), DATA, toy.DIM, CPU, 4 << 30)
    assert head is not None
    head(torch.randn(8, toy.DIM), torch.arange(8))
    assert seen == [(head.weight.device, toy.CLASSES, toy.DIM, 4 << 30)]


def test_the_bytes_of_the_student_are_those_that_the_estimate_has_for_the_whole_run(tmp_path: Path) -> None:
    student = FeatureTower(toy.DIM, toy.DIM, hidden=32, layers=1)
    parameters = sum(p.numel() for p in student.parameters())
    for stage, offload, share in (
        (1, {}, 4 + 12 / 4),
        (0, {}, 4 + 8),
        (1, {"offload_optimizer": {"device": "cpu"}}, 4),
    ):
        zero = {"stage": stage, **offload}
        run = load_run(toy.run_file(tmp_path, "student", zero_optimization=zero), [], world=4)
        kept = {
            name: size for name, size in memory.student_sizes(run, parameters, 4, "cuda").items() if "buffer" in name
        }
        assert memory.student_bytes(run, student, 4, "cuda") == int(parameters * share + sum(kept.values()))
    assert memory.student_bytes(run, student, 4, "cpu") == 0


def test_dry_run_and_estimate_warn_of_a_peak_that_no_gpu_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and moments of 20 million classes of width 1,280 have 307 GB."""
    warning = "MiB, expected at most 80,896, the memory of the GPU: set classifier.memory_budget_gb below the budget of"
    if torch.cuda.is_available():
        pytest.skip("the limit is that of the GPU that is there")
    file = toy.run_file(tmp_path, "large", train_batch_size=16, student__embed_dim=1280)
    options = ["--deepspeed_config", str(file), "--ranks", "1", "16", "--device", "cuda"]
    said = toy.estimated([*options, "--num-classes", "20000000", "--feature-dim", str(toy.DIM)])
    assert "1 rank: the estimated peak of rank 0 is" in said and said.count(warning) == 1
    peak = memory.MemoryEstimate({"classifier rows": 90_000.0}, {"forward": 1.0}, 0.0, 0.0)
    monkeypatch.setattr(estimates, "memory_estimate", lambda *_: peak)
    with caplog.at_level(logging.WARNING, logger="megacid"):
        for device, classes in (("cuda", 7), ("cuda", 0), ("cpu", 7)):
            estimates._report_peak_memory(None, None, classes, 1, device, None)  # type: ignore[arg-type]
    assert len(caplog.messages) == 2 and f"is 90,001 {warning}" in caplog.messages[0]
    assert "memory_budget_gb" not in caplog.messages[1]


@pytest.mark.parametrize("weight_grad", ["auto", "recomputed"])
def test_slabs_of_a_part_of_the_dimensions_read_a_copy_of_the_rows(tmp_path: Path, weight_grad: str) -> None:
    """[S, D / 2] fp32; all dimensions are read in place."""
    if torch.cuda.is_available():
        pytest.skip("the plan follows the GPU that is there")
    changes = ["train_batch_size=4096", f"classifier.weight_grad={weight_grad}", "classifier.sample_rate=1"]
    for rate, copied in ((1, None), (0.5, 10_000_000 * 256 * 4)):
        run = run_with(tmp_path, *changes, f"classifier.feature_rate={rate}")
        planned = plan_classifier(run, 10_000_000, 512, 1, "cuda")
        assert planned.plan.kind == "recomputed"
        _, step = memory._classifier(run, 10_000_000, 512, 1, "cuda")
        assert step.get("sampled rows") == copied and planned.plan.bytes in step.values()


def test_dry_run_and_estimate_say_the_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, student = run_with(tmp_path, "classifier.sample_rate=1"), SimpleNamespace(embed_dim=toy.DIM)
    expected = str(plan_classifier(run, toy.CLASSES, toy.DIM, 1, "cpu"))
    assert expected.startswith(
        "gradient stored, 1 chunk of 8 samples x 1001 class rows, 0.0 MiB within a budget of 64.0"
    )
    with caplog.at_level(logging.INFO, logger="megacid"):
        estimates._report_classifier(run, student, toy.CLASSES, 1, "cpu", None)  # type: ignore[arg-type]
    assert f"classifier: {expected}" in caplog.text
    file = toy.run_file(tmp_path, "table", classifier__sample_rate=1)
    sizes = ["--num-classes", str(toy.CLASSES), "--feature-dim", str(toy.DIM), "--device", "cpu"]
    said = toy.estimated(["--deepspeed_config", str(file), "--ranks", "1", "2", *sizes])
    assert f"1 rank: {expected}" in said and "2 ranks: gradient stored, 1 chunk of 8 samples x 501 class rows" in said
