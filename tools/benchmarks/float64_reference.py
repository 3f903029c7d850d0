"""Loss and gradients in float64 on a sample of samples and classes, for shapes whose full matrix fits in no memory.

Legend: B samples, C classes, D width, n classes of a block, i sampled samples, k sampled classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 30


class Exact(NamedTuple):
    loss: Tensor  # 0-d, over all samples and classes
    grad_x: Tensor  # [i, D] of samples `rows`
    grad_w: Tensor  # [k, D] of classes `classes`
    rows: Tensor  # [i] int64
    classes: Tensor  # [k] int64


def sample_of(target_B: Tensor, classes: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(samples, classes) to check, at most `count` of each. Half of the classes are labels of the batch if there are
    enough: their gradient has another term."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(target_B), generator=generator)[:count].to(target_B.device)
    labels = target_B[rows].unique()[: max(1, count // 2)]
    others = torch.randint(classes, (count - len(labels),), generator=generator).to(target_B.device)
    return rows.sort().values, torch.cat([labels, others]).unique()


@torch.no_grad()
def exact_on_sample(
    x_BD: Tensor,
    w_CD: Tensor,
    target_B: Tensor,
    rows: Tensor,
    classes: Tensor,
    *,
    scale: float,
    margin: float,
    normalise: bool,
) -> Exact:
    """Mean cross entropy of z = scale (x . w - margin at the label), and its gradients at the sampled rows.

    normalise: divide x and w by their norms first; gradients are with respect to the undivided rows. All arithmetic is
    float64, in blocks of classes. |scale x . w| must be below 700: no maximum is subtracted.
    """
    x = x_BD.double()
    inverse_x = 1 / x.norm(dim=1, keepdim=True) if normalise else torch.ones_like(x[:, :1])
    x = x * inverse_x
    batch, each = len(x), scale / len(x)

    def rows_of_w(at: slice | Tensor) -> tuple[Tensor, Tensor]:
        w = w_CD[at].double()
        inverse = 1 / w.norm(dim=1, keepdim=True) if normalise else torch.ones_like(w[:, :1])
        return w * inverse, inverse

    negatives = x.new_zeros(batch)
    negative_grad_iD = x.new_zeros(len(rows), x.shape[1])
    step = max(1, _BLOCK_BYTES // (8 * max(batch, x.shape[1])))
    for start in range(0, len(w_CD), step):
        w_nD, _ = rows_of_w(slice(start, start + step))
        weight_Bn = (x @ w_nD.T).mul_(scale).exp_()
        own = (target_B >= start) & (target_B < start + len(w_nD))
        weight_Bn[own, target_B[own] - start] = 0.0
        negatives += weight_Bn.sum(1)
        negative_grad_iD += weight_Bn[rows] @ w_nD
    w_BD, _ = rows_of_w(target_B)
    logit = scale * ((x * w_BD).sum(1) - margin)
    total = negatives + logit.exp()
    miss = negatives / total  # 1 - P(label)

    grad_x = each * (negative_grad_iD / total[rows, None] - miss[rows, None] * w_BD[rows])
    w_kD, inverse_k = rows_of_w(classes)
    share_Bk = (x @ w_kD.T).mul_(scale).exp_() / total[:, None]
    is_label = target_B[:, None] == classes[None, :]
    grad_w = each * (torch.where(is_label, -miss[:, None], share_Bk).T @ x)
    if normalise:
        unit = x[rows]
        grad_x = (grad_x - unit * (unit * grad_x).sum(1, keepdim=True)) * inverse_x[rows]
        grad_w = (grad_w - w_kD * (w_kD * grad_w).sum(1, keepdim=True)) * inverse_k
    return Exact((total.log() - logit).mean(), grad_x, grad_w, rows, classes)
