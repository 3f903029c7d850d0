"""Partition of a computation into chunks of samples or slabs of class rows that fit the memory budget.

Legend: G gathered batch, D width, S rows of w that are used on this rank, b samples of a chunk, n rows of a slab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from megacid_kernels.loss_spec import LossSpec

Implementation = Literal["torch", "triton"]

_TILE_ROWS = 128  # slabs except the last end on a tile boundary of the products
_MIN_TRITON_SAMPLES = 8  # tensor cores multiply 16, and equal chunks may be half as long as the budget allows
_LOSS_SLAB_ROWS = 1 << 18  # a loss alone keeps no matrix in Triton; longer slabs make no product faster
_TILE_STATISTICS = 12 / 64  # bytes per entry at most: three numbers per tile of 64 columns
# 16-bit products that a GPU computes while it moves a byte: H100, H200 and B200 have 150 to 300 by their data sheets.
_FLOP_PER_BYTE = 160


class Sizes(NamedTuple):
    """Sizes of a call on one rank."""

    batch: int  # G
    rows: int  # S
    width: int  # D
    labels: int = 1  # per sample
    itemsize: int = 4  # bytes of a number of PyTorch's engine: 4, or 8 for float64 inputs
    gather: bool = False  # the rows are selected from w


class ChunkNeeds(NamedTuple):
    """What an engine needs per chunk of samples."""

    itemsize: int  # bytes of an exponential
    copied_labels: int  # labels per sample whose rows are copied
    min_samples: int  # fewer make the products too slow


class SlabNeeds(NamedTuple):
    """What an engine needs per slab of class rows."""

    fixed_bytes: int
    bytes_per_class: int
    max_classes: int  # longer slabs gain nothing


class Plan(NamedTuple):
    kind: Literal["stored", "recomputed", "loss-only"]
    chunks: list[slice]  # of samples, for "stored"; the other kinds take the whole batch at once
    slabs: list[tuple[int, int]]  # (start, stop) of class rows; all of them in one for "stored"
    bytes: int  # of the matrices of a chunk, or of everything that belongs to a slab
    budget: int  # their bound

    @property
    def samples(self) -> int:
        """Samples of the longest chunk."""
        return max((part.stop - part.start for part in self.chunks), default=0)

    @property
    def rows(self) -> int:
        """Rows of the longest slab."""
        return max(stop - start for start, stop in self.slabs)


class Work(NamedTuple):
    """Products and traffic of a call with both gradients on one rank."""

    flop: int  # of the matrix products
    bytes: int  # read and written in the device's memory by everything of size [S, D] or [G, S]

    @property
    def cost(self) -> int:
        """In FLOP: a byte counts as the products that a GPU computes in its time."""
        return self.flop + _FLOP_PER_BYTE * self.bytes


def with_available_memory(
    spec: LossSpec, device: torch.device, classes: int, width: int, reserved: int = 0
) -> LossSpec:
    """The spec with the memory that `classes` fp32 rows of this width, their two moments and `reserved` bytes leave on
    this GPU, in case the default budget depends on it."""
    if device.type != "cuda" or spec.available_bytes is not None or spec.memory_budget_bytes is not None:
        return spec
    # In whole GiB: equal GPUs may differ by a few pages.
    whole = torch.cuda.get_device_properties(device).total_memory >> 30 << 30
    return replace(spec, available_bytes=whole - 12 * classes * width - reserved)


def make_plan(spec: LossSpec, sizes: Sizes, chosen: Implementation, device: str, gradients: bool = True) -> Plan:
    """The plan of a call.

    In Triton, weight_grad "auto" takes slabs where `Work.cost` is lower or no chunk fits the budget. The comparison is
    that of the widest shard, so all ranks choose alike.

    Args:
        chosen: the implementation.
        device: type of the device, "cpu" or "cuda".
        gradients: False: the loss alone.

    Raises:
        ValueError: the budget holds no chunk, or no slab of one class.
    """
    if not gradients:
        return plan_slabs(spec, sizes, chosen, device, gradients=False)
    in_slabs = spec.weight_grad == "recomputed" or (
        spec.weight_grad == "auto" and chosen == "triton" and _slabs_are_faster(spec, sizes, device)
    )
    return (plan_slabs if in_slabs else plan_chunks)(spec, sizes, chosen, device)


def _slabs_are_faster(spec: LossSpec, sizes: Sizes, device: str) -> bool:
    widest = sizes._replace(rows=spec.max_rows or sizes.rows)
    try:
        chunks = plan_chunks(spec, widest, "triton", device)
    except ValueError:
        chunks = None
    if chunks is not None and len(chunks.chunks) <= 1:
        return False  # it passes over the gradient once, as slabs do, and computes no product twice
    try:
        slabs = plan_slabs(spec, widest, "triton", device)
    except ValueError:
        return False
    return chunks is None or work_of(slabs, spec, widest, "triton").cost < work_of(chunks, spec, widest, "triton").cost


def chunk_needs(spec: LossSpec, sizes: Sizes, chosen: Implementation) -> ChunkNeeds:
    if chosen == "torch":
        return ChunkNeeds(sizes.itemsize, copied_labels=sizes.labels, min_samples=1)
    return ChunkNeeds(_itemsize(spec, sizes, chosen), copied_labels=0, min_samples=_MIN_TRITON_SAMPLES)


def slab_needs(spec: LossSpec, sizes: Sizes, chosen: Implementation, gradients: bool) -> SlabNeeds:
    matrices, filters = len(spec.distributions()), spec.filter_threshold is not None
    itemsize = _itemsize(spec, sizes, chosen)
    if chosen == "torch":
        copies = sizes.gather + gradients
        per_class = itemsize * (sizes.batch * max(1, matrices) + copies * sizes.width)
        return SlabNeeds(0, per_class + filters * sizes.batch, max(1, sizes.rows))
    kept = matrices if gradients else int(spec.weights.gamma > 0)
    size = sizes.batch * (kept * itemsize + filters + _TILE_STATISTICS)
    size += sizes.width * (4 + 4 * gradients)  # the unit rows, and their gradient
    return SlabNeeds(4 * sizes.rows, int(size), max(1, sizes.rows) if kept else _LOSS_SLAB_ROWS)


def _itemsize(spec: LossSpec, sizes: Sizes, chosen: Implementation) -> int:
    return sizes.itemsize if chosen == "torch" else 4 if spec.precision == "fp32" else 2


def plan_chunks(spec: LossSpec, sizes: Sizes, chosen: Implementation, device: str) -> Plan:
    """Chunks for a stored gradient, the same number on every rank. ValueError if the budget is too small."""
    batch, rows, width = sizes[:3]
    needs = chunk_needs(spec, sizes, chosen)
    budget = spec.chunk_budget(batch, rows, width, needs.copied_labels, needs.itemsize, device)
    step = spec.samples_per_chunk(batch, rows, width, needs.copied_labels, needs.itemsize, device)
    if step < min(batch, needs.min_samples):
        raise ValueError(
            f"memory_budget_bytes is {budget}, which allows chunks of {step} samples with "
            f"{spec.max_rows or rows} class rows, expected at least {min(batch, needs.min_samples)}: raise it, or pass "
            "weight_grad='recomputed'"
        )
    chunks = [slice(start, min(start + step, batch)) for start in range(0, batch, step)]
    used = int(step * spec.bytes_per_sample(rows, width, needs.copied_labels, needs.itemsize, device))
    return Plan("stored", chunks, [(0, rows)], used if batch else 0, budget)


def plan_slabs(spec: LossSpec, sizes: Sizes, chosen: Implementation, device: str, gradients: bool = True) -> Plan:
    """Slabs for a recomputed gradient or a loss alone. ValueError if the budget does not hold a slab of one class."""
    needs, rows = slab_needs(spec, sizes, chosen, gradients), sizes.rows
    budget = spec.budget_bytes(device)
    available = budget - needs.fixed_bytes
    if available < needs.bytes_per_class:
        raise ValueError(
            f"memory_budget_bytes is {budget}, expected at least {needs.fixed_bytes + needs.bytes_per_class}, the size "
            "of a slab of one class for this batch: raise it"
        )
    step = min(available // needs.bytes_per_class, needs.max_classes)
    if step > _TILE_ROWS:
        step -= step % _TILE_ROWS
    slabs = [(start, min(start + step, rows)) for start in range(0, rows, step)] or [(0, 0)]
    used = needs.fixed_bytes + min(step, rows) * needs.bytes_per_class
    return Plan("recomputed" if gradients else "loss-only", [], slabs, used, budget)


def work_of(plan: Plan, spec: LossSpec, sizes: Sizes, chosen: Implementation, each_slab: bool = False) -> Work:
    """Products and traffic of a plan with gradients.

    Counted are the class rows, the matrices of exponentials, and both gradients; where an engine makes more passes over
    a matrix, such as for a filter, the traffic is a lower bound.

    Args:
        each_slab: count a call of `Gradients.each_slab`, too, which computes the gradient of a recomputed plan again.
    """
    matrices, elements, entries = len(spec.distributions()), sizes.rows * sizes.width, sizes.rows * sizes.batch
    itemsize, products = _itemsize(spec, sizes, chosen), len(spec.student_products())
    cosines = matrices if chosen == "triton" else sum(bool(spec.distributions(s)) for s in ("student", "teacher"))
    again = plan.kind == "recomputed"
    flop = 2 * entries * sizes.width * (cosines * (1 + again) + products + matrices)
    pieces = len(plan.slabs) if again else len(plan.chunks)
    passes = 1 if again else pieces  # over all rows
    # Unit rows: read once in fp32, written for each product's dtype; then read by every product.
    copies = 2 if chosen == "triton" and spec.precision in ("auto", "fp16") else 1
    rows_moved = (1 + again) * (4 + copies * itemsize) + itemsize * (cosines * (passes + again) + products * passes)
    # The gradient: written by the first product and updated by the others; then through the norm.
    gradient = 4 * (2 * matrices * passes - 1) + 12
    traffic = elements * (rows_moved + gradient) + 3 * itemsize * matrices * entries
    if again:
        traffic += 8 * pieces * products * sizes.batch * sizes.width
    if again and each_slab:
        flop += 2 * entries * sizes.width * (cosines + matrices)
        traffic += elements * (4 + itemsize * (copies + cosines) + gradient) + 2 * itemsize * matrices * entries
    return Work(flop, traffic)


def describe(plan: Plan, sizes: Sizes, chosen: Implementation, work: Work) -> str:
    """The plan in words: pieces, bytes, products and traffic."""
    if plan.kind == "stored":
        pieces = f"gradient stored, {_count(plan.chunks, 'chunk')} of {plan.samples} samples x {sizes.rows} class rows"
    else:
        pieces = f"gradient recomputed, {_count(plan.slabs, 'slab')} of {plan.rows} class rows x {sizes.batch} samples"
    return (
        f"{pieces}, {plan.bytes / 2**20:.1f} MiB within a budget of {plan.budget / 2**20:.1f}; products "
        f"{_number(work.flop / 1e12)} TFLOP, predicted traffic {_number(work.bytes / 2**30)} GiB ({chosen})"
    )


def _number(value: float) -> str:
    """Three digits, without an exponent for large numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(pieces: Sequence[object], name: str) -> str:
    return f"{len(pieces)} {name}{'s' * (len(pieces) != 1)}"
