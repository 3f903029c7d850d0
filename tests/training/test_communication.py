"""The collectives of a training step on 2 ranks, counted: each embedding matrix is gathered once, as it is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from collective_counter import CollectiveCounter
from harness import run_ranks
from test_gradient_cache import BATCH, WIDTH, build_state, division, micro_batches
from train_run import Pipeline

from megacid import train

NO_CLUSTER = ("loss.cluster=0", "data.labels=null", "loss.beta=null", "loss.gamma=null", "classifier=null")
OBJECTIVES = {
    "instance and cluster": ("loss.contrastive=0", "loss.mse=0"),
    "contrastive": (*NO_CLUSTER, "loss.instance=0", "loss.mse=0", "data.teacher=null"),
    "all terms": ("loss.affinity=0.2",),
    "cluster": (
        "loss.contrastive=0", "loss.instance=0", "loss.mse=0", "loss.beta=0", "loss.gamma=0", "data.teacher=null",
    ),
    "mse": (*NO_CLUSTER, "loss.instance=0", "loss.contrastive=0"),
}  # fmt: skip
FP32, FP16 = BATCH * WIDTH * 4, BATCH * WIDTH * 2  # a matrix of all ranks
LABELS = 2 * (6 + BATCH // 2) * 8  # two headers of 6 numbers with the labels
GUARD = 8 * 8  # five numbers of the decision, three that are logged
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
}  # fmt: skip


def count_collectives(file: Path, settings: list[str]) -> tuple[list[tuple[str, int]], int]:
    """Those of the third step, in order, and the student's number of parameters."""
    state = build_state(file, settings)
    batches = (
        replace(b, teacher_image=b.teacher_image.half(), teacher_text=b.teacher_text.half())  # type: ignore[union-attr]
        for b in micro_batches(state, 3)
    )
    metrics, lifecycle = SimpleNamespace(waited_for_data=lambda _: None), SimpleNamespace(asked_after=lambda _: False)
    for step in range(3):  # the first one exchanges labels twice, to learn how many there are
        with CollectiveCounter() as counter:
            _, verdict = train.train_step(step, state, batches, metrics, lambda _: None, lifecycle)  # type: ignore[arg-type]
        assert verdict.apply
    return [tuple(call) for call in counter.calls], sum(p.numel() for p in state.student.parameters())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nowhere = Path("nowhere")
    pipeline = Pipeline(tmp_path_factory.mktemp("communication"), nowhere, nowhere, nowhere)
    return pipeline.run_file("communication", classifier__init="random")


@pytest.mark.parametrize(("name", "accumulation"), [*((name, 1) for name in EXPECTED), ("all terms", 2), ("mse", 2)])
def test_a_step_has_these_collectives_and_no_others(file: Path, name: str, accumulation: int) -> None:
    settings = [*division(accumulation, 0), *OBJECTIVES[name]]
    for calls, parameters in run_ranks(count_collectives, 2, file, settings):
        times = accumulation if name == "mse" else 1  # mse alone needs no gradient caching
        engine = [("all_reduce", parameters * 4), ("all_reduce", GUARD)]
        assert calls == EXPECTED[name] * times + engine
