"""Class-parallel margin softmax: the operators of the megacid classifier. Needs torch only; see ../README.md."""

from megacid_kernels.affinity import affinity_cross_entropy
from megacid_kernels.contrastive import contrastive_cross_entropy
from megacid_kernels.cross_entropy import linear_margin_cross_entropy
from megacid_kernels.discrimination import (
    discrimination_with_gradients,
    linear_margin_discrimination,
    through_norm_,
)
from megacid_kernels.engines.dispatch import resolve
from megacid_kernels.engines.interface import DeferredNorm
from megacid_kernels.loss_spec import LossSpec, TargetMargin, Weights
from megacid_kernels.margin import Margin
from megacid_kernels.schedule import Discrimination, Gradients, OnGradientSlab
from megacid_kernels.sigmoid import sigmoid_cross_entropy

__all__ = [
    "DeferredNorm",
    "Discrimination",
    "Gradients",
    "LossSpec",
    "Margin",
    "OnGradientSlab",
    "TargetMargin",
    "Weights",
    "affinity_cross_entropy",
    "contrastive_cross_entropy",
    "discrimination_with_gradients",
    "linear_margin_cross_entropy",
    "linear_margin_discrimination",
    "resolve",
    "sigmoid_cross_entropy",
    "through_norm_",
]
