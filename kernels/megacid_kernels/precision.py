"""The precision of PyTorch's products of fp32 matrices on CUDA, set for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch


@contextlib.contextmanager
def fp32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Compute products of fp32 factors in IEEE fp32 or in TF32, whatever PyTorch's settings are, which come back.

    Inside, do not read `allow_tf32` or `torch.get_float32_matmul_precision()`: PyTorch >= 2.9 may raise RuntimeError,
    because the newer setting was written. Read `fp32_precision`.
    """
    # torch >= 2.9 has a setting that also reads what `allow_tf32` set; once both were written, reading the older fails.
    settings, newer = torch.backends.cuda.matmul, hasattr(torch.backends.cuda.matmul, "fp32_precision")
    before = settings.fp32_precision if newer else settings.allow_tf32
    if (before in ("tf32", True)) == (precision == "tf32"):
        yield
        return
    name = "fp32_precision" if newer else "allow_tf32"
    setattr(settings, name, precision if newer else precision == "tf32")
    try:
        yield
    finally:
        # A value equal to the parent's counts as inherited: "none" follows later changes of the parent.
        inherited = newer and before == torch.backends.cudnn.fp32_precision
        setattr(settings, name, "none" if inherited else before)
