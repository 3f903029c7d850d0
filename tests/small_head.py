"""A head of 60 classes, its batches and optimizers, for tests that use it like plain torch code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megacid import PartialFC, RowAdamW, RowSGD

CLASSES, WIDTH = 60, 8
Row = RowAdamW | RowSGD
OPTIMIZERS: dict[str, Callable[..., Row]] = {"adamw": RowAdamW, "sgd": RowSGD}


def batch(seed: int = 0, count: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=g), torch.randint(0, CLASSES, (count,), generator=g)


def make(**options: Any) -> PartialFC:
    w = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1))
    return PartialFC(CLASSES, WIDTH, **{"init": w, "scale": 16.0, **options})


def update(head: PartialFC, optimizer: Row, seed: int) -> None:
    head(*batch(seed)).backward()
    optimizer.step()
    optimizer.zero_grad()
