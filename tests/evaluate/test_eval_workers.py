"""Workers of an evaluation: a bad sample, a worker that dies and a Ctrl-C are one line each."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import rank_fates
from test_datasets import to_tensor, write_split

from megacid.errors import UserError, run_tool
from megacid.evaluate.datasets import load_benchmark


def benchmark(root: Path, *samples: tuple[Any, str]) -> Path:
    write_split(root / "test", [list(samples)])
    (root / "classnames.txt").write_text("a\nb\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    return root


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((b"<html>", "1"), r"sample s0000001 cannot be evaluated \(not a readable"),
        ((9, "7"), "class id is 7, expected"),
    ],
)
def test_a_bad_sample_is_one_line_also_from_a_worker(
    tmp_path: Path, bad: tuple[Any, str], message: str, workers: int
) -> None:
    root = benchmark(tmp_path / "set", (10, "0"), bad, (30, "1"))
    with pytest.raises(UserError, match=message) as error:
        list(load_benchmark(root).split("test", to_tensor).batches(2, workers=workers))
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def die(image: Any) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return to_tensor(image)


def test_a_worker_that_dies_is_one_line(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "set", *[(n, "0") for n in range(8)])
    with pytest.raises(UserError, match=r"was killed by SIGKILL, .* use fewer --workers") as error:
        list(load_benchmark(root).split("test", die).batches(2, workers=1))
    assert "\n" not in str(error.value)


def slowly(image: Any) -> torch.Tensor:
    time.sleep(0.5)
    return to_tensor(image)


def interrupted(root: str) -> int:
    """The exit code of an evaluation whose process group gets a Ctrl-C after the first batch."""
    os.setpgid(0, 0)

    def evaluate() -> None:
        for _ in load_benchmark(root).split("test", slowly).batches(2, workers=2):
            os.killpg(0, signal.SIGINT)

    return run_tool(evaluate)


def test_ctrl_c_to_the_process_group_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = benchmark(tmp_path / "set", *[(n, "0") for n in range(12)])
    assert rank_fates(interrupted, 1, str(root)) == [130]
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("error: interrupted") == 1
