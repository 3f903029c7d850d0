"""Suite machine-code: real kernels compiled without a GPU, what their machine code shows, and what it predicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import machine_code, sass
from benchmarks.kernel_bounds import H100_BYTES_PER_S, MULTIPROCESSORS, RATES, Work, bounds, predicted, programs_by
from benchmarks.sass import MachineCode, read
from megacid.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# Two kernels of suite head, and two counterexamples: rows of 128 numbers per thread, and fp32 factors, which no
# tensor core takes.
GOOD_AND_BAD = """
import functools, sys
import bench
from benchmarks import machine_code

usual = machine_code.kernels

def kernels(case):
    from megacid_kernels.fused import ProductTile, Tile, exponentials, unit_rows
    every = usual(case)
    (x16, w16), options = every["exponentials"].run.args, every["exponentials"].run.keywords
    tile = ProductTile(16, 32, 16, 4, 1)
    fp32 = functools.partial(exponentials, x16.float(), w16.float(), tile=tile, **options)
    large = functools.partial(unit_rows, case.w, tile=Tile(64, 64, 1))
    good = {name: every[name] for name in ("unit_rows", "exponentials")}
    return good | {
        "large tile": every["unit_rows"]._replace(run=large), "fp32": every["exponentials"]._replace(run=fp32)
    }

machine_code.kernels = kernels
sys.exit(bench.main(sys.argv[1:]))
"""


def compiled(folder: Path, *options: str, script: str | None = None) -> tuple[int, str, dict[str, dict[str, Any]]]:
    """(exit code, output, rows by kernel) of the suite in a process of its own: this one may interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")])
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton"), "PYTHONPATH": paths}
    program = [str(ROOT / "tools" / "bench.py")] if script is None else ["-c", script]
    command = [sys.executable, *program, "--suite", "machine-code", "--json", str(folder / "out.json"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (folder / "out.json").exists(), done.stderr
    report = json.loads((folder / "out.json").read_text())
    return done.returncode, done.stdout, {row["provider"]: row for row in report["results"]}


def cells(output: str, header: str, kernel: str) -> list[str]:
    """The cells of a column in the lines of a kernel."""
    columns: list[str] = []
    found = []
    for line in output.splitlines():
        words = [word.strip() for word in line.strip("|").split("|")]
        if line.startswith("| kernel |"):
            columns = words
        elif line.startswith(f"| {kernel} |") and header in columns:
            found.append(words[columns.index(header)])
    return found


def test_a_spill_and_a_product_without_the_tensor_cores_show_in_the_table_and_miss_a_limit(tmp_path: Path) -> None:
    code, output, rows = compiled(tmp_path, "--widths", "64", "--check", script=GOOD_AND_BAD)
    assert list(rows) == ["unit_rows", "exponentials", "large tile", "fp32"]
    usual, large, fp32 = rows["exponentials"], rows["large tile"], rows["fp32"]
    assert usual["spilled_bytes"] == 0 and usual["before_matrix"] >= 1 and usual["shared_bytes"] > 0
    # Every thread makes its share of the tile's exponentials, after the product.
    assert usual["after_exponential"] == usual["tile_rows"] * usual["tile_columns"] / (32 * usual["warps"])
    assert "before_exponential" not in usual and usual["programs_by_registers"] >= 1
    assert large["spilled_bytes"] > 0 and large["registers"] == 255
    assert "before_matrix" not in fp32 and fp32["before_total"] == 0 and fp32["after_exponential"] > 0
    # 128 threads read the rows in 128 bits, four numbers each.
    unit = rows["unit_rows"]
    assert unit["after_global_load_128"] == unit["tile_rows"] * unit["tile_columns"] / 128 / 4
    assert code == 1 and output.count("MISSED") == 2
    assert cells(output, "spilled bytes", "exponentials") == ["0"]
    assert cells(output, "spilled bytes", "large tile") == [f"{large['spilled_bytes']:.0f}"]
    assert cells(output, "matrix", "fp32")[0] == "0" and cells(output, "matrix", "exponentials")[0] != "0"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(MULTIPROCESSORS))
def test_every_kernel_of_the_head_is_in_the_table_and_meets_the_limits(architecture: str, tmp_path: Path) -> None:
    code, output, rows = compiled(tmp_path, "--widths", "512", "--architecture", architecture, "--check")
    assert code == 0, output
    names = {"unit_rows", "exponentials", "exponentials, no matrix", "exponentials in place", "nearest", "finish_x_"}
    assert set(rows) == names | {"add_labels_", "rows_through_norm_", "adamw_rows_"}
    assert ("predicted_s" in rows["nearest"]) == (architecture in RATES)


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match=r"TRITON_INTERPRET is 1.*unset it"), machine_code.absent_gpu("sm_90"):
        pass


# ---- reading machine code -------------------------------------------------------------------------------------------

SASS = """
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.LTC128B.128 R4, [R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64], P1 ;
        /*0030*/                   LDSM.16.M88.4 R4, [R3] ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   HGMMA.64x256x16.F32 R24, gdesc[UR4], R24 ;
.L_x_1:
        /*0060*/                   STL.64 [R1], R2 ;
        /*0070*/                   MUFU.EX2 R4, R4 ;
        /*0080*/                   MUFU.RCP R4, R4 ;
        /*0090*/              @P3  LDL R2, [R1] ;
        /*00a0*/                   STG.E.U16 desc[UR4][R2.64], R5 ;
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00c0*/                   UTMASTG.2D [UR8], [UR4] ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA `(.L_x_9);
        /*00f0*/                   NOP;
"""


def test_instructions_are_counted_by_kind_before_and_after_the_last_product() -> None:
    code = read(SASS, registers=99)
    before = {"global_load_128": 1, "global_to_shared_copy_128": 1, "shared_load_128": 1, "barrier": 1, "matrix": 1}
    assert code.before == Counter(before | {"other": 1, "total": 6})
    after = {"local_store_64": 1, "exponential": 1, "special_function": 1, "local_load_32": 1, "global_store_16": 1}
    assert code.after == Counter(after | {"barrier": 1, "tensor_store": 1, "other": 2, "total": 9})
    assert code.registers == 99 and code.spilled_bytes == 8 + 4
    no_product = read(SASS.replace("HGMMA", "FFMA"), registers=99)
    assert no_product.before["total"] == 0 and no_product.after["total"] == 15
    for name in ("HMMA.16816.F32", "UTCHMMA", "QGMMA.64x128x32.F32.E4M3.E4M3"):
        assert read(SASS.replace("HGMMA.64x256x16.F32", name), registers=99).before["matrix"] == 1


def test_programs_of_a_multiprocessor_follow_from_its_scarcest_resource() -> None:
    h100 = MULTIPROCESSORS["sm_90"]
    assert programs_by(128, 96 << 10, 8, h100) == {"registers": 2, "shared_memory": 2, "warps": 8}
    assert programs_by(129, 113 << 10, 8, h100) == {"registers": 1, "shared_memory": 2, "warps": 8}
    assert programs_by(255, 144 << 10, 8, h100) == {"registers": 1, "shared_memory": 1, "warps": 8}
    assert programs_by(24, 0, 1, h100) == {"registers": 84, "shared_memory": 228, "warps": 32}


# ---- prediction -----------------------------------------------------------------------------------------------------


def code_of(after: int) -> MachineCode:
    return MachineCode(128, 0, Counter(total=600, matrix=32), Counter(total=after))


def test_the_predicted_bound_of_known_kernels() -> None:
    rates, logits = RATES["sm_90"], (4096, 131_072)
    count = 4096 * 131_072
    fused = Work(logits, 2 * count, flop=2 * count * 512, exponentials=count)
    by_name = bounds(fused, code_of(500), (128, 128), 8, rates)
    assert predicted(by_name) == (pytest.approx(0.689e-3, rel=1e-3), "matrix")
    assert by_name["memory"] == pytest.approx(2 * count / H100_BYTES_PER_S)
    assert by_name["exponentials"] == pytest.approx(0.139e-3, rel=1e-2)
    # 32 x 1024 tiles of 8 warps, 500 instructions each, on 132 x 4 schedulers at 1.83 GHz
    assert by_name["issue_slots"] == pytest.approx(32 * 1024 * 8 * 500 / (132 * 4 * 1.83e9), rel=1e-3)
    assert predicted(bounds(fused._replace(flop=2 * count * 64), code_of(500), (128, 128), 8, rates))[1] == "memory"
    assert predicted(bounds(fused, code_of(5000), (128, 128), 8, rates))[1] == "issue_slots"
    assert predicted(bounds(fused._replace(flop=0, bytes=0), code_of(50), (128, 128), 8, rates))[1] == "exponentials"
    ragged = bounds(fused._replace(cells=(4097, 131_072)), code_of(500), (128, 128), 8, rates)
    assert ragged["issue_slots"] == pytest.approx(by_name["issue_slots"] * 33 / 32)


def write_head_report(path: Path, gpu: str, seconds: list[float], budget_gib: float = 20.0, **changes: Any) -> None:
    row = {"block": "kernels", "provider": "unit_rows", "shape": "131072,512,4096,1.0", "seconds": seconds} | changes
    arguments = {"budget_gib": budget_gib}
    report = {"suite": "head", "machine": {"gpu": gpu}, "arguments": arguments, "results": [row]}
    path.write_text(json.dumps(report))


def test_only_measurements_of_the_same_gpu_shape_and_budget_are_compared(tmp_path: Path) -> None:
    assert machine_code.measured(tmp_path, "H100") == {}
    write_head_report(tmp_path / "head-512-h200.json", "NVIDIA H200", [1.0])
    write_head_report(tmp_path / "head-512-small.json", "NVIDIA H100", [2.0], budget_gib=1.0)
    write_head_report(tmp_path / "head-768-h100.json", "NVIDIA H100", [3.0], block="margin")
    write_head_report(tmp_path / "optimizer-h100.json", "NVIDIA H100", [4.0])
    assert machine_code.measured(tmp_path, "H100") == {}
    write_head_report(tmp_path / "head-512-h100.json", "NVIDIA H100 80GB HBM3", [5.0, 6.0, 8.0])
    write_head_report(tmp_path / "head-512-pcie.json", "NVIDIA H100 PCIe", [7.0])  # of lower rates
    times = machine_code.measured(tmp_path, RATES["sm_90"].gpu)
    assert times == {("unit_rows", machine_code.shape_of(512).option): 6.0}
    row = {"predicted_s": 4.0}
    assert machine_code.compared(row, 6.0) == {"measured_s": 6.0, "measured_over_predicted": 1.5}
    assert machine_code.compared(row, None) == {} == machine_code.compared({}, 6.0)


def test_a_disassembler_that_fails_is_an_error_with_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvdisasm"
    program.write_text("#!/bin/sh\necho 'fatal: unknown sm_120' >&2\necho more >&2\nexit 1\n")
    program.chmod(0o755)
    knobs = SimpleNamespace(nvidia=SimpleNamespace(cuobjdump=SimpleNamespace(path=str(program))))
    monkeypatch.setattr(sass.importlib, "import_module", lambda name: knobs)
    with pytest.raises(UserError, match=r"nvdisasm failed \(fatal: unknown sm_120\): set TRITON_CUOBJDUMP_PATH"):
        sass.disassemble(b"no machine code")


def test_the_default_shapes_are_those_that_suite_head_measures() -> None:
    assert [machine_code.shape_of(width).option for width in (512, 768, 100)] == [
        "131072,512,4096,1.0", "131072,768,8192,1.0", "131072,100,4096,1.0"
    ]  # fmt: skip
