"""The machine code of a compiled kernel: registers, spilled bytes, and how many instructions of each kind it has.

The disassembler and the reader of resources are those in the triton package. Counts are static: an instruction in a
loop counts once, and both sides of a branch count.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

from megacid.errors import UserError

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?:\.|$)")
# Products on the tensor cores: of warp groups and warps (sm_80 to sm_90, sm_120), and tcgen05 (sm_100).
_MATRIX = re.compile(r"(?:H|I|Q|B|D)G?MMA|UTC[A-Z]*MMA")
_MOVES = {
    "LDG": "global_load",
    "STG": "global_store",
    "LDGSTS": "global_to_shared_copy",
    "LDS": "shared_load",
    "LDSM": "shared_load",
    "STS": "shared_store",
    "STSM": "shared_store",
    "LDL": "local_load",
    "STL": "local_store",
}
_OTHERS = {
    "UTMALDG": "tensor_load",
    "UTMASTG": "tensor_store",
    "BAR": "barrier",
    "SYNCS": "barrier",
}


class MachineCode(NamedTuple):
    """Counts by kind of instruction, see `kind_of`, and "total". Without a matrix instruction all are in `after`."""

    registers: int  # per thread
    spilled_bytes: int  # per thread, stored to and loaded from local memory
    before: Counter[str]  # from the start to the last matrix instruction
    after: Counter[str]


def kind_of(instruction: str) -> str:
    """The kind of an instruction such as "LDG.E.128": "matrix", "exponential", "special_function", "barrier", a move
    with its width in bits ("global_load_128", "shared_store_32"), "tensor_load" or "tensor_store" (whole tiles by the
    tensor memory accelerator), or "other"."""
    name = instruction.split(".")[0]
    if _MATRIX.fullmatch(name):
        return "matrix"
    if name == "MUFU":
        return "exponential" if instruction.startswith("MUFU.EX2") else "special_function"
    if name in ("LDSM", "STSM"):  # one, two or four matrices of 8 x 8 halves in a warp: 32 bits each per thread
        return f"{_MOVES[name]}_{32 * int(instruction[-1]) if instruction[-2] == '.' else 32}"
    if name in _MOVES:
        width = _WIDTH.search(instruction)
        return f"{_MOVES[name]}_{width[1] if width else 32}"
    return _OTHERS.get(name, "other")


def read(disassembly: str, registers: int) -> MachineCode:
    """The counts of a disassembly as nvdisasm prints it."""
    kinds = [kind_of(name) for name in _INSTRUCTION.findall(disassembly) if name != "NOP"]  # NOP pads the end
    last = max((i for i, kind in enumerate(kinds) if kind == "matrix"), default=-1)
    before, after = (Counter({"total": len(part)} | Counter(part)) for part in (kinds[: last + 1], kinds[last + 1 :]))
    spilled = sum(
        count * int(kind.rpartition("_")[2]) // 8
        for kind, count in (before + after).items()
        if kind.startswith("local")
    )
    return MachineCode(registers, spilled, before, after)


def disassemble(cubin: bytes) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        registers = re.search(r"REG:(\d+)", usage)
        assert registers is not None, usage
        return read(_tool("nvdisasm", "-c", file.name), int(registers[1]))


def _tool(name: str, *words: str) -> str:
    """The output of a program that comes with triton."""
    knobs = importlib.import_module("triton.knobs").nvidia
    try:
        path = getattr(knobs, name).path
    except RuntimeError as error:
        raise UserError(f"triton finds no {name} ({error}): set TRITON_{name.upper()}_PATH to one") from error
    try:
        return subprocess.run([path, *words], capture_output=True, text=True, check=True, timeout=60).stdout
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[0]
        raise UserError(
            f"{path} failed ({said}): set TRITON_{name.upper()}_PATH to one that knows this GPU architecture"
        ) from error
