"""tools/bench_gpu.py: every slice's own code at a toy shape, results that are kept, and slices that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import forked_programs
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.classifier_providers import Shape
from benchmarks.classifier_timing import needed_bytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import bench_gpu

    handler = signal.getsignal(signal.SIGTERM)
    yield bench_gpu
    signal.signal(signal.SIGTERM, handler)


Dry = tuple[Path, str, list[str]]
# Slices that run the program of another one at other sizes: their toy shapes are slow, their options are always read.
REPEATED = ("head-768", "head-1m", "head-10m", "head-init", "tune-768")


@pytest.fixture(scope="module", params=[pytest.param("each program"), pytest.param("all", marks=pytest.mark.slow)])
def dry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dry:
    """(results, output, slices) of a dry run."""
    import bench_gpu

    slices = [name for name, one in bench_gpu.SLICES.items() if one.toy is not None]
    if request.param != "all":
        slices = [name for name in slices if name not in REPEATED]
    out = tmp_path_factory.mktemp("dry")
    words = [str(ROOT / "tools" / "bench_gpu.py"), str(out), "--dry", "--slices", *slices]
    # Forked: 14 programs start in the dry run. That it starts a slice in the interpreter is tested with a failed slice.
    command, env = [sys.executable, forked_programs.__file__, *words], os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    return out, done.stdout, slices


def test_the_programs_of_all_slices_accept_their_options(tool: ModuleType) -> None:
    import bench
    import tune

    for one in tool.SLICES.values():
        program, *options = one.words.format(json="result.json").split()
        if program != "-m":
            # --list: tuning itself needs a GPU.
            bench.parse(options) if program == "tools/bench.py" else tune.parse([*options, "--list"])


def test_every_slice_runs_at_a_toy_shape_and_leaves_a_small_result(tool: ModuleType, dry: Dry) -> None:
    out, _, slices = dry
    assert {path.name for path in out.iterdir()} == {f"{name}-dry.{ext}" for name in slices for ext in ("json", "md")}
    results = {name: json.loads((out / f"{name}-dry.json").read_text()) for name in slices}
    tests = ("kernel-tests", "engine-tests")
    assert all(results[name]["results"][0]["passed"] >= 1 for name in tests)
    assert [row["stage"] for row in results["first-start"]["results"]][-2:] == ["train", "resume"]
    assert results["tune-512"][0]["architecture"] == "interpreter"
    reports = [result for name, result in results.items() if name not in tests and isinstance(result, dict)]
    assert all(report["machine"]["interpreted"] for report in reports), "a dry run must not pass for a measurement"
    rows = [row for report in reports for row in report["results"]]
    assert len(rows) > 40 and not [row for row in rows if "skipped" in row and row["provider"] != "faiss"]
    assert {"megacid-fused", "megacid-in-place", "exponentials", "kernel"} <= {row.get("provider") for row in rows}
    assert max(path.stat().st_size for path in out.iterdir()) < 64 << 10


def test_a_slice_ends_with_a_table_of_at_most_ten_lines(dry: Dry) -> None:
    parts = dry[1].split("\n=== ")[1:]
    assert [part.partition(":")[0] for part in parts] == dry[2]
    for part in parts:
        lines = part.partition("\n\nbench_gpu:")[0].strip().splitlines()
        assert 3 <= len(lines) <= 12, part  # its name, its time and the table


def test_a_slice_with_a_result_is_not_measured_again(
    tool: ModuleType,
    dry: Dry,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tool, "run_slice", lambda *args, **options: pytest.fail("measured again"))
    assert tool.main([str(dry[0]), "--dry", "--slices", "head-512", "step-10m"]) == 0
    assert capsys.readouterr().out.count(" is there") == 2


def sliced(tool: ModuleType, **words: str) -> dict[str, object]:
    return {name: tool.Slice(name, text, "", figure="") for name, text in words.items()}


def test_a_failed_slice_shows_its_last_lines_and_does_not_stop_the_next(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("import sys\nprint(*range(99), 'the cause', sep='\\n')\nsys.exit(3)\n")
    (tmp_path / "good.py").write_text(
        "import os, sys\n"
        "assert os.environ['TRITON_INTERPRET'] == '1' and os.environ['CUDA_VISIBLE_DEVICES'] == ''\n"
        "open(sys.argv[1], 'w').write('[]')\n"
    )
    slices = sliced(
        tool,
        broken=f"{tmp_path}/broken.py",
        skipped="-m pytest -q -p no:cacheprovider -m gpu tests/kernels/test_fused_rows.py",
        good=f"{tmp_path}/good.py {{json}}",
    )
    monkeypatch.setattr(tool, "SLICES", slices)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert tool.main([str(tmp_path / "out"), "--dry"]) == 1
    output = capsys.readouterr().out
    assert "the cause" in output and "\n78\n" not in output and "slice broken failed: exit code 3" in output
    assert "slice skipped failed: no test ran" in output
    assert "1 of 3 slices have a result" in output and "bench_gpu: failed: broken, skipped" in output
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["good-dry.json"]


def test_a_slice_that_takes_too_long_ends_with_all_its_processes(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(tool, "SLICES", sliced(tool, long=f"{tmp_path}/long.py"))
    monkeypatch.setattr(tool, "LIMIT_S", 3)
    assert tool.main([str(tmp_path / "out"), "--dry"]) == 1
    assert "slice long failed: it took more than 3 s" in capsys.readouterr().out
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("a process of the slice is still running")


def test_a_missed_limit_sets_the_exit_code_also_when_the_result_is_there(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "gpu_name", lambda: "h200")
    row = {"shape": "10000000,512,4096,0.1", "provider": "megacid", "seconds": [0.028, 0.029, 0.03]}
    report = {"suite": "step", "machine": {}, "arguments": {"device": "cuda"}, "results": [row]}
    for median, code in ((0.029, 0), (0.031, 1)):
        row["seconds"] = [median] * 3
        (tmp_path / "step-10m-h200.json").write_text(json.dumps(report))
        assert tool.main([str(tmp_path), "--slices", "step-10m"]) == code
        assert ("bench_gpu: missed a limit: step-10m" in capsys.readouterr().out) == bool(code)


def test_repeats_are_kept_as_quantiles_that_have_the_same_median(tool: ModuleType) -> None:
    report = {"results": [{"seconds": [5.0, 1.0, 3.0, 2.0, 4.0], "shape": "1,2", "rank": 3, "share": 0.123456789}]}
    (row,) = tool.compact(report)["results"]
    assert row == {"seconds": [1.8, 3.0, 4.2], "shape": "1,2", "rank": 3, "share": 0.12346}


def test_ten_million_classes_are_measured_on_the_gpus_that_hold_them() -> None:
    """Free memory of an H100 and an H200, of which a tenth stays unused, see classifier_timing.measure_shape."""
    tenth, whole = (Shape(10_000_000, 512, 4096, rate) for rate in (0.1, 1.0))
    assert needed_bytes("megacid", tenth, train=True) < 0.9 * 79 * 2**30 < needed_bytes("megacid", whole, train=True)
    assert needed_bytes("megacid", whole, train=True) < 0.9 * 139 * 2**30
