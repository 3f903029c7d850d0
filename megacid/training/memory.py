"""Estimates the peak memory of a run from its shapes: what is there for the whole run, and what each phase adds.

How much DeepSpeed adds in a phase was read in its code and measured on CPU ranks (tests/training/test_memory.py).
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from megacid.classifier import PartialFC
from megacid.classifier.sampling import num_dims
from megacid.config.conditions import is_mean_over_samples
from megacid.config.optimizers import OPTIMIZERS
from megacid.config.schema import RunFile
from megacid.distributed.parallel import Parallel, shard_range
from megacid.distributed.reduction import is_left_open
from megacid.models.feature_tower import FeatureTower
from megacid.training.classifier_plan import plan_classifier
from megacid.training.schedule import groups_of_run
from megacid_kernels.loss_spec import DEVICE_BYTES

if TYPE_CHECKING:
    from megacid.models.student import Student

log = logging.getLogger("megacid")

MIB = 2**20
EMA = "EMA of the student"
BUCKET = 500_000_000  # DeepSpeed's default reduce_bucket_size, in elements


class MemoryEstimate(NamedTuple):
    """Memory of rank 0, which has the largest class shard, in MiB.

    always: parts that are there for the whole run. phases: what each phase of a step needs in addition; one at a time.
    checkpoint: host memory while a checkpoint is written, one of the phases on a CPU. offloaded: host memory of an
    optimizer that `offload_optimizer` takes off a GPU, and of the average of its fp32 weights.
    """

    always: dict[str, float]
    phases: dict[str, float]
    checkpoint: float
    offloaded: float

    @property
    def peak(self) -> float:
        return sum(self.always.values()) + max(self.phases.values())

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


def memory_estimate(
    run: RunFile,
    student: Student | FeatureTower,
    num_classes: int,
    world: int,
    device: str,
    teacher_width: int | None = None,
) -> MemoryEstimate:
    """The memory of a run, without the process itself. Takes seconds for a large student.

    Args:
        student: not inside an engine yet.
        num_classes: over all ranks; 0 without a classifier.
        world: number of ranks.
        device: "cpu" or "cuda".
        teacher_width: of all teachers together; None: the student's.
    """
    from megacid.training.activations import count_activations  # imports what a start needs only for an estimate

    sizes = [p.numel() for p in student.parameters()]
    trained = sum(sizes) - frozen_count(student)
    teacher_width = teacher_width or student.embed_dim
    always, gradients, offloaded = _student(run, student, world, device)
    kept = int(sum(always.values()))
    always["batch"] = _batch(run, student, device, teacher_width)
    head: dict[str, float] = {}
    if num_classes:
        stored, head = _classifier(run, num_classes, student.embed_dim, world, device, kept)
        always |= stored
    row_gradient = head.get("their gradient", 0.0)
    embeddings = run.global_batch * 4 * (4 * student.embed_dim + 2 * teacher_width)
    autocast = torch.bfloat16 if run.deepspeed.get("torch_autocast", {}).get("enabled") else None
    activations = count_activations(student, run.micro_batch, torch.bfloat16 if run.bf16 else torch.float32, autocast)
    width, stage = 2 if run.bf16 else 4, run.zero_stage
    share = 1 / world if stage else 1.0
    gathered = sum(sizes) * width if stage == 3 and world > 1 else 0.0
    backward = activations.peak_with_gradients if run.accumulation == 1 else activations.peak + gradients
    own = is_left_open(run)
    reduce = gradients if own else 2.0 * gradients  # in one bucket, and its flat copy
    if device == "cuda" and stage in (1, 2):  # the whole buffer is allocated; on a CPU only pages that are written
        zero = run.deepspeed.get("zero_optimization", {})
        bucket = zero.get("reduce_bucket_size", BUCKET) * width * (2 if zero.get("overlap_comm") else 1)
        backward, reduce = backward + bucket, reduce + max(0.0, bucket - gradients)
    # Copies of the parameters that rank 0 writes, and of their moments; ZeRO gathers one parameter at a time.
    checkpoint = 4 * (1 + moments_of(run)) * (sum(sizes[::world]) + (max(sizes) if stage else 0))
    phases = {
        "forward and objective": gathered + activations.after_forward + embeddings + sum(head.values()),
        "backward": gathered + backward + embeddings + row_gradient,
        "reduction of gradients": reduce + row_gradient,
        "optimizer step": trained * share * _update_bytes(run, world, bool(offloaded)) + row_gradient,
    }
    if device == "cpu":
        phases["checkpoint"] = checkpoint
    in_mib = [{name: size / MIB for name, size in part.items()} for part in (always, phases)]
    return MemoryEstimate(in_mib[0], in_mib[1], checkpoint / MIB, offloaded / MIB)


def student_bytes(run: RunFile, student: Student | FeatureTower, world: int, device: str) -> int:
    """Bytes of a GPU that the student's weights, optimizer and average have for the whole run; 0 for a CPU, where the
    classifier's budget does not depend on them."""
    return 0 if device == "cpu" else int(sum(_student(run, student, world, device)[0].values()))


def _student(
    run: RunFile, student: Student | FeatureTower, world: int, device: str
) -> tuple[dict[str, float], float, float]:
    """Bytes of the student's parts on this device, the bytes of all gradients, and those of what the host keeps."""
    muon = sum(p.numel() for group in groups_of_run(run, student) if group.get("muon") for p in group["params"])
    parameters = sum(p.numel() for p in student.parameters())
    parts = student_sizes(run, parameters, world, device, frozen_count(student), muon)
    gradients = parts.pop("student gradients")
    return parts, gradients, sum(parts.pop(name, 0.0) for name in _on_the_host(run, device))


def memory_warning(peak: float, num_classes: int, device: str) -> str | None:
    """What to say about a peak, in MiB, that the GPU does not hold; one of 80 GB is assumed where there is none."""
    found = torch.cuda.is_available()
    size = (torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if found else DEVICE_BYTES) / MIB
    if device != "cuda" or peak <= size:
        return None
    lower = "set classifier.memory_budget_gb below the budget of the classifier's plan, or " if num_classes else ""
    return (
        f"the estimated peak of rank 0 is {peak:,.0f} MiB, expected at most {size:,.0f}, the memory of the GPU: "
        f"{lower}raise gradient_accumulation_steps"
    )


def _update_bytes(run: RunFile, world: int, offloaded: bool) -> int:
    """Bytes of a parameter's gradient in an update: as it came, and in fp32. Our own reduction has it in its buffer."""
    stage = run.zero_stage
    if is_left_open(run) and (stage or world > 1):
        return 0
    return 4 * (stage > 0 and not offloaded) + ((2 if run.bf16 else 4) if stage < 3 else 0)


def moments_of(run: RunFile) -> int:
    """Number of moments that the student's optimizer keeps for a parameter; Muon has fewer for its own."""
    return len(OPTIMIZERS[run.deepspeed["optimizer"]["type"]].moments)


def _on_the_host(run: RunFile, device: str) -> tuple[str, ...]:
    """The parts that `offload_optimizer` takes off a GPU: the optimizer, and the average of its fp32 weights."""
    offload = run.deepspeed.get("zero_optimization", {}).get("offload_optimizer", {})
    return ("student optimizer", EMA) if device == "cuda" and offload.get("device", "none") != "none" else ()


def student_sizes(
    run: RunFile, parameters: int, world: int, device: str, frozen: int = 0, muon: int = 0
) -> dict[str, float]:
    """Bytes of the student's weights, whole gradients, optimizer, average, and of what ZeRO-3 keeps between steps.

    muon: number of parameters that Muon updates, with one moment each.
    """
    trained = parameters - frozen
    width, stage = 2 if run.bf16 else 4, run.zero_stage
    share = 1 / world if stage else 1.0
    sizes = {
        "student weights": parameters * width * (share if stage == 3 else 1.0),
        "student gradients": trained * width,
        # The moments, and the fp32 weights that DeepSpeed keeps when it partitions, also in an fp32 run.
        "student optimizer": (trained * (moments_of(run) + (stage > 0)) - muon) * share * 4,
    }
    if run.megacid.student.ema_decay is not None:
        sizes[EMA] = trained * 4 / world
    if frozen and device == "cpu":
        sizes["frozen weights for checkpoints"] = frozen * 4
    if is_left_open(run) and (stage or world > 1):
        # At stage 1 this rank's part, and on several ranks all of them, which gloo receives once more.
        parts = (share if stage else 0) + (world > 1) * (2 if stage and device == "cpu" else 1)
        sizes["buffer of gradients"] = trained * 4 * parts
    if stage == 3:
        zero = run.deepspeed.get("zero_optimization", {})
        bucket = min(trained, zero.get("reduce_bucket_size", BUCKET))
        sizes["gradients of ZeRO-3 and their bucket"] = (trained * share + bucket) * width
    return sizes


def _batch(run: RunFile, student: Student | FeatureTower, device: str, teacher_width: int) -> float:
    """Bytes of the micro-batches that are held at once, with their teacher embeddings; on a GPU also of the next."""
    pixel = 4 if isinstance(student, FeatureTower) else 1
    sample = math.prod(student.image_shape) * pixel + student.text_length * 8 + 2 * teacher_width * 4
    held = 1 if is_mean_over_samples(run.megacid.loss) else run.accumulation
    return run.micro_batch * (held + (device == "cuda")) * sample


def _classifier(
    run: RunFile, num_classes: int, embed_dim: int, world: int, device: str, reserved: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of the class shard and its optimizer, and of what the cluster term needs in a step."""
    config = run.megacid.classifier
    local = shard_range(num_classes, 0, world)[1]
    moments = (2 if config.optimizer == "adamw" else 1) * (4 if config.moments == "fp32" else 2)
    used = num_dims(embed_dim, config.feature_rate)
    spec, *_, plan = plan_classifier(run, num_classes, embed_dim, world, device, reserved)
    rows = spec.max_rows or local
    stored: dict[str, float] = {
        "classifier rows": local * (embed_dim * 4 + 4),
        "classifier optimizer": local * (embed_dim * moments + 4 + (12 if config.lazy == "decay" else 0)),
    }
    step: dict[str, float] = {}
    if plan.kind == "stored" or used < embed_dim:  # slabs read all dimensions in place
        step["sampled rows"] = rows * used * 4
    if config.weight_grad == "recomputed":
        return stored, step | {"a slab: rows, logits, gradient": plan.bytes}
    # With a part of the dimensions there is also the gradient over all of them.
    step["their gradient"] = rows * 4 * (used + embed_dim * (used < embed_dim))
    return stored, step | {"their logits" if plan.kind == "stored" else "a slab: rows, logits": plan.bytes}


def frozen_count(student: Student | FeatureTower) -> int:
    """Number of the student's parameters that are frozen."""
    return sum(p.numel() for p in student.parameters() if not p.requires_grad)


def report_memory(run: RunFile, student: Student | FeatureTower, head: PartialFC | None, parallel: Parallel) -> None:
    """Log the sizes of the run and the images in shared memory."""
    parameters = sum(p.numel() for p in student.parameters())
    frozen = frozen_count(student)
    num_classes = head.num_classes if head else 0
    log.info(
        "student %s: %.2f M parameters, width %d; classes %d; ranks %d; ZeRO stage %d; batch %d = %d x %d x %d ranks",
        run.megacid.student.model, parameters / 1e6, student.embed_dim, num_classes, parallel.world, run.zero_stage,
        run.global_batch, run.micro_batch, run.accumulation, parallel.world,
    )  # fmt: skip
    if run.megacid.student.freeze:
        log.info("frozen: %.2f M of the %.2f M parameters", frozen / 1e6, parameters / 1e6)
    if workers := run.megacid.data.workers:
        prefetch, shape = run.megacid.data.prefetch, student.image_shape
        log.info(
            "shared memory of the images prefetched by a rank: %.1f MiB = %d workers x %d x %d x %s bytes",
            shared_memory(run, student),
            workers, prefetch, run.micro_batch, " x ".join(map(str, shape)),
        )  # fmt: skip


def shared_memory(run: RunFile, student: Student | FeatureTower) -> float:
    """MiB of the images that a rank's loader processes prefetch."""
    config = run.megacid.data
    return config.workers * config.prefetch * run.micro_batch * math.prod(student.image_shape) / MIB
