"""The collectives of a training step on 2 ranks, counted: each embedding matrix is gathered once, as it is stored.

`megacid.training.communication` predicts them all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from collective_counter import CollectiveCounter
from harness import run_ranks
from test_gradient_cache import BATCH, CLASSES, WIDTH, build_state, division, micro_batches, small_student
from train_run import Pipeline

from megacid import train
from megacid.config.load import load_run
from megacid.models.freezing import frozen_parameters
from megacid.training.communication import Collective, step_collectives

NO_CLUSTER = ("loss.cluster=0", "data.labels=null", "loss.beta=null", "loss.gamma=null", "classifier=null")
OBJECTIVES = {
    "instance and cluster": ("loss.contrastive=0", "loss.mse=0"),
    "contrastive": (*NO_CLUSTER, "loss.instance=0", "loss.mse=0", "data.teacher=null"),
    "all terms": ("loss.affinity=0.2",),
    "cluster": (
        "loss.contrastive=0", "loss.instance=0", "loss.mse=0", "loss.beta=0", "loss.gamma=0", "data.teacher=null",
    ),
    "mse": (*NO_CLUSTER, "loss.instance=0", "loss.contrastive=0"),
    "contrastive, sigmoid": (
        *NO_CLUSTER, "loss.instance=0", "loss.mse=0", "data.teacher=null", "loss.form=sigmoid",
    ),
    "instance and cluster, sigmoid": ("loss.contrastive=0", "loss.mse=0", "loss.form=sigmoid"),
}  # fmt: skip
FP32, FP16 = BATCH * WIDTH * 4, BATCH * WIDTH * 2  # a matrix of all ranks
LABELS = 2 * (6 + BATCH // 2) * 8  # two headers of 6 numbers with the labels
GUARD = 9 * 8  # five numbers of the decision, four that are logged
# The collectives of the objective, in their order: name -> (kind, bytes).
EXPECTED = {
    "instance and cluster": [
        ("all_gather", FP16), ("all_gather", FP16), ("all_gather", FP32), ("all_gather", FP32),
        ("all_gather", LABELS), ("all_reduce", 7 * BATCH * 4), ("all_reduce", 4),
        ("reduce_scatter", FP32), ("reduce_scatter", FP32),
    ],
    "contrastive": [
        ("all_gather", FP32), ("all_gather", FP32), ("all_reduce", 4),
        ("reduce_scatter", FP32), ("reduce_scatter", FP32),
    ],
    "all terms": [
        ("all_gather", FP16), ("all_gather", FP16), ("all_gather", FP32), ("all_gather", FP32),
        ("all_gather", LABELS), ("all_reduce", 7 * BATCH * 4), ("all_reduce", 4 * 4),
        ("reduce_scatter", FP32), ("reduce_scatter", FP32),
    ],
    "cluster": [
        ("all_gather", LABELS), ("all_gather", FP32), ("all_reduce", 4 * BATCH * 4), ("reduce_scatter", FP32),
    ],
    "mse": [("all_reduce", 4)],
    # Each rank needs all texts of the student, or all of the teacher's matrices, and its own rows of the other one.
    "contrastive, sigmoid": [("all_gather", FP32), ("all_reduce", 4), ("reduce_scatter", FP32)],
    "instance and cluster, sigmoid": [
        ("all_gather", FP16), ("all_gather", FP16),
        ("all_gather", LABELS), ("all_gather", FP32), ("all_reduce", 7 * BATCH * 4), ("reduce_scatter", FP32),
        ("all_reduce", 4),
    ],
}  # fmt: skip


def count_collectives(file: Path, settings: list[str], freeze: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    """Those of the third step, in order."""
    state = build_state(file, settings, freeze=freeze)
    batches = (
        replace(b, teacher_image=b.teacher_image.half(), teacher_text=b.teacher_text.half())  # type: ignore[union-attr]
        for b in micro_batches(state, 3)
    )
    metrics, lifecycle = SimpleNamespace(waited_for_data=lambda _: None), SimpleNamespace(asked_after=lambda _: False)
    for step in range(3):  # the first one exchanges labels twice, to learn how many there are
        with CollectiveCounter() as counter:
            _, verdict = train.train_step(step, state, batches, metrics, lambda _: None, lifecycle)  # type: ignore[arg-type]
        assert verdict.apply
    return [tuple(call) for call in counter.calls]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nowhere = Path("nowhere")
    pipeline = Pipeline(tmp_path_factory.mktemp("communication"), nowhere, nowhere, nowhere)
    return pipeline.run_file("communication", classifier__init="random")


def predicted(file: Path, settings: list[str], freeze: tuple[str, ...] = ()) -> list[Collective]:
    run = load_run(file, settings, world=2)
    student = small_student(sigmoid=run.megacid.loss.form == "sigmoid")
    student.clip.set_grad_checkpointing(run.megacid.student.grad_checkpointing)
    student.freeze(frozen_parameters(student.clip, freeze, ("image", "text")))
    return step_collectives(run, student, CLASSES if run.megacid.loss.cluster else 0, 2, "cpu")


@pytest.mark.parametrize(("name", "accumulation"), [*((name, 1) for name in EXPECTED if name != "mse"), ("mse", 2)])
def test_a_step_has_these_collectives_and_no_others(file: Path, name: str, accumulation: int) -> None:
    settings = [*division(accumulation, 0), *OBJECTIVES[name]]
    calls_of_ranks = run_ranks(count_collectives, 2, file, settings)
    parameters = sum(p.numel() for p in small_student(sigmoid="sigmoid" in name).parameters())
    for calls in calls_of_ranks:
        times = accumulation if name == "mse" else 1  # mse alone needs no gradient caching
        assert calls == EXPECTED[name] * times + [("all_reduce", parameters * 4), ("all_reduce", GUARD)]
        assert sorted(calls) == sorted((c.kind, c.size) for c in predicted(file, settings) for _ in range(c.number))


def total_by_kind(calls: list[tuple[str, int]]) -> Counter[str]:
    total = Counter[str]()
    for kind, size in calls:
        total[kind] += size
    return total


STAGES = [
    *((stage, accumulation, False, 100_000) for stage in (1, 2, 3) for accumulation in (1, 2)),
    *((stage, 1, True, 100_000) for stage in (1, 2, 3)),
    *((3, accumulation, False, threshold) for accumulation in (1, 2, 4) for threshold in (0, 20_000)),
]


@pytest.mark.parametrize(
    ("stage", "accumulation", "bf16", "threshold"),
    [case if case == (2, 2, False, 100_000) else pytest.param(*case, marks=pytest.mark.slow) for case in STAGES],
)
def test_the_bytes_of_zero_are_the_predicted_ones(
    file: Path, stage: int, accumulation: int, bf16: bool, threshold: int
) -> None:
    settings = [*division(accumulation, stage), *OBJECTIVES["all terms"]]
    settings += ["bf16.enabled=true"] * bf16
    settings += [f"zero_optimization.stage3_param_persistence_threshold={threshold}"] * (stage == 3)
    expected = predicted(file, settings)
    for calls in run_ranks(count_collectives, 2, file, settings):
        assert total_by_kind(calls) == total_by_kind([(c.kind, c.size * c.number) for c in expected])
        assert stage == 3 or len(calls) == sum(c.number for c in expected)


FROZEN = {
    "image": ("image",),
    "text": ("text",),
    "the first layers": ("visual.conv1.*", "visual.*embedding", "visual.ln_pre.*", "visual.transformer.resblocks.0.*"),
    "between trained layers": ("visual.transformer.resblocks.1.*", "transformer.resblocks.0.*"),
}


@pytest.mark.parametrize("loss", [("loss.contrastive=1", "loss.mse=0"), ("loss.contrastive=0", "loss.mse=1")])
def test_a_frozen_tower_whose_images_the_classifier_gathers_has_no_reduce_scatter(
    file: Path, loss: tuple[str, ...]
) -> None:
    settings = [*division(1, 0), *loss, "loss.instance=0"] + ["loss.form=sigmoid"] * ("loss.mse=0" in loss)
    expected = predicted(file, settings, ("image",))
    for calls in run_ranks(count_collectives, 2, file, settings, ("image",)):
        assert sorted(calls) == sorted((c.kind, c.size) for c in expected for _ in range(c.number))


@pytest.mark.parametrize(
    ("case", "stage", "accumulation", "recomputed"),
    [
        ("image", 3, 2, False),
        *(
            pytest.param(case, stage, accumulation, recomputed, marks=pytest.mark.slow)
            for case, stage, accumulation, recomputed in [
                *((case, 3, 1, False) for case in FROZEN),
                *((case, 3, 2, False) for case in FROZEN if case != "image"),
                *((case, 1, 1, False) for case in FROZEN),
                ("the first layers", 3, 2, True),
            ]
        ),
    ],
)
def test_zero_3_gathers_frozen_parameters_too(
    file: Path, case: str, stage: int, accumulation: int, recomputed: bool
) -> None:
    settings = [*division(accumulation, stage), *OBJECTIVES["all terms"]]
    settings += [f"student.grad_checkpointing={str(recomputed).lower()}"]
    settings += ["zero_optimization.stage3_param_persistence_threshold=0"] * (stage == 3)
    expected = total_by_kind([(c.kind, c.size * c.number) for c in predicted(file, settings, FROZEN[case])])
    for calls in run_ranks(count_collectives, 2, file, settings, FROZEN[case]):
        found = total_by_kind(calls)
        if (case, accumulation) == ("text", 2):  # the prefetch gathers a matrix of the frozen tower in each backward
            assert 1.0 < found["all_gather"] / expected["all_gather"] < 1.02
            found["all_gather"] = expected["all_gather"]
        assert found == expected
