"""Compile the fused kernels for GPUs that need not be there and print what the assembler says of them, as JSON.

`python tests/kernels/aot.py` needs Triton and its ptxas; TRITON_INTERPRET must not be set. tests/kernels/test_aot.py runs
it as a process of its own: another test may have imported the kernels for Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

ARCHITECTURES = (80, 90)
NO_COMPILER = 77  # exit status: Triton or ptxas is missing


class Build(NamedTuple):
    """One kernel as one caller would have it compiled."""

    name: str
    kernel: Any
    types: dict[str, str]  # of the arguments that are not constants
    constants: dict[str, Any]
    warps: int


def builds() -> Iterator[Build]:
    from megacid_kernels.fused import tile_of
    from megacid_kernels.fused.rows import through_norm_kernel, unit_rows_kernel
    from megacid_kernels.fused.update import adamw_rows_kernel, sgd_rows_kernel

    def build(kernel: Any, name: str, width: int, types: dict[str, str], **constants: Any) -> Build:
        tile = tile_of(width)
        constants |= {"D": width, "ROWS": tile.rows, "BLOCK": tile.block}
        return Build(f"{name} D={width}", kernel, types | {"num_rows": "i32"}, constants, tile.warps)

    # 512 and 4096 are one full block, 1000 is a ragged one, 129 has rows that are not aligned, 5120 takes two.
    for width in (129, 512, 1000, 4096, 5120):
        unit = {
            "w_ptr": "*fp32",
            "rows_ptr": "*i64",
            "inverse_ptr": "*fp32",
            "first_ptr": "*fp16",
            "second_ptr": "*bf16",
        }
        yield build(unit_rows_kernel, "unit_rows", width, unit, HAS_ROWS=True, HAS_SECOND=True, INTERPRET=False)
        back = {"grad_ptr": "*fp32", "unit_ptr": "*fp32", "inverse_ptr": "*fp32"}
        yield build(through_norm_kernel, "through_norm", width, back)
        for moments in ("fp32", "bf16"):
            # lazy "none" with the one, "decay" with the other
            for kernel, name, types in (
                (adamw_rows_kernel, "adamw_rows", _adamw(moments, per_row=moments == "bf16")),
                (sgd_rows_kernel, "sgd_rows", _sgd(moments, per_row=moments == "bf16")),
            ):
                constants = {"COLUMNS": moments == "bf16", "BF16": moments == "bf16", "SCALE_IN_MEMORY": True}
                yield build(kernel, f"{name} {moments}", width, types, **constants, HAS_ROWS=True, THROUGH_NORM=True)
    # All rows, a gradient that has been through the norm, a number for its scale: the other branches.
    unit |= {"rows_ptr": "*fp32", "first_ptr": "*fp32", "second_ptr": "*fp32"}
    yield build(unit_rows_kernel, "unit_rows plain", 512, unit, HAS_ROWS=False, HAS_SECOND=False, INTERPRET=False)
    constants = {"COLUMNS": False, "BF16": True, "SCALE_IN_MEMORY": False, "HAS_ROWS": False, "THROUGH_NORM": False}
    plain = {"rows_ptr": "*fp32", "grad_scale": "fp32"}
    yield build(adamw_rows_kernel, "adamw_rows plain", 512, _adamw("bf16", per_row=False) | plain, **constants)
    yield build(sgd_rows_kernel, "sgd_rows plain", 512, _sgd("bf16", per_row=False) | plain, **constants)


_STEP = {
    "weight_ptr": "*fp32",
    "grad_ptr": "*fp32",
    "rows_ptr": "*i64",
    "row_key_ptr": "*i32",
    "column_key_ptr": "*i32",
    "grad_scale": "*fp32",
}


def _adamw(moments: str, *, per_row: bool) -> dict[str, str]:
    moment, factor = "*fp32" if moments == "fp32" else "*i16", "*fp32" if per_row else "fp32"
    types = _STEP | {"mean_ptr": moment, "square_ptr": moment, "rate_ptr": "*fp32", "eps_ptr": "*fp32"}
    return types | {"keep1": factor, "keep2": factor, "shrink": factor, "add1": "fp32", "add2": "fp32"}


def _sgd(moments: str, *, per_row: bool) -> dict[str, str]:
    moment, factor = "*fp32" if moments == "fp32" else "*i16", "*fp32" if per_row else "fp32"
    return _STEP | {"velocity_ptr": moment, "keep": factor, "shrink": factor, "lr": "fp32", "weight_decay": "fp32"}


def ptxas_path() -> str | None:
    """The assembler that Triton brings along, or that TRITON_PTXAS_PATH names."""
    import triton

    try:
        from triton import knobs

        return str(knobs.nvidia.ptxas.path)
    except (ImportError, AttributeError, RuntimeError):
        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        return str(found) if found.exists() else None


def measure(build: Build, arch: int, ptxas: str) -> dict[str, Any]:
    """Compile for sm_`arch`; registers and spills are what ptxas reports for the PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(build.kernel.arg_names)
    source = ASTSource(
        fn=build.kernel,
        signature={name: "constexpr" if name in build.constants else build.types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        # What the launcher finds for tensors as PyTorch allocates them: pointers are multiples of 16 bytes.
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in build.types.items()
            if kind.startswith("*")
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": build.warps})
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target[1]}", str(path), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spills is not None and registers is not None, said

    def wide(operation: str) -> int:
        return len(re.findall(rf"{operation}\.global\S*\.v4\.b32", ptx))

    return {
        "target": target[1],
        "threads": 32 * compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "registers": int(registers[1]),
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "wide_loads": wide("ld"),
        "wide_stores": wide("st"),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "elements": build.constants["ROWS"] * build.constants["BLOCK"],
    }


def main() -> int:
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set: the kernels would not be compiled; unset it")
    try:
        import triton  # noqa: F401

        ptxas = ptxas_path()
    except ImportError:
        ptxas = None
    if ptxas is None:
        print("Triton or its ptxas is not installed", file=sys.stderr)
        return NO_COMPILER
    found = {f"{build.name} sm_{arch}": measure(build, arch, ptxas) for build in builds() for arch in ARCHITECTURES}
    json.dump(found, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
