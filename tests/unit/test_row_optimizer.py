"""Row optimizers against torch's dense ones, and what they must leave alone; init and errors of the head they train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megacid import PartialFC, RowAdamW, RowSGD
from megacid.config import UserError


def dense_and_rows(kind: str, steps: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(12, 6, generator=g)
    head = PartialFC(12, 6, init=w, scale=8.0)
    dense = w.clone().requires_grad_()
    if kind == "adamw":
        opt = RowAdamW(head, lr=0.03, betas=(0.9, 0.98), weight_decay=0.1)
        ref: torch.optim.Optimizer = torch.optim.AdamW([dense], lr=0.03, betas=(0.9, 0.98), weight_decay=0.1, eps=1e-8)
    else:
        opt = RowSGD(head, lr=0.1, momentum=0.9, weight_decay=0.01)
        ref = torch.optim.SGD([dense], lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        lr = 0.05 / (step + 1)
        opt.lr = ref.param_groups[0]["lr"] = lr
        x, y = torch.randn(9, 6, generator=g), torch.randint(0, 12, (9,), generator=g)
        head(x, y).backward()
        rows, grad = head.row_grad()
        assert torch.equal(rows, torch.arange(12))
        dense.grad = 0.3 * grad.clone()
        opt.step(grad_scale=torch.tensor(0.3))
        opt.zero_grad()
        ref.step()
    return head.weight, dense.detach()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_with_every_row_it_is_the_dense_optimizer(kind: str) -> None:
    got, want = dense_and_rows(kind)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("make", [RowAdamW, RowSGD])
def test_rows_that_were_not_sampled_stay_bit_unchanged(make: type) -> None:
    # scale 8: at 64 a far class's squared gradient underflows to 0, and its second moment rightly stays 0.
    torch.manual_seed(0)
    head = PartialFC(200, 5, sample_rate=0.1, scale=8.0)
    opt = make(head)
    before = {name: rows.clone() for name, rows in (head.state_rows() | opt.state_rows()).items()}
    touched: set[int] = set()
    for step in range(3):
        head.set_step(step)
        head(torch.randn(4, 5), torch.tensor([0, 3, 3, -1])).backward()
        touched |= set(head.row_grad()[0].tolist())
        opt.step()
        opt.zero_grad()
    mask = torch.zeros(200, dtype=torch.bool)
    mask[list(touched)] = True
    assert 20 <= int(mask.sum()) < 70
    for name, rows in (head.state_rows() | opt.state_rows()).items():
        assert torch.equal(rows[~mask], before[name][~mask]), f"{name} of a row that was not sampled changed"
        assert (rows[mask] != before[name][mask]).reshape(int(mask.sum()), -1).any(1).all(), (
            f"{name} of a sampled row stood still"
        )


def test_bias_correction_counts_the_updates_of_each_row() -> None:
    """The first update of a row moves it by about lr, however late it comes."""
    torch.manual_seed(0)
    head = PartialFC(50, 4, sample_rate=0.1, scale=8.0)
    opt = RowAdamW(head, lr=0.01, weight_decay=0.0)
    for step in range(30):
        head.set_step(step)
        head(torch.randn(1, 4), torch.tensor([1])).backward()
        rows, _ = head.row_grad()
        first = rows[opt.updates[rows] == 0]
        before = head.weight[first].clone()
        opt.step()
        opt.zero_grad()
        torch.testing.assert_close(
            (head.weight[first] - before).abs(), torch.full_like(before, 0.01), rtol=1e-2, atol=0
        )
    assert int(opt.updates[1]) == 30 and int(opt.updates.min()) < 10


def test_without_a_gradient_a_step_changes_nothing() -> None:
    head = PartialFC(5, 3)
    opt, before = RowAdamW(head), head.weight.clone()
    opt.step()
    assert torch.equal(head.weight, before) and not opt.updates.any()
    assert head.row_grad()[1].shape == (0, 3) and float(head.grad_norm_sq()) == 0


def test_evaluation_without_grad_leaves_no_gradient() -> None:
    head = PartialFC(5, 3)
    with torch.no_grad():
        loss = head(torch.randn(2, 3), torch.tensor([0, 1]))
    assert float(loss) > 0 and not loss.requires_grad and len(head.row_grad()[0]) == 0


def test_training_lowers_the_loss_and_lifts_the_metrics() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 16, generator=g), torch.arange(40) % 10
    head = PartialFC(10, 16, scale=16.0)
    opt = RowAdamW(head, lr=0.02, weight_decay=0.0)
    assert head.metrics() == {}
    losses, metrics = [], []
    for _ in range(60):
        loss = head(x, y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        metrics.append({name: float(value) for name, value in head.metrics().items()})
    assert losses[-1] < 0.5 * losses[0]
    assert metrics[-1]["target_cosine"] > metrics[0]["target_cosine"] + 0.2
    assert metrics[-1]["accuracy"] > 0.8 > metrics[0]["accuracy"]
    assert metrics[-1]["positive_share"] == 1.0


def test_accuracy_never_claims_a_sample_that_top_1_would_miss() -> None:
    g = torch.Generator().manual_seed(3)
    w, y = torch.randn(30, 8, generator=g), torch.randint(0, 30, (200,), generator=g)
    x = w[y] + 1.5 * torch.randn(200, 8, generator=g)
    head = PartialFC(30, 8, init=w, scale=32.0)
    head(x, y)
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
    top1 = float((cosine.argmax(1) == y).float().mean())
    assert top1 - 0.25 < float(head.metrics()["accuracy"]) <= top1


def test_init_from_file_takes_the_rows_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    np.save(tmp_path / "c.npy", w)
    for init in (
        tmp_path / "c.npy",
        str(tmp_path / "c.npy"),
        np.load(tmp_path / "c.npy", mmap_mode="r"),
        torch.as_tensor(w),
    ):
        assert np.array_equal(PartialFC(9, 4, init=init).weight.numpy(), w)
    with pytest.raises(UserError, match=r"shape \(9, 4\), wanted \(8, 4\)"):
        PartialFC(8, 4, init=tmp_path / "c.npy")
    with pytest.raises(UserError, match=r"nothing\.npy"):
        PartialFC(9, 4, init=tmp_path / "nothing.npy")
    w[7, 2] = np.nan
    with pytest.raises(UserError, match="row 7 is not finite"):
        PartialFC(9, 4, init=w)


def test_training_does_not_write_into_the_array_it_started_from() -> None:
    w = torch.randn(5, 3)
    kept = w.clone()
    head = PartialFC(5, 3, init=w)
    head(torch.randn(2, 3), torch.tensor([0, 1])).backward()
    RowSGD(head).step()
    assert torch.equal(w, kept) and not torch.equal(head.weight, kept)


def test_a_state_of_another_size_is_refused_and_changes_nothing() -> None:
    head, other = PartialFC(5, 3, seed=1), PartialFC(6, 3, seed=2)
    opt, before = RowAdamW(head), head.weight.clone()
    with pytest.raises(UserError, match="has 6 rows, wanted 5"):
        head.load_full_state(other.full_state())
    with pytest.raises(UserError, match="'exp_avg'"):
        opt.load_full_state({"velocity": torch.zeros(5, 3)})
    with pytest.raises(UserError, match=r"shape \(5, 2\), wanted \(5, 3\)"):
        head.load_state_rows(lambda name, start, stop: torch.zeros(stop - start, 2))
    assert torch.equal(head.weight, before)


def test_wrong_inputs_are_named() -> None:
    head = PartialFC(5, 3)
    with pytest.raises(UserError, match=r"torch\.int32"):
        head(torch.randn(2, 3), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(UserError, match=r"wanted \[B, 3\]"):
        head(torch.randn(2, 4), torch.tensor([0, 1]))
    for make, kwargs, says in (
        (RowAdamW, {"betas": (1.0, 0.9)}, "betas"),
        (RowSGD, {"momentum": 1.0}, "momentum"),
        (RowSGD, {"lr": -1.0}, "lr is -1.0"),
    ):
        with pytest.raises(UserError, match=says):
            make(head, **kwargs)
