"""How a call is cut so that its matrices fit the memory budget: chunks of samples, or slabs of class rows."""

from __future__ import annotations

from typing import Literal, NamedTuple

from megacid_kernels.problem import Problem

_TILE_ROWS = 128  # slabs that are not the last end where the tiles of a product do


class SlabBytes(NamedTuple):
    """What a slab takes: `fixed`, whatever its length, and `each` per class; more than `most` classes gain nothing."""

    fixed: int
    each: int
    most: int


class Plan(NamedTuple):
    mode: Literal["row", "slab", "loss-only"]
    chunks: list[slice]  # of samples in mode "row"; the others take all of them at once
    slabs: list[tuple[int, int]]  # (start, stop) of class rows; one with all of them in mode "row"


def plan_rows(
    problem: Problem, batch: int, rows: int, width: int, labels: int, itemsize: int, device: str, *, least: int
) -> Plan:
    """The same number of chunks on every rank, see `Problem.chunk`. ValueError where the budget does not hold `least`
    samples; PyTorch asks for none and takes one at a time then, Triton would be a thousand times slower."""
    step = problem.chunk(batch, rows, width, labels, itemsize, device)
    if step < min(batch, least):
        raise ValueError(
            f"memory_budget_bytes is {problem.budget(device)}, which allows chunks of {step} samples beside "
            f"{problem.max_rows or rows} class rows, expected at least {min(batch, least)}: raise it, or take mode 'slab'"
        )
    return Plan("row", [slice(start, min(start + step, batch)) for start in range(0, batch, step)], [(0, rows)])


def plan_slabs(problem: Problem, rows: int, needs: SlabBytes, gradients: bool, device: str) -> Plan:
    """ValueError where not even a slab of one class fits the budget."""
    budget = problem.budget(device)
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
    return Plan("slab" if gradients else "loss-only", [], slabs)
