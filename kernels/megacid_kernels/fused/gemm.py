"""The two gradient products: cuBLAS products of 16-bit matrices with an fp32 result.

A 16-bit result would round every chunk of the sum. torch >= 2.8 has the product on CUDA, and >= 2.11 can add it to an
fp32 matrix in place; in between, blocks of the product are added. Elsewhere (older torch, Triton's interpreter on a
CPU) blocks of the factors are converted to fp32: their products are exact in TF32, whose mantissa holds bf16's 8 bits,
so tensor cores compute them as well, at half the rate and with one block's copy in memory.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from megacid_kernels.precision import fp32_products

_BLOCK_BYTES = 1 << 28
_VERSION: Any = torch.__version__  # a TorchVersion, which compares with tuples
_HAS_MM, _HAS_ADDMM = _VERSION >= (2, 8), _VERSION >= (2, 11)


def product_fp32(a_mk: Tensor, b_kn: Tensor, total_mn: Tensor | None = None) -> Tensor:
    """a @ b in fp32 [m, n], added to `total_mn` in place if that is given.

    a_mk and b_kn share one dtype of fp32, bf16, fp16; either may be a transposed view. fp32 factors are multiplied as
    PyTorch's settings say, which the schedule sets to IEEE fp32."""
    if a_mk.dtype == torch.float32:
        return a_mk @ b_kn if total_mn is None else total_mn.addmm_(a_mk, b_kn)
    if a_mk.device.type != "cuda" or not _HAS_MM:
        return _widened(a_mk, b_kn, total_mn)
    if total_mn is None:
        return torch.mm(a_mk, b_kn, out_dtype=torch.float32)
    if _HAS_ADDMM:
        return torch.addmm(total_mn, a_mk, b_kn, out_dtype=torch.float32, out=total_mn)
    step = max(1, _BLOCK_BYTES // (4 * b_kn.shape[1]))
    for start in range(0, len(a_mk), step):
        block = slice(start, start + step)
        total_mn[block] += torch.mm(a_mk[block], b_kn, out_dtype=torch.float32)
    return total_mn


def _widened(a_mk: Tensor, b_kn: Tensor, total_mn: Tensor | None) -> Tensor:
    """The product in blocks along the classes, which are the rows of the result or the summed dimension."""
    m, k = a_mk.shape
    n = b_kn.shape[1]
    if total_mn is None:
        total_mn = torch.zeros(m, n, dtype=torch.float32, device=a_mk.device)
    with fp32_products("tf32") if a_mk.device.type == "cuda" else contextlib.nullcontext():
        if k > m:
            step = max(1, _BLOCK_BYTES // (4 * (m + n)))
            for start in range(0, k, step):
                block = slice(start, start + step)
                total_mn.addmm_(a_mk[:, block].float(), b_kn[block].float())
        else:
            step = max(1, _BLOCK_BYTES // (4 * max(k, 1)))
            b = b_kn.float()
            for start in range(0, m, step):
                block = slice(start, start + step)
                total_mn[block].addmm_(a_mk[block].float(), b)
    return total_mn
