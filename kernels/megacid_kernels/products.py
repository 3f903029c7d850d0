"""Matrix products of the classifier's loss in PyTorch, and of the search for nearest centroids.

PyTorch multiplies fp32 matrices on x86 CPUs by MKL, which leaves the AVX-512 of AMD's processors unused. There oneDNN,
which PyTorch contains for its layers, is about twice as fast. `torch.backends.mkldnn.enabled = False` returns to MKL.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import torch
from torch import Tensor

TILE_MULTIPLE = 128  # class rows that oneDNN multiplies are a multiple of it
_MIN_PRODUCTS = 1 << 20  # with fewer multiplications the call of oneDNN takes longer than it saves


def tiles(count: int, size: int) -> list[slice]:
    """Slices of `size` rows, then one of a multiple of 128, then the rest; together `count` rows.

    oneDNN keeps what it prepares for every shape, up to a MiB each: few lengths of tiles keep that small.
    """
    bounds = sorted({*range(0, count, size), count - count % TILE_MULTIPLE, count})
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def times_transposed(a_MK: Tensor, b_NK: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b.T, [M, N], written to `out` if given."""
    if not _is_for_onednn(a_MK, b_NK, len(b_NK), len(b_NK)):
        return torch.mm(a_MK, b_NK.T, out=out)
    product_MN = _onednn(a_MK, b_NK)
    return product_MN if out is None else out.copy_(product_MN)


def times(a_MK: Tensor, b_KN: Tensor, total_MN: Tensor | None = None) -> Tensor:
    """a @ b, [M, N], added to `total` in place if given."""
    if not _is_for_onednn(a_MK, b_KN, len(b_KN), b_KN.shape[1]):
        return a_MK @ b_KN if total_MN is None else total_MN.addmm_(a_MK, b_KN)
    product_MN = _onednn(a_MK, b_KN.T)
    return product_MN if total_MN is None else total_MN.add_(product_MN)


def transposed_times(a_KM: Tensor, b_KN: Tensor, *, out: Tensor, add: bool) -> None:
    """Write a.T @ b to `out` [M, N], or add it."""
    if not _is_for_onednn(a_KM, b_KN, a_KM.shape[1], b_KN.shape[1]):
        torch.addmm(out, a_KM.T, b_KN, beta=int(add), out=out)
    elif add:
        out.add_(_onednn(a_KM.T, b_KN.T))
    else:
        out.copy_(_onednn(a_KM.T, b_KN.T))


def _onednn(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a @ b.T"""
    product_MN: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
    return product_MN


def _is_for_onednn(a: Tensor, b: Tensor, rows: int, products_per_number: int) -> bool:
    """Whether oneDNN is faster and sees few shapes.

    Args:
        rows: length of the dimension that is cut into `tiles`.
        products_per_number: multiplications with every number of a.
    """
    return (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and rows % TILE_MULTIPLE == 0
        and a.numel() * products_per_number >= _MIN_PRODUCTS
        # oneDNN multiplies a part of wider rows by its reference, a thousand times slower.
        and a.is_contiguous()
        and b.is_contiguous()
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether the CPU is AMD's and has AVX-512."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
