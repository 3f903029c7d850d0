"""How a call is cut so that its matrices fit the memory budget: chunks of samples, or slabs of class rows."""

from __future__ import annotations

from typing import Literal, NamedTuple

from megacid_kernels.loss_spec import LossSpec

_TILE_ROWS = 128  # slabs that are not the last end where the tiles of a product do


class SlabBytes(NamedTuple):
    """What a slab takes: `fixed`, whatever its length, and `each` per class; more than `most` classes gain nothing."""

    fixed: int
    each: int
    most: int


class Plan(NamedTuple):
    kind: Literal["stored", "recomputed", "loss-only"]
    chunks: list[slice]  # of samples where the gradient is stored; the others take all of them at once
    slabs: list[tuple[int, int]]  # (start, stop) of class rows; one with all of them where the gradient is stored


def plan_chunks(
    spec: LossSpec, batch: int, rows: int, width: int, labels: int, itemsize: int, device: str, *, least: int
) -> Plan:
    """The same number of chunks on every rank, see `LossSpec.chunk`. ValueError where the budget does not hold `least`
    samples; PyTorch asks for none and takes one at a time then, Triton would be a thousand times slower."""
    step = spec.chunk(batch, rows, width, labels, itemsize, device)
    if step < min(batch, least):
        raise ValueError(
            f"memory_budget_bytes is {spec.budget(device)}, which allows chunks of {step} samples beside "
            f"{spec.max_rows or rows} class rows, expected at least {min(batch, least)}: raise it, or pass weight_grad='recomputed'"
        )
    return Plan("stored", [slice(start, min(start + step, batch)) for start in range(0, batch, step)], [(0, rows)])


def plan_slabs(spec: LossSpec, rows: int, needs: SlabBytes, gradients: bool, device: str) -> Plan:
    """ValueError where not even a slab of one class fits the budget."""
    budget = spec.budget(device)
    left = budget - needs.fixed
    if left < needs.each:
        raise ValueError(
            f"memory_budget_bytes is {budget}, expected at least {needs.fixed + needs.each}: that is what a slab of one class "
            "takes; it grows with the batch"
        )
    most = min(left // needs.each, needs.most)
    if most > _TILE_ROWS:
        most -= most % _TILE_ROWS
    slabs = [(start, min(start + most, rows)) for start in range(0, rows, most)] or [(0, 0)]
    return Plan("recomputed" if gradients else "loss-only", [], slabs)
