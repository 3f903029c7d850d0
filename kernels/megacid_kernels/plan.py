"""Partition of a computation into chunks of samples or slabs of class rows that fit the memory budget."""

from __future__ import annotations

from typing import Literal, NamedTuple

from megacid_kernels.loss_spec import LossSpec

_TILE_ROWS = 128  # slabs except the last end on a tile boundary of the products


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


def plan_chunks(spec: LossSpec, batch: int, rows: int, width: int, needs: ChunkNeeds, device: str) -> Plan:
    """Chunks for a stored gradient, the same number on every rank. ValueError if the budget is too small."""
    step = spec.samples_per_chunk(batch, rows, width, needs.copied_labels, needs.itemsize, device)
    if step < min(batch, needs.min_samples):
        raise ValueError(
            f"memory_budget_bytes is {spec.budget_bytes(device)}, which allows chunks of {step} samples with "
            f"{spec.max_rows or rows} class rows, expected at least {min(batch, needs.min_samples)}: raise it, or pass "
            "weight_grad='recomputed'"
        )
    chunks = [slice(start, min(start + step, batch)) for start in range(0, batch, step)]
    return Plan("stored", chunks, [(0, rows)])


def plan_slabs(spec: LossSpec, rows: int, needs: SlabNeeds, gradients: bool, device: str) -> Plan:
    """Slabs for a recomputed gradient or a loss alone. ValueError if the budget does not hold a slab of one class."""
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
    return Plan("recomputed" if gradients else "loss-only", [], slabs)
