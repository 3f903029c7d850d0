"""Validation of the operators' tensors.

Legend: G gathered batch, D width, L rows in memory, S rows of w that are used on this rank, l labels per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacid_kernels.loss_spec import LossSpec, check_scale


def check_inputs(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    spec: LossSpec,
    rows: Tensor | None,
    teacher: Tensor | None,
    bias: Tensor | None,
    gather: bool,
) -> None:
    """Raise ValueError for wrong shapes, dtypes or devices. Arguments as in `discrimination_with_gradients`."""
    used = w.shape[0] if rows is None or not gather else rows.shape[0]
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)} and w is {tuple(w.shape)}, expected [G, D] and [S, D] with one D")
    if target.ndim not in (1, 2) or target.shape[:1] != x.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target is {tuple(target.shape)} {target.dtype}, expected torch.int64 [{x.shape[0]}] or [{x.shape[0]}, l]"
        )
    if target.ndim == 2 and (target.shape[1] == 0 or (target.shape[1] > 1 and spec.weights.gamma > 0)):
        raise ValueError(
            f"target is {tuple(target.shape)} with gamma {spec.weights.gamma}, expected one label per sample, "
            "or more with gamma 0: set gamma to 0, or pass the nearest label only"
        )
    for name, tensor in (("x", x), ("w", w), ("teacher", teacher)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a floating-point dtype")
    if rows is not None and (rows.ndim != 1 or rows.shape[0] != used or rows.dtype != torch.int64):
        raise ValueError(f"rows is {tuple(rows.shape)} {rows.dtype}, expected [{used}] torch.int64, sorted")
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != used or not bias.is_floating_point()):
        raise ValueError(f"bias is {tuple(bias.shape)} {bias.dtype}, expected a floating-point [{used}]")
    for name, tensor in (("w", w), ("target", target), ("rows", rows), ("teacher", teacher), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {x.device} like x")
    if spec.weights.needs_teacher:
        if teacher is None:
            raise ValueError("teacher is None, but beta or gamma is > 0: pass the stored embeddings [G, D]")
        if teacher.shape != x.shape:
            raise ValueError(f"teacher is {tuple(teacher.shape)}, expected {tuple(x.shape)} like x")
    if spec.world > 1 and spec.max_rows is None:
        raise ValueError(f"max_rows is None on {spec.world} ranks: pass the largest number of rows of w on any rank")
    if spec.num_classes < w.shape[0]:
        raise ValueError(f"num_classes is {spec.num_classes}, expected >= {w.shape[0]}, the rows of w: count all ranks")


def check_constants(scale: object, bias: Tensor | None) -> None:
    """Raise ValueError for a scale or a bias that is to be trained: neither gets a gradient."""
    check_scale(scale)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("bias requires grad, expected a constant, because it gets no gradient: pass bias.detach()")


def check_label_values(target: Tensor, spec: LossSpec) -> None:
    """Raise ValueError for a label out of range, on the host only: on a device, where it would synchronise, such a
    label makes the loss NaN."""
    if target.device.type == "cpu" and target.dtype == torch.int64 and target.numel():
        low, high = (int(value) for value in target.aminmax())
        if low < -1 or high >= spec.num_classes:
            wrong = low if low < -1 else high
            raise ValueError(f"target holds {wrong}, expected -1 (no label) or 0 to {spec.num_classes - 1}")
