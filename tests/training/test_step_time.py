"""The model of a step's time: each part by hand, and the class rows compared with those that the classifier draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

import estimate
from megacid import PartialFC
from megacid.config.load import load_run
from megacid.errors import UserError
from megacid.models.feature_tower import FeatureTower
from megacid.training.classifier_plan import plan_classifier
from megacid.training.communication import Collective
from megacid.training.flops import classifier_flops, student_flops
from megacid.training.open_data import Data
from megacid.training.step_time import COSTS, Costs, Step

ROOT = Path(__file__).resolve().parents[2]
CLASSES, WIDTH = 1001, 32
PAIRS = ROOT / "configs" / "vit_b32_laion225m_8gpu.json"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.run_file(tmp_path_factory.mktemp("step_time"), "toy")


def step_of(file: Path, *settings: str, world: int = 2) -> Step:
    """A step of feature vectors: the cluster term alone, batch 8."""
    run = load_run(file, list(settings), world=world)
    return Step.of(run, FeatureTower(24, WIDTH, hidden=32, layers=1), CLASSES, world, "cpu")


def pairs_step(*settings: str, world: int = 8, teacher_width: int = WIDTH) -> Step:
    """A step of instance and cluster terms, of a student with a forward of 5 and a backward of 10 operations."""
    run = load_run(PAIRS, list(settings), world=world).with_embed_dim(WIDTH)
    return Step(run, world, "cuda", WIDTH, teacher_width, CLASSES, 5.0, 10.0, 1000, [])


def test_the_student_takes_the_operations_that_give_mfu(file: Path) -> None:
    step, parts = step_of(file), step_of(file).time(Costs(tower_flop=1.0))
    tower = FeatureTower(24, WIDTH, hidden=32, layers=1)
    assert parts["forward"] + parts["backward"] == 4 * student_flops(tower)
    assert {name for name, seconds in parts.items() if seconds} == {"forward", "backward"}
    assert step.time(Costs(tower_flop=1.0, fp32=3.0))["forward"] == 3 * parts["forward"]


def test_gradient_caching_and_checkpointing_repeat_forwards() -> None:
    plain = pairs_step("student.grad_checkpointing=false").time(Costs(tower_flop=1.0))
    assert (plain["forward"], plain["backward"]) == (4096 * 5, 4096 * 10)  # 32,768 samples on 8 ranks
    assert pairs_step().time(Costs(tower_flop=1.0))["backward"] == 4096 * 15
    cached = pairs_step("gradient_accumulation_steps=4").time(Costs(tower_flop=1.0))
    assert cached["forward"] == 4096 * 5 * 7 / 4
    no_classes = ('loss={"mse": 1.0}', "data.labels=null", "classifier=null")
    mse = pairs_step("gradient_accumulation_steps=4", *no_classes).time(Costs(tower_flop=1.0))
    assert mse["forward"] == 4096 * 5


def test_an_update_reads_and_writes_this_ranks_share() -> None:
    adamw = pairs_step().time(Costs(memory_byte=1.0))["update: student"]
    assert adamw == 1000 * (28 / 8 + 3 * 2)  # bf16 gradients are copied and their norm is taken
    lion = pairs_step('optimizer={"type": "Lion", "params": {"lr": 1e-4}}').time(Costs(memory_byte=1.0))
    assert lion["update: student"] == 1000 * (20 / 8 + 3 * 2)
    averaged = pairs_step("student.ema_decay=0.9").time(Costs(memory_byte=1.0))
    assert averaged["update: student"] == adamw + 1000 * 12 / 8


def test_losses_take_their_products_and_passes(file: Path) -> None:
    flop = pairs_step().time(Costs(product_flop=1.0))
    similarities = 4096 * 32768
    assert flop["objective: pairs"] == 8 * 2 * similarities * WIDTH
    moved = pairs_step().time(Costs(memory_byte=1.0))
    assert moved["objective: pairs"] == 4 * 6 * similarities
    half = pairs_step('loss.form="sigmoid"').time(Costs(product_flop=1.0))
    assert half["objective: pairs"] == flop["objective: pairs"] / 2
    teachers = ('data.teacher=["a", "b"]', "loss.affinity=1.0", "classifier.init=random")
    two = pairs_step(*teachers, teacher_width=2 * WIDTH).time(Costs(product_flop=1.0))
    assert two["objective: pairs"] == 3 * flop["objective: pairs"]
    wider = pairs_step(*teachers, teacher_width=4 * WIDTH).time(Costs(product_flop=1.0))
    assert wider["objective: pairs"] - two["objective: pairs"] == 2 * 2 * similarities * 2 * WIDTH
    every_class = step_of(file, "classifier.sample_rate=1.0")
    classes = every_class.time(Costs(product_flop=1.0))["objective: classes"]
    assert every_class.rows == CLASSES / 2 and classes == 4 * classifier_flops(every_class.run, CLASSES, WIDTH)
    recomputed = step_of(file, "classifier.sample_rate=1.0", "classifier.weight_grad=recomputed")
    assert recomputed.time(Costs(product_flop=1.0))["objective: classes"] == pytest.approx(classes * 2)
    # Weights read and written, the gradient, two moments read and written; bf16 moments halve the last.
    for moments, size in (("fp32", 28), ("bf16", 20)):
        step = step_of(file, "classifier.sample_rate=1.0", f'classifier.moments="{moments}"')
        assert step.time(Costs(memory_byte=1.0))["update: classes"] == CLASSES / 2 * WIDTH * size


def test_class_rows_on_a_gpu_take_the_work_of_the_printed_plan() -> None:
    """All classes, so that the plan's rows are those of a step, of instance and cluster terms with three weights."""
    every = ("classifier.sample_rate=1.0", "classifier.init=random")

    def classes(*settings: str, **costs: float) -> float:
        step = replace(pairs_step(*every, *settings), num_classes=1_000_000)
        return step.time(Costs(**costs))["objective: classes"]  # type: ignore[arg-type]

    product = 2 * 32768 * 125_000 * WIDTH
    assert classes(product_flop=1.0, fp32=10.0) == 6 * product
    assert classes("classifier.weight_grad=recomputed", product_flop=1.0) == (6 + 2 + 4) * product
    assert classes("classifier.precision=fp32", product_flop=1.0, fp32=10.0) == 60 * product
    assert classes("classifier.impl=torch", product_flop=1.0, fp32=10.0) == 60 * product
    traffic = {
        settings: classes(*settings.split(), memory_byte=1.0)
        for settings in ("", "classifier.impl=torch", "classifier.precision=fp32", "classifier.memory_budget_gb=0.2")
    }
    for settings, moved in traffic.items():
        run = load_run(PAIRS, [*every, *settings.split()], world=8).with_embed_dim(WIDTH)
        planned = plan_classifier(run, 1_000_000, WIDTH, 8, "cuda")
        assert moved == pytest.approx(planned.work.bytes)
        assert f"predicted traffic {moved / 2**30:.3g} GiB" in str(planned).replace(",", "")
    default, *others = traffic.values()
    assert min(others) > default


@pytest.mark.parametrize("labels", [16, 400])
def test_as_many_class_rows_as_the_classifier_uses(file: Path, labels: int) -> None:
    run = load_run(file, [f"train_batch_size={labels}"], world=1)
    step = replace(step_of(file), run=run, world=1)
    head, used = PartialFC(CLASSES, WIDTH, sample_rate=run.megacid.classifier.sample_rate), 0.0
    for number in range(20):
        head.set_step(number)
        target = torch.randint(CLASSES, (labels,), generator=torch.Generator().manual_seed(number))
        head(torch.ones(labels, WIDTH), target)
        used += float(head.metrics()["sampled"]) / 20
    assert step.rows == pytest.approx(used, rel=0.02)


def test_collectives_cross_links_and_network_cards() -> None:
    costs = Costs(link_byte=1.0, network_byte=16.0, hop=1000.0, network_hop=50_000.0, ranks_per_node=8)
    sent = [Collective("a", "all_gather", 8000), Collective("b", "all_reduce", 800, 3)]

    def seconds(world: int) -> float:
        step = replace(pairs_step(), world=world, collectives=sent)
        return step.time(costs)["communication"]

    assert seconds(1) == 0
    # A ring sends (W - 1) / W of the bytes, twice for an all-reduce. One node has a ring of 7 hops.
    assert seconds(8) == (8000 + 3 * 2 * 800) * 7 / 8 + 7 * 1000 + 3 * 2 * 7 * 1000
    # Four nodes: the 8 network cards take 16 / 8 seconds per byte of the ring, which has 28 hops inside nodes.
    between = 2 * (8000 + 3 * 2 * 800) * 31 / 32
    assert seconds(32) == between + 28 * 1000 + 3 * 50_000 + 3 * 2 * (7 * 1000 + 2 * 50_000)


def test_a_step_waits_for_the_loader_only_where_it_is_slower() -> None:
    costs = Costs(tower_flop=1.0, sample=200.0)  # 8 workers: 25 seconds per sample, for 20 of computation
    parts = pairs_step().time(costs)
    assert parts["waiting for data"] == 4096 * (25 - 20)
    assert pairs_step("data.workers=16").time(costs)["waiting for data"] == 0
    assert pairs_step("data.workers=0").time(costs)["waiting for data"] == 4096 * 200


def test_more_gpus_and_fewer_classes_never_take_longer_to_compute() -> None:
    costs = replace(COSTS["cuda"], sample=0.0)
    computed = {}
    for world in (8, 64, 512):
        for classes in (10**6, 10**7, 10**8):
            parts = replace(pairs_step(world=world), num_classes=classes).time(costs)
            computed[world, classes] = sum(parts.values())
    for world, classes in computed:
        assert computed[world, classes] <= computed.get((world, classes * 10), float("inf"))
        assert computed[world, classes] <= computed.get((world // 8, classes), float("inf"))


def test_estimate_prints_a_prediction_and_takes_fitted_costs(file: Path, tmp_path: Path) -> None:
    report: dict[str, Any] = {"suite": "step-time", "machine": {}, "arguments": {"device": "cpu"}, "results": []}
    fitted = tmp_path / "fitted.json"
    fitted.write_text(json.dumps(report | {"costs": {"step": 3600.0}}))
    sizes = ["--deepspeed_config", str(file), "--num-classes", "1001", "--feature-dim", "32", "--ranks", "1", "2"]
    said = toy.estimated([*sizes, "--device", "cpu", "--costs", str(fitted)])
    assert f"the prediction of a model with the costs of {fitted}; not a measurement" in said
    fixed = next(line for line in said.splitlines() if line.startswith("fixed"))
    assert fixed.split() == ["fixed", *["3,600,000.0", "(100%)"] * 2]
    with pytest.raises(UserError, match="is of device cpu, expected cuda: pass another --device"):
        estimate.main([*sizes, "--device", "cuda", "--costs", str(fitted)])


def described(loss: str, *settings: str, embed_dim: int | None = None) -> Data:
    student = ["student.model=digits-student", "student.embed_dim=512"]
    run = load_run(ROOT / "configs" / "clip_kd.json", [*student, f"loss={loss}", *settings], world=1)
    options = ["--embed-dim", str(embed_dim)] if embed_dim else []
    return estimate.describe_data(run, estimate.parse(["--deepspeed_config", "", *options]))


def test_estimate_takes_the_students_width_for_the_teachers_only_where_they_agree() -> None:
    affinity = '{"contrastive": 1.0, "affinity": 1.0}'
    for loss, *settings in (['{"mse": 1.0}'], ['{"contrastive": 1.0}', "data.teacher=null"]):
        assert described(loss, *settings).teacher_dims == (512,)
    for teacher in ("nowhere", '["nowhere", "none"]'):
        with pytest.raises(UserError, match=r"nowhere.*; or pass --num-classes and --embed-dim to estimate without"):
            described(affinity, f"data.teacher={teacher}")
    assert described(affinity, embed_dim=1280).teacher_dims == (1280,)
