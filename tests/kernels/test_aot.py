"""The fused kernels compile for GPUs that need not be present, and the machine code has what bounds their speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aot
import pytest

# fp32 matrices [S, D] that a kernel reads and writes, and 16-bit ones that it writes.
_READ = {"unit_rows": 1, "adamw_rows fp32": 4, "sgd_rows fp32": 3}
_WRITTEN = {"unit_rows": 0, "adamw_rows fp32": 3, "sgd_rows fp32": 2}
_WRITTEN_16 = {"unit_rows": 2}
# The same of the head's kernels on rows: matrices read, matrices written.
_HEAD = {"target_cosines": (2, 0), "finish_x": (3, 1), "finish_x 4 labels": (6, 1), "finish_x 3 products": (5, 1)}
_HEAD |= {"target_margins": (2, 0), "difference_along": (3, 0)}
_HEAD |= {"rows_through_norm": (2, 1), "add_labels": (3, 1)}
# Bytes of shared memory per program; 1 KiB of each is reserved by the driver.
_SHARED = {"sm_80": 166912 - 1024, "sm_90": 232448 - 1024, "sm_100": 232448 - 1024, "sm_120": 101376 - 1024}


# The default run covers sm_90, whose products take the tensor cores' asynchronous path.
@pytest.fixture(
    scope="module",
    params=[arch if arch == 90 else pytest.param(arch, marks=pytest.mark.slow) for arch in aot.ARCHITECTURES],
    ids=lambda arch: f"sm_{arch}",
)
def arch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def compiled(arch: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    kernels = compile_for(tmp_path_factory.mktemp("triton"), str(arch))
    assert len(kernels) == 67 and all(name.endswith(f" sm_{arch}") for name in kernels)
    return kernels


def compile_for(cache: Path, *words: str) -> dict[str, dict[str, Any]]:
    """The report of `aot.py` with these arguments."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(Path(aot.__file__).resolve()), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    if done.returncode == aot.NO_COMPILER:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-4000:]
    kernels: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return kernels


def is_product(name: str) -> bool:
    return name.startswith(("exponentials", "nearest"))


def test_every_kernel_fits_the_register_file_without_spilling(compiled: dict[str, dict[str, Any]]) -> None:
    for name, code in compiled.items():
        assert code["spill_bytes"] == 0, f"{name} spills {code['spill_bytes']} bytes"
        assert code["registers"] * code["threads"] <= 65536, f"{name}: {code['registers']} x {code['threads']}"
        most = _SHARED[name.split()[-1]] if is_product(name) else 48 << 10
        assert code["shared"] <= most, f"{name} needs {code['shared']} bytes of shared memory"


@pytest.mark.slow
def test_the_nearest_centroid_is_found_without_spilling_at_the_widths_of_models(tmp_path: Path) -> None:
    kernels = compile_for(tmp_path, "nearest", *map(str, aot.ARCHITECTURES))
    assert len(kernels) == 4 * len(aot.ARCHITECTURES)
    for name, code in kernels.items():
        assert code["spill_bytes"] == 0, f"{name} spills {code['spill_bytes']} bytes"


def test_two_programs_or_more_share_a_multiprocessor(compiled: dict[str, dict[str, Any]]) -> None:
    """Kernels bound by memory, where a single program would idle while it reduces; and the product for short rows,
    whose programs hide each other's exponentials."""
    for name, code in compiled.items():
        if not is_product(name) or name == "exponentials fp16 D=512 sm_90":
            # Registers are allocated to a warp in units of 256: 8 per thread.
            registers = -(-code["registers"] // 8) * 8
            assert 2 * registers * code["threads"] <= 65536, f"{name}: {code['registers']} registers"
            assert 2 * (code["shared"] + 1024) <= _SHARED["sm_90"] + 1024, f"{name}: {code['shared']} bytes shared"


def test_no_kernel_uses_atomics(compiled: dict[str, dict[str, Any]]) -> None:
    assert not {name for name, code in compiled.items() if code["atomics"]}


@pytest.mark.parametrize("width", [512, 1000, 4096])
def test_every_element_is_read_once_and_in_128_bits(compiled: dict[str, dict[str, Any]], width: int) -> None:
    """Up to 4096 columns. The kernels pass over a row twice and rely on the compiler to merge the passes."""
    checked = 0
    for name, code in compiled.items():
        kernel, _, rest = name.partition(" D=")
        if not rest.startswith(f"{width} ") or kernel not in _READ:
            continue
        each = code["elements"] // code["threads"]
        assert code["wide_loads"] == _READ[kernel] * each // 4, f"{name}: {code['wide_loads']} loads"
        # 16-bit results: 128 bits hold 8, but 64-bit stores of 4 are what the fp32 layout gives.
        want = _WRITTEN[kernel] * each // 4 + _WRITTEN_16.get(kernel, 0) * each // 8
        assert code["wide_stores"] == want, f"{name}: {code['wide_stores']} stores"
        checked += 1
    assert checked == len(_READ)


@pytest.mark.parametrize("width", [512, 1000, 4096])
def test_with_bf16_moments_weight_and_gradient_still_move_in_128_bits(
    compiled: dict[str, dict[str, Any]], arch: int, width: int
) -> None:
    for kernel in ("adamw_rows bf16", "sgd_rows bf16"):
        code = compiled[f"{kernel} D={width} sm_{arch}"]
        each = code["elements"] // code["threads"]
        assert code["wide_loads"] >= 2 * each // 4 and code["wide_stores"] >= each // 4, (kernel, code)


@pytest.mark.parametrize("kernel", _HEAD)
def test_rows_of_the_head_are_read_once_and_in_128_bits(
    compiled: dict[str, dict[str, Any]], arch: int, kernel: str
) -> None:
    read, written = _HEAD[kernel]
    code = compiled[f"{kernel} D=512 sm_{arch}"]
    each = code["elements"] // code["threads"]
    assert (code["wide_loads"], code["wide_stores"]) == (read * each // 4, written * each // 4), (kernel, code)


def test_products_of_16_bit_numbers_run_on_the_tensor_cores_of_sm_90(compiled: dict[str, dict[str, Any]]) -> None:
    """And on those of sm_100, which have another instruction. The others have no asynchronous one."""
    for instruction, arch in (("wgmma", "sm_90"), ("tcgen05", "sm_100")):
        number_of = {name: code[instruction] for name, code in compiled.items() if is_product(name) and "16 D" in name}
        assert len(number_of) == 6
        assert all((number > 0) == name.endswith(arch) for name, number in number_of.items()), number_of


def test_the_head_of_sm_90_reads_its_factors_through_tensor_descriptors(compiled: dict[str, dict[str, Any]]) -> None:
    for name, code in compiled.items():
        by_descriptors = name.endswith("sm_90") and name.startswith("exponentials") and "16 D" in name
        assert (code["tile_loads"] > 0) == by_descriptors, f"{name}: {code['tile_loads']} copies of tiles"


def test_an_entry_of_the_matrix_is_one_exponential_and_one_eighth_of_a_128_bit_store(
    compiled: dict[str, dict[str, Any]],
) -> None:
    """Fused: no load; with tensor descriptors the halves of a tile are copied as a whole. In place: also an eighth of
    a load. Without the filter, which has a matrix of its own."""
    checked = 0
    for name, code in compiled.items():
        each = code["elements"] // code["threads"]
        if name.startswith(("exponentials fp16", "exponentials bf16", "in_place fp16 sm")):
            assert code["exponentials"] == each, f"{name}: {code['exponentials']} exponentials for {each} entries"
            stores = (code["wide_stores"], code["tile_stores"])
            assert stores == ((0, 2) if code["tile_loads"] else (each // 8, 0)), f"{name}: {stores} stores"
            assert code["wide_loads"] == (each // 8 if "in_place" in name else 0), f"{name}: {code['wide_loads']} loads"
            checked += 1
    assert checked == 3
