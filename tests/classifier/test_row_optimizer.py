"""Row optimizers equal torch's dense ones and leave other rows alone; init and errors of the head they train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks

from megacid import PartialFC, RowAdamW, RowSGD
from megacid.classifier import row_optimizer, shard_range
from megacid.classifier.row_state import round_to_bf16, rounding_bits, rounding_keys
from megacid.errors import UserError


def dense_and_rows(kind: str, width: int, steps: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(12, width, generator=g)
    head = PartialFC(12, width, init=w, scale=8.0)
    dense = w.clone().requires_grad_()
    if kind == "adamw":
        opt = RowAdamW(head, lr=0.03, betas=(0.9, 0.98), weight_decay=0.1)
        ref: torch.optim.Optimizer = torch.optim.AdamW([dense], lr=0.03, betas=(0.9, 0.98), weight_decay=0.1, eps=1e-8)
    else:
        opt = RowSGD(head, lr=0.1, momentum=0.9, weight_decay=0.01)
        ref = torch.optim.SGD([dense], lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        lr = 0.05 / (step + 1)
        opt.param_groups[0]["lr"] = ref.param_groups[0]["lr"] = lr
        x, y = torch.randn(9, width, generator=g), torch.randint(0, 12, (9,), generator=g)
        head(x, y).backward()
        rows, grad = head.row_grad()
        assert torch.equal(rows, torch.arange(12))
        dense.grad = 0.3 * grad.clone()
        opt.step(grad_scale=torch.tensor(0.3))
        opt.zero_grad()
        ref.step()
    return head.weight, dense.detach()


@pytest.mark.parametrize("width", [6, 32])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_with_every_row_it_is_the_dense_optimizer(kind: str, width: int) -> None:
    got, expected = dense_and_rows(kind, width)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("lazy", ["none", "decay"])
@pytest.mark.parametrize("make", [RowAdamW, RowSGD])
def test_rows_that_were_not_sampled_stay_bit_unchanged(make: Any, lazy: str, moments: str) -> None:
    # scale 8: at 64 a far class's squared gradient underflows to 0, and its second moment rightly stays 0.
    torch.manual_seed(0)
    head = PartialFC(200, 5, sample_rate=0.1, scale=8.0)
    opt = make(head, lazy=lazy, moments=moments)

    def state() -> dict[str, torch.Tensor]:
        rows = {"weight": head.weight} | opt.state_rows()
        return {name: value.clone() for name, value in rows.items() if not name.startswith("missed_")}

    before = state()
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
    for name, rows in state().items():
        assert torch.equal(rows[~mask], before[name][~mask]), f"{name} of a row that was not sampled changed"
        assert (rows[mask] != before[name][mask]).reshape(int(mask.sum()), -1).any(1).all(), (
            f"{name} of a sampled row did not change"
        )


def test_bias_correction_counts_the_updates_of_each_row() -> None:
    """The first update of a row moves it by about lr, however late it comes."""
    torch.manual_seed(0)
    head = PartialFC(50, 4, sample_rate=0.1, scale=8.0)
    opt = RowAdamW(head, lr=0.01, eps=1e-12, weight_decay=0.0)  # far below the smallest gradient
    for step in range(30):
        head.set_step(step)
        head(torch.randn(1, 4), torch.tensor([1])).backward()
        rows, _ = head.row_grad()
        first = rows[opt.state_rows()["updates"][rows] == 0]
        before = head.weight[first].clone()
        opt.step()
        opt.zero_grad()
        torch.testing.assert_close(
            (head.weight[first] - before).abs(), torch.full_like(before, 0.01), rtol=1e-2, atol=0
        )
    assert int(opt.state_rows()["updates"][1]) == 30 and int(opt.state_rows()["updates"].min()) < 10


def test_without_a_gradient_a_step_changes_nothing() -> None:
    head = PartialFC(5, 3)
    opt, before = RowAdamW(head), head.weight.clone()
    opt.step()
    assert torch.equal(head.weight, before) and not opt.state_rows()["updates"].any()
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
    with pytest.raises(UserError, match=r"shape \(9, 4\), expected \(8, 4\)"):
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
    with pytest.raises(UserError, match="has 6 rows, expected 5"):
        head.load_full_state(other.full_state())
    with pytest.raises(UserError, match="'exp_avg'"):
        opt.load_full_state({"velocity": torch.zeros(5, 3)})
    with pytest.raises(UserError, match=r"shape \(5, 2\), expected \(5, 3\)"):
        head.load_state_rows(lambda name, start, stop: torch.zeros(stop - start, 2))
    assert torch.equal(head.weight, before)


def test_wrong_inputs_are_named() -> None:
    head = PartialFC(5, 3)
    with pytest.raises(UserError, match=r"torch\.int32"):
        head(torch.randn(2, 3), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(UserError, match=r"expected \[B, 3\]"):
        head(torch.randn(2, 4), torch.tensor([0, 1]))
    for make, kwargs, message in (
        (RowAdamW, {"betas": (1.0, 0.9)}, "betas"),
        (RowSGD, {"momentum": 1.0}, "momentum"),
        (RowSGD, {"lr": -1.0}, "lr is -1.0"),
    ):
        with pytest.raises(UserError, match=message):
            make(head, **kwargs)


# ---- pending decay of rows that were not used, storage in bf16, state ----

Feed = list[tuple[torch.Tensor, torch.Tensor]]  # per step: global rows [S] sorted, gradient [S, D]


class Shard:
    """Classes [start, stop) of a head whose gradients the test chooses."""

    def __init__(self, weight_CD: torch.Tensor, start: int, stop: int, seed: int = 5) -> None:
        self.weight = weight_CD[start:stop].clone()
        self.class_start, self.class_stop, self.num_local = start, stop, stop - start
        self.num_classes, self.seed, self.group = len(weight_CD), seed, None
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None

    def take(self, rows: torch.Tensor, grad: torch.Tensor) -> None:
        own = (rows >= self.class_start) & (rows < self.class_stop)
        self.pending = rows[own] - self.class_start, grad[own]

    def row_grad(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.pending is not None
        return self.pending

    def state_rows(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}


class Ranks:
    """The same optimizer on `world` shards."""

    def __init__(self, make: Any, weight_CD: torch.Tensor, world: int = 1) -> None:
        count = len(weight_CD)
        self.heads = [Shard(weight_CD, *shard_range(count, rank, world)) for rank in range(world)]
        self.opts = [make(head) for head in self.heads]

    def step(self, rows: torch.Tensor, grad: torch.Tensor, lr: float, grad_scale: float | torch.Tensor = 1.0) -> None:
        for head, opt in zip(self.heads, self.opts):
            head.take(rows, grad)
            opt.param_groups[0]["lr"] = lr
            opt.step(grad_scale=grad_scale)

    def rows(self) -> dict[str, torch.Tensor]:
        """Everything, by global row, as a checkpoint has it."""
        states = [head.state_rows() | opt.state_rows() for head, opt in zip(self.heads, self.opts)]
        return {name: torch.cat([state[name] for state in states]) for name in states[0]}

    def load(self, rows: dict[str, torch.Tensor]) -> None:
        for head, opt in zip(self.heads, self.opts):
            head.weight.copy_(rows["weight"][head.class_start : head.class_stop])
            opt.load_state_rows(lambda name, start, stop: rows[name][start:stop])


def feed(count: int, width: int, steps: int, share: float, seed: int = 0) -> Feed:
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(steps):
        size = max(1, round(share * count))
        rows = torch.arange(count) if share == 1 else torch.randperm(count, generator=g)[:size].sort().values
        out.append((rows, torch.randn(size, width, generator=g)))
    return out


def lr_of(step: int) -> float:
    return 0.02 + 0.01 * math.sin(step)


def adamw(**options: Any) -> Callable[[Any], RowAdamW]:
    return lambda head: RowAdamW(head, **{"weight_decay": 0.3, **options})


def sgd(**options: Any) -> Callable[[Any], RowSGD]:
    return lambda head: RowSGD(head, **{"weight_decay": 0.3, **options})


def dense(kind: str, weight_CD: torch.Tensor, steps: Feed, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """torch's optimizer in float64 on all rows, with zero gradients for those that are not fed."""
    weight = weight_CD.double().requires_grad_()
    opt: torch.optim.Optimizer
    if kind == "adamw":
        opt = torch.optim.AdamW([weight], **{"betas": (0.9, 0.98), "weight_decay": 0.3, **options})
    else:
        opt = torch.optim.SGD([weight], **{"momentum": 0.9, "weight_decay": 0.3, **options})
    for step, (rows, grad) in enumerate(steps):
        weight.grad = torch.zeros_like(weight)
        weight.grad[rows] = grad.double()
        opt.param_groups[0]["lr"] = lr_of(step)
        opt.step()
    return weight.detach(), opt.state[weight]


def assert_near(got: torch.Tensor, expected: torch.Tensor, what: str, share: float = 1e-6) -> None:
    """Within `share` of the largest number of each row."""
    error = ((got.double() - expected).abs().amax(1) / expected.abs().amax(1)).max()
    assert float(error) < share, f"{what} is off by {float(error):.2g} of a row's largest number"


@pytest.mark.parametrize("lazy", ["none", "decay"])
@pytest.mark.parametrize("grad_scale", [1.0, 0.25, torch.tensor(0.25)])
@pytest.mark.parametrize(("kind", "make"), [("adamw", adamw), ("sgd", sgd)])
def test_with_every_row_50_steps_are_those_of_the_dense_optimizer(
    kind: str, make: Any, lazy: str, grad_scale: float | torch.Tensor
) -> None:
    weight, steps = torch.randn(23, 7, generator=torch.Generator().manual_seed(1)), feed(23, 7, 50, 1.0)
    ranks = Ranks(make(lazy=lazy), weight)
    for step, (rows, grad) in enumerate(steps):
        ranks.step(rows, grad, lr_of(step), grad_scale)
    expected, _ = dense(kind, weight, [(rows, grad * float(grad_scale)) for rows, grad in steps])
    torch.testing.assert_close(ranks.heads[0].weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_with_decay_the_moments_are_those_of_zero_gradients_when_a_row_is_used_again() -> None:
    weight, steps = torch.randn(60, 7, generator=torch.Generator().manual_seed(1)), feed(60, 7, 50, 0.1)
    ranks = Ranks(adamw(lazy="decay"), weight, 2)
    for step, (rows, grad) in enumerate(steps):
        ranks.step(rows, grad, lr_of(step))
        if step in (20, 49):
            _, state = dense("adamw", weight, steps[: step + 1])
            for name in ("exp_avg", "exp_avg_sq"):
                assert_near(ranks.rows()[name][rows], state[name][rows], name)
            assert (ranks.rows()["updates"][rows] == step + 1).all(), "bias correction must count all steps"
    assert int(ranks.rows()["missed_steps"].max()) > 10, "no row missed steps"


@pytest.mark.parametrize(
    ("kind", "make", "options"),
    [("adamw", adamw, {"betas": (0.0, 0.98)}), ("sgd", sgd, {"momentum": 0.0})],
)
def test_without_momentum_decay_gives_the_dense_weights_once_every_row_was_used(
    kind: str, make: Any, options: dict[str, Any]
) -> None:
    weight = torch.randn(60, 7, generator=torch.Generator().manual_seed(1))
    steps = feed(60, 7, 50, 0.1) + feed(60, 7, 1, 1.0, seed=1)
    ranks = {lazy: Ranks(make(lazy=lazy, **options), weight) for lazy in ("none", "decay")}
    for step, (rows, grad) in enumerate(steps):
        for each in ranks.values():
            each.step(rows, grad, lr_of(step))
    expected, _ = dense(kind, weight, steps, **options)
    assert_near(ranks["decay"].heads[0].weight, expected, "the weight")
    assert not torch.allclose(ranks["none"].heads[0].weight.double(), expected, rtol=0.05)


def test_sgd_with_decay_shrinks_velocity_and_weight_by_the_steps_that_were_missed() -> None:
    ranks = Ranks(sgd(lazy="decay", momentum=0.9, weight_decay=0.5), torch.ones(2, 3))
    first, second = torch.tensor([0]), torch.tensor([1])
    ranks.step(first, torch.full((1, 3), 2.0), 0.1)
    for lr in (0.2, 0.3, 0.4):
        ranks.step(second, torch.ones(1, 3), lr)
    ranks.step(first, torch.zeros(1, 3), 0.1)
    before = 1 - 0.1 * 2.5
    caught_up = before * (1 - 0.2 * 0.5) * (1 - 0.3 * 0.5) * (1 - 0.4 * 0.5)
    velocity = 0.9**4 * 2.5 + 0.5 * caught_up
    rows = ranks.rows()
    torch.testing.assert_close(rows["velocity"][0], torch.full((3,), velocity))
    torch.testing.assert_close(rows["weight"][0], torch.full((3,), caught_up - 0.1 * velocity))


ALL_KINDS = [
    (make, moments, lazy) for make in (adamw, sgd) for moments in ("fp32", "bf16") for lazy in ("none", "decay")
]


@pytest.mark.parametrize(("make", "moments", "lazy"), ALL_KINDS)
def test_a_run_that_moves_to_other_shards_ends_with_the_same_bits(make: Any, moments: str, lazy: str) -> None:
    """Also: rounding depends on no rank, and a step without rows (a shard that is not sampled) is a step."""
    weight, steps = torch.randn(37, 5, generator=torch.Generator().manual_seed(1)), feed(37, 5, 40, 0.05)
    make = make(moments=moments, lazy=lazy)
    through, first, second = Ranks(make, weight), Ranks(make, weight, 5), Ranks(make, weight, 3)
    for step, (rows, grad) in enumerate(steps[:7]):
        second.step(rows, grad, lr_of(step + 3))  # its previous state must not matter
    for step, (rows, grad) in enumerate(steps):
        through.step(rows, grad, lr_of(step))
        if step < 23:
            first.step(rows, grad, lr_of(step))
        else:
            if step == 23:
                saved = first.rows()
                dtype = torch.bfloat16 if moments == "bf16" else torch.float32
                names = saved.keys() & {"exp_avg", "exp_avg_sq", "velocity"}
                assert names and all(saved[name].dtype == dtype for name in names)
                second.load(saved)
            second.step(rows, grad, lr_of(step))
    got, expected = second.rows(), through.rows()
    assert got.keys() == expected.keys() and ("missed_steps" in expected) == (lazy == "decay")
    for name in expected:
        assert torch.equal(got[name], expected[name]), f"{name} differs after the move"


@pytest.mark.parametrize(("make", "moments", "lazy"), ALL_KINDS)
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_the_size_of_a_block_changes_nothing(
    make: Any, moments: str, lazy: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, steps = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)), feed(50, 8, 4, share)
    states = []
    for block in (1 << 18, 7 * 4 * 8, 1):
        monkeypatch.setattr(row_optimizer, "_CPU_BLOCK_BYTES", block)
        ranks = Ranks(make(moments=moments, lazy=lazy), weight)
        for step, (rows, grad) in enumerate(steps):
            ranks.step(rows, grad, lr_of(step), torch.tensor(0.5))
        states.append(ranks.rows())
    for name, expected in states[0].items():
        assert not torch.equal(expected, torch.zeros_like(expected)) or (name.startswith("missed") and share == 1)
        for other in states[1:]:
            assert torch.equal(other[name], expected), f"{name} depends on the block"


@pytest.mark.parametrize(("make", "moments", "lazy"), ALL_KINDS)
def test_a_step_does_not_synchronise_with_the_device(make: Any, moments: str, lazy: str) -> None:
    """On "meta" there are no values: item(), tolist(), bool(), nonzero() and the like raise."""
    head = Shard(torch.empty(30, 4, device="meta"), 0, 30)
    opt = make(moments=moments, lazy=lazy)(head)
    for size in (5, 30, 0):
        head.pending = (
            torch.empty(size, dtype=torch.int64, device="meta"),
            torch.empty(size, 4, device="meta"),
        )
        opt.step(grad_scale=torch.empty((), device="meta"))
        opt.step(grad_scale=0.5)


def test_bf16_moments_have_no_bias_where_rounding_to_nearest_stands_still() -> None:
    """beta2 = 0.999, constant gradient: a step changes the average by less than half the distance of bf16 numbers."""
    grad = torch.rand(50, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    ranks = {
        moments: Ranks(adamw(moments=moments, betas=(0.99, 0.999)), torch.zeros(50, 64)) for moments in ("fp32", "bf16")
    }
    nearest = torch.zeros(50, 64, dtype=torch.bfloat16)
    for _ in range(1500):
        for each in ranks.values():
            each.step(torch.arange(50), grad, 0.0)
        nearest = (0.999 * nearest.float() + 0.001 * grad.square()).bfloat16()
    exact, got = ranks["fp32"].rows(), ranks["bf16"].rows()
    assert float((nearest.float() / exact["exp_avg_sq"]).mean()) < 0.8, "the test cannot tell the roundings apart"
    for name, error in (("exp_avg", 0.001), ("exp_avg_sq", 0.004)):
        ratio = got[name].float() / exact[name]
        # 3200 elements, each off by at most some per cent: the mean of them is far nearer to 1.
        assert abs(float(ratio.mean()) - 1) < error and float((ratio - 1).abs().max()) < 0.15, name


def test_the_roundings_of_rows_columns_updates_and_seeds_are_independent() -> None:
    def ups(seed: int, first: int, updates: int) -> torch.Tensor:
        """Which of 512 x 64 equal numbers, a quarter of the way between two bf16 numbers, were rounded up."""
        ids, count = torch.arange(first, first + 512), torch.full((512,), updates)
        keys = rounding_keys(ids, count, 64, seed=seed)
        bits = rounding_bits(*keys, torch.empty(512, 64, dtype=torch.int32), torch.empty(512, 64, dtype=torch.int32))
        low = 1.0 + torch.full((512, 64), 2.0**-9)
        both = [round_to_bf16(low.clone(), half & 0xFFFF).float() for half in (bits, bits >> 16)]
        assert all(set(rounded.unique().tolist()) == {1.0, 1.0 + 2.0**-7} for rounded in both)
        return torch.stack(both) > 1

    base = ups(0, 0, 1)
    assert torch.equal(base, ups(0, 0, 1)) and torch.equal(base[:, 100:], ups(0, 100, 1)[:, :412])
    others = [ups(1, 0, 1), ups(0, 1000, 1), ups(0, 0, 2), base.roll(1, 1), base.roll(1, 2), base.flip(0)]
    for rounded in [base, *others]:
        # Standard deviation of the mean of 32768 draws: 0.0024.
        assert (rounded.float().mean((1, 2)) - 0.25).abs().max() < 0.012
    a = (base.float() - 0.25).flatten()
    for other in others:
        b = (other.float() - 0.25).flatten()
        assert abs(float((a * b).mean() / 0.1875)) < 0.03


@pytest.mark.parametrize("make", [RowAdamW, RowSGD])
def test_training_with_bf16_moments_tracks_fp32(make: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 16, generator=g), torch.arange(80) % 20
    losses: dict[str, list[float]] = {}
    for moments in ("fp32", "bf16"):
        head = PartialFC(20, 16, scale=16.0)
        opt = make(head, lr=0.02, moments=moments)
        losses[moments] = []
        for _ in range(100):
            loss = head(x, y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses[moments].append(loss.item())
    exact, got = np.array(losses["fp32"]), np.array(losses["bf16"])
    assert exact[-1] < 0.7 * exact[0], "nothing was learned"
    assert not np.array_equal(got, exact)
    assert np.abs(got - exact).max() < 0.01 * exact[0]


def _state_of_two_ranks() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    head = PartialFC(31, 4, sample_rate=0.2, scale=8.0)
    opt = RowAdamW(head, moments="bf16", lazy="decay")
    for step in range(5):
        head.set_step(step)
        head(torch.randn(2, 4), torch.tensor([0, 30])).backward()
        opt.step()
        opt.zero_grad()
    own, full = {name: rows.clone() for name, rows in opt.state_rows().items()}, opt.full_state()
    other = RowAdamW(head, moments="bf16", lazy="decay")
    other.load_full_state(full)
    assert all(torch.equal(rows, own[name]) for name, rows in other.state_rows().items())
    return own, full


def test_the_full_state_of_two_ranks_is_their_rows_one_after_the_other() -> None:
    (first, full), (second, also) = run_ranks(_state_of_two_ranks, 2)
    assert full["exp_avg"].dtype == torch.bfloat16 and full["missed_steps"].any() and full["missed_decay"].any()
    for name in full:
        assert torch.equal(full[name], torch.cat([first[name], second[name]])) and torch.equal(full[name], also[name])


def test_a_state_of_the_other_lazy_mode_and_unknown_words_are_refused() -> None:
    head = PartialFC(5, 3)
    with pytest.raises(UserError, match="no 'missed_steps'"):
        RowAdamW(head, lazy="decay").load_full_state(RowAdamW(head).full_state())
    with pytest.raises(UserError, match="moments is 'fp16', expected 'fp32' or 'bf16'"):
        RowAdamW(head, moments="fp16")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="lazy is 'yes', expected 'none' or 'decay'"):
        RowSGD(head, lazy="yes")  # type: ignore[arg-type]
    head(torch.randn(2, 3), torch.tensor([0, 1])).backward()
    before = head.weight.clone()
    with pytest.raises(UserError, match=r"2\.0 \* 0\.5 = 1\.0, expected less than 1"):
        RowAdamW(head, lr=2.0, weight_decay=0.5, lazy="decay").step()
    assert torch.equal(head.weight, before)
