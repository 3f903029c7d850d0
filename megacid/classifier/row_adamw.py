"""AdamW on the class rows of a step.

Legend: D width, S rows used in this step, b rows of a block of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megacid.classifier.head_optimizer import check_number
from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.row_optimizer import Factor, Lazy, Moments, RowOptimizer, column
from megacid.classifier.row_state import correctly_rounded_sqrt
from megacid.errors import UserError
from megacid_kernels.rows import is_on_host


class RowAdamW(RowOptimizer):
    """AdamW on the class rows of a step; equals torch.optim.AdamW if every row is used.

    Args:
        head: the classifier; its `row_grad` is read by `step`.
        lr: learning rate.
        betas: decay rates of the first and the second moment, in [0, 1).
        weight_decay: decoupled weight decay per unit of learning rate.
        moments: dtype of the stored moments, "fp32" or "bf16"; arithmetic is fp32. "bf16" halves their memory and
            rounds stochastically, without bias and identically for any number of ranks.
        lazy: how a row accounts for steps without it: "none", or "decay" for the decays of a zero gradient.

    Raises:
        UserError: a value out of range.
    """

    _MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        head: PartialFC,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        *,
        moments: Moments = "fp32",
        lazy: Lazy = "none",
    ):
        super().__init__(head, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, moments, lazy)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        try:
            beta1, beta2 = map(float, group["betas"])
        except (TypeError, ValueError):
            beta1 = beta2 = math.nan
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise UserError(f"classifier betas are {group['betas']}, expected two numbers in [0, 1)")
        group["betas"] = beta1, beta2
        check_number(group, "eps", "> 0: 1e-8 is usual", low=math.ulp(0.0))

    def _factors(self, count_S: Tensor, missed_S: Tensor | None, decay_S: Tensor | None) -> tuple[Factor, ...]:
        (beta1, beta2), lr = self.group["betas"], self.group["lr"]
        # float64, because 1 - beta ** n loses all but 4 digits in float32 for beta = 0.999.
        correct1, correct2 = 1 - beta1**count_S, (1 - beta2**count_S).sqrt()
        keep1: Factor = beta1
        keep2: Factor = beta2
        shrink: Factor = 1 - lr * self.group["weight_decay"]
        if missed_S is not None and decay_S is not None:
            keep1, keep2 = column(beta1 ** (missed_S + 1)), column(beta2 ** (missed_S + 1))
            shrink = column(decay_S.exp() * shrink)
        # (m / c1) / (sqrt(v) / c2 + eps) with both corrections as factors per row: saves two passes over [b, D].
        rate, eps = column(lr * correct2 / correct1), column(self.group["eps"] * correct2)
        if missed_S is None and self._fits_torch_optim(rate, eps):
            return keep1, keep2, shrink, rate[0].item(), eps[0].item()
        return keep1, keep2, shrink, rate, eps

    def _fits_torch_optim(self, *factors_S1: Tensor) -> bool:
        """Whether PyTorch's operator, which makes one pass, can update the rows: on a CPU, if all have equal factors.

        They have after equally many updates, or after so many that the bias corrections are 1. Widths with a remainder
        are left out: other instructions compute it, and which elements it is depends on the number of threads. On a GPU
        the host would wait for the answer.
        """
        weight = self.head.weight
        if not is_on_host(weight) or weight.shape[1] % 16 or getattr(self.head, "fused", False):
            return False
        return all(bool((factor == factor[0]).all()) for factor in factors_S1)

    def _update(
        self, weight_bD: Tensor, moments: list[Tensor], grad_bD: Tensor, spare_bD: Tensor, factors: tuple[Factor, ...]
    ) -> None:
        (mean, square), (beta1, beta2) = moments, self.group["betas"]
        keep1, keep2, shrink, rate, eps = factors
        if isinstance(rate, float):
            # `rate` and `eps` contain the bias corrections; those of step inf are 1.
            decay = (1 - shrink) / rate if rate else 0.0
            rates: dict[str, Any] = {"lr": rate, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay}
            flags: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False}
            adamw([weight_bD], [grad_bD], [mean], [square], [], [torch.tensor(math.inf)], **flags, **rates)
            return
        mean.mul_(keep1).add_(grad_bD, alpha=1 - beta1)
        square.mul_(keep2).addcmul_(grad_bD, grad_bD, value=1 - beta2)
        correctly_rounded_sqrt(square, out=spare_bD).add_(eps)
        torch.div(mean, spare_bD, out=spare_bD)
        weight_bD.mul_(shrink).addcmul_(spare_bD, rate, value=-1)

    def _step_fused(self, grad_SD: Tensor, factors: tuple[Any, ...], options: dict[str, Any]) -> None:
        from megacid_kernels.fused import AdamWFactors, adamw_rows_  # needs triton

        mean, square = self._moments().values()
        adamw_rows_(
            self.head.weight, mean, square, grad_SD, AdamWFactors(*factors), betas=self.group["betas"], **options
        )
