"""Predicts the collectives of a training step from the run file: their number and bytes.

Legend: G global batch, D width, W ranks. Steps that log, save or check replicas have more of them, and so has the first
step, in which the ranks learn how many labels to exchange.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from megacid.classifier.label_exchange import HEADER
from megacid.classifier.sampling import num_dims
from megacid.config.conditions import is_mean_over_samples
from megacid.config.schema import RunFile
from megacid.distributed.reduction import is_left_open
from megacid.losses.global_batch import STUDENT
from megacid.losses.instance import gathered_student, gathered_teacher
from megacid.models.feature_tower import FeatureTower
from megacid.training.classifier_plan import plan_classifier
from megacid.training.flops import forward_on_meta
from megacid.training.memory import student_bytes
from megacid.training.observe import Observed
from megacid.training.schedule import groups_of_run

if TYPE_CHECKING:
    from megacid.models.student import Student

MIB = 2**20
_DECISION = 5  # numbers of `Guard.decide`, without those of `Observed`
# Defaults of DeepSpeed: elements of a bucket of gradients and of parameters, of the largest parameter that each rank
# keeps whole, and of the largest student whose parameters stay gathered from the forward to the backward.
_BUCKET, _PERSISTENT, _REUSED = 500_000_000, 100_000, 1_000_000_000


class Collective(NamedTuple):
    """`number` equal collectives. size: bytes of the gathered, scattered or reduced tensor of each."""

    what: str
    kind: Literal["all_gather", "all_reduce", "reduce_scatter"]
    size: int
    number: int = 1

    def bytes_sent(self, world: int) -> float:
        """Bytes that a rank sends in a ring of `world` ranks."""
        return (2 if self.kind == "all_reduce" else 1) * self.size * self.number * (world - 1) / world


def step_collectives(
    run: RunFile,
    student: Student | FeatureTower,
    num_classes: int,
    world: int,
    device: str,
    teacher_width: int | None = None,
) -> list[Collective]:
    """The collectives of a training step.

    Args:
        student: not inside an engine yet.
        num_classes: over all ranks; 0 without a classifier.
        world: W.
        device: "cpu" or "cuda", on which the classifier's chunks depend.
        teacher_width: of all teachers together; None: the student's.
    """
    trained = STUDENT if run.accumulation > 1 else _trained_embeddings(student)  # a GradientCache differentiates both
    reserved = student_bytes(run, student, world, device)
    found = objective_collectives(run, num_classes, student.embed_dim, world, device, trained, teacher_width, reserved)
    return found + engine_collectives(run, student, world)


def _trained_embeddings(student: Student | FeatureTower) -> tuple[str, ...]:
    """Names of the student's embeddings that have a gradient: that of a frozen tower has none."""
    if all(p.requires_grad for p in student.parameters()):
        return STUDENT
    out = forward_on_meta(student)
    return tuple(name for name, x in zip(STUDENT, (out.image, out.text)) if x.requires_grad)


def objective_collectives(
    run: RunFile,
    num_classes: int,
    width: int,
    world: int,
    device: str,
    trained: Sequence[str] = STUDENT,
    teacher_width: int | None = None,
    reserved: int = 0,
) -> list[Collective]:
    """Those of the loss terms and of the guard's decision; the arguments are those of `step_collectives`.

    Args:
        width: D.
        trained: names of the student's embeddings that have a gradient.
        reserved: bytes of the student on a GPU, which the classifier's budget leaves.
    """
    loss = run.megacid.loss
    student = gathered_student(loss.instance, loss.contrastive, loss.affinity, loss.form)
    teacher = gathered_teacher(loss.instance, loss.affinity, bool(loss.cluster and (loss.beta or loss.gamma)))
    found, matrix = [], run.global_batch * width
    if teacher:
        stored = 2 * run.global_batch * (teacher_width or width)  # float16, as tools/embed.py writes them
        found.append(Collective("teacher embeddings", "all_gather", stored, len(teacher)))
    if student:
        found.append(Collective("student embeddings", "all_gather", 4 * matrix, len(student)))
        differentiated = sum(name in trained for name in student)
        found.append(Collective("their gradients", "reduce_scatter", 4 * matrix, differentiated))
    if loss.cluster:
        images = None if "image_S" in student else "image_S" in trained
        found += _classifier(run, num_classes, width, world, device, images, reserved)
    terms = sum(weight > 0 for weight in (loss.instance, loss.contrastive, loss.mse, loss.affinity))
    if terms:
        times = run.accumulation if is_mean_over_samples(loss) else 1  # else once for the whole batch
        found.append(Collective("losses and decision", "all_reduce", 4 * terms, times))
    found.append(Collective("losses and decision", "all_reduce", 8 * (_DECISION + len(Observed._fields))))
    return found


def _classifier(
    run: RunFile, num_classes: int, width: int, world: int, device: str, images: bool | None, reserved: int
) -> list[Collective]:
    """Those of the cluster term. images: whether they have a gradient; None: other terms gather them."""
    labels = run.megacid.data.labels_per_sample
    spec, *_, plan = plan_classifier(run, num_classes, width, world, device, reserved)
    student, teacher = (bool(spec.distributions(source)) for source in ("student", "teacher"))
    message = HEADER + run.micro_batch * run.accumulation * labels
    # Per sample: sums of exponentials, the KL's gap, the number of owned labels, cosines of the labels.
    statistics = len(spec.distributions()) + (spec.weights.gamma > 0) + 1 + labels * (2 * student + teacher)
    chunk = plan.samples or run.global_batch
    found = [
        Collective("labels", "all_gather", 8 * world * message),
        *(
            Collective("class statistics", "all_reduce", 4 * statistics * min(chunk, run.global_batch - start))
            for start in range(0, run.global_batch, chunk)
        ),
    ]
    if images is not None:
        matrix = 4 * run.global_batch * num_dims(width, run.megacid.classifier.feature_rate)
        found.append(Collective("student embeddings", "all_gather", matrix))
        if student and images:
            found.append(Collective("their gradients", "reduce_scatter", matrix))
    return found


def engine_collectives(run: RunFile, student: Student | FeatureTower, world: int) -> list[Collective]:
    """The reduction of the student's gradients, their norm, and the parameters of ZeRO.

    DeepSpeed's own reduction, which `is_left_open` rules out, sums gradients with an all-reduce at ZeRO 1 and 2, too.
    The number of all-gathers of ZeRO 3, which depends on the order of the modules, is not predicted: its bytes count as
    one collective. Neither are parameters that its prefetch gathers without using them, nor offload and quantized
    communication.
    """
    groups = [[p.numel() for p in group["params"]] for group in groups_of_run(run, student)]
    itemsize, zero = 2 if run.bf16 else 4, run.deepspeed.get("zero_optimization", {})
    total = sum(map(sum, groups))
    if run.zero_stage == 1 and is_left_open(run):
        flat = [itemsize * _padded(sum(group), 2 * world) for group in groups]
        return [
            *(Collective("student gradients", "reduce_scatter", size) for size in flat),
            Collective("student gradient norm", "all_reduce", 8),
            *(Collective("student weights", "all_gather", size) for size in flat),
        ]
    if run.zero_stage < 3:
        buckets = math.ceil(total / int(zero.get("reduce_bucket_size", _BUCKET) if run.zero_stage else _BUCKET))
        reductions = buckets * (run.accumulation if run.zero_stage == 2 else 1)
        found = [Collective("student gradients", "all_reduce", itemsize * total // buckets, reductions)]
        if run.zero_stage:
            found.append(Collective("student gradient norm", "all_reduce", 4, len(groups)))
            if run.bf16:
                found.append(Collective("student gradient norm", "all_reduce", 1))
            found += [
                Collective("student weights", "all_gather", itemsize * _padded(sum(g), 2 * world)) for g in groups
            ]
        return found
    limit = int(zero.get("stage3_param_persistence_threshold", _PERSISTENT))
    parameters = {name: p.numel() for name, p in student.named_parameters()}
    forward_only = _forward_only(student)
    # Each micro-batch but the last has two forwards; see GradientCache.
    forwards, backwards = 2 * run.accumulation - 1, run.accumulation
    reused = run.accumulation == 1 and sum(parameters.values()) <= int(zero.get("stage3_max_reuse_distance", _REUSED))
    gathered = sum(
        _padded(size, world) * (1 if size <= limit or reused else forwards + backwards * (name not in forward_only))
        for name, size in parameters.items()
    )
    return [
        Collective(
            "student gradients",
            "reduce_scatter",
            itemsize * sum(_padded(size, world) for group in groups for size in group),
            run.accumulation,
        ),
        Collective("student gradient norm", "all_reduce", 8, len(groups)),
        Collective("student weights", "all_gather", itemsize * gathered),
    ]


def _forward_only(student: Student | FeatureTower) -> set[str]:
    """Names of the frozen parameters that no backward needs: those of modules whose output has no gradient."""
    if all(p.requires_grad for p in student.parameters()):
        return set()
    differentiated: dict[str, bool] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
            differentiated[name] = any(value.requires_grad for value in tensors)

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in student.named_modules()]
    try:
        forward_on_meta(student)
    finally:
        for hook in hooks:
            hook.remove()

    def owner(name: str) -> str:  # of modules that are not called, such as those inside attention, their parent
        while name not in differentiated:
            name = name.rpartition(".")[0]
        return name

    return {name for name, _ in student.named_parameters() if not differentiated[owner(name.rpartition(".")[0])]}


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def communication_estimate(collectives: Sequence[Collective], world: int) -> dict[str, float]:
    """MiB that a rank sends in a step, by part."""
    found: dict[str, float] = {}
    for one in collectives:
        found[one.what] = found.get(one.what, 0.0) + one.bytes_sent(world) / MIB
    return found
