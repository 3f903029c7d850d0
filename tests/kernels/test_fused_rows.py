"""The Triton kernels on rows against float64 and against the row optimizers in PyTorch.

Without a GPU they run in Triton's interpreter, see `interpreter.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import assert_holds_in_the_interpreter, on_devices
from torch import Tensor

from megacid.classifier.row_adamw import RowAdamW
from megacid.classifier.row_optimizer import RowOptimizer
from megacid.classifier.row_sgd import RowSGD
from megacid.classifier.row_state import round_to_bf16, rounding_bits, rounding_keys
from megacid_kernels.fused import INTERPRET, AdamWFactors, SGDFactors, Tile, adamw_rows_, sgd_rows_, tile_of, unit_rows

# (L, S, D): one row, rows that do not fill a tile, widths that are no multiple of 4 or of a block. The tile is the
# default, or one with several blocks per row, like the default above 4096 columns.
SHAPES: list[tuple[int, int, int, Tile | None]] = [
    (1, 1, 1, None),
    (37, 5, 7, None),
    (23, 23, 64, None),
    (19, 9, 129, None),
    (21, 6, 512, None),
    (11, 7, 1000, None),
    (13, 5, 129, Tile(4, 64, 4)),
    (9, 6, 512, Tile(4, 128, 4)),
    (9, 3, 1000, Tile(2, 256, 4)),
    (3, 2, 4099, None),
]
shapes = pytest.mark.parametrize(("num_local", "sampled", "width", "tile"), SHAPES)


if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__)

    def test_a_cpu_without_the_interpreter_is_refused() -> None:
        with pytest.raises(ValueError, match="the tensors are on the cpu, expected a GPU"):
            unit_rows(torch.ones(2, 3))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_rows(num_local: int, sampled: int, seed: int = 0) -> Tensor:
    """Sorted unique; the last row is among them where there is more than one."""
    order = torch.randperm(num_local, generator=torch.Generator().manual_seed(seed))
    rows = order[:sampled]
    if sampled > 1 and not (rows == num_local - 1).any():
        rows[0] = num_local - 1
    return rows.sort().values


def weight_with_a_zero_row(num_local: int, width: int, rows: Tensor) -> Tensor:
    w = numbers(num_local, width, seed=1) * torch.logspace(-2, 2, num_local)[:, None]
    if len(rows) > 1:
        w[rows[1]] = 0
    return w


def unit_and_inverse(w: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, 0)
    return w * inverse, inverse


def assert_no_worse(got: Tensor, plain: Tensor, want: Tensor, tolerance: float, terms: Tensor | float = 0) -> None:
    """Element by element: the kernel's error is at most that of plain PyTorch in the same type plus tolerance * (the
    largest |want| of the row + terms). terms: the magnitude of the terms whose difference `want` is. NaN fails."""
    got, plain, want = got.cpu().double(), plain.cpu().double(), want.cpu().double()
    scale = want.abs().amax(-1, keepdim=True) + terms
    excess = (got - want).abs() - (plain - want).abs() - tolerance * scale
    assert bool((excess <= 0).all()), f"worse than plain PyTorch by up to {float(excess.max()):.3e}"


@on_devices
@shapes
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_unit_rows_are_as_exact_as_pytorch(
    num_local: int, sampled: int, width: int, tile: Tile | None, dtypes: tuple[torch.dtype, ...], device: str
) -> None:
    rows = some_rows(num_local, sampled)
    w = weight_with_a_zero_row(num_local, width, rows)
    for chosen in (rows, None):
        *units, inverse = unit_rows(w.to(device), None if chosen is None else chosen.to(device), dtypes, tile=tile)
        part = w if chosen is None else w[chosen]
        want, want_inverse = unit_and_inverse(part.double())
        plain, plain_inverse = unit_and_inverse(part)
        assert [unit.dtype for unit in units] == list(dtypes)
        for unit, dtype in zip(units, dtypes):
            assert_no_worse(unit, plain.to(dtype), want, 3e-7)
        assert_no_worse(inverse[:, None], plain_inverse, want_inverse, 3e-7)
        zero = (part == 0).all(1)
        assert not inverse.cpu()[zero].any() and not any(unit.cpu()[zero].any() for unit in units)


@on_devices
def test_16_bit_unit_rows_are_rounded_to_nearest_even(device: str) -> None:
    """A row of one large and a few small entries is its own unit row in fp32. Ties round to the even number."""
    w = torch.zeros(3, 8)
    w[0, 0], w[1, 0] = 1.0, -1.0
    w[0, 1:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7 + 2**-20]) * 2**-20
    w[1, 1:4] = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-10 + 2**-20]) * 2**-13
    for dtype in (torch.bfloat16, torch.float16):
        unit, exact, _ = unit_rows(w.to(device), None, (dtype, torch.float32))
        assert torch.equal(unit, exact.to(dtype))


@on_devices
@shapes
def test_one_step_is_as_exact_as_pytorch(
    num_local: int, sampled: int, width: int, tile: Tile | None, device: str
) -> None:
    """Both optimizers with factors per row; rows that are not sampled keep every bit; two calls give equal bits."""
    rows = some_rows(num_local, sampled)
    w = weight_with_a_zero_row(num_local, width, rows)
    grad = numbers(sampled, width, seed=2)
    mean = numbers(num_local, width, seed=3)
    square = mean.square() * 1.5 + 0.1
    ramp = torch.linspace(0.5, 1.0, sampled)[:, None]
    adamw, sgd = AdamWFactors(ramp, ramp**2, 1 - ramp / 9, ramp / 7, ramp * 1e-6), SGDFactors(ramp, 1 - ramp / 9)

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        at, g, m, v = (x.to(dtype) for x in (w[rows], grad, mean[rows], square[rows]))
        g = g * 0.3
        keep1, keep2, shrink, rate, eps = (factor.to(dtype) for factor in adamw)
        m1, v1 = keep1 * m + (1 - 0.9) * g, keep2 * v + (1 - 0.98) * g * g
        out = {"exp_avg": m1, "exp_avg_sq": v1, "adamw": shrink * at - rate * m1 / (v1.sqrt() + eps)}
        shrunk = sgd.shrink.to(dtype) * at
        velocity = sgd.keep.to(dtype) * m + g + 0.01 * shrunk
        return out | {"velocity": velocity, "sgd": shrunk - 0.1 * velocity}

    def kernels(where: Tensor, scale: Any) -> dict[str, Tensor]:
        state = {"adamw": w, "exp_avg": mean, "exp_avg_sq": square, "sgd": w, "velocity": mean}
        state = {name: x.to(device, copy=True) for name, x in state.items()}
        options: dict[str, Any] = {"rows_S": where, "grad_scale": scale, "tile": tile}
        adamw_rows_(
            state["adamw"], state["exp_avg"], state["exp_avg_sq"], grad.to(device),
            AdamWFactors(*(factor.to(device) for factor in adamw)), betas=(0.9, 0.98), **options,
        )  # fmt: skip
        factors = SGDFactors(*(factor.to(device)[:, 0] for factor in sgd))
        sgd_rows_(state["sgd"], state["velocity"], grad.to(device), factors, lr=0.1, weight_decay=0.01, **options)
        return state

    got = kernels(rows.to(device), torch.tensor(0.3, device=device))
    plain, want = formula(torch.float32), formula(torch.float64)
    others = torch.ones(num_local, dtype=torch.bool)
    others[rows] = False
    before = {"adamw": w, "exp_avg": mean, "exp_avg_sq": square, "sgd": w, "velocity": mean}
    terms = grad.abs().amax(1, keepdim=True)
    for name in want:
        assert_no_worse(got[name][rows.to(device)], plain[name], want[name], 1e-6, terms)
        assert torch.equal(got[name].cpu()[others], before[name][others]), (
            f"{name} of a row that was not sampled changed"
        )
    again = kernels(rows.to(device), 0.3)
    assert all(torch.equal(got[name], again[name]) for name in got), "two runs differ"


def recorded(kind: type[RowOptimizer]) -> type[RowOptimizer]:
    """The optimizer with the factors of its last step in `factors`."""

    class Recorded(kind):  # type: ignore[misc, valid-type]
        def _factors(self, *args: Any) -> Any:
            self.factors = super()._factors(*args)
            return self.factors

    return Recorded


def head_of(weight: Tensor) -> Any:
    head = SimpleNamespace(weight=weight, num_local=len(weight), class_start=1000, seed=3, next_row_grad=None)
    head.row_grad = lambda: head.next_row_grad
    return head


@on_devices
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("lazy", ["none", "decay"])
@pytest.mark.parametrize("kind", [RowAdamW, RowSGD])
@pytest.mark.parametrize("width", [24, 129])
def test_five_steps_are_those_of_the_row_optimizers(
    kind: Callable[..., Any], lazy: str, moments: str, width: int, device: str
) -> None:
    """Other rows in every step, then all of them."""
    w = numbers(17, width, seed=0).to(device)
    options = {"lr": 0.02, "weight_decay": 0.1, "moments": moments, "lazy": lazy}
    reference = recorded(kind)(head_of(w.clone()), **options)  # type: ignore[arg-type]
    mine = [state.clone() for state in reference._moments().values()]
    for step in range(5):
        rows = some_rows(17, (6, 9, 4, 6, 17)[step], seed=step).to(device)
        g = numbers(len(rows), width, seed=10 + step).to(device)
        reference.head.next_row_grad = rows, g
        reference.group["lr"] = 0.02 / (step + 1)
        scale = torch.tensor(0.7, device=device)
        reference.step(grad_scale=scale)
        keys = (
            rounding_keys(rows + 1000, reference.state_rows()["updates"][rows], width, seed=3)
            if moments == "bf16"
            else None
        )
        shared: dict[str, Any] = {"rows_S": rows if step < 4 else None, "grad_scale": scale, "keys": keys}
        if kind is RowAdamW:
            adamw_rows_(w, *mine, g, AdamWFactors(*reference.factors), betas=reference.group["betas"], **shared)
        else:
            sgd_rows_(w, *mine, g, SGDFactors(*reference.factors), lr=reference.group["lr"], weight_decay=0.1, **shared)
        torch.testing.assert_close(w, reference.head.weight, rtol=3e-6, atol=3e-6)
        for state, want in zip(mine, reference._moments().values()):
            if moments == "fp32":
                torch.testing.assert_close(state, want, rtol=3e-6, atol=3e-7)
                continue
            # The last bit of an fp32 value rarely decides whether it is rounded up, by one bf16 number.
            torch.testing.assert_close(state, want, rtol=2**-7, atol=1e-9)
            assert int((state != want).sum()) <= 4
            state.copy_(want)  # else the weights would diverge


@on_devices
@pytest.mark.parametrize("start", [0, 1 << 40])
def test_rounding_keys_of_a_kernel_are_those_of_pytorch(start: int, device: str) -> None:
    rows, updates = some_rows(2000, 700, seed=3).to(device), torch.arange(700, dtype=torch.int32, device=device)
    want, got = (rounding_keys(rows, updates, 65, seed=9, class_start=start, fused=fused) for fused in (False, True))
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1]) and len(want[0].unique()) > 690


@on_devices
def test_the_rounding_to_bf16_is_the_row_optimizers_bit_for_bit(device: str) -> None:
    """With betas of 0 and a scale of 1 the fp32 moments are g and g * g, without an addition that could round."""
    rows, width = some_rows(9, 5).to(device), 129
    grad = numbers(5, width, seed=1).to(device) * torch.logspace(-12, 6, width, device=device)
    keys = rounding_keys(rows + 77, torch.arange(5, device=device), width, seed=5)
    bits = rounding_bits(*keys, *(torch.empty(5, width, dtype=torch.int32, device=device) for _ in range(2)))
    halves = bits & 0xFFFF, (bits >> 16) & 0xFFFF
    want = [round_to_bf16(x, half) for x, half in zip((grad.clone(), grad * grad), halves)]
    zeros = [torch.zeros(9, width, dtype=torch.bfloat16, device=device) for _ in range(3)]
    column = torch.ones(5, device=device)
    shared: dict[str, Any] = {"rows_S": rows, "keys": keys}
    w = torch.ones(9, width, device=device)
    adamw_rows_(
        w.clone(), zeros[0], zeros[1], grad, AdamWFactors(0.0, 0.0, 1.0, column, column), betas=(0, 0), **shared
    )
    sgd_rows_(w.clone(), zeros[2], grad, SGDFactors(0.0, 1.0), lr=0.1, weight_decay=0.0, **shared)
    for got, rounded in ((zeros[0], want[0]), (zeros[1], want[1]), (zeros[2], want[0])):
        assert torch.equal(got[rows].view(torch.int16), rounded.view(torch.int16))
    assert not torch.equal(want[0], grad.bfloat16()), "the test would not notice rounding to nearest"


@on_devices
def test_a_broken_row_stays_visible(device: str) -> None:
    """NaN and infinity must not silently turn into a zero row."""
    w = torch.ones(3, 6, device=device)
    w[0, 1], w[1, 2] = torch.nan, torch.inf
    unit, _ = unit_rows(w, None, (torch.bfloat16,))
    assert unit.isnan().any(1).tolist() == [True, True, False]


@on_devices
def test_unit_rows_are_followed_by_zeros_up_to_the_length(device: str) -> None:
    w = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).to(device)
    rows = torch.tensor([1, 3, 8], device=device)
    *padded, inverse = unit_rows(w, rows, (torch.float32, torch.bfloat16), length=16)
    *plain, same = unit_rows(w, rows, (torch.float32, torch.bfloat16))
    assert torch.equal(inverse, same)
    for got, want in zip(padded, plain):
        assert got.shape == (16, 6) and torch.equal(got[:3], want) and not got[3:].any()


@on_devices
def test_no_rows_are_no_work(device: str) -> None:
    w = torch.ones(4, 6, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    unit, inverse = unit_rows(w, none, (torch.float16,))
    assert unit.shape == (0, 6) and inverse.shape == (0,)
    sgd_rows_(w, w.clone(), w[:0], SGDFactors(0.9, 1.0), lr=0.1, weight_decay=0.0, rows_S=none)
    assert torch.equal(w, torch.ones_like(w))


def test_unusable_arguments_are_refused_by_name() -> None:
    w, g, column = torch.ones(4, 6), torch.ones(2, 6), torch.ones(2)
    rows = torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"w has strides \(1, 4\) for shape \[4, 6\], expected it contiguous"):
        unit_rows(torch.ones(6, 4).T)
    with pytest.raises(ValueError, match=r"w is torch\.float64, expected torch\.float32"):
        unit_rows(w.double())
    with pytest.raises(ValueError, match=r"w is \[4, 0\], expected \[rows, width >= 1\]"):
        unit_rows(w[:, :0])
    with pytest.raises(ValueError, match=r"rows is torch\.int32, expected torch\.int64"):
        unit_rows(w, rows.int())
    with pytest.raises(ValueError, match=r"dtypes is \(torch\.float64,\), expected one or two of"):
        unit_rows(w, rows, (torch.float64,))
    with pytest.raises(ValueError, match="length is 1, expected at least 2, the number of rows"):
        unit_rows(w, rows, length=1)
    with pytest.raises(ValueError, match="block of a tile is 48, expected a power of two"):
        Tile(1, 48, 4)

    def sgd(**changes: Any) -> None:
        arguments: dict[str, Any] = {"velocity_LD": w, "grad_SD": g, "factors": SGDFactors(0.9, 1.0), "rows_S": rows}
        sgd_rows_(w.clone(), **(arguments | changes), lr=0.1, weight_decay=0.0)

    with pytest.raises(ValueError, match=r"grad is \[4, 6\], expected \[2, 6\]"):
        sgd(grad_SD=w)
    with pytest.raises(ValueError, match=r"velocity is torch\.float16, expected torch\.float32 or torch\.bfloat16"):
        sgd(velocity_LD=w.half())
    with pytest.raises(ValueError, match="keys is None with bf16 moments"):
        sgd(velocity_LD=w.bfloat16())
    with pytest.raises(ValueError, match=r"grad_scale is \[2\], expected \[1\]"):
        sgd(grad_scale=column)
    with pytest.raises(ValueError, match=r"of the factors \['keep', 'shrink'\] only \['keep'\] are tensors"):
        sgd(factors=SGDFactors(column, 1.0))
    with pytest.raises(ValueError, match=r"keep is \[3\], expected \[2\]"):
        sgd(factors=SGDFactors(torch.ones(3), column))
    with pytest.raises(ValueError, match=r"exp_avg_sq is torch\.bfloat16, expected torch\.float32"):
        adamw_rows_(w, w, w.bfloat16(), w, AdamWFactors(1.0, 1.0, 1.0, column, column), betas=(0.9, 0.98))


@pytest.mark.parametrize("width", [1, 16, 17, 512, 2048, 2049, 4096, 4097, 20000])
def test_a_row_up_to_4096_columns_is_one_block(width: int) -> None:
    tile = tile_of(width)
    assert tile.block >= min(width, 4096)
    assert tile.rows * tile.block <= 16 * 32 * tile.warps, "more than 16 elements per thread do not stay in registers"


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    w, g = torch.ones(64, 96, device="cuda"), torch.ones(2, 96, device="cuda")
    rows, scale = torch.tensor([3, 60], device="cuda"), torch.tensor(0.5, device="cuda")

    def work() -> None:
        _, inverse = unit_rows(w, rows)
        sgd_rows_(w, w.clone(), g, SGDFactors(0.9, 1.0), lr=0.1, weight_decay=0.0, rows_S=rows, grad_scale=scale)
        factors = AdamWFactors(0.9, 0.9, 1.0, torch.ones_like(inverse), torch.ones_like(inverse))
        adamw_rows_(w, w.clone(), w.clone(), g, factors, betas=(0.9, 0.98), rows_S=rows, grad_scale=scale)

    work()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31_are_reached() -> None:
    width, num_local = 512, (1 << 22) + 3
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    w, velocity = (torch.zeros(num_local, width, device="cuda") for _ in range(2))
    rows = torch.tensor([1, num_local - 1], device="cuda")
    w[rows] = numbers(2, width, seed=0).cuda()
    before, grad = w[rows], numbers(2, width, seed=1).cuda()
    unit, _ = unit_rows(w, rows)
    torch.testing.assert_close(unit, unit_and_inverse(before)[0])
    options: dict[str, Any] = {"rows_S": rows}
    sgd_rows_(w, velocity, grad, SGDFactors(0.9, 1.0), lr=0.1, weight_decay=0.0, **options)
    torch.testing.assert_close(w[rows], before - 0.1 * grad)
    torch.testing.assert_close(velocity[rows], grad)
