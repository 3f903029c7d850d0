"""From the all-reduced sum over a sample's negatives to its loss and gradient coefficients, in one launch.

Legend: b samples. This is the cross entropy with one label per sample; `megacid_kernels.epilogue` has the general case.

    loss = softplus(d),  1 - P_y = sigmoid(d),  d = ln n + shift - z_y,  n = sum over the negatives of exp(z - shift)

Grid: one program per 256 samples; each sample reads three fp32 numbers and writes three. Nothing is reduced.
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
    """ln(1 + x) for x in [0, 1] within two ulp: the series of 2 artanh(s), s = x / (2 + x) <= 1 / 3, whose eight terms
    leave 3e-9. log(1 + x) would lose the digits of a small x, and with them those of a small loss."""
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
    sums_ptr,  # [b] fp32
    psi_ptr,  # [b] fp32
    share_ptr,  # [b] fp32
    loss_ptr,  # [b] fp32 out
    coefficient_ptr,  # [b] fp32 out
    grad_psi_ptr,  # [b] fp32 out
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
    weight = scale * tl.load(share_ptr + row, mask=inside, other=0.0)
    # ln 0 is written out (a sample without negatives or without a label): the interpreter warns of log(0).
    log_n = tl.where(sums == 0.0, float("-inf"), tl.log(tl.where(sums == 0.0, 1.0, sums)))
    log_weight = tl.where(weight == 0.0, float("-inf"), tl.log(tl.where(weight == 0.0, 1.0, weight)))
    d = log_n - target
    small = tl.exp(-tl.abs(d))
    tail = log1p_of_unit(small)
    # d < 0 is false for NaN, and d + tail keeps it.
    tl.store(loss_ptr + row, tl.where(d < 0.0, tail, d + tail), mask=inside)
    tl.store(grad_psi_ptr + row, -weight * (tl.where(d < 0.0, small, 1.0) / (1.0 + small)), mask=inside)
    # share * scale / Z by logarithms: Z may overflow fp32. The bound acts where every exponential underflowed to 0.
    log_z = tl.where(d < 0.0, target, log_n) + tail
    bounded = log_weight - log_z
    bounded = tl.where(bounded > 88.0, 88.0, bounded)
    tl.store(coefficient_ptr + row, tl.exp(bounded), mask=inside)


def row_epilogue(
    sums_b: Tensor, psi_b: Tensor, share_b: Tensor, *, scale: float, shift: float, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient coefficients of the cross entropy with one label per sample. Losses of 1e-26 keep their digits.

    Args:
        sums_b: fp32, sum over the negatives of all ranks of exp(z - shift).
        psi_b: fp32, psi of the target cosine: the label's logit / scale.
        share_b: fp32 >= 0, weight of the sample in the loss; 0 for a sample without a label.
        scale, shift: of the logits z.

    Returns:
        loss: fp32 [b], -ln P_y, not multiplied by the share.
        coefficient: fp32 [b], share * scale / Z, Z = sum over all classes of exp(z - shift). The gradient with respect
            to the cosine of a negative is coefficient * exp(z - shift).
        grad_psi: fp32 [b], d (share * loss) / d psi = -share * scale * (1 - P_y).
    """
    sums = check_column("sums", sums_b, sums_b.numel(), torch.float32, sums_b)
    psi = check_column("psi", psi_b, len(sums), torch.float32, sums)
    share = check_column("share", share_b, len(sums), torch.float32, sums)
    loss, coefficient, grad_psi = (torch.empty_like(sums) for _ in range(3))
    launch(
        row_epilogue_kernel, len(sums), tile or TILE,
        sums, psi, share, loss, coefficient, grad_psi, len(sums), float(scale), float(shift),
    )  # fmt: skip
    return loss, coefficient, grad_psi
