"""The contrastive operator's engine in Triton and cuBLAS, using the classifier's kernels.

Legend: G candidates, c anchors of one chunk, D width.

The exponentials leave the matrix product directly, in bf16. Cosines are bounded, so all anchors share one shift
kappa = max(0, scale + ln G - 80), as in `LossSpec.shift`, which keeps every sum finite in fp32. The scale is a tensor
on the device, so it multiplies the anchors, and kappa becomes the bias of every column: no host synchronisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megacid_kernels.engines.candidates import AnchorNegatives
from megacid_kernels.fused.exponentials import exponentials
from megacid_kernels.fused.gemm import product_fp32
from megacid_kernels.loss_spec import MAX_LOG_SUM


class TritonCandidates:
    def __init__(self, other_GD: Tensor, scale: Tensor):
        """other_GD: fp32 unit rows."""
        self._first, self._second = other_GD.half(), other_GD.bfloat16()
        self._shift = (scale.float() + (math.log(max(1, len(other_GD))) - MAX_LOG_SUM)).clamp_min(0)
        self._bias = (-self._shift).repeat(len(other_GD))

    def negatives(self, scaled_cD: Tensor, target_c: Tensor, first: int) -> AnchorNegatives:
        slot_c = torch.arange(first, first + len(scaled_cD), device=scaled_cD.device)[:, None]
        result = exponentials(
            scaled_cD.half(), self._first, slot_c, torch.ones_like(slot_c, dtype=torch.bool), scale=1.0, shift=0.0,
            bias_S=self._bias, largest=False,
        )  # fmt: skip
        assert result.matrix is not None
        return AnchorNegatives(result.matrix, result.sums, self._shift)

    def product(self, matrix_cG: Tensor) -> Tensor:
        return product_fp32(matrix_cG, self._second)

    def add_gradient_(self, grad_GD: Tensor, matrix_cG: Tensor, features_cD: Tensor) -> None:
        product_fp32(matrix_cG.T, features_cD.to(matrix_cG.dtype), grad_GD)
