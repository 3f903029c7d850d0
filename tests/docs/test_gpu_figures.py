"""The figures of a GPU in the documentation are those of the files that the benchmark left."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "docs" / "bench"
PROVIDERS = {
    "three cuBLAS products": "cublas-3gemm",
    "megacid": "megacid-fused",
    "megacid, recomputed gradient": "megacid-recomputed",
    "torch.compile of normalise, bf16 product, F.cross_entropy": "torch-compile",
    "torch.compile": "torch-compile",
    "the same without torch.compile": "torch-eager",
    "published scheme, bf16 products, without host waits": "eager-sync-free",
    "published scheme, fp32": "eager",
}


def tables(text: str) -> list[list[list[str]]]:
    """Cells of the rows of every table, without emphasis and code marks."""
    blocks = re.findall(r"(?:^\|.*\n)+", re.sub(r"[*`]", "", text), flags=re.M)
    return [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()] for block in blocks
    ]


def results(name: str, folder: Path = BENCH) -> dict[str, dict[str, Any]]:
    """The rows of the block with a margin, and of the kernels, by provider."""
    report = json.loads((folder / f"head-{name}-h100.json").read_text())
    return {row["provider"]: row for row in report["results"] if row["block"] != "plain"}


@pytest.mark.parametrize(("index", "width"), [(0, "512"), (1, "768")])
def test_the_tables_of_the_classifier_are_those_of_the_measurement(index: int, width: str) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    section = page.partition("## Classifier on a GPU")[2].partition("\n## ")[0]
    rows, measured = tables(section)[index][2:], results(width)
    printed = {row[0]: row for row in tables((BENCH / f"head-{width}-h100.md").read_text())[0]}
    least = measured["cublas-3gemm"]["seconds"][1]
    for name, time, over, memory, errors in rows:
        row = measured[PROVIDERS[name]]
        assert time == printed[PROVIDERS[name]][2], name
        assert over == f"{row['seconds'][1] / least:.{1 if row['seconds'][1] / least > 10 else 2}f}x", name
        assert memory == f"{row['peak_extra_bytes'] / 2**20:,.0f} MiB", name
        assert errors == ("" if "dx_error" not in row else f"{row['dx_error']:.1e}, {row['dw_error']:.1e}"), name
    assert len(rows) > 3


def test_the_readmes_ratios_are_those_of_the_measurement() -> None:
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("* **Measured.**")]
    seconds = {name: row["seconds"][1] for name, row in results("512").items() if "seconds" in row}
    ours = seconds["megacid-fused"]
    assert f"on an H100 {seconds['eager'] / ours:.0f} times as fast as the published partial-FC scheme" in line
    assert f"{seconds['torch-compile'] / ours:.1f} times as fast as torch.compile" in line
    assert f"{ours / seconds['cublas-3gemm']:.2f} times the time of the matrix products alone" in line


def test_the_summary_of_the_benchmark_files_is_theirs() -> None:
    text = (BENCH / "README.md").read_text()
    for width, shape in (("512", "131,072 x 512, batch 4096"), ("768", "131,072 x 768, batch 8192")):
        row, (classes, _, batch) = results(width), (131_072, int(width), 4096 if width == "512" else 8192)
        time = {name: row[name]["seconds"][1] for name in ("megacid-fused", "cublas-3gemm", "eager-sync-free")}
        over = time["megacid-fused"] / time["cublas-3gemm"]
        speed = time["eager-sync-free"] / time["megacid-fused"]
        memory = row["megacid-fused"]["peak_extra_bytes"] / (2 * batch * classes + 4 * classes * int(width))
        files = f"[head-{width}-h100.md](head-{width}-h100.md)"
        assert f"| {shape} | {files} | {over:.2f} | {speed:.1f}x | {memory:.2f} |" in text
    stages = json.loads((BENCH / "first-start-h100.json").read_text())["results"]
    seconds = {row["stage"]: row["seconds"][0] for row in stages}
    for stage, words in (
        ("embed", "embed 4,096 pairs"),
        ("cluster", "cluster"),
        ("train", "train"),
        ("resume", "resume"),
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {words}")]
        assert f"| {seconds[stage]:.1f} |" in line


def test_the_first_and_the_present_figures_are_those_of_both_reports() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    rows = tables(page.partition("## What the first GPU changed")[2])[0][2:]
    reports = results("512", BENCH / "first"), results("512")
    kinds = ("megacid-fused", "ratio", "megacid-loss-only", "exponentials")
    for kind, row in zip(kinds, rows, strict=True):
        for cell, report in zip(row[1:], reports, strict=True):
            seconds = report["megacid-fused" if kind == "ratio" else kind]["seconds"][1]
            over = seconds / report["cublas-3gemm"]["seconds"][1]
            assert cell == (f"{over:.2f}x" if kind == "ratio" else f"{1e3 * seconds:.3f}"), row


def test_the_figures_of_the_other_suites_are_those_of_their_reports() -> None:
    text = (BENCH / "README.md").read_text()

    def measured(suite: str) -> list[dict[str, Any]]:
        return [row for row in json.loads((BENCH / f"{suite}-h200.json").read_text())["results"] if "seconds" in row]

    for row in measured("optimizer"):
        if row["optimizer"] == "adamw" and row["provider"] in ("kernel", "rows"):
            name = {"kernel": "the kernel", "rows": "as the trainer calls it"}[row["provider"]]
            figures = f"{row['gb_per_s']:,.0f} | {row['copy_fraction']:.1%}"
            assert f"| {name}, {row['moments']} moments | {figures} |" in text
    for row in measured("assignment"):
        if row["provider"] in ("megacid-fp16", "megacid-bf16") and ",1048576," in row["shape"]:
            figures = f"{row['cublas_fraction']:.1%} | {row['laion_hours']:.2f}"
            assert f"| {row['provider'].removeprefix('megacid-')} | {row['shape']} | {figures} |" in text
    steps = measured("step-10m")
    for row in steps:
        rate = float(row["shape"].split(",")[3])
        assert f"| r = {rate:g} | {1e3 * row['seconds'][1]:.1f} | {row['peak_extra_bytes'] / 2**30:.1f} |" in text
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert (
        len(steps) == 2
        and "{:.1f} ms with a tenth of the classes, {:.1f} ms with all".format(
            *(1e3 * row["seconds"][1] for row in steps)
        )
        in page
    )
