"""LossSpec: everything about a loss except its tensors, as one frozen value object."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "triton")
DEFAULT_BUDGET_BYTES = 1 << 30
ENOUGH_SAMPLES = 4096  # longer chunks make no product faster
DEVICE_BYTES = 79 << 30  # of a GPU of 80 GB, what its driver reports
MAX_LOG_SUM = 80.0  # e^80 and its products with the other factors stay finite in float32
_MIN_CPU_BUDGET_BYTES = 1 << 26
_MAX_SHIFT = 80.0  # exp(z - shift) of negatives with cosines near 0 is still representable in float32

Source = Literal["student", "teacher"]


class Distribution(NamedTuple):
    """A softmax over the classes. Each one needs a matrix of exponentials."""

    source: Source  # whose cosines
    temperature: float


class TargetMargin(Protocol):
    """A margin on the target class. `Margin` implements it."""

    def target(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """psi and d psi / d cos, shaped like `cos`; see `Margin.target`."""
        ...


@dataclass(frozen=True)
class Weights:
    """Weights of the three loss terms. Terms of weight 0 are not computed.

        loss = alpha * CE(zS, y) + beta * CE(zT, y) + gamma * KL(softmax(zT / temperature) || softmax(zS / temperature))

    with zS = scale * psi_y(cos(x, w)) and zT = scale * cos(teacher, w), each averaged (or summed) over the labelled
    samples. In the KL the teacher's distribution is a constant [assumed]: w receives no gradient through zT.

    Attributes:
        alpha: weight of the student's cross entropy, >= 0.
        beta: weight of the teacher's cross entropy, >= 0.
        gamma: weight of the KL divergence, >= 0.
        temperature: temperature of both distributions in the KL, > 0.
    """

    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"weight {name} is {value}, expected a finite number >= 0: 0 disables the term")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}, expected a finite number > 0: 1 disables it")

    @property
    def needs_student(self) -> bool:
        return self.alpha > 0 or self.gamma > 0

    @property
    def needs_teacher(self) -> bool:
        return self.beta > 0 or self.gamma > 0


@dataclass(frozen=True)
class LossSpec:
    """Everything about a loss except its tensors.

    Attributes:
        num_classes: classes of all ranks together; must be equal on every rank (the fixed shift depends on it).
        scale: logit scale s, > 0.
        margin: margin on the target class; None: no margin.
        margin_grad: "exact", or "straight_through", which replaces d psi / d cos by 1.
        labels_loss: of several labels per sample: "mlcd" is ln(1 + sum_labels exp(-z)) + ln(1 + sum_negatives exp(z))
            (An et al., ECCV 2024); "mean" is the mean over a sample's labels of one cross entropy each, with the other
            labels as negatives (as in OneVision-Encoder's released code), which have no margin or bias and pass the
            filter. Both cost the same.
        weights: weights of the loss terms.
        filter_threshold: negatives with a larger student cosine leave all denominators of that sample; None: none do.
        class_start: global id of the first class of this rank's shard.
        max_rows: largest number of rows of w on any rank, required on several ranks; None: this rank's number.
        reduction: "mean" or "sum" over the labelled samples.
        group: ranks over which the classes are sharded; None: the default group, or a single process.
        impl: "auto", "torch" or "triton"; see `resolve`.
        weight_grad: "stored" computes the gradient [S, D] of w in chunks of samples: 6 G S D FLOP. "recomputed"
            computes it slab by slab with the least memory: 8 G S D FLOP. "auto" is the faster one in Triton, by the
            rule of `plan.make_plan`, and "stored" in PyTorch.
        precision: of the matrix products in Triton. "fp16" (which "auto" means) rounds unit rows to fp16 for the
            cosines and the factors of the gradient products to bf16; "bf16" rounds both to bf16 and keeps one copy of
            the rows; "fp32" rounds nothing. PyTorch accepts "auto" and "fp32" and never rounds below fp32.
        memory_budget_bytes: bound on the matrices of exponentials, with weight_grad "recomputed" on all of a slab;
            None: for slabs 1 GiB (on a CPU 64 MiB), for chunks `chunk_budget`.
        available_bytes: memory of the GPU that class rows, their moments and the student leave, which the default
            budget follows; the least of all ranks, which must make equal chunks. None: of this GPU in whole GiB, for
            `max_rows` rows and no student.

    Raises:
        ValueError: a value is out of range, or scale / temperature + ln(num_classes) > 160.
    """

    num_classes: int
    scale: float = 64.0
    margin: TargetMargin | None = None
    margin_grad: Literal["exact", "straight_through"] = "exact"
    weights: Weights = field(default_factory=Weights)
    filter_threshold: float | None = None
    class_start: int = 0
    max_rows: int | None = None
    reduction: Literal["mean", "sum"] = "mean"
    group: dist.ProcessGroup | None = None
    impl: str = "auto"
    weight_grad: str = "auto"
    precision: str = "auto"
    memory_budget_bytes: int | None = None
    labels_loss: Literal["mlcd", "mean"] = "mlcd"
    available_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("impl", IMPLEMENTATIONS),
            ("weight_grad", ("auto", "stored", "recomputed")),
            ("precision", ("auto", "fp16", "bf16", "fp32")),
            ("margin_grad", ("exact", "straight_through")),
            ("reduction", ("mean", "sum")),
            ("labels_loss", ("mlcd", "mean")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
        check_scale(self.scale)
        if self.margin is not None and (
            isinstance(self.margin, type) or not callable(getattr(self.margin, "target", None))
        ):
            raise ValueError(f"margin is {self.margin!r}, expected a Margin such as Margin.cosface(0.3), or None")
        threshold = self.filter_threshold
        if threshold is not None and not (isinstance(threshold, Real) and math.isfinite(threshold)):
            raise ValueError(f"filter_threshold is {threshold!r}, expected a finite cosine such as 0.4, or None")
        check_budget(self.memory_budget_bytes)
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}, expected the classes of all ranks together")
        temperature = min(self.weights.temperature, 1.0) if self.weights.gamma > 0 else 1.0
        if self.shift(temperature) > _MAX_SHIFT:
            raise ValueError(
                f"scale is {self.scale} with {self.num_classes} classes and temperature {temperature}, expected "
                f"scale / temperature + ln(num_classes) <= {MAX_LOG_SUM + _MAX_SHIFT:g}, float32's range: lower scale"
            )

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def shift(self, temperature: float = 1.0) -> float:
        """kappa, the constant subtracted from every logit / temperature before exp.

        Cosine logits are bounded by the scale, so no maximum is needed: C exp(scale / temperature - kappa) <= exp(80).
        """
        return max(0.0, self.scale / temperature + math.log(self.num_classes) - MAX_LOG_SUM)

    def softened(self, source: Source) -> Distribution:
        """The distribution that the KL compares; at temperature 1 it is also that of the cross entropy."""
        return Distribution(source, self.weights.temperature)

    def distributions(self, source: Source | None = None) -> list[Distribution]:
        """Distributions that the loss terms need, of the student, of the teacher, or (None) of both."""
        weights = self.weights
        if source is None:
            return self.distributions("student") + self.distributions("teacher")
        cross_entropy = (weights.alpha if source == "student" else weights.beta) > 0
        plain = [Distribution(source, 1.0)] if cross_entropy else []
        return list(dict.fromkeys(plain + ([self.softened(source)] if weights.gamma > 0 else [])))

    def student_products(self) -> list[Distribution]:
        """Distributions whose exponentials are multiplied with w for the gradient of x."""
        soft_teacher = [self.softened("teacher")] if self.weights.gamma > 0 else []
        return self.distributions("student") + soft_teacher

    def budget_bytes(self, device: str) -> int:
        """`memory_budget_bytes` or its default for slabs."""
        return self.memory_budget_bytes or (_MIN_CPU_BUDGET_BYTES if device == "cpu" else DEFAULT_BUDGET_BYTES)

    def bytes_per_sample(self, rows: int, width: int, labels: int, itemsize: int, device: str) -> float:
        """Bytes of a chunk per sample: of the live matrices, and off a CPU of the labels' rows.

        labels: labels per sample whose rows [width] are copied; itemsize: bytes of an exponential.
        """
        rows = max(1, self.max_rows or rows)
        matrices = float(len(self.distributions()))
        if self.filter_threshold is not None:
            matrices += 1 / itemsize + (not self.distributions("student"))
        per_sample = rows * max(1.0, matrices)
        if self.memory_budget_bytes is not None or device != "cpu":
            per_sample += 4 * labels * width
        return per_sample * itemsize

    def chunk_budget(self, batch: int, rows: int, width: int, labels: int, itemsize: int, device: str) -> int:
        """`memory_budget_bytes`, or its default for chunks of samples.

        On a CPU, where a product of fewer samples is as fast: half of the gradient's size, at least 64 MiB and at most
        1 GiB. On a GPU: the size of the gradient or of a chunk of min(batch, 4096) samples, whichever is larger, at
        most a quarter of the available memory that the gradient and the unit rows leave, since activations need the
        rest, and at least 1 GiB.
        """
        if self.memory_budget_bytes is not None:
            return self.memory_budget_bytes
        rows = max(1, self.max_rows or rows)
        if device == "cpu":
            return min(DEFAULT_BUDGET_BYTES, max(_MIN_CPU_BUDGET_BYTES, rows * width * itemsize // 2))
        available = DEVICE_BYTES - 12 * rows * width if self.available_bytes is None else self.available_bytes
        free = (available - 8 * rows * width) // 4
        per_sample = self.bytes_per_sample(rows, width, labels, itemsize, device)
        enough = math.ceil(min(batch, ENOUGH_SAMPLES) * per_sample)
        return max(DEFAULT_BUDGET_BYTES, min(free, max(4 * rows * width, enough)))

    def samples_per_chunk(self, batch: int, rows: int, width: int, labels: int, itemsize: int, device: str) -> int:
        """Chunk length for which the live [chunk, rows] matrices fit the budget.

        It follows from the widest shard (`max_rows`), because every rank must make as many all-reduces, one per chunk.
        The arguments are those of `bytes_per_sample`.
        """
        budget = self.chunk_budget(batch, rows, width, labels, itemsize, device)
        per_sample = self.bytes_per_sample(rows, width, labels, itemsize, device)
        return equal_chunk_size(batch, max(1, min(batch, int(budget / per_sample))))


def check_scale(scale: object) -> None:
    """Raise ValueError unless the scale is a positive number. A tensor is refused: it would get no gradient."""
    if isinstance(scale, Tensor):
        raise ValueError("scale is a tensor, which gets no gradient, expected a number such as 64: pass its item()")
    if not (isinstance(scale, Real) and math.isfinite(scale) and float(scale) > 0):
        raise ValueError(f"scale is {scale!r}, expected a finite number > 0 such as 64")


def equal_chunk_size(batch: int, limit: int) -> int:
    """Samples per chunk, at most `limit`: chunks of (nearly) equal length, no short last one; 1 for an empty batch."""
    return -(-batch // -(-batch // limit)) if batch else 1


def check_budget(memory_budget_bytes: int | None) -> None:
    if memory_budget_bytes is not None and memory_budget_bytes <= 0:
        raise ValueError(f"memory_budget_bytes is {memory_budget_bytes}, expected > 0, or None for the default")
