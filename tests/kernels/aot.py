"""Compile the fused kernels for GPUs that need not be present and print the assembler's report as JSON.

`python tests/kernels/aot.py [nearest] [80] [90] [100] [120]`, by default for all architectures, needs Triton and its
ptxas; TRITON_INTERPRET must not be set. "nearest" compiles that kernel alone, at more widths. tests/kernels/test_aot.py
runs it in a separate process, because another test may have imported the kernels for Triton's interpreter.
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

ARCHITECTURES = (80, 90, 100, 120)
# Of models, besides those of `builds`: the widths at which registers were spilled once.
WIDTHS_OF_NEAREST = tuple(("ieee", "fp16", width) for width in (640, 768, 1024, 1280))
NO_COMPILER = 77  # exit status: Triton or ptxas is missing


class Build(NamedTuple):
    """A kernel with the types and constants of one caller."""

    name: str
    kernel: Any
    types: dict[str, str]  # of the arguments that are not constants
    constants: dict[str, Any]
    warps: int
    stages: int = 3  # Triton's default
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16


def builds(arch: int) -> Iterator[Build]:
    yield from row_builds()
    yield from head_builds()
    yield from product_builds(arch)


def row_builds() -> Iterator[Build]:
    from megacid_kernels.fused import tile_of
    from megacid_kernels.fused.normalize import unit_rows_kernel
    from megacid_kernels.fused.row_update import adamw_rows_kernel, sgd_rows_kernel

    def build(kernel: Any, name: str, width: int, types: dict[str, str], **constants: Any) -> Build:
        tile = tile_of(width)
        constants |= {"D": width, "ROWS": tile.rows, "BLOCK": tile.block}
        return Build(f"{name} D={width}", kernel, types | {"num_rows": "i32"}, constants, tile.warps)

    # 512 and 4096 are one full block, 1000 is a partial one, 129 has unaligned rows, 5120 takes two blocks.
    for width in (129, 512, 1000, 4096, 5120):
        unit = {
            "w_ptr": "*fp32",
            "rows_ptr": "*i64",
            "inverse_ptr": "*fp32",
            "first_ptr": "*fp16",
            "second_ptr": "*bf16",
        }
        yield build(unit_rows_kernel, "unit_rows", width, unit, HAS_ROWS=True, HAS_SECOND=True, INTERPRET=False)
        for moments in ("fp32", "bf16"):
            # lazy "none" with the one, "decay" with the other
            for kernel, name, types in (
                (adamw_rows_kernel, "adamw_rows", _adamw(moments, per_row=moments == "bf16")),
                (sgd_rows_kernel, "sgd_rows", _sgd(moments, per_row=moments == "bf16")),
            ):
                constants = {"COLUMNS": moments == "bf16", "BF16": moments == "bf16", "SCALE_IN_MEMORY": True}
                yield build(kernel, f"{name} {moments}", width, types, **constants, HAS_ROWS=True)
    # All rows, and a number for the gradient's scale: the other branches.
    unit |= {"rows_ptr": "*fp32", "first_ptr": "*fp32", "second_ptr": "*fp32"}
    yield build(unit_rows_kernel, "unit_rows plain", 512, unit, HAS_ROWS=False, HAS_SECOND=False, INTERPRET=False)
    constants = {"COLUMNS": False, "BF16": True, "SCALE_IN_MEMORY": False, "HAS_ROWS": False}
    plain = {"rows_ptr": "*fp32", "grad_scale": "fp32"}
    yield build(adamw_rows_kernel, "adamw_rows plain", 512, _adamw("bf16", per_row=False) | plain, **constants)
    yield build(sgd_rows_kernel, "sgd_rows plain", 512, _sgd("bf16", per_row=False) | plain, **constants)


_FP32_ROWS = {"x_ptr": "*fp32", "w_ptr": "*fp32", "inverse_x_ptr": "*fp32", "inverse_w_ptr": "*fp32"}
_FP32_ROWS |= {"rows_ptr": "*i64"}
_LABELS = {"grad_cos_ptr": "*fp32", "cos_ptr": "*fp32"}


def head_builds() -> Iterator[Build]:
    """The kernels of the head that are bound by memory."""
    from megacid_kernels.fused import (
        exponentials_inplace,
        gradient_epilogue,
        label_gradient,
        row_statistics,
        target,
        tile_of,
    )
    from megacid_kernels.fused.nearest import best_strip_kernel
    from megacid_kernels.fused.row_epilogue import TILE, row_epilogue_kernel

    # One full block, and two of which one is partial.
    for width in (512, 5120):
        tile = tile_of(width)
        cut = {"D": width, "ROWS": tile.rows, "BLOCK": tile.block}
        types = _FP32_ROWS | {
            "slot_ptr": "*i64",
            "own_ptr": "*u8",
            "num_pairs": "i32",
            **{f"{name}_ptr": "*fp32" for name in ("cos", "second", "dpsi")},
            **{name: "fp32" for name in ("m2", "m3", "cos_m2", "sin_m2", "last", "sin_floor")},
        }
        for name, margin in (("target_cosines", False), ("target_margins", True)):
            constants = cut | {"LABELS": 1, "HAS_ROWS": True, "EASY": False}
            constants |= {"MARGIN": margin, "ANGLE": margin, "EXACT": margin}
            yield Build(f"{name} D={width}", target.target_cosines_kernel, types, constants, tile.warps)
        types = _FP32_ROWS | _LABELS | {"slot_ptr": "*i64", "num_rows": "i32", "num_slots": "i32"}
        for name in ("product", "coefficient", "second", "second_coefficient", "third", "third_coefficient"):
            types[f"{name}_ptr"] = "*fp32"
        for name, labels, products in (
            ("finish_x", 1, 1),
            ("finish_x 4 labels", 4, 1),
            ("finish_x 3 products", 1, 3),
        )[: 3 if width == 512 else 1]:
            constants = cut | {"LABELS": labels, "PRODUCTS": products, "HAS_ROWS": True}
            yield Build(f"{name} D={width}", gradient_epilogue.finish_x_kernel, types, constants, tile.warps)
        types = {f"{name}_ptr": "*fp32" for name in ("a", "b", "c", "out")} | {"num_rows": "i32"}
        yield Build(f"difference_along D={width}", row_statistics.difference_along_kernel, types, cut, tile.warps)
        types = {
            "grad_ptr": "*fp32",
            "w_ptr": "*fp32",
            "rows_ptr": "*i64",
            "inverse_ptr": "*fp32",
            "square_ptr": "*fp32",
        }
        yield Build(
            f"rows_through_norm D={width}",
            gradient_epilogue.rows_through_norm_kernel,
            types | {"num_rows": "i32"},
            cut | {"HAS_ROWS": True},
            tile.warps,
        )
        types = _FP32_ROWS | _LABELS | {"grad_ptr": "*fp32", "order_key_ptr": "*i64", "order_entry_ptr": "*i64"}
        tile = label_gradient.tile_of_row(width)
        cut |= {"ROWS": tile.rows, "BLOCK": tile.block, "LABELS": 1, "HAS_ROWS": True}
        yield Build(
            f"add_labels D={width}",
            label_gradient.add_labels_kernel,
            types | {"num_entries": "i32", "num_slots": "i32"},
            cut,
            tile.warps,
        )

    tile = exponentials_inplace.TILE
    cut = {"BLOCKS": exponentials_inplace.BLOCKS, "ROWS": tile.rows, "BLOCK": tile.block, "INTERPRET": False}
    for name, cosines, stored, every in (
        ("in_place fp16", "*fp16", "*bf16", False),
        ("in_place fp16 filter and bias", "*fp16", "*bf16", True),
        ("in_place fp32", "*fp32", "*fp32", False),
    ):
        types = _NEGATIVES | {"cos_ptr": cosines, "matrix_ptr": stored, "stride": "i32"}
        yield Build(
            name,
            exponentials_inplace.exponentials_in_place_kernel,
            types,
            cut | _negatives(every),
            tile.warps,
            aligned=("stride", "hidden_stride"),
        )

    tile = row_statistics.REDUCTION_TILE
    types = {
        "sums_partial_ptr": "*fp32",
        "largest_partial_ptr": "*fp32",
        "removed_partial_ptr": "*i32",
        "sums_ptr": "*fp32",
    }
    types |= {"largest_ptr": "*fp32", "removed_ptr": "*i64", "num_tiles": "i32", "num_rows": "i32"}
    types |= {"scale_log2": "fp32", "shift_log2": "fp32"}
    cut = {"LARGEST": True, "FILTER": True, "HAS_BIAS": True, "ROWS": tile.rows, "BLOCK": tile.block}
    cut |= {"TILES": row_statistics.REDUCED_TILES}
    yield Build("reduce_tiles", row_statistics.reduce_tiles_kernel, types, cut | {"LAST": True}, tile.warps)
    types |= {"removed_ptr": "*i32"}
    yield Build("reduce_tiles in parts", row_statistics.reduce_tiles_kernel, types, cut | {"LAST": False}, tile.warps)

    types = {"value_partial_ptr": "*fp32", "label_partial_ptr": "*i32", "value_ptr": "*fp32", "label_ptr": "*i64"}
    cut = {"ROWS": 32, "BLOCK": 64}
    yield Build("best_strip", best_strip_kernel, types | {"num_rows": "i32", "num_strips": "i32"}, cut, 4)

    types = {name: "*fp32" for name in row_epilogue_kernel.arg_names if name.endswith("_ptr")} | {"own_ptr": "*u8"}
    types |= {"num_rows": "i32"} | {name: "fp32" for name in ("alpha", "beta", "gamma", "scale", "shift")}
    types |= {"soft_scale": "fp32", "soft_shift": "fp32"}
    cut = {"ROWS": TILE.rows, "BLOCK": TILE.block}
    for name, more in (("row_epilogue", False), ("row_epilogue three terms", True)):
        constants = cut | {"ALPHA": True, "BETA": more, "GAMMA": more, "MERGED": more}
        yield Build(name, row_epilogue_kernel, types, constants, TILE.warps)
    yield from label_builds()


def label_builds() -> Iterator[Build]:
    from megacid_kernels.fused.labels import LOCATE_TILE, SHARE_TILE, locate_kernel, share_kernel

    types = {"target_ptr": "*i64", "rows_ptr": "*i64", "own_ptr": "*u8", "slot_ptr": "*i64", "present_ptr": "*u8"}
    types |= {"num_labels_ptr": "*fp32", "owned_ptr": "*fp32"}
    types |= {"num_samples": "i32", "num_rows": "i32", "class_start": "i32"}
    cut = {"ROWS": LOCATE_TILE.rows, "BLOCK": LOCATE_TILE.block}
    for name, labels, has_rows in (("locate", 1, False), ("locate 4 labels in rows", 4, True)):
        yield Build(name, locate_kernel, types, cut | {"LABELS": labels, "HAS_ROWS": has_rows}, LOCATE_TILE.warps)
    types = {"num_labels_ptr": "*fp32", "share_ptr": "*fp32", "sample_weight_ptr": "*fp32", "num_samples": "i32"}
    cut = {"ROWS": SHARE_TILE.rows, "BLOCK": SHARE_TILE.block, "MEAN": True}
    yield Build("share", share_kernel, types, cut, SHARE_TILE.warps)


def product_builds(arch: int) -> Iterator[Build]:
    """The kernels of the head that are bound by arithmetic, with the table's tiles for this architecture."""
    import torch

    from megacid_kernels.fused.exponentials import exponentials_kernel
    from megacid_kernels.fused.tuning import lookup, tiles_for

    names = {"fp16": "float16", "bf16": "bfloat16"}
    fp32 = tiles_for(torch.device("cpu"), torch.float32, 512)
    # 512 and 768 are multiples of the depth, 1000 is not.
    for kind, dtype, width in (
        ("", "fp16", 512),
        ("", "bf16", 1000),
        (" filter and bias", "fp16", 768),
        (" hidden", "fp16", 768),
        (" filter and bias", "fp32", 512),
    ):
        tiles = lookup(f"sm_{arch}", names[dtype], width) if dtype in names else fp32
        assert tiles is not None
        masks = kind in (" filter and bias", " hidden")
        tile = tiles.forward.with_room_for_masks() if masks else tiles.forward
        types = _NEGATIVES | _factors(tile, dtype) | {"matrix_stride": "i32"}
        types |= {"matrix_ptr": "*fp32" if dtype == "fp32" else "*bf16"}
        if tile.descriptors:
            types["matrix_ptr"] = f"tensordesc<bf16[{tile.rows}, {tile.columns // 2}]>"
        constants = _negatives("bias" in kind) | {"D": width, "INTERPRET": False, "STORE": True}
        constants |= {"DESCRIPTORS": tile.descriptors}
        constants |= {"HAS_HIDDEN": kind == " hidden"} | _cut(tile)
        aligned = ("matrix_stride", "hidden_stride")
        title = f"exponentials{kind} {dtype} D={width}"
        yield Build(title, exponentials_kernel, types, constants, tile.warps, tile.stages, aligned)
    usual = (("ieee", "fp16", 512), ("ieee", "bf16", 1000), ("ieee", "fp32", 512), ("tf32x3", "fp32", 512))
    yield from nearest_builds(arch, usual)


def nearest_builds(arch: int, kinds: tuple[tuple[str, str, int], ...]) -> Iterator[Build]:
    """`nearest` for triples of precision, dtype and width."""
    import torch

    from megacid_kernels.fused.nearest import nearest_kernel
    from megacid_kernels.fused.tuning import lookup, tiles_for

    names = {"fp16": "float16", "bf16": "bfloat16"}
    fp32 = tiles_for(torch.device("cpu"), torch.float32, 512)
    for precision, dtype, width in kinds:
        tiles = lookup(f"sm_{arch}", names[dtype], width) if dtype in names else fp32
        assert tiles is not None
        tile = tiles.nearest
        types = {"x_ptr": "*" + dtype, "c_ptr": "*" + dtype, "half_norm_ptr": "*fp32", "value_ptr": "*fp32"}
        types |= {"label_ptr": "*i32", "num_rows": "i32", "num_columns": "i32", "tiles_per_strip": "i32"}
        constants = {"D": width, "HAS_NORM": dtype != "bf16", "PRECISION": precision, "INTERPRET": False} | _cut(tile)
        title = f"nearest {precision} {dtype} D={width}"
        yield Build(title, nearest_kernel, types, constants, tile.warps, tile.stages)


def _factors(tile: Any, dtype: str) -> dict[str, str]:
    """Types of both factors: pointers or descriptors."""
    if not tile.descriptors:
        return {"x_ptr": "*" + dtype, "w_ptr": "*" + dtype}
    rows = {"x_ptr": tile.rows, "w_ptr": tile.columns}
    return {name: f"tensordesc<{dtype}[{length}, {tile.depth}]>" for name, length in rows.items()}


def _cut(tile: Any) -> dict[str, int]:
    return {"ROWS": tile.rows, "BLOCK": tile.columns, "DEPTH": tile.depth, "GROUP": tile.group}


_NEGATIVES = {
    "slot_ptr": "*i64",
    "own_ptr": "*u8",
    "bias_ptr": "*fp32",
    "hidden_ptr": "*u8",
    "sums_ptr": "*fp32",
    "largest_ptr": "*fp32",
    "removed_ptr": "*i32",
    "num_rows": "i32",
    "num_columns": "i32",
    "hidden_stride": "i32",
    "scale_log2": "fp32",
    "shift_log2": "fp32",
    "threshold": "fp32",
}


def _negatives(every: bool) -> dict[str, Any]:
    return {"LABELS": 1, "HAS_BIAS": every, "FILTER": every, "HAS_HIDDEN": False, "LARGEST": True}


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


def ptxas_path(arch: int) -> str | None:
    """The assembler for sm_`arch` that Triton ships, or that TRITON_PTXAS_PATH or TRITON_PTXAS_BLACKWELL_PATH names."""
    import triton

    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return str(get_ptxas(arch).path)
    except (ImportError, AttributeError, RuntimeError, TypeError):  # other versions of Triton
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        return str(path) if path.exists() else None


def measure(build: Build, arch: int, ptxas: str) -> dict[str, Any]:
    """Compile for sm_`arch`; registers and spills are those that ptxas reports for the PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(build.kernel.arg_names)
    source = ASTSource(
        fn=build.kernel,
        signature={name: "constexpr" if name in build.constants else build.types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        # As for tensors that PyTorch allocates: pointers are multiples of 16 bytes.
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in build.types.items()
            if kind.startswith("*") or name in build.aligned
        },
    )
    options = {"num_warps": build.warps, "num_stages": build.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target[1]}", str(path), "-o", str(Path(folder) / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spills is not None and registers is not None, report

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
        # Copies of whole tiles by the tensor memory accelerator.
        "tile_loads": ptx.count("cp.async.bulk.tensor.2d.shared"),
        "tile_stores": ptx.count("cp.async.bulk.tensor.2d.global"),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        # Of the tensor cores' asynchronous products: sm_90's, and sm_100's.
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "exponentials": ptx.count("ex2.approx"),
        "elements": build.constants["ROWS"] * build.constants["BLOCK"],
    }


def main() -> int:
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set: the kernels would not be compiled; unset it")
    try:
        import triton  # noqa: F401

    except ImportError:
        print("Triton is not installed", file=sys.stderr)
        return NO_COMPILER
    words = sys.argv[1:]
    measured = {}
    for arch in [int(word) for word in words if word.isdigit()] or ARCHITECTURES:
        ptxas = ptxas_path(arch)
        if ptxas is None:
            print(f"Triton has no ptxas for sm_{arch}", file=sys.stderr)
            return NO_COMPILER
        chosen = nearest_builds(arch, WIDTHS_OF_NEAREST) if "nearest" in words else builds(arch)
        measured |= {f"{build.name} sm_{arch}": measure(build, arch, ptxas) for build in chosen}
    json.dump(measured, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
