"""Row mode in plain PyTorch: loss and closed-form gradients in one pass over chunks of samples.

Legend: G gathered batch, b samples of one chunk, D width, S rows of w on this rank.

Per chunk: cosines and exponentials -> ONE sum all-reduce of [k, b] row statistics, hidden under the dX product -> dX, dW.
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


class _Matrix(NamedTuple):
    """Exponentials of one distribution and the index of their row sum in the statistics."""

    exp_bS: Tensor
    stat: int


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
    """The [b, S] work of one chunk: exponentials, statistics, products."""

    def __init__(self, problem: Problem, slot: Tensor, own: Tensor):
        self.problem, self.slot, self.own = problem, slot[:, None], own[:, None]
        self.stats: list[Tensor] = []
        self.matrices: dict[str, _Matrix] = {}
        self.removed: Tensor | None = None

    def add_stat(self, value: Tensor) -> int:
        self.stats.append(value)
        return len(self.stats) - 1

    def add_exp(self, name: str, cos_bS: Tensor, temperature: float, keep_cos: bool) -> None:
        scale, shift = self.problem.scale / temperature, self.problem.shift(temperature)
        exp = cos_bS * scale if keep_cos else cos_bS.mul_(scale)
        exp = exp.sub_(shift).exp_() if shift else exp.exp_()
        exp.scatter_(1, self.slot, exp.gather(1, self.slot).masked_fill_(self.own, 0.0))
        if self.removed is not None:
            exp.masked_fill_(self.removed, 0.0)
        self.matrices[name] = _Matrix(exp, self.add_stat(exp.sum(1)))

    def build(self, x_bD: Tensor | None, teacher_bD: Tensor | None, w_SD: Tensor) -> int:
        """Fill matrices "S", "T" (logits as they are) and "S/", "T/" (divided by the temperature; the same matrix when it
        is 1). Returns the index of the KL's sum_j exp(zT_j / temperature) (cosT_j - cosS_j), negatives only, or -1."""
        w, threshold = self.problem.weights, self.problem.filter_threshold
        kl, warm = w.gamma > 0, w.temperature != 1.0
        cos_S = x_bD @ w_SD.T if x_bD is not None else None
        cos_T = teacher_bD @ w_SD.T if teacher_bD is not None else None
        if threshold is not None and cos_S is not None:
            self.removed = cos_S > threshold
        if cos_S is not None and (w.alpha > 0 or (kl and not warm)):
            self.add_exp("S", cos_S, 1.0, keep_cos=kl)
        if cos_T is not None and (w.beta > 0 or (kl and not warm)):
            self.add_exp("T", cos_T, 1.0, keep_cos=kl)
        if not kl:
            return -1
        assert cos_S is not None and cos_T is not None
        for name, cos in (("S", cos_S), ("T", cos_T)):
            if warm:
                self.add_exp(name + "/", cos, w.temperature, keep_cos=True)
            else:
                self.matrices[name + "/"] = self.matrices[name]
        return self.add_stat(cos_T.sub_(cos_S).mul_(self.matrices["T/"].exp_bS).sum(1))


class _Rows(NamedTuple):
    """What the reduced statistics give: coefficients of the sparse and dense gradient parts, all [b]."""

    raw: Tensor  # [3, b]
    target_x: Tensor  # d loss / d cos_target of the student
    target_t: Tensor | None
    dense: dict[
        str, tuple[Tensor | None, Tensor | None]
    ]  # matrix -> (coefficient with x, coefficient with the teacher)


def _epilogue(
    problem: Problem, chunk: _Chunk, stats: Tensor, kl_stat: int, index: dict[str, int], inv_n: Tensor
) -> _Rows:
    w, s = problem.weights, problem.scale
    zero = torch.zeros_like(inv_n)
    raw, target_x, target_t = [zero, zero, zero], zero, None
    dense: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def softmax(name: str, cosine: Tensor, temperature: float) -> _Softmax:
        logit = cosine * (s / temperature) - problem.shift(temperature)
        return _softmax(stats[chunk.matrices[name].stat], logit)

    def add(name: str, with_x: Tensor | None, with_teacher: Tensor | None) -> None:
        # One matrix may serve two terms (temperature 1): add the coefficients, not the products.
        canonical = name.rstrip("/") if w.temperature == 1.0 else name
        a, b = dense.get(canonical, (None, None))
        both_x = with_x if a is None else a if with_x is None else a + with_x
        both_t = with_teacher if b is None else b if with_teacher is None else b + with_teacher
        dense[canonical] = (both_x, both_t)

    if w.alpha > 0:
        student = softmax("S", stats[index["psi"]], 1.0)
        raw[0] = student.loss
        add("S", inv_n * (w.alpha * s) * student.inv_z, None)
        target_x = target_x - inv_n * (w.alpha * s) * student.miss
    if w.beta > 0:
        teacher = softmax("T", stats[index["cos_t"]], 1.0)
        raw[1] = teacher.loss
        add("T", None, inv_n * (w.beta * s) * teacher.inv_z)
        target_t = -inv_n * (w.beta * s) * teacher.miss
    if w.gamma > 0:
        psi, cos_t, st = stats[index["psi"]], stats[index["cos_t"]], s / w.temperature
        student, teacher = softmax("S/", psi, w.temperature), softmax("T/", cos_t, w.temperature)
        mean_gap = stats[kl_stat] * teacher.inv_z + (1 - teacher.miss) * (cos_t - psi)
        raw[2] = st * mean_gap + student.log_z - teacher.log_z
        add("S/", inv_n * (w.gamma * st) * student.inv_z, None)
        add("T/", -inv_n * (w.gamma * st) * teacher.inv_z, None)
        target_x = target_x + inv_n * (w.gamma * st) * (teacher.miss - student.miss)
    return _Rows(torch.stack(raw), target_x, target_t, dense)


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
    weights, batch = problem.weights, x_GD.shape[0]
    use_x = weights.needs_student or problem.filter_threshold is not None
    own, slot = locate(target_G, rows_S, problem.class_start, w_SD.shape[0])
    labelled = target_G >= 0
    count = labelled.sum().to(x_GD.dtype)
    each = 1 / count.clamp_min(1) if problem.reduction == "mean" else torch.ones_like(count)
    unit_w, inv_w = unit_rows(w_SD)
    w_y_GD = unit_w[slot]
    unit_x, inv_x = unit_rows(x_GD)
    unit_t = unit_rows(teacher_GD)[0] if teacher_GD is not None and weights.needs_teacher else None
    on_x = _target(unit_x, w_y_GD, own, problem, True) if weights.needs_student else None
    on_t = _target(unit_t, w_y_GD, own, problem, False) if unit_t is not None else None

    grad_x = torch.zeros_like(x_GD) if need_x else None
    grad_w = torch.zeros_like(w_SD) if need_w else None
    raw = x_GD.new_zeros(3)
    target_cosine, hit = x_GD.new_zeros(batch), torch.zeros_like(labelled)
    step = problem.chunk(batch, w_SD.shape[0], x_GD.element_size())
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        x, t = unit_x[part], unit_t[part] if unit_t is not None else None
        chunk = _Chunk(problem, slot[part], own[part])
        kl_stat = chunk.build(x if use_x else None, t, unit_w)
        index = {"own": chunk.add_stat(own[part].to(x.dtype))}
        if on_x is not None:
            index |= {"psi": chunk.add_stat(on_x.psi[part]), "cos": chunk.add_stat(on_x.cos[part])}
        if on_t is not None:
            index["cos_t"] = chunk.add_stat(on_t.cos[part])
        stats = torch.stack(chunk.stats)
        pending = dist.all_reduce(stats, group=problem.group, async_op=True) if problem.world > 1 else None
        products = _products(chunk, unit_w, problem) if need_x else {}
        if pending is not None:
            pending.wait()

        rows = _epilogue(problem, chunk, stats, kl_stat, index, labelled[part] * each)
        # A labelled sample whose class no rank holds would be a wrong number; NaN is a loud one.
        lost = labelled[part] & (stats[index["own"]] < 0.5)
        raw += rows.raw.masked_fill(~labelled[part], 0.0).masked_fill(lost, torch.nan).sum(1)
        if on_x is not None:
            name, temperature = ("S", 1.0) if "S" in chunk.matrices else ("S/", weights.temperature)
            target_cosine[part] = stats[index["cos"]]
            logit = stats[index["cos"]] * (problem.scale / temperature) - problem.shift(temperature)
            hit[part] = labelled[part] & (logit > stats[chunk.matrices[name].stat].log())
        target_x = rows.target_x * on_x.dpsi[part] if on_x is not None else None
        if grad_x is not None and target_x is not None:
            grad_x[part] = sum(
                (rows.dense[k][0][:, None] * u for k, u in products.items()), target_x[:, None] * w_y_GD[part]
            )  # type: ignore[index]
        if grad_w is not None:
            _add_grad_w(grad_w, chunk, rows, x, t, slot[part], own[part], target_x)
    raw = raw * each
    terms = raw * raw.new_tensor([weights.alpha, weights.beta, weights.gamma])
    return Outcome(
        terms, raw, target_cosine, hit,
        _through_norm(grad_x, unit_x, inv_x) if grad_x is not None else None,
        _through_norm(grad_w, unit_w, inv_w) if grad_w is not None else None,
    )  # fmt: skip


def _products(chunk: _Chunk, unit_w: Tensor, problem: Problem) -> dict[str, Tensor]:
    """E @ w for every matrix that the student's embeddings get gradient from; needs no reduced statistic."""
    w, suffix = problem.weights, "" if problem.weights.temperature == 1.0 else "/"
    names = (["S"] if w.alpha > 0 else []) + (["S" + suffix, "T" + suffix] if w.gamma > 0 else [])
    return {name: chunk.matrices[name].exp_bS @ unit_w for name in dict.fromkeys(names)}


def _add_grad_w(
    grad_w: Tensor,
    chunk: _Chunk,
    rows: _Rows,
    x: Tensor,
    t: Tensor | None,
    slot: Tensor,
    own: Tensor,
    target_x: Tensor | None,
) -> None:
    def scaled(with_x: Tensor | None, with_teacher: Tensor | None) -> Tensor | None:
        parts = [
            c[:, None] * rows_ for c, rows_ in ((with_x, x), (with_teacher, t)) if c is not None and rows_ is not None
        ]
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]

    for name, (with_x, with_teacher) in rows.dense.items():
        features = scaled(with_x, with_teacher)
        if features is not None:
            grad_w.addmm_(chunk.matrices[name].exp_bS.T, features)
    # Rows of other ranks carry slot 0: their coefficient must be 0. The student's is (its dpsi is 0 there).
    target_t = rows.target_t * own if rows.target_t is not None else None
    features = scaled(target_x, target_t)
    if features is not None:
        grad_w.index_add_(0, slot, features)
