#!/usr/bin/env python3
"""Measure on one GPU in slices of at most nine minutes, the most useful first. Run it again to measure what is missing.

    tools/bench_gpu.py --list                    what each slice measures
    tools/bench_gpu.py docs/bench                every slice that has no result there yet
    tools/bench_gpu.py docs/bench --slices head-512 tune-512
    tools/bench_gpu.py /tmp/dry --dry            the slices at toy shapes on the CPU, with the kernels in Triton's
                                                 interpreter: tests the slices and measures nothing

A slice leaves SLICE-GPU.json, small enough to commit, and its output in SLICE-GPU.md. It ends with a table of at most
ten lines, or with the last lines of its output if it fails. A failed slice does not stop the others. The exit code is 1
if a slice failed or a limit is missed.
"""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path
from bench import MODULES
from benchmarks.measure import format_ms, format_value, quantiles
from benchmarks.suite import Limit
from checkout import ROOT
from megacid.errors import EXIT_STOPPED, UserError, run_tool
from megacid.storage.atomic import write_json_atomic

LIMIT_S = 540
SHOWN_ROWS, FAILURE_LINES = 8, 20  # a table's header has two lines
NAMES = ("stage", "shape", "block", "optimizer", "moments", "provider")  # what names a row of the table
DRY = "dry"  # in the place of the GPU's name


class Slice(NamedTuple):
    about: str
    words: str  # the program and its options; {json} is the result
    toy: str | None  # options of --dry, after the others: the last one counts; None: it has no toy shape, not in --dry
    shown: tuple[str, ...] = ()  # values of a row's "provider" that the table shows; () for all
    figure: str = ""  # the measurement that the table shows after the time


HEAD = "tools/bench.py --json {json} --suite head --shapes "
FEW = ("cublas-3gemm", "eager-sync-free", "torch-compile", "megacid-fused", "megacid-in-place", "megacid-recomputed")
AGAINST_CUBLAS = "cublas-3gemm liger-tuned megacid-fused megacid-in-place megacid-recomputed megacid-loss-only"
TOY_HEAD = "--shapes 40,16,2,1 --geometry init --providers cublas-3gemm"
TESTS = "-m pytest -q -p no:cacheprovider -n 4 --dist loadfile -m gpu"  # the largest are in one file, one at a time
TUNE = "tools/tune.py --out {json} --dtypes float16 --widths "
TOY_TUNE = "--widths 32 --samples 8 --classes 100"
SLICES = {
    "kernel-tests": Slice(
        "the tests of the kernels on the GPU",
        f"{TESTS} tests/kernels/test_fused_rows.py tests/kernels/test_fused_head.py "
        "tests/kernels/test_triton_numerics.py",
        "-n 0 -m not(gpu) -k a_broken_row",
    ),
    "engine-tests": Slice(
        "the tests of losses, of the classifier and of the nearest centroid on the GPU",
        f"{TESTS} tests/kernels/test_engines.py tests/kernels/test_assigner.py tests/kernels/test_contrastive.py "
        "tests/classifier/test_sampling.py",
        "-n 0 -m not(gpu) -k a_budget_too_small",
    ),
    "first-start": Slice(
        "embed, cluster, a training of 50 steps that is stopped and resumed",
        "tools/bench.py --json {json} --suite first-start",
        "--model digits-student --samples 24 --size 32 --clusters 3 --batch 8 --steps 2",
        figure="samples_per_second",
    ),
    "head-512": Slice(
        "forward and backward, 131,072 classes x 512",
        HEAD + "131072,512,4096,1",
        TOY_HEAD + " eager-sync-free megacid-fused megacid-in-place megacid-recomputed megacid-loss-only megacid-torch",
        FEW,
        "cublas_fraction",
    ),
    "head-768": Slice(
        "the same with fewer peers, 131,072 x 768",
        f"{HEAD}131072,768,8192,1 --providers {AGAINST_CUBLAS} eager-sync-free torch-compile",
        TOY_HEAD,
        FEW,
        "cublas_fraction",
    ),
    "step-10m": Slice(
        "a step with AdamW, 10,000,000 classes x 512, a tenth of them and all",
        "tools/bench.py --json {json} --suite step --shapes 10000000,512,4096,0.1 10000000,512,4096,1",
        "--shapes 200,16,64,0.5 --repeats 5",
        figure="peak_extra_bytes",
    ),
    "optimizer": Slice(
        "updates of sampled rows",
        "tools/bench.py --json {json} --suite optimizer",
        "--shapes 100,32,4,0.5",
        ("rows", "kernel"),
        "copy_fraction",
    ),
    "tune-512": Slice("tiles for width 512: the table for MEGACID_KERNEL_TABLE", TUNE + "512", TOY_TUNE),
    "tune-768": Slice("tiles for width 768", TUNE + "768", TOY_TUNE),
    "head-1m": Slice(
        "forward and backward, 1,048,576 classes x 768",
        f"{HEAD}1048576,768,16384,1 --providers {AGAINST_CUBLAS}",
        TOY_HEAD,
        FEW,
        "cublas_fraction",
    ),
    "assignment": Slice(
        "the nearest of a million centroids, the work of k-means",
        "tools/bench.py --json {json} --suite assignment",
        "--shapes 20,30,32 --repeats 1",
        figure="cublas_fraction",
    ),
    "head-10m": Slice(
        "forward and backward, 10,000,000 classes x 512",
        f"{HEAD}10000000,512,4096,1 --budget-gib 8 --providers {AGAINST_CUBLAS}",
        TOY_HEAD,
        FEW,
        "cublas_fraction",
    ),
    "contrastive": Slice(
        "the instance loss of large batches",
        "tools/bench.py --json {json} --suite contrastive",
        "--shapes 32,16",
        figure="speed_over_materialised",
    ),
    "step-time": Slice(
        "the model of a training step, for tools/estimate.py --costs",
        "tools/bench.py --json {json} --suite step-time --clock wall",
        None,
        figure="relative_error",
    ),
    "head-init": Slice(
        "head-512 with random embeddings, which some peers do not skip",
        HEAD + "131072,512,4096,1 --geometry init",
        TOY_HEAD,
        FEW,
        "cublas_fraction",
    ),
}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("out", type=local_path, nargs="?", default=ROOT / "docs" / "bench", help="default docs/bench")
    parser.add_argument("--slices", nargs="+", choices=tuple(SLICES), default=list(SLICES), help="default all")
    parser.add_argument("--list", action="store_true", help="list the slices and their commands, and run none")
    parser.add_argument("--dry", action="store_true", help="run the slices at toy shapes on the CPU")
    return parser.parse_args(argv)


def gpu_name() -> str:
    """A word for the GPU, such as "h100". Asked in a process of its own: this one must take no memory of the GPU."""
    program = "import torch; print(torch.cuda.get_device_name().removeprefix('NVIDIA ').split()[0].lower())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise UserError("torch finds no GPU: run this on a machine with one, or test the slices with --dry")
    return done.stdout.strip()


def run_slice(one: Slice, json_path: Path, output: Path, *, dry: bool) -> str:
    """Run the slice. Returns why it failed, or ""."""
    words = [word.format(json=json_path) for word in [*one.words.split(), *((one.toy or "").split() if dry else ())]]
    environment = dict(os.environ)
    if dry:
        words += ["--device", "cpu", "--threads", "1"] if words[0] == "tools/bench.py" else []
        environment |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with output.open("w") as file:
        streams: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, preexec_fn=os.setpgrp, **streams
        )
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"it took more than {LIMIT_S} s"
        finally:  # also after SIGTERM and Ctrl-C
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        return f"exit code {code}"
    if words[:2] == ["-m", "pytest"]:
        counts = counts_of_tests(output.read_text())
        if "passed" not in counts:
            return "no test ran"
        result: Any = {"suite": "tests", "results": [counts]}
    else:
        result = compact(json.loads(json_path.read_text()))
    write_json_atomic(json_path, result)
    return ""


def counts_of_tests(output: str) -> dict[str, int]:
    """{"passed": 12, ...} from the closing line of pytest."""
    line = output.strip().splitlines()[-1]
    return {word: int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", line.partition(" in ")[0])}


def compact(value: Any) -> Any:
    """A report with repeats as their 20 %, 50 % and 80 % quantiles, and numbers of five digits."""
    if isinstance(value, dict):
        return {key: compact(each) for key, each in value.items()}
    if isinstance(value, list):
        repeats = len(value) > 3 and all(isinstance(each, float) for each in value)
        return [compact(each) for each in (quantiles(value) if repeats else value)]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(one: Slice, result: Any) -> list[str]:
    """The slice's table, at most ten lines."""
    if isinstance(result, list):  # of tiles
        return [f"{each['dtype']} {each['width']}: {each['matrix']}, forward {each['forward']}" for each in result]
    if result["suite"] == "tests":
        return [f"{count} {what}" for what, count in result["results"][0].items()]
    lines = [f"| measured | ms p50 [p20, p80] | {one.figure} |", "|---|---:|---:|"]
    for row in [row for row in result["results"] if not one.shown or row["provider"] in one.shown][:SHOWN_ROWS]:
        name = ", ".join(str(row[key]) for key in NAMES if key in row)
        figure = format_value(row.get(one.figure), ",.4g")
        cells = [name, *([row["skipped"], ""] if "skipped" in row else [format_ms(row["seconds"]), figure])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def limits_of(result: Any) -> list[Limit]:
    """The limits of a suite's report; none for tests and tiles."""
    if isinstance(result, list) or result["suite"] not in MODULES:
        return []
    suite = importlib.import_module(f"benchmarks.{MODULES[result['suite']]}")
    limits: list[Limit] = suite.check(result)
    return limits


def measure(name: str, out: Path, gpu: str) -> Any:
    """The result of a slice, from its file if it is there; None if it failed, and its last lines are printed."""
    one, json_path, output = SLICES[name], out / f"{name}-{gpu}.json", out / f"{name}-{gpu}.md"
    print(f"\n=== {name}: {one.about}", flush=True)
    if json_path.exists():
        print(f"{json_path} is there")
    else:
        start = time.perf_counter()
        reason = run_slice(one, json_path, output, dry=gpu == DRY)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
        if reason:
            json_path.unlink(missing_ok=True)
            print("\n".join(output.read_text().splitlines()[-FAILURE_LINES:]))
            print(f"bench_gpu: slice {name} failed: {reason}; its output is in {output}", flush=True)
            return None
    try:
        return json.loads(json_path.read_text())
    except ValueError as error:
        raise UserError(f"{json_path} is no result of a slice ({error}): remove it to measure again") from error


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        for name, one in SLICES.items():
            print(f"{name}: {one.about}\n    python {one.words.format(json=f'{name}.json')}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
    gpu = DRY if args.dry else gpu_name()
    args.out.mkdir(parents=True, exist_ok=True)
    failed, missed = [], []
    names = [name for name in args.slices if not args.dry or SLICES[name].toy is not None]
    for name in names:
        result = measure(name, args.out.resolve(), gpu)
        if result is None:
            failed.append(name)
            continue
        print("\n".join(table(SLICES[name], result)))
        limits = limits_of(result)
        if gpu != DRY:  # toy shapes meet no limit
            print(*limits, sep="\n")
            missed += [name] if not all(limit.met for limit in limits) else []
    print(f"\nbench_gpu: {len(names) - len(failed)} of {len(names)} slices have a result in {args.out}")
    for what, which in (("failed", failed), ("missed a limit", missed)):
        if which:
            print(f"bench_gpu: {what}: {', '.join(which)}")
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
