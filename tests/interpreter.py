"""For tests of Triton kernels: run them on "cuda", or without a GPU in Triton's interpreter.

Triton chooses between its compiler and its interpreter at import. Without a GPU one test of a file therefore runs the
file's comparisons in a separate process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from megacid_kernels.fused import INTERPRET

on_devices = pytest.mark.parametrize("device", ["cpu" if INTERPRET else pytest.param("cuda", marks=pytest.mark.gpu)])


def assert_holds_in_the_interpreter(file: str, timeout_s: float = 1800) -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(file).resolve())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
