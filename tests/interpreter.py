"""For the tests of Triton's kernels.

Triton decides at the import between its compiler and its interpreter. So without a GPU the comparisons of a file run in a
process of their own, with TRITON_INTERPRET=1, which one test of that file starts; with one they run in place, on "cuda".
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


def assert_holds_in_the_interpreter(file: str, timeout_s: float = 300) -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(file).resolve())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
