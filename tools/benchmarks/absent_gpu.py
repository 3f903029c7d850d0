"""Compiles kernels for a GPU that need not be present, from the calls that would launch them there.

Inside `absent_gpu` tensors on "cuda" have shapes and no memory (PyTorch's fake tensors), and the launch of a Triton
kernel is recorded and can be compiled for the given architecture. Types, constants and alignments are therefore those
of the launcher's own call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernel_bounds import MULTIPROCESSORS
from megacid.errors import UserError


class Launch(NamedTuple):
    kernel: str  # name of the Triton function
    constants: dict[str, Any]  # arguments by keyword, such as the sizes of a tile
    compile: Callable[[], Any]  # triton's CompiledKernel; call it inside the context


@contextlib.contextmanager
def absent_gpu(architecture: str) -> Iterator[list[Launch]]:
    """A list that gets the launches inside the context. The process must not run kernels afterwards.

    Args:
        architecture: one of MULTIPROCESSORS.

    Raises:
        UserError: Triton is missing, or its interpreter is on.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET is 1, but this compiles kernels instead of interpreting them: unset it")
    try:
        driver: Any = importlib.import_module("triton.runtime").driver
        function: Any = importlib.import_module("triton.runtime.jit").JITFunction
        make_target = importlib.import_module("triton.backends.compiler").GPUTarget
    except ImportError as error:
        raise UserError(f"Triton cannot be imported ({error}): install triton, which compiles the kernels") from error
    target = make_target("cuda", int(architecture.removeprefix("sm_")), 32)
    launches: list[Launch] = []
    run = function.run

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        compile_only = functools.partial(run, kernel, *args, grid=grid, warmup=True, **keywords)
        launches.append(Launch(kernel.__name__, keywords, compile_only))

    # Triton keeps compiled kernels per device: another architecture is another device.
    device = SimpleNamespace(
        get_current_device=lambda: target.arch, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    properties = SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS[architecture].count, major=target.arch // 10, minor=target.arch % 10
    )
    driver.set_active(device)
    with FakeTensorMode(), warnings.catch_warnings(), contextlib.ExitStack() as patches:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # 0: aligned, as PyTorch's are
        for owner, name, value in (
            (function, "run", launch),
            (torch.cuda, "device", contextlib.nullcontext),
            (torch.cuda, "get_device_capability", lambda device=None: divmod(target.arch, 10)),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield launches
