"""Row mode in plain PyTorch: loss and closed-form gradients in one pass over chunks of samples.

Legend: G gathered batch, b samples of one chunk, D width, S rows of w on this rank, l labels per sample.

Per chunk: exponentials -> ONE sum all-reduce of [k, b] row statistics, hidden under the dX product -> dX, dW.
The exponentials are stored un-normalised: 1 / Z scales rows, so it commutes with both gradient products and no second
pass over [b, S] is needed. With E_j = exp(z_j - kappa) for the negatives (E_y := 0), n = sum_j E_j:

    one label     CE = softplus(d), 1 - P_y = sigmoid(d), d = ln n + kappa - z_y     (no cancellation as P_y -> 1)
    several       ln(1 + sum_i exp(-z_i)) + ln(1 + n exp(kappa)), i over the labels  (MLCD, An et al., ECCV 2024)
    KL            sum_j pT_j (zT_j - zS_j) + ln ZS - ln ZT      dKL/dzS_j = pS_j - pT_j

The labels' classes are never inside E: their cosines come from full-precision rows and their gradient is a sparse extra
term. The KL's sum_j E_j (cosT_j - cosS_j) is (t - x) . (E w), a product that the gradient needs anyway, so no matrix of
cosines outlives its exponentials.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacid_kernels.epilogue import Coefficients, epilogue
from megacid_kernels.problem import Problem

_BLOCK_BYTES = {"cpu": 1 << 20}  # elementwise work on [S, D] in blocks that stay in a core's cache
_DEVICE_BLOCK_BYTES = 1 << 28  # elsewhere only the temporaries are to stay small


class Outcome(NamedTuple):
    """What `row_mode` gives; the last two only where they were asked for."""

    terms: Tensor  # [3] weighted and reduced: alpha * CE(student), beta * CE(teacher), gamma * KL
    raw: Tensor  # [3] the same without their weights
    target_cosine: Tensor  # [G, l] student's cosine to its labels; 0 where there is none, or no student term
    largest_negative: Tensor  # [G] largest logit / scale among THIS RANK's negatives; -inf without any
    removed: Tensor  # [G] int64, negatives of this rank that the filter took out
    grad_x: Tensor | None  # [G, D] this shard's partial sum
    grad_w: Tensor | None  # [S, D]


class _Target(NamedTuple):
    """The labels' classes of every sample, zeros where another rank owns the class."""

    cos: Tensor  # [b, l]
    psi: Tensor  # [b, l]
    dpsi: Tensor  # [b, l]


def row_blocks(x: Tensor) -> list[slice]:
    """Slices along dim 0 that `x` is worked on in, so that temporaries stay small."""
    size = _BLOCK_BYTES.get(x.device.type, _DEVICE_BLOCK_BYTES)
    step = max(1, size // max(1, x.shape[1] * x.element_size()))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def inverse_norms(x: Tensor) -> Tensor:
    """1 / |x| of every row, [n, 1]; 0 of a zero row, which so stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norm > torch.finfo(x.dtype).tiny, 1 / norm, torch.zeros_like(norm))


class _Rows:
    """The class rows, unit rows as far as the products are concerned, without a second [S, D] in memory.

    Rows that may be overwritten are normalised in place. Others stay as they are: their cosines are divided by the norms
    instead, and so are the exponentials once they are summed, which puts the norms into both gradient products.
    """

    def __init__(self, w_SD: Tensor, overwrite: bool):
        self.inverse = inverse_norms(w_SD)
        self.w = w_SD.mul_(self.inverse) if overwrite else w_SD
        self.columns = None if overwrite else self.inverse[:, 0]  # [S], to multiply matrices [b, S] with

    def of(self, slot: Tensor) -> Tensor:
        """Unit rows of these slots, [..., D]."""
        rows = self.w[slot]
        return rows if self.columns is None else rows.mul_(self.columns[slot][..., None])

    def scaled(self, matrix_bS: Tensor) -> Tensor:
        return matrix_bS if self.columns is None else matrix_bS.mul_(self.columns)

    def through_norm_(self, grad: Tensor) -> Tensor:
        """Turn the sums of the products into the gradient of w, in place."""
        for rows in row_blocks(grad):
            part, w, inverse = grad[rows], self.w[rows], self.inverse[rows]
            along = torch.linalg.vecdot(w, part)[:, None]
            if self.columns is None:
                part.addcmul_(w, along, value=-1).mul_(inverse)
            else:
                # `part` holds 1 / |w| already. Twice, for w is no unit row; one by one, for 1 / |w|^2 may overflow.
                part.addcmul_(w, along.mul_(inverse).mul_(inverse), value=-1)
        return grad


def _through_norm_(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Turn the gradient of x / |x| into that of x, in place. Linear: may run on partial sums."""
    return grad.addcmul_(unit, torch.linalg.vecdot(unit, grad)[:, None], value=-1).mul_(inverse)


def locate(target_Gl: Tensor, rows_S: Tensor | None, class_start: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """(own [G, l] bool, slot [G, l]: the row of w that holds the class, 0-clamped where not owned). No host sync."""
    local = target_Gl - class_start
    if num_rows == 0:
        return torch.zeros_like(target_Gl, dtype=torch.bool), torch.zeros_like(target_Gl)
    if rows_S is None:
        slot = local.clamp(0, num_rows - 1)
        own = slot == local
    else:
        slot = torch.searchsorted(rows_S, local).clamp(max=num_rows - 1)
        own = rows_S[slot] == local
    return own & (target_Gl >= 0), slot


def without_repeats(target_Gl: Tensor) -> Tensor:
    """A class that a sample names twice counts once: later ones become -1."""
    earlier = torch.ones(target_Gl.shape[1], target_Gl.shape[1], dtype=torch.bool, device=target_Gl.device).tril(-1)
    again = ((target_Gl[:, :, None] == target_Gl[:, None, :]) & earlier).any(2)
    return target_Gl.masked_fill(again, -1)


def _target(x_bD: Tensor, w_blD: Tensor, own: Tensor, problem: Problem, with_margin: bool) -> _Target:
    """Target cosine and margin from full-precision rows. sin = |x - w| |x + w| / 2 keeps its digits at cos -> +-1."""
    x = x_bD[:, None, :]
    cos = torch.linalg.vecdot(x, w_blD)
    psi, dpsi = cos, torch.ones_like(cos)
    if with_margin and problem.margin is not None:
        sin = torch.linalg.vector_norm(x - w_blD, dim=2) * torch.linalg.vector_norm(x + w_blD, dim=2) / 2
        psi, exact = problem.margin.target(cos, sin)
        dpsi = exact if problem.margin_grad == "exact" else dpsi
    zero = torch.zeros_like(cos)
    return _Target(*(torch.where(own, value, zero) for value in (cos, psi, dpsi)))


class _Chunk:
    """The [b, S] work of one chunk: matrices of exponentials by name (see `Problem.matrices`) and their row sums."""

    def __init__(self, problem: Problem, slot: Tensor, own: Tensor, bias: Tensor | None):
        self.problem, self.slot, self.own, self.bias = problem, slot, own, bias
        self.stats: dict[str, Tensor] = {}
        self.matrices: dict[str, Tensor] = {}
        self.hidden: Tensor | None = None  # [b, S] bool: negatives that the filter takes out
        self.removed = torch.zeros(len(slot), dtype=torch.int64, device=slot.device)
        self.largest: Tensor | None = None

    def add(self, unit_bD: Tensor, rows: _Rows, names: dict[str, float], *, student: bool) -> None:
        """The matrices `names` (name -> temperature) of one distribution; of the student also mask and maximum."""
        if not names and not (student and self.problem.filter_threshold is not None):
            return
        scale = self.problem.scale
        temperatures = list(names.items()) or [("", 1.0)]
        first = temperatures[0][1]
        logits = rows.scaled((unit_bD * (scale / first)) @ rows.w.T)
        self._hide_labels(logits)
        if student and self.problem.filter_threshold is not None:
            self.hidden = logits > self.problem.filter_threshold * (scale / first)
            self.removed = self.hidden.sum(1)
        if self.hidden is not None:
            logits.masked_fill_(self.hidden, -torch.inf)
        # Every matrix but the first is made from the first's logits, before these are overwritten.
        for name, temperature in [*temperatures[1:], temperatures[0]]:
            if not name:
                continue
            z = logits if temperature == first else logits * (first / temperature)
            shift = self.problem.shift(temperature)
            if self.bias is not None:
                z += self.bias - shift
            elif shift:
                z -= shift
            if student and temperature == first and z.shape[1]:
                self.largest = (z.amax(1) + shift) / (scale / temperature)
            self.stats[name] = z.exp_().sum(1)
            self.matrices[name] = rows.scaled(z)

    def _hide_labels(self, logits: Tensor) -> None:
        if logits.shape[1]:
            at = logits.gather(1, self.slot)
            # Two labels of other ranks share slot 0 with a label of this rank at worst; -inf must win, so: minimum.
            logits.scatter_reduce_(1, self.slot, at.masked_fill_(self.own, -torch.inf), "amin")


class _Run:
    """One call: what belongs to the whole batch, and the sums over its chunks."""

    def __init__(
        self,
        x_GD: Tensor,
        w_SD: Tensor,
        target_Gl: Tensor,
        rows_S: Tensor | None,
        teacher_GD: Tensor | None,
        bias_S: Tensor | None,
        problem: Problem,
        overwrite_w: bool,
    ):
        weights = problem.weights
        self.problem, self.bias = problem, bias_S
        target_Gl = without_repeats(target_Gl) if target_Gl.shape[1] > 1 else target_Gl
        self.present = target_Gl >= 0
        self.own, self.slot = locate(target_Gl, rows_S, problem.class_start, w_SD.shape[0])
        self.labelled = self.present.any(1)
        count = self.labelled.sum().to(x_GD.dtype)
        self.each = 1 / count.clamp_min(1) if problem.reduction == "mean" else torch.ones_like(count)
        self.rows = _Rows(w_SD, overwrite_w)
        self.inv_x = inverse_norms(x_GD)
        self.unit_x = x_GD * self.inv_x
        self.unit_t = None
        if teacher_GD is not None and weights.needs_teacher:
            self.unit_t = teacher_GD * inverse_norms(teacher_GD)
        self.raw = x_GD.new_zeros(3)
        self.target_cosine = x_GD.new_zeros(target_Gl.shape)
        self.largest = x_GD.new_full((len(x_GD),), -torch.inf)
        self.removed = torch.zeros(len(x_GD), dtype=torch.int64, device=x_GD.device)

    def chunk(self, part: slice, grad_x: Tensor | None, grad_w: Tensor | None) -> None:
        problem, weights = self.problem, self.problem.weights
        own, slot, x = self.own[part], self.slot[part], self.unit_x[part]
        t = self.unit_t[part] if self.unit_t is not None else None
        w_y = self.rows.of(slot) if len(self.rows.w) else x.new_zeros(*slot.shape, x.shape[1])
        on_x = _target(x, w_y, own, problem, True) if weights.needs_student else None
        on_t = _target(t, w_y, own, problem, False) if t is not None else None

        chunk = _Chunk(problem, slot, own, self.bias)
        chunk.add(x, self.rows, problem.matrices("S"), student=True)
        if t is not None:
            chunk.add(t, self.rows, problem.matrices("T"), student=False)
        self.removed[part] = chunk.removed
        if chunk.largest is not None:
            self.largest[part] = chunk.largest
        products: dict[str, Tensor] = {}
        if weights.gamma > 0 and t is not None:
            name = problem.softened("T")
            products[name] = chunk.matrices[name] @ self.rows.w
            chunk.stats["gap"] = torch.linalg.vecdot(t - x, products[name])
        chunk.stats["own"] = own.sum(1).to(x.dtype)
        for kind, value in _by_label(on_x, on_t):
            chunk.stats |= {f"{kind}{i}": column for i, column in enumerate(value.unbind(1))}
        reduced = torch.stack(list(chunk.stats.values()))
        pending = dist.all_reduce(reduced, group=problem.group, async_op=True) if problem.world > 1 else None
        if grad_x is not None:
            for name in problem.student_products():
                products.setdefault(name, chunk.matrices[name] @ self.rows.w)
        if pending is not None:
            pending.wait()
        stats = dict(zip(chunk.stats, reduced.unbind()))

        rows = epilogue(problem, stats, self.present[part], self.labelled[part] * self.each)
        # A label whose class no rank holds would be a wrong number; NaN is a loud one.
        lost = stats["own"] < self.present[part].sum(1) - 0.5
        self.raw += rows.raw.masked_fill(~self.labelled[part], 0.0).masked_fill(lost, torch.nan).sum(1)
        if on_x is not None:
            self.target_cosine[part] = torch.stack([stats[f"cos{i}"] for i in range(slot.shape[1])], 1)
        labels = []  # what pulls at the labels: (coefficient [b, l], embeddings, their cosines to the labels)
        if on_x is not None:
            labels.append((rows.target_x * on_x.dpsi, x, on_x.cos))  # dpsi is 0 where another rank owns the class
        if t is not None and on_t is not None and rows.target_t is not None:
            labels.append((rows.target_t * own, t, on_t.cos))
        if grad_x is not None and on_x is not None:
            pull = labels[0][0]
            # Only what is tangential: at cos = +-1, where d psi is large, the rest would not cancel in through_norm.
            grad_x[part] = torch.bmm(pull[:, None, :], w_y - on_x.cos[..., None] * x[:, None, :])[:, 0]
            for name, product in products.items():
                if name in rows.with_x:
                    grad_x[part].addcmul_(rows.with_x[name][:, None], product)
        if grad_w is not None:
            _add_grad_w(grad_w, part.start == 0, chunk, rows, self.rows.columns, x, t, w_y, labels)


def _by_label(on_x: _Target | None, on_t: _Target | None) -> list[tuple[str, Tensor]]:
    found = [] if on_x is None else [("psi", on_x.psi), ("cos", on_x.cos)]
    return found + ([] if on_t is None else [("cos_t", on_t.cos)])


def row_mode(
    x_GD: Tensor,
    w_SD: Tensor,
    target_Gl: Tensor,
    rows_S: Tensor | None,
    teacher_GD: Tensor | None,
    bias_S: Tensor | None,
    problem: Problem,
    need_x: bool,
    need_w: bool,
    *,
    overwrite_w: bool = False,
) -> Outcome:
    """All tensors in one compute dtype (float32 or float64). See the module's docstring for the schedule.

    overwrite_w: w is the caller's scratch copy; its rows are normalised in place, which saves two passes over [b, S].
    """
    run = _Run(x_GD, w_SD, target_Gl, rows_S, teacher_GD, bias_S, problem, overwrite_w)
    grad_x = torch.zeros_like(x_GD) if need_x else None
    batch = len(x_GD)
    grad_w = None
    if need_w:  # the first chunk writes it, the others add
        grad_w = torch.empty_like(w_SD) if batch else torch.zeros_like(w_SD)
    step = problem.chunk(batch, len(w_SD), x_GD.shape[1], target_Gl.shape[1], x_GD.element_size(), x_GD.device.type)
    for start in range(0, batch, step):
        run.chunk(slice(start, min(start + step, batch)), grad_x, grad_w)
    raw = run.raw * run.each
    weights = (problem.weights.alpha, problem.weights.beta, problem.weights.gamma)
    return Outcome(
        terms=torch.stack([weight * part for weight, part in zip(weights, raw.unbind())]),
        raw=raw,
        target_cosine=run.target_cosine,
        largest_negative=run.largest,
        removed=run.removed,
        grad_x=_through_norm_(grad_x, run.unit_x, run.inv_x) if grad_x is not None else None,
        grad_w=run.rows.through_norm_(grad_w) if grad_w is not None else None,
    )


def _add_grad_w(
    grad_w: Tensor,
    first: bool,
    chunk: _Chunk,
    rows: Coefficients,
    columns: Tensor | None,
    x: Tensor,
    t: Tensor | None,
    w_blD: Tensor,
    labels: list[tuple[Tensor, Tensor, Tensor]],
) -> None:
    """labels: (coefficient [b, l], embeddings [b, D], their cosines to the labels [b, l]) of student and teacher."""

    def features(with_x: Tensor | None, with_t: Tensor | None) -> Tensor:
        parts = [c[:, None] * unit for c, unit in ((with_x, x), (with_t, t)) if c is not None and unit is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    for name in {**rows.with_x, **rows.with_t}:
        right = features(rows.with_x.get(name), rows.with_t.get(name))
        if first:
            torch.mm(chunk.matrices[name].T, right, out=grad_w)
            first = False
        else:
            grad_w.addmm_(chunk.matrices[name].T, right)
    if not len(grad_w):
        return
    for i in range(chunk.slot.shape[1]):
        slot = chunk.slot[:, i]
        for coefficient, unit, cos in labels:
            toward = (unit - cos[:, i, None] * w_blD[:, i]).mul_(coefficient[:, i, None])  # tangential, as for x
            _add_rows_(grad_w, slot, toward if columns is None else toward.mul_(columns[slot][:, None]))


def _add_rows_(total: Tensor, slot: Tensor, rows: Tensor) -> None:
    """total[slot] += rows in an order that is the same in every run, also for slots that occur several times."""
    if total.device.type == "cpu":
        total.index_add_(0, slot, rows)  # one row after the other
    else:
        total.index_put_((slot,), rows, accumulate=True)  # sorts the slots, where index_add_ would use atomics
