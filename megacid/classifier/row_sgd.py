"""SGD with momentum on the class rows of a step.

Legend: D width, S rows used in this step, b rows of a block of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megacid.classifier.head_optimizer import check_number
from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.row_optimizer import Factor, Lazy, Moments, RowOptimizer, column


class RowSGD(RowOptimizer):
    """SGD with momentum on the class rows of a step; equals torch.optim.SGD if every row is used.

    Args:
        head: the classifier; its `row_grad` is read by `step`.
        lr: learning rate.
        momentum: decay rate of the velocity, in [0, 1).
        weight_decay: coupled: this multiple of the weight is added to the gradient.
        moments: dtype of the stored velocity, as in `RowAdamW`.
        lazy: as in `RowAdamW`.

    Raises:
        UserError: a value out of range.
    """

    _MOMENTS = ("velocity",)

    def __init__(
        self,
        head: PartialFC,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        *,
        moments: Moments = "fp32",
        lazy: Lazy = "none",
    ):
        super().__init__(head, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, moments, lazy)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_number(group, "momentum", "a number in [0, 1)", high=1.0)

    def _factors(self, count_S: Tensor, missed_S: Tensor | None, decay_S: Tensor | None) -> tuple[Factor, ...]:
        momentum = self.group["momentum"]
        if missed_S is None or decay_S is None:
            return momentum, 1.0
        return column(momentum ** (missed_S + 1)), column(decay_S.exp())

    def _update(
        self, weight_bD: Tensor, moments: list[Tensor], grad_bD: Tensor, spare_bD: Tensor, factors: tuple[Factor, ...]
    ) -> None:
        (velocity,) = moments
        keep, shrink = factors
        if isinstance(shrink, Tensor):
            weight_bD.mul_(shrink)
        velocity.mul_(keep).add_(grad_bD).add_(weight_bD, alpha=self.group["weight_decay"])
        weight_bD.add_(velocity, alpha=-self.group["lr"])

    def _step_fused(self, grad_SD: Tensor, factors: tuple[Any, ...], options: dict[str, Any]) -> None:
        from megacid_kernels.fused import SGDFactors, sgd_rows_  # needs triton

        (velocity,), rates = self._moments().values(), {name: self.group[name] for name in ("lr", "weight_decay")}
        sgd_rows_(self.head.weight, velocity, grad_SD, SGDFactors(*factors), **rates, **options)
