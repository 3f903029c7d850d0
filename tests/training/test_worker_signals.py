"""Signals to the whole process group, as a terminal and a scheduler send them: loader workers lose no batch quietly."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from pathlib import Path

import pytest
import toy
from harness import rank_fates
from pair_data import encoded, put
from PIL import Image

from megacid import failpoints

STEPS, AT = 6, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("signals")
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "0.tar", "w") as tar:
        for number in range(16):
            put(tar, f"k{number}.png", encoded(Image.new("RGB", (32, 32), (number, 0, 0)), "PNG"))
            put(tar, f"k{number}.txt", f"number {number}".encode())
    assert rank_fates(toy.train_here, 1, ["--deepspeed_config", str(run_file(root, "whole"))]) == [0]
    return root


def run_file(root: Path, name: str) -> Path:
    block = {
        "run": {"name": name, "dir": str(root / "runs"), "total_steps": STEPS, "save_every": STEPS, "log_every": 1},
        "student": {"model": "digits-student"},
        "data": {"shards": str(root / "shards"), "workers": 2},
        "loss": {"contrastive": 1.0},
    }
    tree = {
        "train_batch_size": 4, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "megacid": block,
    }  # fmt: skip
    path = root / f"{name}.json"
    path.write_text(json.dumps(tree))
    return path


def signalled(argv: list[str], number: int) -> int:
    """A trainer that leads a process group, all of which gets a signal at the end of a step."""
    os.setpgid(0, 0)
    failpoints.hooks["train:step_end"] = lambda step, **_: os.killpg(0, number) if step == AT else None
    return toy.train_here(argv)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_trainer_and_workers_is_a_stop_and_no_failure(
    root: Path, number: int, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    file = run_file(root, f"signal{number}")
    run, argv = root / "runs" / f"signal{number}", ["--deepspeed_config", str(file)]
    assert rank_fates(signalled, 1, argv, number) == [code]
    said = capfd.readouterr().err
    assert "Traceback" not in said and "error: " not in said and "KeyboardInterrupt" not in said
    (saved,) = run.glob("step-*")
    # The worker of the next batch ignores SIGINT; SIGTERM ends it, and the step is then made after the restart.
    assert saved.name in ([f"step-{AT + 2:08d}"] if number == signal.SIGINT else [f"step-{AT + n:08d}" for n in (1, 2)])
    if number == signal.SIGINT:
        return
    assert rank_fates(toy.train_here, 1, argv) == [0]
    last = f"step-{STEPS:08d}"
    assert toy.differing(toy.tensors(root / "runs" / "whole" / last), toy.tensors(run / last)) == []
