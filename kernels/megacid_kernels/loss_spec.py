"""What is to be computed: the value objects that travel through the package instead of fifteen arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch.distributed as dist
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "triton")
WEIGHT_GRADS = ("auto", "stored", "recomputed")
PRECISIONS = ("auto", "fp16", "bf16", "fp32")
DEFAULT_BUDGET_BYTES = 1 << 30
LARGEST_LOG_SUM = 80.0  # of exponentials: e^80 and what it is multiplied with stay finite in float32
_CPU_BUDGET_BYTES = 1 << 26  # at least, see `LossSpec.chunk`
# Of the shift. Up to here negatives at cosine 0 and a little below keep exponentials that float32 can hold.
_MOST_SHIFT = 80.0


def equal_chunk(batch: int, most: int) -> int:
    """Samples of a chunk: at most `most`, in equal chunks, not many full ones and a small last one; 1 of an empty batch."""
    return -(-batch // -(-batch // most)) if batch else 1


class TargetMargin(Protocol):
    """A margin on the target class; `megacid.Margin` is one."""

    def target(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(psi, d psi / d cos) for target cosines `cos` and the matching sines `sin`, any shape, float32 or float64."""
        ...


@dataclass(frozen=True)
class Weights:
    """Weights of the three terms, each a mean over the labelled samples; a term of weight 0 is not computed.

    zS = scale * psi_y(cos(x, w)), zT = scale * cos(teacher, w):
    alpha * CE(zS, y) + beta * CE(zT, y) + gamma * KL(softmax(zT / temperature) || softmax(zS / temperature)).
    The teacher's distribution is a constant in the KL [assumed]: no gradient reaches w through zT there.
    """

    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"weight {name} is {value}, expected a finite number >= 0: set it to 0 to leave the term out"
                )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature is {self.temperature}, expected a finite number > 0: 1 leaves the logits as they are"
            )

    @property
    def needs_student(self) -> bool:
        return self.alpha > 0 or self.gamma > 0

    @property
    def needs_teacher(self) -> bool:
        return self.beta > 0 or self.gamma > 0


@dataclass(frozen=True)
class LossSpec:
    """Everything but the tensors. `group`: ranks the classes are sharded over (None: the default group, or alone)."""

    num_classes: int  # classes of all ranks: bounds the sum of exponentials, must be the same on every rank
    scale: float = 64.0
    margin: TargetMargin | None = None
    margin_grad: Literal["exact", "straight_through"] = "exact"
    weights: Weights = field(default_factory=Weights)
    filter_threshold: float | None = None  # negatives of a larger student cosine leave all denominators of that sample
    class_start: int = 0  # global id of the first class of this rank's shard
    max_rows: int | None = None  # most rows that any rank passes as w; None: as many as here
    reduction: Literal["mean", "sum"] = "mean"
    group: dist.ProcessGroup | None = None
    impl: str = "auto"  # see `dispatch.resolve`
    weight_grad: str = "auto"  # "stored", which "auto" is, or "recomputed": see `schedule`
    # Triton's products: "fp16" (which "auto" is) rounds the unit rows to it for the cosines, and everything in the products
    # of the gradients to bf16; "bf16" does so for both and holds one copy of the rows; "fp32" rounds nothing. PyTorch
    # computes in the inputs' precision, at least float32, and takes no other word than "auto" and "fp32".
    precision: str = "auto"
    memory_budget_bytes: int | None = None  # for the [chunk, S] matrices; None: see `chunk`

    def __post_init__(self) -> None:
        for name, value, known in (
            ("impl", self.impl, IMPLEMENTATIONS),
            ("weight_grad", self.weight_grad, WEIGHT_GRADS),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, available are {', '.join(map(repr, known))}")
        if self.margin_grad not in ("exact", "straight_through"):
            raise ValueError(f"margin_grad is {self.margin_grad!r}, expected 'exact' or 'straight_through'")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {self.reduction!r}, expected 'mean' or 'sum'")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale is {self.scale}, expected a finite number > 0 such as 64")
        if self.memory_budget_bytes is not None and self.memory_budget_bytes <= 0:
            raise ValueError(
                f"memory_budget_bytes is {self.memory_budget_bytes}, expected > 0, or None for the default"
            )
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}, expected the number of classes of all ranks together")
        hottest = self.weights.temperature if self.weights.gamma > 0 else 1.0
        if self.shift(min(hottest, 1.0)) > _MOST_SHIFT:
            raise ValueError(
                f"scale is {self.scale} with {self.num_classes} classes and temperature {hottest}, expected scale / "
                f"temperature + ln(num_classes) <= {80 + _MOST_SHIFT:g}: float32 has no exponents for more"
            )

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def shift(self, temperature: float = 1.0) -> float:
        """kappa, subtracted from every logit / temperature before exp. Cosine logits are bounded by the scale, so no
        maximum is needed: num_classes * exp(scale - kappa) <= exp(80) stays finite in float32."""
        return max(0.0, self.scale / temperature + math.log(self.num_classes) - LARGEST_LOG_SUM)

    def budget(self, device: str) -> int:
        """Bytes for the matrices, where nothing else says how many: see `chunk`."""
        return self.memory_budget_bytes or (_CPU_BUDGET_BYTES if device == "cpu" else DEFAULT_BUDGET_BYTES)

    def softened(self, name: str) -> str:
        """The matrix whose exponentials are those of the KL: "S/", "T/", or "S", "T" themselves at temperature 1."""
        return name if self.weights.temperature == 1.0 else name + "/"

    def matrices(self, name: str) -> dict[str, float]:
        """Matrices of exponentials that are needed of the student ("S") or the teacher ("T"): name -> temperature."""
        w = self.weights
        found = {name: 1.0} if (w.alpha if name == "S" else w.beta) > 0 else {}
        if w.gamma > 0:
            found[self.softened(name)] = w.temperature
        return found

    def student_products(self) -> list[str]:
        """Matrices whose product with w goes into the gradient of x."""
        w = self.weights
        names = (["S"] if w.alpha > 0 else []) + ([self.softened("S"), self.softened("T")] if w.gamma > 0 else [])
        return list(dict.fromkeys(names))

    def chunk(self, batch: int, rows: int, width: int, labels: int, itemsize: int, device: str) -> int:
        """Samples per chunk so that the live [chunk, rows] matrices (and the rows of the labels) fit the budget; the same
        on every rank, because each chunk has one all-reduce: computed from the widest shard, not from this one."""
        rows = max(1, self.max_rows or rows)
        matrices = float(len(self.matrices("S")) + len(self.matrices("T")))
        if self.filter_threshold is not None:
            matrices += 1 / itemsize + (not self.matrices("S"))
        per_sample = rows * max(1.0, matrices)
        budget = self.memory_budget_bytes or DEFAULT_BUDGET_BYTES
        if self.memory_budget_bytes is None and device == "cpu":
            # A product of fewer samples is as fast on a CPU: no more than half of what the gradient takes anyway.
            budget = min(budget, max(_CPU_BUDGET_BYTES, rows * width * itemsize // 2))
        else:
            per_sample += 4 * labels * width
        most = max(1, min(batch, int(budget / (per_sample * itemsize))))
        return equal_chunk(batch, most)
