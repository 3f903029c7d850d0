"""The margin cross entropy."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from torch import Tensor

from megacid_kernels.discrimination import linear_margin_discrimination
from megacid_kernels.problem import Problem, TargetMargin


def linear_margin_cross_entropy(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    *,
    margin: TargetMargin | None = None,
    scale: float = 64.0,
    rows: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    impl: str = "auto",
    mode: str = "auto",
    memory_budget_bytes: int | None = None,
    class_start: int = 0,
    num_classes: int | None = None,
    max_rows: int | None = None,
    margin_grad: Literal["exact", "straight_through"] = "exact",
    filter_threshold: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Mean (or sum) over the labelled samples of CE(scale * psi_y(cos(x, w)), y), classes sharded over `group`.

    Tensors and gradients as in `linear_margin_discrimination`; x's gradient is this shard's partial sum. On several
    ranks `num_classes` (all ranks together) and `max_rows` (most rows of w on any rank) must be given and equal on
    every rank: the fixed shift and the chunks follow from them. impl: "auto" or "torch"; mode: "auto" or "row".
    """
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if num_classes is None and world > 1:
        raise ValueError(f"num_classes is None on {world} ranks: pass the number of classes of all ranks together")
    problem = Problem(
        num_classes=w.shape[0] if num_classes is None else num_classes, scale=scale, margin=margin, margin_grad=margin_grad, filter_threshold=filter_threshold,
        class_start=class_start, max_rows=max_rows, reduction=reduction, group=group, impl=impl, mode=mode,
        memory_budget_bytes=memory_budget_bytes,
    )  # fmt: skip
    return linear_margin_discrimination(x, w, target, problem, rows=rows, bias=bias).loss
