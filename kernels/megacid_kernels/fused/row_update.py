"""AdamW and SGD steps of sampled rows: decay, moments and write back in one pass.

Legend: L rows in memory, S rows of this step, D width.

`megacid.classifier.row_adamw` and `row_sgd` define the step and the factors of a row; these kernels do the same fp32
arithmetic in the same order. Grid: one program per `tile.rows` of the S rows; every element is read and written once,
nothing is reduced. The kernels are bound by memory: AdamW moves 28 bytes per element (weight and both moments read and
written, gradient read), SGD 20; with bf16 moments 20 and 16.

bf16 moments are rounded stochastically without bias, see `megacid.classifier.row_state`: 32 random bits per element,
murmur3's finaliser (Appleby, public domain) of a key of the row and one of the column; the lower half for the first
moment, the upper for the second. bf16 is handled as int16 patterns, so only these bits decide.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import (
    Tile,
    block_columns,
    check_column,
    check_matrix,
    check_rows,
    launch,
    program_slots,
    tile_of,
)

Factor = float | Tensor  # one for all rows, or one per row: fp32 [S] or [S, 1]
Keys = tuple[Tensor, Tensor]  # int32 [S] (or [S, 1]) and int32 [D] (or [1, D])


class AdamWFactors(NamedTuple):
    """m = keep1 m + (1 - beta1) g,  v = keep2 v + (1 - beta2) g^2,  w = shrink w - rate m / (sqrt(v) + eps).

    With n steps counted, rate = lr sqrt(1 - beta2^n) / (1 - beta1^n) and eps = eps0 sqrt(1 - beta2^n) is AdamW
    (Loshchilov and Hutter, 2019) with both bias corrections moved to the row. `keep1`, `keep2`
    and `shrink` are all floats or all [S].
    """

    keep1: Factor
    keep2: Factor
    shrink: Factor
    rate: Tensor
    eps: Tensor


class SGDFactors(NamedTuple):
    """w = shrink w,  v = keep v + g + weight_decay w,  w = w - lr v. Both are floats, or both [S]."""

    keep: Factor
    shrink: Factor


@triton.jit
def _factor(x, slot, inside, COLUMN: tl.constexpr):
    """x[slot] as [ROWS, 1] if x is a column in memory, else the number x."""
    if COLUMN:
        return tl.load(x + slot, mask=inside, other=0.0)[:, None]
    else:
        return x


@triton.jit
def _scale(x, IN_MEMORY: tl.constexpr):
    if IN_MEMORY:
        return tl.load(x)
    else:
        return x


@triton.jit
def _random_bits(row_key, column_key_ptr, column, D: tl.constexpr):
    """murmur3's finaliser, uint32 [ROWS, BLOCK]. Products wrap on purpose: no overflow check in debug builds."""
    column_key = tl.load(column_key_ptr + column, mask=column < D, other=0)
    bits = (row_key ^ column_key).to(tl.uint32, bitcast=True)
    bits = bits ^ (bits >> 16)
    bits = tl.mul(bits, 0x85EBCA6B, sanitize_overflow=False)
    bits = bits ^ (bits >> 13)
    bits = tl.mul(bits, 0xC2B2AE35, sanitize_overflow=False)
    return bits ^ (bits >> 16)


@triton.jit
def _load_moment(pointer, mask, BF16: tl.constexpr):
    """A moment as fp32; an int16 pattern of bf16 is the upper half of the fp32 pattern."""
    x = tl.load(pointer, mask=mask, other=0)
    if BF16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _to_bf16(x, bits):
    """int16 patterns of bf16; `bits`: uint32 below 2^16. A carry out of the lower half rounds up."""
    pattern = tl.add(x.to(tl.uint32, bitcast=True), bits, sanitize_overflow=False)
    return (pattern >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit(do_not_specialize=["num_rows"])
def adamw_rows_kernel(
    weight_ptr,  # [L, D] fp32, in and out
    mean_ptr,  # [L, D] fp32, or bf16 as int16, in and out
    square_ptr,  # [L, D] same dtype, in and out
    grad_ptr,  # [S, D] fp32
    rows_ptr,  # [S] int64, unused unless HAS_ROWS
    row_key_ptr,  # [S] int32, unused unless BF16
    column_key_ptr,  # [D] int32, unused unless BF16
    keep1,  # [S] fp32 with COLUMNS, else a number
    keep2,  # [S] fp32 with COLUMNS, else a number
    shrink,  # [S] fp32 with COLUMNS, else a number
    rate_ptr,  # [S] fp32
    eps_ptr,  # [S] fp32
    grad_scale,  # [1] fp32 with SCALE_IN_MEMORY, else a number
    num_rows,
    add1,  # 1 - beta1
    add2,  # 1 - beta2
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE_IN_MEMORY: tl.constexpr,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, inside, source = program_slots(rows_ptr, num_rows, HAS_ROWS, ROWS)
    row, grad_row = source[:, None] * D, slot[:, None] * D
    scale = _scale(grad_scale, SCALE_IN_MEMORY)
    kept1 = _factor(keep1, slot, inside, COLUMNS)
    kept2 = _factor(keep2, slot, inside, COLUMNS)
    shrunk = _factor(shrink, slot, inside, COLUMNS)
    rate = _factor(rate_ptr, slot, inside, True)
    eps = tl.load(eps_ptr + slot, mask=inside, other=1.0)[:, None]  # 1: no 0 / 0 beyond the last row
    if BF16:
        row_key = tl.load(row_key_ptr + slot, mask=inside, other=0)[:, None]
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, inside, D, BLOCK)
        w = tl.load(weight_ptr + row + column, mask=mask, other=0.0)
        g = tl.load(grad_ptr + grad_row + column, mask=mask, other=0.0)
        g = g * scale
        mean = kept1 * _load_moment(mean_ptr + row + column, mask, BF16) + add1 * g
        square = kept2 * _load_moment(square_ptr + row + column, mask, BF16) + add2 * g * g
        tl.store(weight_ptr + row + column, shrunk * w - rate * tl.div_rn(mean, tl.sqrt_rn(square) + eps), mask=mask)
        if BF16:
            bits = _random_bits(row_key, column_key_ptr, column, D)
            tl.store(mean_ptr + row + column, _to_bf16(mean, bits & 0xFFFF), mask=mask)
            tl.store(square_ptr + row + column, _to_bf16(square, bits >> 16), mask=mask)
        else:
            tl.store(mean_ptr + row + column, mean, mask=mask)
            tl.store(square_ptr + row + column, square, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def sgd_rows_kernel(
    weight_ptr,  # [L, D] fp32, in and out
    velocity_ptr,  # [L, D] fp32, or bf16 as int16, in and out
    grad_ptr,  # [S, D] fp32
    rows_ptr,  # [S] int64, unused unless HAS_ROWS
    row_key_ptr,  # [S] int32, unused unless BF16
    column_key_ptr,  # [D] int32, unused unless BF16
    keep,  # [S] fp32 with COLUMNS, else a number
    shrink,  # [S] fp32 with COLUMNS, else a number
    grad_scale,  # [1] fp32 with SCALE_IN_MEMORY, else a number
    num_rows,
    lr,
    weight_decay,
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE_IN_MEMORY: tl.constexpr,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, inside, source = program_slots(rows_ptr, num_rows, HAS_ROWS, ROWS)
    row, grad_row = source[:, None] * D, slot[:, None] * D
    scale = _scale(grad_scale, SCALE_IN_MEMORY)
    kept = _factor(keep, slot, inside, COLUMNS)
    shrunk = _factor(shrink, slot, inside, COLUMNS)
    if BF16:
        row_key = tl.load(row_key_ptr + slot, mask=inside, other=0)[:, None]
    for start in range(0, D, BLOCK):
        column, mask = block_columns(start, inside, D, BLOCK)
        w = tl.load(weight_ptr + row + column, mask=mask, other=0.0)
        g = tl.load(grad_ptr + grad_row + column, mask=mask, other=0.0)
        w = w * shrunk
        velocity = kept * _load_moment(velocity_ptr + row + column, mask, BF16) + g * scale + weight_decay * w
        tl.store(weight_ptr + row + column, w - lr * velocity, mask=mask)
        if BF16:
            bits = _random_bits(row_key, column_key_ptr, column, D)
            tl.store(velocity_ptr + row + column, _to_bf16(velocity, bits & 0xFFFF), mask=mask)
        else:
            tl.store(velocity_ptr + row + column, velocity, mask=mask)


def adamw_rows_(
    weight_LD: Tensor,
    exp_avg_LD: Tensor,
    exp_avg_sq_LD: Tensor,
    grad_SD: Tensor,
    factors: AdamWFactors,
    *,
    betas: tuple[float, float],
    rows_S: Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
    keys: Keys | None = None,
    tile: Tile | None = None,
) -> None:
    """One AdamW step of rows `rows_S`, in place. Other rows keep every bit.

    Args:
        weight_LD: fp32, contiguous.
        exp_avg_LD, exp_avg_sq_LD: both fp32, or both bf16, which needs `keys`; contiguous.
        grad_SD: fp32, contiguous, with respect to w[rows_S].
        factors: decay and bias correction per row.
        betas: of AdamW; the factors have their powers.
        rows_S: int64, sorted, unique, in [0, L): of equal rows the programs would race, and a row out of range writes
            elsewhere in memory. None: all rows, S = L.
        grad_scale: multiplies the gradient; one fp32 on the device, or a number.
        keys: `megacid.classifier.row_state.rounding_keys`; unused for fp32 moments.
        tile: None: `tile_of(D)`.
    """
    moments = {"exp_avg": exp_avg_LD, "exp_avg_sq": exp_avg_sq_LD}
    step = _StepArguments(weight_LD, moments, grad_SD, rows_S, grad_scale, keys)
    keep1, keep2, shrink = step.factors({"keep1": factors.keep1, "keep2": factors.keep2, "shrink": factors.shrink})
    rate, eps = (step.column(name, x) for name, x in (("rate", factors.rate), ("eps", factors.eps)))
    launch(
        adamw_rows_kernel, step.num_rows, tile or tile_of(step.width),
        weight_LD, *step.moments, grad_SD, step.rows, *step.keys, keep1, keep2, shrink, rate, eps, step.grad_scale,
        step.num_rows, float(1 - betas[0]), float(1 - betas[1]), COLUMNS=isinstance(keep1, Tensor), **step.constants,
    )  # fmt: skip
    step.count_change()


def sgd_rows_(
    weight_LD: Tensor,
    velocity_LD: Tensor,
    grad_SD: Tensor,
    factors: SGDFactors,
    *,
    lr: float,
    weight_decay: float,
    rows_S: Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
    keys: Keys | None = None,
    tile: Tile | None = None,
) -> None:
    """One SGD step with momentum of rows `rows_S`, in place. See `SGDFactors`; the other arguments are those of
    `adamw_rows_`."""
    step = _StepArguments(weight_LD, {"velocity": velocity_LD}, grad_SD, rows_S, grad_scale, keys)
    keep, shrink = step.factors({"keep": factors.keep, "shrink": factors.shrink})
    launch(
        sgd_rows_kernel, step.num_rows, tile or tile_of(step.width),
        weight_LD, *step.moments, grad_SD, step.rows, *step.keys, keep, shrink, step.grad_scale,
        step.num_rows, float(lr), float(weight_decay), COLUMNS=isinstance(keep, Tensor), **step.constants,
    )  # fmt: skip
    step.count_change()


class _StepArguments:
    """The checked arguments that both optimizers share, as their kernels take them."""

    def __init__(
        self,
        weight_LD: Tensor,
        moments: dict[str, Tensor],
        grad_SD: Tensor,
        rows_S: Tensor | None,
        grad_scale: float | Tensor,
        keys: Keys | None,
    ):
        check_matrix("weight", weight_LD, (torch.float32,))
        self.width, self.like = weight_LD.shape[1], weight_LD
        self.num_rows = check_rows(rows_S, len(weight_LD), weight_LD)
        self.rows = weight_LD if rows_S is None else rows_S
        first = next(iter(moments.values()))
        for name, moment in moments.items():
            dtypes = (torch.float32, torch.bfloat16) if moment is first else (first.dtype,)
            check_matrix(name, moment, dtypes, tuple(weight_LD.shape), weight_LD)
        check_matrix("grad", grad_SD, (torch.float32,), (self.num_rows, self.width), weight_LD)
        bf16 = first.dtype == torch.bfloat16
        self.moments = [moment.view(torch.int16) if bf16 else moment for moment in moments.values()]
        if bf16 and keys is None:
            raise ValueError("keys is None with bf16 moments, expected the int32 rounding keys of the rows and columns")
        self.keys = [weight_LD, weight_LD]
        if bf16 and keys is not None:
            self.keys = [
                check_column("keys[0]", keys[0], self.num_rows, torch.int32, weight_LD),
                check_column("keys[1]", keys[1], self.width, torch.int32, weight_LD),
            ]
        self.grad_scale = grad_scale if isinstance(grad_scale, Tensor) else float(grad_scale)
        if isinstance(grad_scale, Tensor):
            self.grad_scale = check_column("grad_scale", grad_scale.reshape(-1), 1, torch.float32, weight_LD)
        self.constants = {
            "D": self.width,
            "HAS_ROWS": rows_S is not None,
            "SCALE_IN_MEMORY": isinstance(grad_scale, Tensor),
            "BF16": bf16,
        }

    def count_change(self) -> None:
        """Tell autograd of the change in place, which it does not see: a backward that saved the rows then fails."""
        for changed in (self.like, *self.moments):
            torch.autograd.graph.increment_version(changed)

    def column(self, name: str, x: Tensor) -> Tensor:
        return check_column(name, x, self.num_rows, torch.float32, self.like)

    def factors(self, named: dict[str, Factor]) -> list[Factor]:
        """All floats, or all fp32 [S]."""
        tensors = [name for name, x in named.items() if isinstance(x, Tensor)]
        if 0 < len(tensors) < len(named):
            raise ValueError(f"of the factors {list(named)} only {tensors} are tensors, expected all of them or none")
        return [self.column(name, x) if isinstance(x, Tensor) else float(x) for name, x in named.items()]
