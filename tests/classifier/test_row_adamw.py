"""RowAdamW gives rows of equal factors to the operator of torch.optim, and the result is that of its own operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megacid import PartialFC, RowAdamW
from megacid.classifier import row_adamw


@pytest.mark.parametrize(
    ("updates", "width", "by_torch"),
    [
        ((0, 0), 32, True),
        ((900, 2000), 32, True),  # every bias correction is 1 in fp32
        ((0, 1), 32, False),
        ((0, 0), 24, False),
    ],
)
@pytest.mark.parametrize("lazy", ["none", "decay"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_torch_updates_rows_of_equal_factors_and_the_result_is_that_of_each_row(
    monkeypatch: pytest.MonkeyPatch, updates: tuple[int, int], width: int, by_torch: bool, lazy: Any, moments: Any
) -> None:
    operator, calls = row_adamw.adamw, []
    monkeypatch.setattr(row_adamw, "adamw", lambda *a, **k: calls.append(operator(*a, **k)))

    def stepped(lr: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        head = PartialFC(40, width, scale=8.0)
        opt = RowAdamW(head, lr=lr, weight_decay=0.1, lazy=lazy, moments=moments)
        opt.rows_state["updates"].copy_(torch.tensor(updates).repeat(20))
        for _ in range(3):
            head(torch.randn(16, width), torch.arange(16)).backward()
            opt.step(grad_scale=torch.tensor(0.3))
            opt.zero_grad()
        return head.weight, opt.state_rows()

    got = stepped(0.01), stepped(0.0)
    assert bool(calls) == by_torch
    monkeypatch.setattr(RowAdamW, "_fits_torch_optim", lambda *_: False)
    # Stochastic rounding: a last bit of fp32 decides about one of bf16.
    tolerance, most = {"fp32": (1e-6, 2e-7), "bf16": (2.0**-6, 2e-4)}[moments]
    for (weight, state), (expected, expected_state) in zip(got, (stepped(0.01), stepped(0.0))):
        torch.testing.assert_close(weight, expected, rtol=2e-6, atol=most)
        for name, rows in state.items():
            want = expected_state[name]
            torch.testing.assert_close(rows, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def test_rows_that_missed_a_step_are_not_given_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_adamw, "adamw", lambda *_, **__: pytest.fail("rows have missed a step"))
    head = PartialFC(40, 32)
    opt = RowAdamW(head, lazy="decay")
    opt.step()  # no row is used
    head(torch.randn(16, 32), torch.arange(16)).backward()
    opt.step()
