"""From the reduced sum of a sample's negatives to its loss and gradient coefficients, in one launch.

Legend: b samples. The cross entropy with one label of `megacid_kernels.epilogue`, which has the other terms as well.

    loss = softplus(d),  1 - P_y = sigmoid(d),  d = ln n + shift - z_y        n: sum over the negatives of exp(z - shift)
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import Tile, check_column, launch

TILE = Tile(rows=256, block=1, warps=4)


@triton.jit
def log1p_of_unit(x):
    """ln(1 + x) for x in [0, 1], correctly rounded but for an ulp or two: 2 artanh(s), s = x / (2 + x) <= 1 / 3. log(1 + x)
    would lose the digits of a small x, and with them those of a small loss. Eight terms leave 3e-9."""
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 15
    series = series * q + 1.0 / 13
    series = series * q + 1.0 / 11
    series = series * q + 1.0 / 9
    series = series * q + 1.0 / 7
    series = series * q + 1.0 / 5
    series = series * q + 1.0 / 3
    return 2.0 * (s + s * q * series)


@triton.jit(do_not_specialize=["num_rows"])
def row_epilogue_kernel(
    sums_ptr,  # [b] fp32, and so all
    psi_ptr,
    share_ptr,
    loss_ptr,  # out
    coefficient_ptr,  # out
    pull_ptr,  # out
    num_rows,
    scale,
    shift,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    sums = tl.load(sums_ptr + row, mask=inside, other=1.0)
    target = scale * tl.load(psi_ptr + row, mask=inside, other=0.0) - shift
    each = scale * tl.load(share_ptr + row, mask=inside, other=0.0)
    # No negative at all, an unlabelled sample: ln 0. Said by hand, for interpreters warn of it.
    log_n = tl.where(sums == 0.0, float("-inf"), tl.log(tl.where(sums == 0.0, 1.0, sums)))
    log_each = tl.where(each == 0.0, float("-inf"), tl.log(tl.where(each == 0.0, 1.0, each)))
    d = log_n - target
    small = tl.exp(-tl.abs(d))
    tail = log1p_of_unit(small)
    # Comparisons with the NaN on the far side: a lost sample stays one.
    tl.store(loss_ptr + row, tl.where(d < 0.0, tail, d + tail), mask=inside)
    tl.store(pull_ptr + row, -each * (tl.where(d < 0.0, small, 1.0) / (1.0 + small)), mask=inside)
    # share * scale / Z through logarithms: Z itself may be too large for fp32. The bound acts where all underflowed to 0.
    log_z = tl.where(d < 0.0, target, log_n) + tail
    bounded = log_each - log_z
    bounded = tl.where(bounded > 88.0, 88.0, bounded)
    tl.store(coefficient_ptr + row, tl.exp(bounded), mask=inside)


def row_epilogue(
    sums_b: Tensor, psi_b: Tensor, share_b: Tensor, *, scale: float, shift: float, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, coefficient, pull) of the cross entropy with one label per sample, fp32 [b] each.

    sums_b       sum over all ranks' negatives of exp(z - shift), fp32
    psi_b        psi of the target cosine, the label's logit / scale, fp32
    share_b      weight of the sample in the loss, >= 0, fp32; 0 for one without label
    loss         -ln P_y, without the share
    coefficient  share * scale / Z with Z = sum over all classes of exp(z - shift): d loss / d cosine of a negative is
                 coefficient * E
    pull         d (share * loss) / d psi = -share * scale * (1 - P_y)

    12 bytes are read and 12 written per sample. Losses of 1e-26 keep their digits. ValueError for what cannot be used.
    """
    sums = check_column("sums", sums_b, sums_b.numel(), torch.float32, sums_b)
    psi = check_column("psi", psi_b, len(sums), torch.float32, sums)
    share = check_column("share", share_b, len(sums), torch.float32, sums)
    loss, coefficient, pull = (torch.empty_like(sums) for _ in range(3))
    launch(
        row_epilogue_kernel, len(sums), tile or TILE,
        sums, psi, share, loss, coefficient, pull, len(sums), float(scale), float(shift),
    )  # fmt: skip
    return loss, coefficient, pull
