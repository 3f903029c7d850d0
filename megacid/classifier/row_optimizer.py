"""Optimizers that touch only the class rows a step used: no momentum, decay or state change elsewhere.

Legend: D width, L local classes, S sampled rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.row_state import ReadRows, copy_rows, gather_state, reader_of
from megacid.config import UserError


class RowOptimizer:
    """What both optimizers share: the head, `lr` and `weight_decay` (settable at any time), state by global row."""

    def __init__(self, head: PartialFC, lr: float, weight_decay: float):
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"classifier {name} is {value}, wanted a finite number >= 0")
        self.head, self.lr, self.weight_decay = head, lr, weight_decay

    def state_rows(self) -> dict[str, Tensor]:
        """This rank's optimizer state: name -> [L, ...]."""
        raise NotImplementedError

    def _update(self, rows_S: Tensor, grad_SD: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, grad_scale: float | Tensor = 1.0) -> None:
        """Update the rows of `head.row_grad()` with their gradient times `grad_scale` (gradient clipping)."""
        rows, grad = self.head.row_grad()
        if len(rows):
            self._update(rows, grad * grad_scale)

    def zero_grad(self) -> None:
        self.head.zero_grad()

    def load_state_rows(self, read: ReadRows) -> None:
        """Take this rank's rows from read(name, start, stop), whatever number of ranks wrote them."""
        copy_rows(self.state_rows(), read, self.head.class_start, self.head.class_stop)

    def full_state(self) -> dict[str, Tensor]:
        """name -> [C, ...] on the host of every rank. A collective."""
        return gather_state(self.state_rows(), self.head.group)

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_rows(reader_of(state, self.head.num_classes))


class RowAdamW(RowOptimizer):
    """AdamW on sampled rows. Bias correction counts a row's own updates; with every row used it is dense AdamW.

    A row that is skipped keeps its moments as they are: its averages run over its updates, not over steps.
    """

    def __init__(
        self,
        head: PartialFC,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
    ):
        super().__init__(head, lr, weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"classifier betas are {betas}, wanted two numbers in [0, 1)")
        if not eps > 0:
            raise UserError(f"classifier eps is {eps}, wanted > 0: 1e-8 is usual")
        self.betas, self.eps = betas, eps
        self.exp_avg = torch.zeros_like(head.weight)
        self.exp_avg_sq = torch.zeros_like(head.weight)
        self.updates = torch.zeros(head.num_local, dtype=torch.int32, device=head.weight.device)

    def state_rows(self) -> dict[str, Tensor]:
        """{"exp_avg": fp32 [L, D], "exp_avg_sq": fp32 [L, D], "updates": int32 [L]}."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "updates": self.updates}

    def _update(self, rows_S: Tensor, grad_SD: Tensor) -> None:
        beta1, beta2 = self.betas
        count = self.updates[rows_S] + 1
        mean = self.exp_avg[rows_S].lerp_(grad_SD, 1 - beta1)
        square = self.exp_avg_sq[rows_S].mul_(beta2).addcmul_(grad_SD, grad_SD, value=1 - beta2)
        # In float64: 1 - beta ** n of a float32 has 4 digits left for beta = 0.999.
        correct1 = (1 - beta1 ** count.double()).float()[:, None]
        correct2 = (1 - beta2 ** count.double()).sqrt().float()[:, None]
        weight = self.head.weight[rows_S].mul_(1 - self.lr * self.weight_decay)
        weight -= self.lr * (mean / correct1) / ((square.sqrt() / correct2).add_(self.eps))
        self.head.weight[rows_S] = weight
        self.exp_avg[rows_S], self.exp_avg_sq[rows_S], self.updates[rows_S] = mean, square, count


class RowSGD(RowOptimizer):
    """SGD with momentum and (coupled) weight decay on sampled rows; with every row used it is torch.optim.SGD."""

    def __init__(self, head: PartialFC, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 5e-4):
        super().__init__(head, lr, weight_decay)
        if not 0 <= momentum < 1:
            raise UserError(f"classifier momentum is {momentum}, wanted a number in [0, 1)")
        self.momentum = momentum
        self.velocity = torch.zeros_like(head.weight)

    def state_rows(self) -> dict[str, Tensor]:
        """{"velocity": fp32 [L, D]}."""
        return {"velocity": self.velocity}

    def _update(self, rows_S: Tensor, grad_SD: Tensor) -> None:
        weight = self.head.weight[rows_S]
        velocity = self.velocity[rows_S].mul_(self.momentum).add_(grad_SD).add_(weight, alpha=self.weight_decay)
        self.head.weight[rows_S] = weight - self.lr * velocity
        self.velocity[rows_S] = velocity
