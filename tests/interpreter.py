"""For tests of Triton kernels: run them on "cuda", or without a GPU in Triton's interpreter.

Triton chooses between its compiler and its interpreter at import. Without a GPU one test of a file therefore runs the
file's comparisons in a separate process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from megacid_kernels.fused import INTERPRET

on_devices = pytest.mark.parametrize("device", ["cpu" if INTERPRET else pytest.param("cuda", marks=pytest.mark.gpu)])


def assert_holds_in_the_interpreter(file: str, timeout_s: float = 1800) -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(file).resolve())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


@functools.cache
def _builtins_of(package: Any) -> list[str]:
    import triton.language as tl

    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _look_for_builtins_once() -> None:
    """The interpreter replaces Triton's builtins by its own at every call of a device function. Which ones there are it
    finds among all names of four packages each time, in a third of the time of these tests."""
    from triton.runtime import interpreter

    module = types.ModuleType("inspect")
    module.__dict__.update(vars(inspect))
    members = lambda package: [(name, getattr(package, name)) for name in _builtins_of(package)]  # noqa: E731
    module.getmembers = members  # type: ignore[attr-defined]
    interpreter.inspect = module


if INTERPRET:
    _look_for_builtins_once()
