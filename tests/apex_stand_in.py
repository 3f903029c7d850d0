"""Stands in for NVIDIA Apex, which needs a GPU and its compiler: its two optimizers on any device.

Arguments, defaults and state are those of apex.optimizers: steps are counted by parameter group.
"""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from torch import Tensor


class _Fused(torch.optim.Optimizer):
    def __init__(self, params: Any, adam_w_mode: bool, amsgrad: bool, set_grad_none: bool, **defaults: Any) -> None:
        assert adam_w_mode and not amsgrad and set_grad_none, "not needed here"
        super().__init__(params, defaults)

    def _gradient_factor(self) -> float | Tensor:
        return 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        factor = self._gradient_factor()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (first, second), step = group["betas"], group["step"] if group["bias_correction"] else 10**9
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = p.grad * factor, self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["exp_avg"].mul_(first).add_(g, alpha=1 - first if group.get("grad_averaging", True) else 1.0)
                state["exp_avg_sq"].mul_(second).addcmul_(g, g, value=1 - second)
                mean, square = state["exp_avg"] / (1 - first**step), state["exp_avg_sq"] / (1 - second**step)
                update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p
                p.sub_(group["lr"] * self._trust(p, update, group) * update)

    def _trust(self, p: Tensor, update: Tensor, group: dict[str, Any]) -> float | Tensor:
        return 1.0


class FusedAdam(_Fused):
    """AdamW."""

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: Any = (0.9, 0.999), eps: float = 1e-8,
        adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False, set_grad_none: bool = True,
        capturable: bool = False, master_weights: bool = False,
    ) -> None:  # fmt: skip
        assert not capturable and not master_weights, "not needed here"
        super().__init__(
            params, adam_w_mode, amsgrad, set_grad_none, lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
            weight_decay=weight_decay,
        )  # fmt: skip


class FusedLAMB(_Fused):
    """LAMB, which clips the norm of all gradients itself."""

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: Any = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.01, amsgrad: bool = False, adam_w_mode: bool = True, grad_averaging: bool = True,
        set_grad_none: bool = True, max_grad_norm: float = 1.0, use_nvlamb: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, adam_w_mode, amsgrad, set_grad_none, lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
            weight_decay=weight_decay, grad_averaging=grad_averaging, max_grad_norm=max_grad_norm,
        )  # fmt: skip
        self.use_nvlamb = use_nvlamb

    def _gradient_factor(self) -> float | Tensor:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm, largest = torch.nn.utils.get_total_norm(grads), self.defaults["max_grad_norm"]
        return largest / norm if norm > largest else 1.0

    def _trust(self, p: Tensor, update: Tensor, group: dict[str, Any]) -> float | Tensor:
        if not group["weight_decay"] and not self.use_nvlamb:
            return 1.0
        return torch.where((p.norm() > 0) & (update.norm() > 0), p.norm() / update.norm(), 1.0)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `apex` importable, with the CUDA extension by which NVIDIA's package is known."""
    extension, apex, optimizers = (types.ModuleType(name) for name in ("amp_C", "apex", "apex.optimizers"))
    extension.__spec__ = ModuleSpec("amp_C", None)
    vars(optimizers).update(FusedAdam=FusedAdam, FusedLAMB=FusedLAMB)
    vars(apex).update(optimizers=optimizers)
    for module in (extension, apex, optimizers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
