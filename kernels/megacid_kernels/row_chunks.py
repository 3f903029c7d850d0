"""Row mode in plain PyTorch: loss and closed-form gradients in one pass over chunks of samples.

Legend: G gathered batch, b samples of one chunk, D width, S rows of w on this rank.

Per chunk: cosines, exponentials -> ONE sum all-reduce of [k, b] row statistics, hidden under the dX product -> dX, dW.
The exponentials are stored un-normalised: 1 / Z scales rows, so it commutes with both gradient products and no second
pass over [b, S] is needed. With E_j = exp(z_j - kappa) for the negatives (E_y := 0), n = sum_j E_j, Z = n + E_y:

    CE   = softplus(d), 1 - P_y = sigmoid(d), d = ln n + kappa - z_y      (no cancellation as P_y -> 1)
    dCE/dz_j = E_j / Z      dCE/dz_y = -(1 - P_y)
    KL   = sum_j pT_j (zT_j - zS_j) + ln ZS - ln ZT      dKL/dzS_j = pS_j - pT_j
The target class is never inside E: its cosine comes from full-precision rows and its gradient is a sparse extra term.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacid_kernels.problem import Problem


class Outcome(NamedTuple):
    terms: Tensor  # [3] weighted and reduced: alpha * CE(student), beta * CE(teacher), gamma * KL
    raw: Tensor  # [3] the same without their weights
    target_cosine: Tensor  # [G] student's cosine to its class, 0 for unlabelled samples or without a student term
    hit: Tensor  # [G] bool: without the margin the target outweighs all negatives together
    grad_x: Tensor | None  # [G, D] this shard's partial sum
    grad_w: Tensor | None  # [S, D]


class _Target(NamedTuple):
    """The target class of every sample, zeros where another rank owns it."""

    cos: Tensor  # [G]
    psi: Tensor  # [G]
    dpsi: Tensor  # [G]


class _Softmax(NamedTuple):
    """Row quantities of one distribution, all [b]."""

    loss: Tensor  # cross entropy of the target
    miss: Tensor  # 1 - P_target
    log_z: Tensor  # ln Z - kappa
    inv_z: Tensor  # exp(-log_z)


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / |x|, 1 / |x|); a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    inverse = torch.where(norm > torch.finfo(x.dtype).tiny, 1 / norm, torch.zeros_like(norm))
    return x * inverse, inverse


def _through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x from the gradient of x / |x|. Linear: may run on partial sums."""
    return (grad - unit * (unit * grad).sum(1, keepdim=True)) * inverse


def locate(target_G: Tensor, rows_S: Tensor | None, class_start: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """(own [G] bool, slot [G]: the row of w that holds the class, 0-clamped where not owned). No host sync."""
    local = target_G - class_start
    if rows_S is None:
        slot = local.clamp(0, num_rows - 1)
        own = slot == local
    else:
        slot = torch.searchsorted(rows_S, local).clamp(max=num_rows - 1)
        own = rows_S[slot] == local
    return own & (target_G >= 0), slot


def _target(unit_GD: Tensor, w_GD: Tensor, own: Tensor, problem: Problem, with_margin: bool) -> _Target:
    """Target cosine and margin from full-precision rows. sin = |x - w| |x + w| / 2 keeps its digits at cos -> +-1."""
    cos = (unit_GD * w_GD).sum(1)
    psi, dpsi = cos, torch.ones_like(cos)
    if with_margin and problem.margin is not None:
        sin = torch.linalg.vector_norm(unit_GD - w_GD, dim=1) * torch.linalg.vector_norm(unit_GD + w_GD, dim=1) / 2
        psi, exact = problem.margin.target(cos, sin)
        dpsi = exact if problem.margin_grad == "exact" else dpsi
    zero = torch.zeros_like(cos)
    return _Target(*(torch.where(own, value, zero) for value in (cos, psi, dpsi)))


def _softmax(negatives: Tensor, target_logit: Tensor) -> _Softmax:
    d = negatives.log() - target_logit
    loss = torch.logaddexp(d, torch.zeros_like(d))
    log_z = target_logit + loss
    # The floor only acts where every exponential underflowed to 0: 0 * finite is 0, 0 * inf would be NaN.
    floor = -87.0 if log_z.dtype == torch.float32 else -700.0
    return _Softmax(loss, torch.sigmoid(d), log_z, torch.exp(-log_z.clamp_min(floor)))


class _Chunk:
    """The [b, S] work of one chunk: exponentials and row statistics.

    Matrices "S" (student) and "T" (teacher) hold the logits' exponentials, "S/" and "T/" those of logits / temperature;
    with temperature 1 the first two serve for both. A statistic named like a matrix is its row sum.
    """

    def __init__(self, problem: Problem, slot: Tensor, own: Tensor):
        self.problem, self.slot, self.own = problem, slot[:, None], own[:, None]
        self.stats: dict[str, Tensor] = {}
        self.matrices: dict[str, Tensor] = {}
        self.removed: Tensor | None = None

    def add_exp(self, name: str, cos_bS: Tensor, temperature: float, keep_cos: bool) -> None:
        scale, shift = self.problem.scale / temperature, self.problem.shift(temperature)
        exp = cos_bS * scale if keep_cos else cos_bS.mul_(scale)
        exp = exp.sub_(shift).exp_() if shift else exp.exp_()
        exp.scatter_(1, self.slot, exp.gather(1, self.slot).masked_fill_(self.own, 0.0))
        if self.removed is not None:
            exp.masked_fill_(self.removed, 0.0)
        self.matrices[name], self.stats[name] = exp, exp.sum(1)

    def build(self, x_bD: Tensor | None, teacher_bD: Tensor | None, w_SD: Tensor) -> None:
        """Fill the needed matrices, and the KL's statistic "gap" = sum_j exp(zT_j / temperature) (cosT_j - cosS_j)."""
        w, threshold = self.problem.weights, self.problem.filter_threshold
        kl = w.gamma > 0
        cos_S = x_bD @ w_SD.T if x_bD is not None else None
        cos_T = teacher_bD @ w_SD.T if teacher_bD is not None else None
        if threshold is not None and cos_S is not None:
            self.removed = cos_S > threshold
        plain_too = kl and w.temperature == 1.0
        if cos_S is not None and (w.alpha > 0 or plain_too):
            self.add_exp("S", cos_S, 1.0, keep_cos=kl)
        if cos_T is not None and (w.beta > 0 or plain_too):
            self.add_exp("T", cos_T, 1.0, keep_cos=kl)
        if not kl or cos_S is None or cos_T is None:
            return
        if w.temperature != 1.0:
            self.add_exp("S/", cos_S, w.temperature, keep_cos=True)
            self.add_exp("T/", cos_T, w.temperature, keep_cos=True)
        self.stats["gap"] = cos_T.sub_(cos_S).mul_(self.matrices[self.softened("T")]).sum(1)

    def softened(self, name: str) -> str:
        return name if self.problem.weights.temperature == 1.0 else name + "/"


class _Rows(NamedTuple):
    """What the reduced statistics give, all per sample of the chunk."""

    raw: Tensor  # [3, b] the terms without weights
    target_x: Tensor  # [b] d loss / d psi of the student's target
    target_t: Tensor | None  # [b] d loss / d target cosine of the teacher
    with_x: dict[str, Tensor]  # [b] coefficient of a matrix in d loss / d student cosine
    with_t: dict[str, Tensor]  # [b] the same for the teacher's cosines


def _epilogue(problem: Problem, chunk: _Chunk, stats: dict[str, Tensor], share: Tensor) -> _Rows:
    """share [b]: the sample's weight in the loss, 0 for unlabelled samples."""
    w, s = problem.weights, problem.scale
    raw, target_x, target_t = [torch.zeros_like(share) for _ in range(3)], torch.zeros_like(share), None
    with_x: dict[str, Tensor] = {}
    with_t: dict[str, Tensor] = {}

    def softmax(name: str, cosine: Tensor, temperature: float) -> _Softmax:
        return _softmax(stats[name], cosine * (s / temperature) - problem.shift(temperature))

    if w.alpha > 0:
        student, each = softmax("S", stats["psi"], 1.0), share * (w.alpha * s)
        raw[0], with_x["S"] = student.loss, each * student.inv_z
        target_x = target_x - each * student.miss
    if w.beta > 0:
        teacher, each = softmax("T", stats["cos_t"], 1.0), share * (w.beta * s)
        raw[1], with_t["T"] = teacher.loss, each * teacher.inv_z
        target_t = -each * teacher.miss
    if w.gamma > 0:
        soft = s / w.temperature
        each, name_S, name_T = share * (w.gamma * soft), chunk.softened("S"), chunk.softened("T")
        student = softmax(name_S, stats["psi"], w.temperature)
        teacher = softmax(name_T, stats["cos_t"], w.temperature)
        mean_gap = stats["gap"] * teacher.inv_z + (1 - teacher.miss) * (stats["cos_t"] - stats["psi"])
        raw[2] = soft * mean_gap + student.log_z - teacher.log_z
        # With temperature 1 a matrix serves two terms: their coefficients are added, not their products.
        with_x[name_S] = with_x.get(name_S, 0) + each * student.inv_z
        with_x[name_T] = -each * teacher.inv_z
        target_x = target_x + each * (teacher.miss - student.miss)
    return _Rows(torch.stack(raw), target_x, target_t, with_x, with_t)


class _Run:
    """One call: what belongs to the whole batch, and the sums over its chunks."""

    def __init__(
        self,
        x_GD: Tensor,
        w_SD: Tensor,
        target_G: Tensor,
        rows_S: Tensor | None,
        teacher_GD: Tensor | None,
        problem: Problem,
    ):
        weights = problem.weights
        self.problem = problem
        self.own, self.slot = locate(target_G, rows_S, problem.class_start, w_SD.shape[0])
        self.labelled = target_G >= 0
        count = self.labelled.sum().to(x_GD.dtype)
        self.each = 1 / count.clamp_min(1) if problem.reduction == "mean" else torch.ones_like(count)
        self.unit_w, self.inv_w = unit_rows(w_SD)
        self.w_y = self.unit_w[self.slot]
        self.unit_x, self.inv_x = unit_rows(x_GD)
        self.unit_t = unit_rows(teacher_GD)[0] if teacher_GD is not None and weights.needs_teacher else None
        self.on_x = _target(self.unit_x, self.w_y, self.own, problem, True) if weights.needs_student else None
        self.on_t = _target(self.unit_t, self.w_y, self.own, problem, False) if self.unit_t is not None else None
        self.raw = x_GD.new_zeros(3)
        self.target_cosine, self.hit = x_GD.new_zeros(len(x_GD)), torch.zeros_like(self.labelled)

    def chunk(self, part: slice, grad_x: Tensor | None, grad_w: Tensor | None) -> None:
        problem, on_x = self.problem, self.on_x
        x, t = self.unit_x[part], self.unit_t[part] if self.unit_t is not None else None
        chunk = _Chunk(problem, self.slot[part], self.own[part])
        needs_x = on_x is not None or problem.filter_threshold is not None
        chunk.build(x if needs_x else None, t, self.unit_w)
        chunk.stats["own"] = self.own[part].to(x.dtype)
        if on_x is not None:
            chunk.stats |= {"psi": on_x.psi[part], "cos": on_x.cos[part]}
        if self.on_t is not None:
            chunk.stats["cos_t"] = self.on_t.cos[part]
        reduced = torch.stack(list(chunk.stats.values()))
        pending = dist.all_reduce(reduced, group=problem.group, async_op=True) if problem.world > 1 else None
        products = _products(chunk, self.unit_w) if grad_x is not None else {}
        if pending is not None:
            pending.wait()
        stats = dict(zip(chunk.stats, reduced.unbind()))

        rows = _epilogue(problem, chunk, stats, self.labelled[part] * self.each)
        # A labelled sample whose class no rank holds would be a wrong number; NaN is a loud one.
        lost = self.labelled[part] & (stats["own"] < 0.5)
        self.raw += rows.raw.masked_fill(~self.labelled[part], 0.0).masked_fill(lost, torch.nan).sum(1)
        target_x = rows.target_x * on_x.dpsi[part] if on_x is not None else None
        if target_x is not None:
            self.diagnose(part, stats)
            if grad_x is not None:
                grad_x[part] = target_x[:, None] * self.w_y[part]
                for name, product in products.items():
                    grad_x[part].addcmul_(rows.with_x[name][:, None], product)
        if grad_w is not None:
            # Rows of other ranks carry slot 0 and must add 0: the student's dpsi is 0 there already.
            target_t = rows.target_t * self.own[part] if rows.target_t is not None else None
            _add_grad_w(grad_w, chunk, rows, x, t, target_x, target_t)

    def diagnose(self, part: slice, stats: dict[str, Tensor]) -> None:
        name, temperature = ("S", 1.0) if "S" in stats else ("S/", self.problem.weights.temperature)
        logit = stats["cos"] * (self.problem.scale / temperature) - self.problem.shift(temperature)
        self.target_cosine[part] = stats["cos"]
        self.hit[part] = self.labelled[part] & (logit > stats[name].log())


def row_mode(
    x_GD: Tensor,
    w_SD: Tensor,
    target_G: Tensor,
    rows_S: Tensor | None,
    teacher_GD: Tensor | None,
    problem: Problem,
    need_x: bool,
    need_w: bool,
) -> Outcome:
    """All tensors in one compute dtype (float32 or float64). See the module's docstring for the schedule."""
    run = _Run(x_GD, w_SD, target_G, rows_S, teacher_GD, problem)
    grad_x = torch.zeros_like(x_GD) if need_x else None
    grad_w = torch.zeros_like(w_SD) if need_w else None
    batch = len(x_GD)
    step = problem.chunk(batch, len(w_SD), x_GD.element_size())
    for start in range(0, batch, step):
        run.chunk(slice(start, min(start + step, batch)), grad_x, grad_w)
    raw = run.raw * run.each
    weights = raw.new_tensor([problem.weights.alpha, problem.weights.beta, problem.weights.gamma])
    return Outcome(
        terms=raw * weights,
        raw=raw,
        target_cosine=run.target_cosine,
        hit=run.hit,
        grad_x=_through_norm(grad_x, run.unit_x, run.inv_x) if grad_x is not None else None,
        grad_w=_through_norm(grad_w, run.unit_w, run.inv_w) if grad_w is not None else None,
    )


def _products(chunk: _Chunk, unit_w: Tensor) -> dict[str, Tensor]:
    """E @ w for every matrix that the student's embeddings get gradient from; needs no reduced statistic."""
    w = chunk.problem.weights
    names = (["S"] if w.alpha > 0 else []) + ([chunk.softened("S"), chunk.softened("T")] if w.gamma > 0 else [])
    return {name: chunk.matrices[name] @ unit_w for name in dict.fromkeys(names)}


def _add_grad_w(
    grad_w: Tensor,
    chunk: _Chunk,
    rows: _Rows,
    x: Tensor,
    t: Tensor | None,
    target_x: Tensor | None,
    target_t: Tensor | None,
) -> None:
    def features(with_x: Tensor | None, with_t: Tensor | None) -> Tensor:
        parts = [c[:, None] * unit for c, unit in ((with_x, x), (with_t, t)) if c is not None and unit is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    for name in {**rows.with_x, **rows.with_t}:
        grad_w.addmm_(chunk.matrices[name].T, features(rows.with_x.get(name), rows.with_t.get(name)))
    grad_w.index_add_(0, chunk.slot[:, 0], features(target_x, target_t))
