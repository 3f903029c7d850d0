"""Arithmetic of a training step, counted by torch's FLOP counter, and the peak arithmetic of known GPUs."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from megacid.classifier import PartialFC
from megacid.classifier.sampling import num_dims
from megacid.config.schema import RunFile
from megacid.errors import one_line
from megacid.models.feature_tower import FeatureTower
from megacid.models.output import StudentOutput

if TYPE_CHECKING:
    from megacid.models.student import Student

log = logging.getLogger("megacid")

_SAMPLES = 2  # batch normalisation needs more than one

# Dense bf16 TFLOP/s by a word of the device name, from the vendors' data sheets; the first that matches.
_PEAKS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "B200": 2250.0,
    "A100": 312.0, "A40": 149.7, "A10": 125.0, "L40S": 362.0, "L4": 121.0, "MI300X": 1307.0,
}  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by its name; None for a device that is not in the table."""
    return next((peak for words, peak in _PEAKS.items() if re.search(rf"\b{words}\b", device_name)), None)


def forward_on_meta(student: Student | FeatureTower) -> StudentOutput:
    """Forward of two samples on meta tensors in place of the parameters, whose `requires_grad` they have.

    Nothing is computed, and the student stays as it is.
    """
    meta = {
        name: torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
        for name, tensor in [*student.named_parameters(), *student.named_buffers()]
    }
    image = torch.empty(_SAMPLES, *student.image_shape, device="meta")
    text = torch.zeros(_SAMPLES, student.text_length, dtype=torch.int64, device="meta")
    with torch.random.fork_rng(devices=[]):
        out: StudentOutput = functional_call(student, meta, (image, text))
    return out


def count_student(student: Student | FeatureTower, *, recomputes: bool = False) -> tuple[float, float]:
    """Floating-point operations of one sample's forward and of its backward, without recomputed activations.

    Args:
        recomputes: whether the student recomputes activations, which is turned off for the count.
    """
    try:
        if recomputes:
            student.clip.set_grad_checkpointing(False)  # type: ignore[operator, union-attr]
        with FlopCounterMode(display=False) as counter:
            out = forward_on_meta(student)
            forward = counter.get_total_flops()
            torch.stack([value.sum() for value in out]).sum().backward()
    finally:
        if recomputes:
            student.clip.set_grad_checkpointing(True)  # type: ignore[operator, union-attr]
    return forward / _SAMPLES, (counter.get_total_flops() - forward) / _SAMPLES


def student_flops(student: Student | FeatureTower, *, recomputes: bool = False) -> float:
    """Floating-point operations of one sample's forward and backward; see `count_student`."""
    return sum(count_student(student, recomputes=recomputes))


def classifier_flops(run: RunFile, num_classes: int, embed_dim: int) -> float:
    """Floating-point operations of the cluster term of one sample, forward and backward, without recomputed logits.

    A product of the embedding with the sampled rows takes 2 operations per row and dimension. The student's logits need
    two more of that size for the gradients of embedding and rows, the teacher's one more for the rows under beta.
    """
    config, loss = run.megacid.classifier, run.megacid.loss
    product = 2.0 * num_classes * config.sample_rate * num_dims(embed_dim, config.feature_rate)
    return product * (3 * bool(loss.alpha or loss.gamma) + bool(loss.beta or loss.gamma) + bool(loss.beta))


def step_flops(run: RunFile, student: Student | FeatureTower, head: PartialFC | None) -> float | None:
    """Floating-point operations of one step of all ranks; None for a student that torch cannot count.

    The losses between pairs of embeddings are left out: they are below 1 % of a ViT-B/32 at batch 32,768.
    """
    try:
        sample = student_flops(student, recomputes=run.megacid.student.grad_checkpointing)
    except Exception as error:  # a model of another package may need more than shapes
        log.warning("the arithmetic of student %s cannot be counted (%s)", run.megacid.student.model, one_line(error))
        return None
    if head is not None:
        sample += classifier_flops(run, head.num_classes, student.embed_dim)
    return run.global_batch * sample
