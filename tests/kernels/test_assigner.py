"""The assignment of k-means by Triton's kernel, against PyTorch.

Without a GPU it runs in Triton's interpreter, see `interpreter.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import assert_holds_in_the_interpreter, on_devices

from megacid.errors import UserError
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.nearest import Assigner, prepare
from megacid.offline.rows import ArrayRows
from megacid_kernels.fused import INTERPRET

if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__)

    def test_a_cpu_is_refused_with_a_remedy() -> None:
        with pytest.raises(UserError, match=r"backend is 'triton', which cannot run here .*take --backend torch"):
            Assigner(torch.eye(3), "cosine", torch.device("cpu"), "triton")


def some(n: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


@on_devices
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_labels_lose_no_more_than_their_rounding(metric: Any, device: str) -> None:
    torch_device = torch.device(device)
    x_TD, c_KD = (prepare(some(n, 48, seed), metric, torch_device) for n, seed in ((300, 0), (70, 1)))
    value_T, label_T = (result[:, 0] for result in Assigner(c_KD, metric, torch_device, "triton").tile(x_TD))
    best_TL, want_TL = Assigner(c_KD, metric, torch_device, "torch").tile(x_TD, 2)
    torch.testing.assert_close(value_T, best_TL[:, 0], rtol=1e-3, atol=1e-3)
    # The label differs only where the second best is as near within rounding.
    other = label_T != want_TL[:, 0]
    assert other.float().mean() < 0.05 and torch.equal(label_T[other], want_TL[other, 1])
    assert ((best_TL[other, 0] - best_TL[other, 1]).abs() < 2e-3).all()
    # Several labels per row come from PyTorch.
    several = Assigner(c_KD, metric, torch_device, "triton").tile(x_TD, 3)[1]
    assert torch.equal(several[:, :2], want_TL)


@on_devices
def test_a_fit_does_not_depend_on_the_memory_it_may_use(device: str) -> None:
    rows = ArrayRows(some(2500, 32, 2).astype(np.float16))
    settings = KMeansSettings(k=6, iterations=3, backend="triton")
    whole = kmeans(rows, settings, device=device)
    tight = kmeans(rows, replace(settings, memory_gb=1.0 if device == "cuda" else 0.0025), device=device)
    assert torch.equal(whole.centroids, tight.centroids) and whole.objective == tight.objective
    want = kmeans(rows, replace(settings, backend="torch"), device=device)
    assert whole.objective[-1] == pytest.approx(want.objective[-1], abs=2e-3)
