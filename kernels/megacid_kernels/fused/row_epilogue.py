"""From the all-reduced row statistics to losses and gradient coefficients, in one launch.

Legend: b samples. This is the case of one label per sample; `megacid_kernels.epilogue` has the formulas of the general
one, and of the KL divergence.

    loss = softplus(d),  1 - P_y = sigmoid(d),  d = ln n + shift - z_y,  n = sum over the negatives of exp(z - shift)

Grid: one program per 256 samples; each sample reads up to thirteen numbers and writes up to nine. Nothing is reduced.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacid_kernels.fused.launch import Tile, check_column, launch

TILE = Tile(rows=256, block=1, warps=4)


class SoftmaxRows(NamedTuple):
    """One softmax over the classes, of the student or of the teacher."""

    sums: Tensor  # [b] fp32, sum over the negatives of all ranks of exp(z - shift)
    target: Tensor  # [b] fp32, the label's logit / scale: psi of the student, the cosine of the teacher
    scale: float  # of the logits z
    shift: float


class RowLosses(NamedTuple):
    """Result of `row_epilogue`. A coefficient is the gradient with respect to the cosine of a negative, divided by the
    negative's exp(z - shift)."""

    raw: Tensor  # [3, b] fp32: cross entropies of student and teacher, KL; 0 if not computed or without a label
    coefficients: Tensor  # [4, b] fp32: student, teacher, and in the KL student, teacher; unset without the term. Where
    # both terms of the student read the same sums, the KL's is the sum of both
    student: Tensor  # [b] fp32, d loss / d target cosine of the student; 0 where another rank owns the class
    teacher: Tensor  # [b] fp32, the same of the teacher; unset without its cross entropy


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


@triton.jit
def _log(x):
    """ln 0 is written out (a sample without negatives or without a label): the interpreter warns of log(0)."""
    return tl.where(x == 0.0, float("-inf"), tl.log(tl.where(x == 0.0, 1.0, x)))


@triton.jit
def _softmax(sums_ptr, target_ptr, row, inside, scale, shift):
    """(loss, 1 - P_y, ln Z - shift)"""
    log_n = _log(tl.load(sums_ptr + row, mask=inside, other=1.0))
    target = scale * tl.load(target_ptr + row, mask=inside, other=0.0) - shift
    d = log_n - target
    small = tl.exp(-tl.abs(d))
    tail = log1p_of_unit(small)
    # d < 0 is false for NaN, and d + tail keeps it.
    loss = tl.where(d < 0.0, tail, d + tail)
    return loss, tl.where(d < 0.0, small, 1.0) / (1.0 + small), tl.where(d < 0.0, target, log_n) + tail


@triton.jit
def _divided_by_z(factor, log_z):
    """By logarithms: Z may overflow fp32. The bound acts where every exponential underflowed to 0."""
    bounded = _log(factor) - log_z
    return tl.exp(tl.where(bounded > 88.0, 88.0, bounded))


@triton.jit(do_not_specialize=["num_rows"])
def row_epilogue_kernel(
    student_sums_ptr,  # [b] fp32, unused unless ALPHA
    teacher_sums_ptr,  # [b] fp32, unused unless BETA
    soft_student_sums_ptr,  # [b] fp32, unused unless GAMMA, as the next two
    soft_teacher_sums_ptr,  # [b] fp32
    gap_ptr,  # [b] fp32
    psi_ptr,  # [b] fp32, unused unless ALPHA or GAMMA
    teacher_cos_ptr,  # [b] fp32, unused unless BETA or GAMMA
    dpsi_ptr,  # [b] fp32, of this rank; unused unless ALPHA or GAMMA
    own_ptr,  # [b] uint8
    share_ptr,  # [b] fp32
    num_labels_ptr,  # [b] fp32
    owned_ptr,  # [b] fp32
    raw_ptr,  # [3, b] fp32 out
    coefficients_ptr,  # [4, b] fp32 out
    student_ptr,  # [b] fp32 out, unused unless ALPHA or GAMMA
    teacher_ptr,  # [b] fp32 out, unused unless BETA
    num_rows,
    alpha,
    beta,
    gamma,
    scale,
    shift,
    soft_scale,
    soft_shift,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GAMMA: tl.constexpr,
    MERGED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    share = tl.load(share_ptr + row, mask=inside, other=0.0)
    count = tl.load(num_labels_ptr + row, mask=inside, other=0.0)
    # A label whose class no rank holds makes the loss NaN instead of silently wrong.
    lost = tl.load(owned_ptr + row, mask=inside, other=0.0) < count - 0.5
    nothing = tl.where(lost, float("nan"), tl.zeros((ROWS,), tl.float32))
    student = tl.zeros((ROWS,), tl.float32)
    raw = nothing
    if ALPHA:
        loss, residual, log_z = _softmax(student_sums_ptr, psi_ptr, row, inside, scale, shift)
        factor = share * (alpha * scale)
        raw = tl.where(count > 0.0, loss + nothing, 0.0)
        student -= factor * residual
        coefficient = _divided_by_z(factor, log_z)
        tl.store(coefficients_ptr + row, coefficient, mask=inside)
    tl.store(raw_ptr + row, raw, mask=inside)
    raw = nothing
    if BETA:
        loss, residual, log_z = _softmax(teacher_sums_ptr, teacher_cos_ptr, row, inside, scale, shift)
        factor = share * (beta * scale)
        raw = tl.where(count > 0.0, loss + nothing, 0.0)
        own = tl.load(own_ptr + row, mask=inside, other=0).to(tl.float32)
        tl.store(teacher_ptr + row, -factor * residual * own, mask=inside)
        tl.store(coefficients_ptr + num_rows + row, _divided_by_z(factor, log_z), mask=inside)
    tl.store(raw_ptr + num_rows + row, raw, mask=inside)
    raw = nothing
    if GAMMA:
        _, of_student, log_zs = _softmax(soft_student_sums_ptr, psi_ptr, row, inside, soft_scale, soft_shift)
        _, of_teacher, log_zt = _softmax(soft_teacher_sums_ptr, teacher_cos_ptr, row, inside, soft_scale, soft_shift)
        factor = share * (gamma * soft_scale)
        psi = tl.load(psi_ptr + row, mask=inside, other=0.0)
        teacher_cos = tl.load(teacher_cos_ptr + row, mask=inside, other=0.0)
        gap = tl.load(gap_ptr + row, mask=inside, other=0.0) * _divided_by_z(tl.full((ROWS,), 1.0, tl.float32), log_zt)
        gap += (1.0 - of_teacher) * (teacher_cos - psi)
        raw = tl.where(count > 0.0, soft_scale * gap + log_zs - log_zt + nothing, 0.0)
        student += factor * (of_teacher - of_student)
        soft_coefficient = _divided_by_z(factor, log_zs)
        if MERGED:
            soft_coefficient += coefficient
        tl.store(coefficients_ptr + 2 * num_rows + row, soft_coefficient, mask=inside)
        tl.store(coefficients_ptr + 3 * num_rows + row, -_divided_by_z(factor, log_zt), mask=inside)
    tl.store(raw_ptr + 2 * num_rows + row, raw, mask=inside)
    if ALPHA or GAMMA:
        tl.store(student_ptr + row, student * tl.load(dpsi_ptr + row, mask=inside, other=0.0), mask=inside)


def _check_equal(
    student: SoftmaxRows | None, teacher: SoftmaxRows | None, kl: tuple[SoftmaxRows, SoftmaxRows] | None
) -> None:
    """Raise ValueError where terms differ in what the kernel reads once for both."""
    soft_student, soft_teacher = kl or (None, None)
    merged = soft_student if student and soft_student and student.sums is soft_student.sums else None
    for names, a, b in (
        ("student and teacher", student, teacher),
        ("kl[0] and kl[1]", soft_student, soft_teacher),
        ("student and kl[0], which have the same sums,", student, merged),
    ):
        if a and b and a[2:] != b[2:]:
            raise ValueError(f"{names} have (scale, shift) {a[2:]} and {b[2:]}, expected the same: they are read once")
    for names, a, b in (("student and kl[0]", student, soft_student), ("teacher and kl[1]", teacher, soft_teacher)):
        if a and b and a.target.data_ptr() != b.target.data_ptr():
            raise ValueError(f"{names} have two targets, expected one tensor for both: it is read once")


def row_epilogue(
    share_b: Tensor,
    num_labels_b: Tensor,
    owned_b: Tensor,
    *,
    student: SoftmaxRows | None = None,
    teacher: SoftmaxRows | None = None,
    kl: tuple[SoftmaxRows, SoftmaxRows] | None = None,
    gap_b: Tensor | None = None,
    dpsi_b: Tensor | None = None,
    own_b: Tensor | None = None,
    weights: tuple[float, float, float] = (1.0, 0.0, 0.0),
    tile: Tile | None = None,
) -> RowLosses:
    """Losses and gradient coefficients with one label per sample. Losses of 1e-26 keep their digits.

    Args:
        share_b: fp32 >= 0, weight of the sample in the loss; 0 for a sample without a label.
        num_labels_b: fp32, 1 for a sample with a label, else 0.
        owned_b: fp32, 1 where some rank holds the label's class; where none does, the losses become NaN.
        student, teacher: of the cross entropies, with one scale and shift; None: no such term.
        kl: student and teacher of the KL divergence, with one scale and shift, and with the targets of `student` and
            `teacher` where those are given; None: no such term.
        gap_b: fp32, sum_j E_j (cosT_j - cosS_j) over the negatives of all ranks, E of the KL's teacher.
        dpsi_b: fp32, d psi / d cos of the student's label, 0 where another rank owns the class.
        own_b: bool, whether this rank owns the label's class; for the teacher's term.
        weights: of the three terms.
    """
    share = check_column("share", share_b, share_b.numel(), torch.float32, share_b)
    samples = len(share)

    def column(name: str, value: Tensor | None, needed: object, dtype: torch.dtype = torch.float32) -> Tensor:
        """The checked column, or any tensor if the kernel does not read it."""
        if not needed:
            return share
        if value is None:
            raise ValueError(f"{name} is None, expected [{samples}] for the terms that are given")
        return check_column(name, value, samples, dtype, share)

    soft_student, soft_teacher = kl or (None, None)
    of_student, of_teacher = student or soft_student, teacher or soft_teacher
    plain, soft = student or teacher or soft_student, soft_student or student or teacher
    if plain is None or soft is None:
        raise ValueError("student, teacher and kl are None, expected at least one term")
    _check_equal(student, teacher, kl)
    sums = [
        column(name, each and each.sums, each)
        for name, each in (
            ("student.sums", student), ("teacher.sums", teacher), ("kl[0].sums", soft_student),
            ("kl[1].sums", soft_teacher),
        )
    ]  # fmt: skip
    empty = [torch.empty(shape, device=share.device) for shape in ((3, samples), (4, samples), samples, samples)]
    own = column("own", own_b, teacher, torch.bool)
    launch(
        row_epilogue_kernel, samples, tile or TILE,
        *sums, column("gap", gap_b, kl), column("psi", of_student and of_student.target, of_student),
        column("teacher cosine", of_teacher and of_teacher.target, of_teacher), column("dpsi", dpsi_b, of_student),
        own.view(torch.uint8) if teacher else own, share, column("num_labels", num_labels_b, True),
        column("owned", owned_b, True), *empty, samples, *map(float, weights), float(plain.scale), float(plain.shift),
        float(soft.scale), float(soft.shift),
        ALPHA=student is not None, BETA=teacher is not None, GAMMA=kl is not None,
        MERGED=kl is not None and student is not None and kl[0].sums is student.sums,
    )  # fmt: skip
    return RowLosses(*empty)
