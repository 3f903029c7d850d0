"""The GPU code of tools/bench.py and tools/tune.py, in Triton's interpreter as far as possible: not the times, but
correct calls, rejection of a wrong tile, and tiles that are skipped before they are compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megacid.errors import UserError

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import tile_search
from megacid_kernels.fused import ProductTile
from megacid_kernels.fused.tuning import MatrixBy, Tiles, as_json, read_table

ROOT = Path(__file__).resolve().parents[2]

INTERPRETED = """
import argparse, dataclasses, json, sys
import torch
from benchmarks import head_gpu, head_kernels, measure, tile_search
from benchmarks.classifier_providers import Shape
from megacid_kernels.fused.product import ProductTile

measure._TURN_S, measure._LEAST_REPEATS, tile_search._ROUNDS = 0.0, 1, 1
cpu = torch.device("cpu")
timer = measure.timer_of(argparse.Namespace(device="cpu", clock="wall"))
forward = tile_search.forward
wrong, good = ProductTile(16, 32, 32, 4, 1), ProductTile(32, 64, 32, 4, 1)
tile_search.RUNS["forward"] = lambda case, tile: forward(case, tile) * (1.01 if tile == wrong else 1.0)
case = tile_search.Case.random(20, 100, 32, torch.float16, cpu)
best, rows = tile_search.tune(case, {"forward": [wrong, good], "nearest": [good]}, timer)
case = next(head_gpu.cases(Shape(100, 32, 4), "init", 2 * 100 * 3, cpu))
kernels = head_kernels.measure_kernels(case, timer, 1)
print(json.dumps([dataclasses.asdict(best), rows, kernels]))
"""


def test_in_the_interpreter_a_wrong_tile_is_left_out_and_every_kernel_of_the_head_is_timed() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    best, rows, kernels = json.loads(done.stdout.splitlines()[-1])
    assert best["forward"]["columns"] == best["nearest"]["columns"] == 64
    skipped = {row["tile"]: row["skipped"] for row in rows if "skipped" in row}
    assert list(skipped) == ["16x32x32, 4 warps, 1 stages, group 8"] and "off by 1.0e-02" in next(
        iter(skipped.values())
    )
    assert [row["kernel"] for row in rows if "seconds" in row] == ["forward"] * 5 + ["nearest"] * 5 + ["in-place"]
    assert len(kernels) == 9 and all(("tflops" in row) != ("gb_per_s" in row) for row in kernels), kernels


def test_a_tile_that_cannot_run_is_left_out_before_it_is_compiled() -> None:
    # 3 stages of (128 + 256) x 64 halves are 144 KiB; 128 x 256 sums are 128 per thread of 8 warps.
    tile = ProductTile(128, 256, 64, 8, 3)
    assert tile_search.excess(tile, 2, tile_search.SHARED_BYTES["sm_90"]) == ""
    assert "144 KiB of shared memory, 99 KiB" in tile_search.excess(tile, 2, tile_search.SHARED_BYTES["sm_86"])
    assert "256 accumulators" in tile_search.excess(
        ProductTile(128, 256, 64, 4, 3), 2, tile_search.SHARED_BYTES["sm_90"]
    )
    for architecture, shared in tile_search.SHARED_BYTES.items():
        for kernel in tile_search.KERNELS:
            for dtype in (torch.float16, torch.float32):
                fitting = tile_search.fitting(kernel, dtype, shared, descriptors=False)
                assert fitting, f"no tile of {kernel} in {dtype} for {architecture}"


@pytest.mark.parametrize("matrix", ["fused", "in-place"])
def test_forcing_how_exponentials_are_made_lasts_for_one_call(
    matrix: MatrixBy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import head_megacid
    from megacid_kernels.fused.tuning import TABLE_VARIABLE, lookup

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.delenv(TABLE_VARIABLE, raising=False)
    usual = lookup("sm_90", "float16", 640)
    with head_megacid.force_matrix(matrix, torch.device("cuda"), 640):
        forced = lookup("sm_90", "float16", 640)
    assert usual is not None and forced is not None and forced.matrix == matrix and forced.forward == usual.forward
    assert TABLE_VARIABLE not in os.environ


def test_tune_refuses_without_a_gpu_and_lists_what_it_would_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import tune

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no GPU"):
        tune.main(["--out", str(tmp_path / "table.json")])
    with pytest.raises(UserError, match="--out is missing"):
        tune.main([])
    tune.main(["--list", "--architecture", "sm_86", "--dtypes", "float16"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("| measured |" in line for line in lines) == 2 * len(
        tile_search.fitting("forward", torch.float16, 99 << 10, descriptors=False)
    )
    assert any("128x256x64, 8 warps, 4 stages" in line and "192 KiB of shared memory" in line for line in lines)
    assert not any("descriptors" in line for line in lines)
    tune.main(["--list", "--dtypes", "float16"])
    assert "128x128x64, 4 warps, 3 stages, group 8, descriptors | measured |" in capsys.readouterr().out


def test_a_table_reads_as_it_was_written(tmp_path: Path) -> None:
    tile = ProductTile(64, 128, 32, 4, 3, 8)
    table = {("sm_90", "float16", 512): Tiles(tile, tile, "in-place")}
    path = tmp_path / "table.json"
    path.write_text(as_json(table))
    assert read_table(str(path)) == table


@pytest.mark.gpu
def test_on_a_gpu_every_provider_of_ours_passes_the_gate_and_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import bench
    from benchmarks import measure
    from benchmarks.head_megacid import OURS

    monkeypatch.setattr(measure, "_TURN_S", 0.01)
    out = tmp_path / "out.json"
    assert bench.main(["--suite", "head", "--shapes", "5003,320,260,1", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    for name in ("cublas-3gemm", *OURS):
        for row in (row for row in rows if row["provider"] == name):
            assert "skipped" not in row and row["same_bits"] == 1.0, row
    assert not [row for row in rows if row["block"] == "kernels" and "skipped" in row]
    assert bench.main(["--suite", "optimizer", "--shapes", "20000,256,64,0.1", "--json", str(out)]) == 0
    assert not [row for row in json.loads(out.read_text())["results"] if "skipped" in row]
