"""Predicts the time of a training step from the run file and what the hardware costs: a model, not a measurement.

Legend: G global batch, D width, W ranks, R class rows that a rank uses in a step.

The parts of a step follow each other. Only the loader works at the same time, and a step waits for the rest of its
time. docs/scaling.md has the formulas. Not counted: kernel launches that the GPU waits for, the latency of ZeRO 3's
all-gathers (see `engine_collectives`), checkpoints and evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megacid.config.conditions import is_mean_over_samples
from megacid.config.schema import RunFile
from megacid.models.feature_tower import FeatureTower
from megacid.training.classifier_plan import ClassifierPlan, plan_classifier
from megacid.training.communication import Collective, step_collectives
from megacid.training.flops import classifier_flops, count_student
from megacid.training.memory import moments_of, student_bytes

if TYPE_CHECKING:
    from megacid.models.student import Student


@dataclass(frozen=True)
class Costs:
    """Seconds that a rank takes for a unit of work.

    tower_flop, product_flop: a floating-point operation of the student in bf16, and of the products of embeddings with
    each other and with class rows. fp32: time of an operation in fp32 over that in 16 bits. memory_byte: a byte read or
    written. link_byte, network_byte: a byte that a rank sends inside its node, and that one of the node's network
    cards, one for each rank, sends to another node. hop, network_hop: the latency of a step of a ring, inside a node
    and between two. sample: a loaded sample, of one core. step: what does not depend on the size of a step. source:
    whose costs they are.
    """

    tower_flop: float = 0.0
    fp32: float = 1.0
    product_flop: float = 0.0
    memory_byte: float = 0.0
    link_byte: float = 0.0
    network_byte: float = 0.0
    hop: float = 0.0
    network_hop: float = 0.0
    sample: float = 0.0
    step: float = 0.0
    ranks_per_node: int = 8
    source: str = ""


# An NVIDIA DGX H100. Data sheet: 989 TFLOP/s dense in bf16, 67 in fp32, 3.35 TB/s of memory, NVLink with 450 GB/s and a
# 400 Gbit/s network card in each direction for each GPU. Hops: the ring latencies of NCCL's protocol "Simple" in its
# src/graph/tuning.cc. The factors are the fractions that we assume a step to reach; nothing was measured on a GPU. A
# sample: data.decoder "pillow" at 256 px, measured by tools/bench.py --suite loader.
H100 = Costs(
    tower_flop=1 / (0.4 * 989e12),
    fp32=(0.4 * 989) / (0.6 * 67),
    product_flop=1 / (0.5 * 989e12),
    memory_byte=1 / (0.8 * 3.35e12),
    link_byte=1 / (0.8 * 450e9),
    network_byte=1 / (0.8 * 50e9),
    hop=3.4e-6,
    network_hop=14e-6,
    sample=3.8e-3,
    source="an H100, assumed",
)
# One thread of an AMD EPYC and gloo, in CPU time: fitted by tools/bench.py --suite step-time (docs/benchmarks.md),
# which does not measure loading.
EPYC = Costs(
    tower_flop=1.25e-11,
    product_flop=9.21e-12,
    memory_byte=1.44e-10,
    link_byte=1.68e-9,
    source="one thread of an AMD EPYC, fitted",
)
COSTS = {"cuda": H100, "cpu": EPYC}

_LOGIT_BYTES = {"cuda": 6, "cpu": 24}  # of an exponential: written and read by two products; PyTorch's engine also sums
# Class rows are copied and normalised; their gradient is written, projected, and summed for the norm.
_CPU_ROW_BYTES = 36
# Written and read by two products; what else passes over exponentials of the classifier finds them in the cache.
_CPU_EXPONENTIAL_BYTES = 12


@dataclass(frozen=True)
class Step:
    """What the time of a training step depends on. forward_flop, backward_flop: of one sample."""

    run: RunFile
    world: int
    device: str
    width: int
    teacher_width: int
    num_classes: int
    forward_flop: float
    backward_flop: float
    trained: int
    collectives: list[Collective]
    student_bytes: int = 0  # see `plan_classifier`

    @classmethod
    def of(
        cls,
        run: RunFile,
        student: Student | FeatureTower,
        num_classes: int,
        world: int,
        device: str,
        teacher_width: int | None = None,
    ) -> Step:
        """The arguments are those of `step_collectives`."""
        flop = count_student(student, recomputes=run.megacid.student.grad_checkpointing)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        collectives = step_collectives(run, student, num_classes, world, device, teacher_width)
        reserved = student_bytes(run, student, world, device)
        widths = student.embed_dim, teacher_width or student.embed_dim
        return cls(run, world, device, *widths, num_classes, *flop, trained, collectives, reserved)

    @property
    def samples(self) -> float:
        """Of a rank."""
        return self.run.global_batch / self.world

    @property
    def rows(self) -> float:
        """R: the drawn class rows and those of other labels, as if labels were spread evenly over the classes."""
        classes, rate = self.num_classes, self.run.megacid.classifier.sample_rate
        if not classes:
            return 0.0
        labels = self.run.global_batch * self.run.megacid.data.labels_per_sample
        labelled = -classes * math.expm1(-labels / classes)
        return (rate * classes + (1 - rate) * labelled) / self.world

    def time(self, costs: Costs) -> dict[str, float]:
        """Seconds by part."""
        parts = {
            "forward": forward(self, costs),
            "objective: pairs": pair_losses(self, costs),
            "objective: classes": classifier(self, costs),
            "backward": backward(self, costs),
            "update: student": student_update(self, costs),
            "update: classes": row_update(self, costs),
            "communication": communication(self, costs),
            "fixed": costs.step,
        }
        overlapped = sum(parts.values()) if self.run.megacid.data.workers else 0.0
        return parts | {"waiting for data": max(0.0, loading(self, costs) - overlapped)}


def _tower_flop(step: Step, costs: Costs) -> float:
    autocast = step.run.deepspeed.get("torch_autocast", {}).get("enabled", False)
    return costs.tower_flop * (1.0 if step.run.bf16 or autocast else costs.fp32)


def forward(step: Step, costs: Costs) -> float:
    """Seconds of the student's forwards: with gradient caching each micro-batch but the last has two."""
    accumulation = step.run.accumulation
    forwards = 1.0 if is_mean_over_samples(step.run.megacid.loss) else (2 * accumulation - 1) / accumulation
    return _tower_flop(step, costs) * step.samples * step.forward_flop * forwards


def backward(step: Step, costs: Costs) -> float:
    """Seconds of the student's backward, with the forward that gradient checkpointing repeats."""
    flop = step.backward_flop + step.forward_flop * step.run.megacid.student.grad_checkpointing
    return _tower_flop(step, costs) * step.samples * flop


def pair_losses(step: Step, costs: Costs) -> float:
    """Seconds of the losses over matrices [G / W, G] of similarities."""
    loss, teachers = step.run.megacid.loss, len(step.run.megacid.data.teachers)
    sigmoid = loss.form == "sigmoid"  # one matrix for both directions, always in plain PyTorch
    terms = [(loss.instance, 4, 8), (loss.contrastive, 2, 6)]
    # Products: the similarities, and a gradient for each factor that is the student's, or the scale's.
    matrices = sum(count for weight, count, _ in terms if weight) / (1 + sigmoid)
    products = sum(count for weight, _, count in terms if weight) / (1 + sigmoid)
    affinity = teachers * bool(loss.affinity)
    # The teachers' similarities have their own widths; those of the student and their gradients have its width.
    width = step.width * (products + 6 * affinity) + 2 * step.teacher_width * bool(loss.affinity)
    moved = matrices * _LOGIT_BYTES["cpu" if sigmoid else step.device] + 4 * affinity * _LOGIT_BYTES[step.device]
    similarities = step.samples * step.run.global_batch
    flop = 2 * similarities * width
    return flop * costs.product_flop + similarities * moved * costs.memory_byte


def classifier(step: Step, costs: Costs) -> float:
    """Seconds of the cluster term: products and traffic of its plan, for R rows."""
    if not step.num_classes:
        return 0.0
    planned = plan_classifier(step.run, step.num_classes, step.width, step.world, step.device, step.student_bytes)
    if step.device == "cpu":
        flop, moved = _fitted_classifier(step, planned)
    else:
        flop, moved = (amount * step.rows / planned.sizes.rows for amount in planned.work)
        if planned.chosen == "torch" or planned.spec.precision == "fp32":
            flop *= costs.fp32
    return flop * costs.product_flop + moved * costs.memory_byte


def _fitted_classifier(step: Step, planned: ClassifierPlan) -> tuple[float, float]:
    """Operations and bytes to which the costs of a CPU are fitted."""
    run, entries, matrices = step.run, step.run.global_batch * step.rows, len(planned.spec.distributions())
    drawn = run.megacid.classifier.sample_rate * step.num_classes / step.world
    flop = run.global_batch * classifier_flops(run, step.num_classes, step.width) / step.world * step.rows / drawn
    if planned.plan.kind == "recomputed":  # two more products for the exponentials, one for the rows' gradient
        flop += 3 * 2 * entries * matrices * planned.sizes.width
    return flop, entries * matrices * _CPU_EXPONENTIAL_BYTES + step.rows * planned.sizes.width * _CPU_ROW_BYTES


def row_update(step: Step, costs: Costs) -> float:
    """Seconds of the row optimizer, which reads and writes weights and moments and reads the gradient."""
    config = step.run.megacid.classifier
    moments = (2 if config.optimizer == "adamw" else 1) * (4 if config.moments == "fp32" else 2)
    return step.rows * step.width * (8 + 4 + 2 * moments) * costs.memory_byte


def student_update(step: Step, costs: Costs) -> float:
    """Seconds to copy the student's gradients for the reduction, for their norm, and to update this rank's share.

    The update reads and writes fp32 weights and moments, and reads the gradient. The average of the weights, which is
    divided over the ranks at every ZeRO stage, is read and written with them. Muon's products are not counted.
    """
    share = 1 / step.world if step.run.zero_stage else 1.0
    updated = (8 + 4 + 8 * moments_of(step.run)) * share
    averaged = 12 / step.world if step.run.megacid.student.ema_decay is not None else 0.0
    return step.trained * (updated + averaged + 3 * (2 if step.run.bf16 else 4)) * costs.memory_byte


def communication(step: Step, costs: Costs) -> float:
    """Seconds of the collectives: the bytes and latency of rings, and for all-reduces the latency of NCCL's trees."""
    local = min(step.world, costs.ranks_per_node)
    nodes = math.ceil(step.world / local)
    ring = (step.world - nodes) * costs.hop + (nodes - 1) * costs.network_hop
    tree = 2 * ((local - 1) * costs.hop + math.log2(nodes) * costs.network_hop)
    # The node's network cards share what its ring sends to the next node.
    byte = max(costs.link_byte, costs.network_byte / local if nodes > 1 else 0.0)
    return sum(
        one.number * (tree if one.kind == "all_reduce" else ring) + one.bytes_sent(step.world) * byte
        for one in step.collectives
    )


def loading(step: Step, costs: Costs) -> float:
    """Seconds to load the samples of a rank in its loader processes; rows of features cost nothing."""
    data = step.run.megacid.data
    return 0.0 if data.features else step.samples * costs.sample / max(1, data.workers)
