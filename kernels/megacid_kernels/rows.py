"""Elementwise work on matrices of many rows: their lengths, and the one rounding of a gradient. Small temporaries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CPU_BLOCK_BYTES = 1 << 20  # elementwise work on [S, D] stays in a core's cache
_DEVICE_BLOCK_BYTES = 1 << 28  # bounds the temporaries
_ORDINARY = 2.0**50  # squares of rows with lengths from 1 / _ORDINARY to _ORDINARY neither overflow nor vanish
_MAX_FACTOR = 2.0**20  # of exponentials; they may be as large as e^80 / classes


def row_blocks(x: Tensor) -> list[slice]:
    """Blocks along dim 0 for elementwise work with small temporaries."""
    size = _CPU_BLOCK_BYTES if x.device.type == "cpu" else _DEVICE_BLOCK_BYTES
    step = max(1, size // max(1, x.shape[1] * x.element_size()))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def is_on_host(x: Tensor) -> bool:
    """Whether the host may read x without waiting for a device."""
    return x.device.type == "cpu"


def inverse_norms(x: Tensor) -> Tensor:
    """1 / |x| of every row [..., D] as [..., 1]; 0 for a row that is zero or shorter than the smallest normal number.

    Rows whose squares would leave the range of the dtype are scaled by a power of two first.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.where(norm > torch.finfo(x.dtype).tiny, 1 / norm, torch.zeros_like(norm))
    extreme = ((norm < 1 / _ORDINARY) | (norm > _ORDINARY)).squeeze(-1)
    if not is_on_host(x):
        # Asking whether there are any would synchronise, so every row is computed both ways.
        return torch.where(extreme[..., None], _scaled_inverse_norms(x.flatten(0, -2)).view_as(norm), inverse)
    if bool(extreme.any()):
        inverse[extreme] = _scaled_inverse_norms(x[extreme])
    return inverse


def _scaled_inverse_norms(x_nD: Tensor) -> Tensor:
    """[n, 1]"""
    inverse, tiny = x_nD.new_empty(len(x_nD), 1), torch.finfo(x_nD.dtype).tiny
    for rows in row_blocks(x_nD):
        exponent = _row_exponents(x_nD[rows])
        norm = torch.linalg.vector_norm(torch.ldexp(x_nD[rows], -exponent), dim=1, keepdim=True)
        inverse[rows] = torch.where(torch.ldexp(norm, exponent) > tiny, torch.ldexp(1 / norm, -exponent), 0)
    return inverse


def _row_exponents(x_nD: Tensor) -> Tensor:
    """[n, 1] int32, the binary exponent of every row's largest number, within bounds that keep 2^-exponent normal."""
    lowest = math.frexp(torch.finfo(x_nD.dtype).tiny)[1]
    largest = torch.linalg.vector_norm(x_nD, torch.inf, dim=1, keepdim=True)
    return torch.frexp(largest).exponent.clamp(lowest, 1 - lowest)


def are_extreme(inverse: Tensor) -> bool:
    """Whether products of exponentials and these inverse norms may leave the range of float32. False on a device, where
    reading them would synchronise."""
    if not is_on_host(inverse):
        return False
    return bool(((inverse > _MAX_FACTOR) | ((inverse < 1 / _MAX_FACTOR) & (inverse > 0))).any())


def unit_rows(x_nD: Tensor) -> Tensor:
    """x / |x| of every row [n, D], also where |x|^2 is outside of the dtype's range; a zero row stays zero."""
    return torch.nn.functional.normalize(torch.ldexp(x_nD, -_row_exponents(x_nD)), dim=1)


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor, rounded to `dtype` once. Pass `grad` in float32 or float64: in 16 bits its small numbers would be
    lost before a loss scale multiplies them."""
    factor = factor.to(grad.dtype)
    # A compiler fuses both steps.
    if grad.dtype == dtype or grad.ndim != 2 or torch.compiler.is_compiling():
        return (grad * factor).to(dtype)
    out = grad.new_empty(grad.shape, dtype=dtype)
    for rows in row_blocks(grad):
        torch.mul(grad[rows], factor, out=out[rows])
    return out
