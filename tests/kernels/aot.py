"""Compile the fused kernels for GPUs that need not be present and print the assembler's report as JSON.

`python tests/kernels/aot.py [nearest] [80] [90] [100] [120]`, by default for all architectures, needs Triton and its
ptxas; TRITON_INTERPRET must not be set. "nearest" compiles that kernel alone, at more widths. tests/kernels/test_aot.py
runs it in a separate process, because another test may have imported the kernels for Triton's interpreter.

The launchers are called on tensors without memory, so types, constants and alignments are those of their own launches.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels"), str(_ROOT / "tools")]

from benchmarks.absent_gpu import Launch, absent_gpu  # noqa: E402

ARCHITECTURES = (80, 90, 100, 120)
# Of models, besides those of `builds`: the widths at which registers were spilled once.
WIDTHS_OF_NEAREST = tuple(("ieee", "fp16", width) for width in (640, 768, 1024, 1280))
NO_COMPILER = 77  # exit status: Triton or ptxas is missing
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_SAMPLES, _ROWS = 4096, 1 << 18


class Build(NamedTuple):
    """One kernel that a call of a launcher launches."""

    name: str
    kernel: str  # the Triton function
    call: Callable[[], object]
    which: int = 0  # of the launches of this kernel


def builds() -> Iterator[Build]:
    yield from row_builds()
    yield from label_builds()
    yield from in_place_builds()
    yield from product_builds()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _indices(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int64)


# ---- rows of the weight ---------------------------------------------------------------------------------------------


def row_builds() -> Iterator[Build]:
    from megacid_kernels.fused import unit_rows

    # 512 and 4096 are one full block, 1000 is a partial one, 129 has unaligned rows, 5120 takes two blocks.
    for width in (129, 512, 1000, 4096, 5120):
        w, rows = _empty(_ROWS, width), _indices(_SAMPLES)
        unit = functools.partial(unit_rows, w, rows, (torch.float16, torch.bfloat16))
        yield Build(f"unit_rows D={width}", "unit_rows_kernel", unit)
        for moments in ("fp32", "bf16"):
            # lazy "none" with the one, "decay" with the other
            options: dict[str, Any] = {"per_row": moments == "bf16", "rows_S": rows, "grad_scale": _empty(1)}
            yield Build(f"adamw_rows {moments} D={width}", "adamw_rows_kernel", _adamw(width, moments, **options))
            yield Build(f"sgd_rows {moments} D={width}", "sgd_rows_kernel", _sgd(width, moments, **options))
    # All rows, and a number for the gradient's scale: the other branches.
    yield Build("unit_rows plain D=512", "unit_rows_kernel", functools.partial(unit_rows, _empty(_ROWS, 512)))
    options = {"per_row": False, "rows_S": None, "grad_scale": 0.5}
    yield Build("adamw_rows plain D=512", "adamw_rows_kernel", _adamw(512, "bf16", **options))
    yield Build("sgd_rows plain D=512", "sgd_rows_kernel", _sgd(512, "bf16", **options))


def _adamw(width: int, moments: str, *, per_row: bool, **options: Any) -> Callable[[], object]:
    from megacid_kernels.fused import AdamWFactors, adamw_rows_

    weight, moment, grad, keys = _step(width, moments, options["rows_S"])
    column = _empty(len(grad))
    factors = AdamWFactors(*[column if per_row else 0.9] * 3, column, column)
    return functools.partial(
        adamw_rows_, weight, moment, moment, grad, factors, betas=(0.9, 0.98), keys=keys, **options
    )  # fmt: skip


def _sgd(width: int, moments: str, *, per_row: bool, **options: Any) -> Callable[[], object]:
    from megacid_kernels.fused import SGDFactors, sgd_rows_

    weight, moment, grad, keys = _step(width, moments, options["rows_S"])
    factors = SGDFactors(*[_empty(len(grad)) if per_row else 0.9] * 2)
    return functools.partial(sgd_rows_, weight, moment, grad, factors, lr=0.1, weight_decay=0.1, keys=keys, **options)


def _step(width: int, moments: str, rows_S: Tensor | None) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(weight, moment, gradient, rounding keys)"""
    count = _ROWS if rows_S is None else len(rows_S)
    keys = _empty(count, dtype=torch.int32), _empty(width, dtype=torch.int32)
    return _empty(_ROWS, width), _empty(_ROWS, width, dtype=_DTYPES[moments]), _empty(count, width), keys


# ---- the head -------------------------------------------------------------------------------------------------------


def label_builds() -> Iterator[Build]:
    """The kernels of the head that are bound by memory or by their launch, but for the matrix in place."""
    from megacid_kernels.fused import (
        add_labels_,
        label_order,
        locate_labels,
        rows_through_norm_,
        target_cosines,
        target_margins,
    )
    from megacid_kernels.fused.row_statistics import difference_along

    for name, count, given in (("locate", 1, None), ("locate 4 labels in rows", 4, _indices(_ROWS))):
        call = functools.partial(locate_labels, _indices(_SAMPLES, count), given, _ROWS, 1000, mean=True)
        yield Build(name, "locate_kernel", call)
        if given is None:
            yield Build("share", "share_kernel", call)
    yield from sampled_rows_builds()
    column, each, slot = _empty(_SAMPLES), _empty(_SAMPLES, 1), _indices(_SAMPLES, 1)
    own = _empty(_SAMPLES, 1, dtype=torch.bool)
    yield from epilogue_builds(column, own)
    # One full block, and two of which one is partial.
    for width in (512, 5120):
        x, w = _empty(_SAMPLES, width), (_empty(_ROWS, width), _indices(_ROWS), _empty(_ROWS))
        call = functools.partial(target_cosines, x, column, *w, slot, own)
        yield Build(f"target_cosines D={width}", "target_cosines_kernel", call)
        call = functools.partial(
            target_margins, x, column, *w, slot, own, m2=0.5, m3=0.1, easy_margin=False, exact=True, sin_floor=1e-6
        )
        yield Build(f"target_margins D={width}", "target_cosines_kernel", call)
        yield from finish_x_builds(x, column, w)
        call = functools.partial(difference_along, x, x, x)
        yield Build(f"difference_along D={width}", "difference_along_kernel", call)
        call = functools.partial(rows_through_norm_, *w[:1], *w, factor=_empty(1))
        yield Build(f"rows_through_norm D={width}", "rows_through_norm_kernel", call)
        call = functools.partial(add_labels_, w[0], label_order(slot, own), each, each, x, column, *w)
        yield Build(f"add_labels D={width}", "add_labels_kernel", call)


def sampled_rows_builds() -> Iterator[Build]:
    from megacid_kernels.fused.hashing import rounding_row_keys
    from megacid_kernels.fused.sampled_rows import Strata, count_labels, merge_rows_

    updates = _empty(_ROWS, dtype=torch.int32)
    call = functools.partial(rounding_row_keys, _indices(_ROWS), updates, 0, (1 << 62, -(1 << 62)))
    yield Build("rounding_keys", "rounding_keys_kernel", call)
    labels, low, high = _indices(_SAMPLES), range(99_000, 100_000), range(90_000)
    for classes in (1_000_000, 3_000_000_000):  # numbers of 32 and of 64 bits
        strata = Strata(classes, 100_000, 10_000, 1 << 62, 0, classes, low, high)
        yield Build(
            f"count_labels of {classes}", "count_labels_kernel", functools.partial(count_labels, labels, strata)
        )
        rows, positive = _indices(_ROWS), _empty(_ROWS, dtype=torch.bool)
        call = functools.partial(merge_rows_, rows, positive, labels, _indices(_SAMPLES + 1), strata)
        yield Build(f"merge_rows of {classes}", "merge_rows_kernel", call)


def epilogue_builds(column: Tensor, own: Tensor) -> Iterator[Build]:
    from megacid_kernels.fused import SoftmaxRows, row_epilogue

    rows = SoftmaxRows(column, column, 64.0, 0.0)
    one = functools.partial(row_epilogue, column, column, column, student=rows, dpsi_b=column)
    yield Build("row_epilogue", "row_epilogue_kernel", one)
    more = functools.partial(one, teacher=rows, kl=(rows, rows), gap_b=column, own_b=own, weights=(0.5, 0.3, 0.2))
    yield Build("row_epilogue three terms", "row_epilogue_kernel", more)


def finish_x_builds(x: Tensor, column: Tensor, w: tuple[Tensor, Tensor, Tensor]) -> Iterator[Build]:
    from megacid_kernels.fused import finish_x_

    width = x.shape[1]
    for name, labels, more in (
        ("finish_x", 1, ()),
        ("finish_x 4 labels", 4, ()),
        ("finish_x 3 products", 1, ((x, column), (x, column))),
    )[: 3 if width == 512 else 1]:
        each, slot = _empty(_SAMPLES, labels), _indices(_SAMPLES, labels)
        call = functools.partial(finish_x_, x, column, each, each, x, column, *w, slot, more=more)
        yield Build(f"{name} D={width}", "finish_x_kernel", call)


def in_place_builds() -> Iterator[Build]:
    from megacid_kernels.fused import exponentials_

    columns = 1 << 25  # their tiles are reduced in parts
    own = {"slot_bl": _indices(_SAMPLES, 1), "own_bl": _empty(_SAMPLES, 1, dtype=torch.bool)}
    for name, dtype, options in (
        ("in_place fp16", torch.float16, {}),
        ("in_place fp16 filter and bias", torch.float16, {"threshold": 0.5, "bias_S": _empty(columns)}),
        ("in_place fp32", torch.float32, {}),
    ):
        cos = _empty(_SAMPLES, columns, dtype=dtype)
        call = functools.partial(exponentials_, cos, **own, scale=64.0, shift=1.0, **options)
        yield Build(name, "exponentials_in_place_kernel", call)
        if options:
            yield Build("reduce_tiles in parts", "reduce_tiles_kernel", call)
            yield Build("reduce_tiles", "reduce_tiles_kernel", call, which=1)


def product_builds() -> Iterator[Build]:
    """The kernels of the head that are bound by arithmetic, with the table's tiles for the architecture."""
    from megacid_kernels.fused import exponentials, nearest, pitched

    own = {"slot_bl": _indices(_SAMPLES, 1), "own_bl": _empty(_SAMPLES, 1, dtype=torch.bool)}
    filtered = {"threshold": 0.5, "bias_S": _empty(_ROWS)}
    # 512 and 768 are multiples of the depth, 1000 is not.
    for kind, dtype, width, options in (
        ("", "fp16", 512, {}),
        ("", "bf16", 1000, {}),
        (" filter and bias", "fp16", 768, filtered),
        (" hidden", "fp16", 768, {"hidden_bS": pitched(_SAMPLES, _ROWS, torch.bool, torch.device("cuda"))}),
        (" filter and bias", "fp32", 512, filtered),
    ):
        x, w = (_empty(n, width, dtype=_DTYPES[dtype]) for n in (_SAMPLES, _ROWS))
        call = functools.partial(exponentials, x, w, **own, scale=64.0, shift=1.0, **options)
        yield Build(f"exponentials{kind} {dtype} D={width}", "exponentials_kernel", call)
    usual = (("ieee", "fp16", 512), ("ieee", "bf16", 1000), ("ieee", "fp32", 512), ("tf32x3", "fp32", 512))
    yield from nearest_builds(usual)
    x, w = (_empty(n, 512, dtype=torch.float16) for n in (_SAMPLES, _ROWS))
    yield Build("best_strip", "best_strip_kernel", functools.partial(nearest, x, w))


def nearest_builds(kinds: tuple[tuple[str, str, int], ...]) -> Iterator[Build]:
    """`nearest` for triples of precision, dtype and width."""
    from megacid_kernels.fused import nearest

    for precision, dtype, width in kinds:
        x, c = (_empty(n, width, dtype=_DTYPES[dtype]) for n in (_SAMPLES, _ROWS))
        half_norm = _empty(_ROWS) if dtype != "bf16" else None
        call = functools.partial(nearest, x, c, half_norm, precision=precision)
        yield Build(f"nearest {precision} {dtype} D={width}", "nearest_kernel", call)


# ---- the assembler's report -----------------------------------------------------------------------------------------


def ptxas_path(arch: int) -> str | None:
    """The assembler for sm_`arch` that Triton ships, or that TRITON_PTXAS_PATH or TRITON_PTXAS_BLACKWELL_PATH names."""
    import triton

    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return str(get_ptxas(arch).path)
    except (ImportError, AttributeError, RuntimeError, TypeError):  # other versions of Triton
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        return str(path) if path.exists() else None


def measure(launch: Launch, ptxas: str) -> dict[str, Any]:
    """Compile a launch; registers and spills are those that ptxas reports for the PTX."""
    compiled = launch.compile()
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
        "elements": launch.constants["ROWS"] * launch.constants["BLOCK"],
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
        with absent_gpu(f"sm_{arch}") as launches:
            for build in nearest_builds(WIDTHS_OF_NEAREST) if "nearest" in words else builds():
                launches.clear()
                build.call()
                chosen = [launch for launch in launches if launch.kernel == build.kernel][build.which]
                measured[f"{build.name} sm_{arch}"] = measure(chosen, ptxas)
    json.dump(measured, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
