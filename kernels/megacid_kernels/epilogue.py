"""From reduced row statistics to losses and gradient coefficients: all there is between the all-reduce and the gradient
products, on [b] and [b, l] tensors only.

Legend: b samples of one chunk, l labels per sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megacid_kernels.loss_spec import LossSpec


class Coefficients(NamedTuple):
    """What the reduced statistics of a chunk give."""

    raw: Tensor  # [3, b] the terms without weights
    target_x: Tensor  # [b, l] d loss / d psi of the student's labels
    target_t: Tensor | None  # [b, l] d loss / d target cosine of the teacher
    with_x: dict[str, Tensor]  # [b] coefficient of a matrix in d loss / d student cosine
    with_t: dict[str, Tensor]  # [b] the same for the teacher's cosines


class Softmax(NamedTuple):
    """Row quantities of one distribution."""

    loss: Tensor  # [b]
    pull: Tensor  # [b, l] -d loss / d logit of each label
    log_z: Tensor  # [b] -ln(d loss / d logit of a negative, divided by its exponential); for one label ln Z - kappa


def over_z(factor: Tensor, log_z: Tensor) -> Tensor:
    """factor / Z for factor >= 0, finite: the bound only acts where every exponential underflowed to 0, and 0 * finite
    is 0 where 0 * inf would be NaN."""
    return torch.exp((factor.log() - log_z).clamp_max(88.0 if log_z.dtype == torch.float32 else 700.0))


def one_label(negatives: Tensor, logit: Tensor, shift: float | Tensor) -> Softmax:
    """Cross entropy. negatives [b]: sum of exp(z - shift); logit [b, 1]: the label's; shift: a tensor is [b] or 0-d."""
    target, log_n = logit[:, 0] - shift, negatives.log()
    d = log_n - target
    loss = torch.logaddexp(d, torch.zeros_like(d))
    log_z = torch.logaddexp(log_n, target)  # not target + loss: the two may cancel
    return Softmax(loss, torch.sigmoid(d)[:, None], log_z)


def _several_labels(negatives: Tensor, logit: Tensor, present: Tensor, shift: float) -> Softmax:
    """MLCD: ln(1 + sum_i exp(-z_i)) + ln(1 + sum_j exp(z_j)); present [b, l]: which labels there are."""
    pull = torch.where(present, -logit, -torch.inf)
    zero = torch.zeros_like(negatives)
    positive = torch.logaddexp(torch.logsumexp(pull, 1), zero)
    log_z = torch.logaddexp(negatives.log(), zero - shift)  # ln(1 + sum_j exp(z_j)) - shift
    loss = positive + log_z + shift
    return Softmax(loss, torch.exp(pull - positive[:, None]), log_z)


def epilogue(spec: LossSpec, stats: dict[str, Tensor], present: Tensor, share: Tensor) -> Coefficients:
    """stats: the sums over ranks, [b] each: "own", row sums of the matrices by name, "psi0".. and "cos_t0".. by label,
    "gap" for the KL. present [b, l] bool; share [b]: the sample's weight in the loss, 0 for unlabelled samples."""
    w, s, labels = spec.weights, spec.scale, present.shape[1]
    raw, target_t = [torch.zeros_like(share) for _ in range(3)], None
    target_x = torch.zeros_like(present, dtype=share.dtype)
    with_x: dict[str, Tensor] = {}
    with_t: dict[str, Tensor] = {}

    def softmax(name: str, cosine: str, temperature: float) -> Softmax:
        logit = torch.stack([stats[f"{cosine}{i}"] for i in range(labels)], 1) * (s / temperature)
        shift = spec.shift(temperature)
        if labels == 1:
            return one_label(stats[name], logit, shift)
        return _several_labels(stats[name], logit, present, shift)

    if w.alpha > 0:
        student, each = softmax("S", "psi", 1.0), share * (w.alpha * s)
        raw[0], with_x["S"] = student.loss, over_z(each, student.log_z)
        target_x = target_x - each[:, None] * student.pull
    if w.beta > 0:
        teacher, each = softmax("T", "cos_t", 1.0), share * (w.beta * s)
        raw[1], with_t["T"] = teacher.loss, over_z(each, teacher.log_z)
        target_t = -each[:, None] * teacher.pull
    if w.gamma > 0:
        soft = s / w.temperature
        each, name_S, name_T = share * (w.gamma * soft), spec.softened("S"), spec.softened("T")
        student = softmax(name_S, "psi", w.temperature)
        teacher = softmax(name_T, "cos_t", w.temperature)
        target_gap = (1 - teacher.pull[:, 0]) * (stats["cos_t0"] - stats["psi0"])
        raw[2] = (
            soft * (stats["gap"] * over_z(torch.ones_like(each), teacher.log_z) + target_gap)
            + student.log_z
            - teacher.log_z
        )
        # With temperature 1 a matrix serves two terms: their coefficients are added, not their products.
        with_x[name_S] = with_x.get(name_S, 0) + over_z(each, student.log_z)
        with_x[name_T] = -over_z(each, teacher.log_z)
        target_x = target_x + each[:, None] * (teacher.pull - student.pull)
    return Coefficients(torch.stack(raw), target_x, target_t, with_x, with_t)
