"""The programs in examples/ run as they stand and show what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch._dynamo  # by the first optimizer: here once, not in every forked rank
import torch.distributed as dist
from harness import run_ranks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FACES = EXAMPLES / "face_recognition.py"
STEPS, STOP, IDENTITIES = 60, 40, 2_000


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


faces = load(FACES)
Runs = tuple[list[tuple[int, float, float]], ...]


def whole_and_resumed(folder: Path) -> Runs:
    whole = faces.train(folder / "whole", STEPS, IDENTITIES)
    before = faces.train(folder / "parts", STEPS, IDENTITIES, stop=STOP)
    dist.barrier()  # rank 0 has written the checkpoint
    return whole, before, faces.train(folder / "parts", STEPS, IDENTITIES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runs]:
    folder = tmp_path_factory.mktemp("faces")
    for name in ("whole", "parts", "alone"):
        (folder / name).mkdir()
    first, second = run_ranks(whole_and_resumed, 2, folder)
    assert first == second
    return folder, first


def test_face_recognition_learns_to_verify_identities_that_it_was_not_trained_on(runs: tuple[Path, Runs]) -> None:
    (_, loss, accuracy), *_, (last, last_loss, last_accuracy) = runs[1][0]
    assert last == STEPS and last_loss < 0.8 * loss
    assert accuracy < 0.8 and last_accuracy > 0.9


def test_face_recognition_continues_from_its_checkpoint_with_the_same_bits(runs: tuple[Path, Runs]) -> None:
    folder, (whole, before, after) = runs
    assert before + after == whole and after[0][0] == STOP + faces.EVERY
    ends = [torch.load(folder / name / "last.pt", weights_only=True) for name in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(*(end["head"].values() for end in ends)))
    assert all(torch.equal(a, b) for a, b in zip(*(end["network"].values() for end in ends)))


def test_face_recognition_does_not_depend_on_the_number_of_ranks(runs: tuple[Path, Runs]) -> None:
    folder, (whole, *_) = runs
    (alone,) = run_ranks(faces.train, 1, folder / "alone", STEPS, IDENTITIES)
    for (step, loss, accuracy), (whole_step, whole_loss, whole_accuracy) in zip(alone, whole, strict=True):
        assert step == whole_step and loss == pytest.approx(whole_loss, rel=1e-3)
        assert accuracy == pytest.approx(whole_accuracy, abs=0.01)


@pytest.mark.slow
@pytest.mark.launch
def test_face_recognition_starts_with_torchrun_and_continues_on_fewer_ranks(tmp_path: Path) -> None:
    for ranks, steps, line in ((2, 40, "step 20: "), (1, 60, "step 60: ")):
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(FACES)]
        options = ["--out", str(tmp_path), "--steps", str(steps), "--identities", "500"]
        done = subprocess.run([sys.executable, "-m", *command, *options], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert line in done.stdout and ("step 20: " in done.stdout) == (ranks == 2)


def test_kernel_alone_shows_equal_gradients_and_less_memory() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak memory of a CPU is read from Linux's /proc")
    sizes = ["--samples", "256", "--classes", "40000", "--width", "16", "--device", "cpu"]
    # In a process of its own: this one may hold freed memory that the example would use.
    command = [sys.executable, str(EXAMPLES / "kernel_alone.py"), *sizes]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    values = {line[:14].strip(): [float(word) for word in line[14:].split()] for line in lines}
    for name in ("loss", "gradient of x", "gradient of w"):
        ours, plain, difference = values[name]
        assert ours == pytest.approx(plain, rel=1e-4) and plain > 0.01
        assert difference <= 1e-5 * plain
    ours, plain, _ = values["memory, MiB"]
    assert 0 < ours < 0.6 * plain
