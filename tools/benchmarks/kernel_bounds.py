"""What limits a kernel: the resources of a multiprocessor, and bounds of the time from the rates of one GPU.

The bounds are of perfect overlap: the longest of them is the predicted time. Nothing here is measured when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.sass import MachineCode


class Multiprocessor(NamedTuple):
    """Resources by compute capability, CUDA C++ programming guide."""

    count: int  # of the GPU that stands for the architecture
    shared_bytes: int
    warps: int
    programs: int
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(108, 164 << 10, 64, 32),  # A100
    "sm_90": Multiprocessor(132, 228 << 10, 64, 32),  # H100 SXM
    "sm_100": Multiprocessor(148, 228 << 10, 64, 32),  # B200
    "sm_120": Multiprocessor(188, 100 << 10, 48, 24),  # RTX PRO 6000
}
_RESERVED_SHARED_BYTES = 1 << 10  # of every program, by the driver
_REGISTER_UNIT = 256  # a warp gets multiples of it
_SCHEDULERS = 4  # of a multiprocessor: each has a quarter of the registers and issues one warp instruction per cycle


class Rates(NamedTuple):
    gpu: str  # as in the name that the driver reports
    flop_per_s: float  # of 16-bit factors
    bytes_per_s: float  # read plus written
    special_per_s: float  # special functions, such as exponentials
    warp_instructions_per_s: float


# Data sheet of the H100 SXM: 989 TFLOP/s of dense bf16 products and 3.35 TB/s. With 4096 FLOP per cycle on each of its
# multiprocessors (Hopper white paper) that is a clock of 1.83 GHz.
H100_SHEET_FLOP_PER_S, H100_SHEET_BYTES_PER_S = 989e12, 3.35e12
_H100_CYCLES_PER_S = H100_SHEET_FLOP_PER_S / 4096  # of all multiprocessors together
# Measured on an H100 80GB HBM3, torch 2.11: a bf16 product of 8192 x 8192 x 8192, and a device copy.
H100_FLOP_PER_S, H100_BYTES_PER_S = 798e12, 3.0e12
_SPECIAL_PER_CYCLE = 16  # per multiprocessor, CUDA C++ programming guide, throughput of arithmetic instructions
RATES = {
    "sm_90": Rates(
        "H100 80GB HBM3",
        H100_FLOP_PER_S,
        H100_BYTES_PER_S,
        _SPECIAL_PER_CYCLE * _H100_CYCLES_PER_S,
        _SCHEDULERS * _H100_CYCLES_PER_S,
    )
}


class Work(NamedTuple):
    """What a kernel has to do."""

    cells: tuple[int, int]  # rows and columns of the matrix that its tiles cover
    bytes: int  # read and written, each once
    flop: int = 0  # of matrix products
    exponentials: int = 0


def programs_by(registers: int, shared_bytes: int, warps: int, on: Multiprocessor) -> dict[str, int]:
    """Programs of a kernel that a multiprocessor holds at once, by resource; the smallest applies.

    Args:
        registers: per thread.
        shared_bytes, warps: of a program.
    """
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    resident = on.registers // _SCHEDULERS // per_warp * _SCHEDULERS
    return {
        "registers": resident // warps,
        "shared_memory": on.shared_bytes // (shared_bytes + _RESERVED_SHARED_BYTES),
        "warps": min(on.warps // warps, on.programs),
    }


def bounds(work: Work, code: MachineCode, tile: tuple[int, int], warps: int, rates: Rates) -> dict[str, float]:
    """Lower bounds of a kernel's time in seconds.

    Args:
        tile: rows and columns of `work.cells` that a program covers at a time.
        warps: of a program.

    The issue slots are those of the epilogue: of the instructions after the last matrix instruction, once per tile. For
    a kernel without products these are all of its instructions. Both sides of a branch count, so this bound may be too
    high.
    """
    rows, columns = (-(-cells // length) for cells, length in zip(work.cells, tile))
    return {
        "matrix": work.flop / rates.flop_per_s,
        "memory": work.bytes / rates.bytes_per_s,
        "exponentials": work.exponentials / rates.special_per_s,
        "issue_slots": rows * columns * warps * code.after["total"] / rates.warp_instructions_per_s,
    }


def predicted(bounds_s: Mapping[str, float]) -> tuple[float, str]:
    """The longest bound in seconds, and which one it is."""
    name = max(bounds_s, key=lambda name: bounds_s[name])
    return bounds_s[name], name
