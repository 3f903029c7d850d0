"""The estimate of a run's memory against the anonymous memory of CPU ranks, measured while they train."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from harness import run_ranks
from pair_data import peak_mib
from torch import nn

from megacid.config.load import load_run
from megacid.distributed.parallel import Parallel
from megacid.models.feature_tower import FeatureTower
from megacid.models.student import build_student
from megacid.training import estimates
from megacid.training.activations import count_activations
from megacid.training.memory import MIB, MemoryEstimate, memory_estimate

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
from benchmarks.anonymous_memory import PeakAnonymous, anonymous_bytes

DIM, CLASSES = 64, 20_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,096 feature vectors."""
    root = tmp_path_factory.mktemp("memory")
    random = np.random.default_rng(7)
    for folder in ("features", "labels"):
        (root / "features" / folder).mkdir(parents=True)
    np.save(
        root / "features" / "features" / "features_00000.npy", random.standard_normal((4096, DIM)).astype(np.float16)
    )
    np.save(root / "features" / "labels" / "labels_00000.npy", random.integers(0, CLASSES, 4096).astype(np.int32))
    meta = {"made_by": "synthesize", "source": {"seed": 7}, "classes": CLASSES, "dim": DIM}
    (root / "features" / "meta.json").write_text(json.dumps(meta))
    return root


def return_freed_memory() -> None:
    """Let glibc return what it keeps of freed memory, and map every large block, which it returns when freed.

    What it keeps otherwise depends on the tests before, and blocks that are taken from it need no new page.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65_536)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)


def measured(argv: list[str]) -> float:
    """Peak of this rank's anonymous memory during a training of 2 steps, in MiB above its start."""
    return_freed_memory()
    started = anonymous_bytes()
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    with PeakAnonymous() as peak:
        assert toy.train_here(argv) == 0
    return (peak.bytes - started) / MIB


def check(root: Path, world: int, stage: int, **changes: Any) -> None:
    def run_file(attempt: int) -> Path:
        name = "_".join(map(str, (world, stage, *changes.values(), attempt)))
        file: Path = toy.run_file(
            root, name, zero_optimization={"stage": stage}, run__total_steps=2, run__save_every=100,
            schedule__warmup_steps=0, run__check_every=0, **changes,
        )  # fmt: skip
        return file

    def peak(attempt: int) -> float:
        return float(run_ranks(measured, world, ["--deepspeed_config", str(run_file(attempt))], timeout_s=300)[0])

    measured_peak = peak(0)
    # In a process of its own: PyTorch refuses to fork after a backward on fake tensors.
    (found,) = run_ranks(estimated, 1, run_file(0), world)
    estimate = MemoryEstimate(*found).peak
    # What else the process does only adds to the measured peak: of two the lesser counts.
    if measured_peak > 1.1 * estimate:
        measured_peak = min(measured_peak, peak(1))
    assert estimate == pytest.approx(measured_peak, rel=0.1), found


def estimated(file: Path, world: int, device: str = "cpu") -> MemoryEstimate:
    run = load_run(file, [], world=world)
    config = run.megacid.student
    student = FeatureTower(DIM, config.embed_dim or 0, hidden=config.hidden, layers=config.layers)
    return memory_estimate(run, student, CLASSES, world, device)


LARGE = {"student__hidden": 2048, "student__layers": 3, "student__embed_dim": 256}


def test_the_estimate_is_within_a_tenth_of_the_measured_peak(root: Path) -> None:
    check(root, 1, 1, train_batch_size=512, **LARGE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "stage", "batch", "accumulation"),
    [(1, 0, 32, 1), (2, 0, 4096, 1), (2, 1, 4096, 1), (2, 1, 4096, 4), (2, 2, 1024, 1), (2, 3, 512, 1)],
)
def test_the_estimate_follows_stage_ranks_batch_and_micro_batches(
    root: Path, world: int, stage: int, batch: int, accumulation: int
) -> None:
    check(root, world, stage, train_batch_size=batch, gradient_accumulation_steps=accumulation, **LARGE)


def student_memory(grad_checkpointing: bool) -> tuple[float, float]:
    """Bytes of a forward and backward of a two-tower student: the kernel's own peak, and counted on fake tensors."""
    torch.set_num_threads(1)
    student = build_student("digits-teacher", embed_dim=None, seed=0, grad_checkpointing=grad_checkpointing)
    images, texts = torch.randn(256, *student.image_shape), torch.zeros(256, student.text_length, dtype=torch.int64)
    sum(value.sum() for value in student(images[:2], texts[:2])).backward()
    student.zero_grad()
    return_freed_memory()
    started = peak_mib(reset=True) * MIB - images.nbytes - texts.nbytes
    sum(value.sum() for value in student(images, texts)).backward()
    measured = peak_mib() * MIB - started
    return measured, count_activations(student, 256, torch.float32).peak_with_gradients


@pytest.mark.parametrize("grad_checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_activations_of_both_towers_are_those_measured(grad_checkpointing: bool) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # a fork would have the memory of the tests before
        measured, counted = fresh.submit(student_memory, grad_checkpointing).result()
    assert counted == pytest.approx(measured, rel=0.1)


class _Block(nn.Module):
    """x -> relu(W x): backward needs the input and the output."""

    image_shape, text_length = (256,), 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 256, bias=False)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(image).relu(),)


def counted() -> tuple[int, ...]:
    block = _Block()
    weight = block.layer.weight
    found = count_activations(block, 1024, torch.float32)  # type: ignore[arg-type]
    assert block.layer.weight is weight and weight.grad is None and not weight.isnan().any()
    return tuple(found)


def test_saved_tensors_and_gradients_are_counted_once() -> None:
    (found,) = run_ranks(counted, 1)
    matrix = 1024 * 256 * 4
    weight = 256 * 256 * 4
    # Forward keeps the input and the output. At the peak there are their gradients and that of the weight, too.
    assert found == (2 * matrix, 4 * matrix + weight, 4 * matrix + weight)


def test_a_model_that_cannot_be_estimated_does_not_end_rank_0_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> MemoryEstimate:
        raise RuntimeError("aten._local_scalar_dense\non fake tensors")

    monkeypatch.setattr(estimates, "memory_estimate", refused)
    monkeypatch.setattr(estimates.Step, "of", refused)
    with caplog.at_level("WARNING", "megacid"):
        estimates.report_estimates(None, None, None, Parallel(0, 2, 0, torch.device("cpu"), None))  # type: ignore[arg-type]
    assert caplog.messages == [
        f"the {what} cannot be estimated (aten._local_scalar_dense on fake tensors)"
        for what in ("peak memory", "time of a step")
    ]


def test_an_offloaded_optimizer_needs_memory_of_the_host_alone(tmp_path: Path) -> None:
    kept, moved = (
        MemoryEstimate(
            *run_ranks(
                estimated, 1, toy.run_file(tmp_path, name, zero_optimization=zero, student__ema_decay=0.9), 2, "cuda"
            )[0]
        )
        for name, zero in (("kept", {"stage": 1}), ("moved", {"stage": 1, "offload_optimizer": {"device": "cpu"}}))
    )
    on_host = {"student optimizer", "EMA of the student"}
    assert moved.offloaded == sum(kept.always[name] for name in on_host) > 0 and kept.offloaded == 0
    assert not on_host & moved.always.keys() and moved.peak <= kept.peak - moved.offloaded
