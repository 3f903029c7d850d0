"""Argument mistakes in every tool: one line on stderr, exit code 2, before anything is read or written."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from megacid.errors import run_tool

TOOLS = Path(__file__).resolve().parents[2] / "tools"
IO = ("--embeddings", "nowhere", "--out", "out")
BALANCE, CLUSTER = ("balance", *IO, "--clusters", "nowhere"), ("cluster", *IO)
EMBED = ("embed", "--shards", "nowhere", "--out", "out", "--model", "none")
SYNTHESIZE, FEATURES = ("synthesize", "scenes", "--out", "out"), ("synthesize", "features", "--out", "out")
ESTIMATE, SWEEP = (
    ("estimate", "--deepspeed_config", "none.json"),
    ("sweep", "--deepspeed_config", "none.json", "--out", "o"),
)
FIGURES, EVAL = (
    ("figures", "--out", "out", "--demo", "none"),
    ("eval", "--model", "none", "--dataset-root", "x", "--out", "o"),
)
KMEANS = ("bench", "--suite", "kmeans")
NEVER = ("nan", "inf", "-inf", "x", "", "1e400", "-1")  # no option takes any of these

MISTAKES = [
    *[((*BALANCE, "--target-keep"), value) for value in (*NEVER, "0", "1.5")],
    *[((*BALANCE, "--threshold"), value) for value in (*NEVER, "2.1")],
    *[((*BALANCE, "--threshold", "0.3", "--cap"), value) for value in (*NEVER, "0", "0.5")],
    *[
        ((*BALANCE, "--threshold", "0.3", option), value)
        for option in ("--seed", "--neighbor-clusters", "--search-rows", "--block", "--gallery-groups")
        for value in (*NEVER, "1.5", "1" * 5000)
    ],
    *[((*CLUSTER, "--k"), value) for value in (*NEVER, "0", str(2**31))],
    *[((*CLUSTER, "--k", "4", "--memory-gb"), value) for value in (*NEVER, "0")],
    *[((*CLUSTER, "--k", "4", "--tolerance"), value) for value in (*NEVER, "1")],
    *[
        ((*CLUSTER, "--k", "4", option), value)
        for option in ("--seed", "--iterations", "--train-sample", "--refine", "--refine-cells", "--top-labels")
        for value in (*NEVER, str(2**64))
    ],
    *[((*EMBED, option), value) for option in ("--batch-size", "--workers") for value in NEVER],
    *[
        ((*SYNTHESIZE, option), value)
        for option in ("--seed", "--num", "--clusters", "--duplicates")
        for value in NEVER
    ],
    *[
        ((*FEATURES, "--classes", "2", option), value)
        for option in ("--noise", "--nuisance", "--dim")
        for value in NEVER
    ],
    *[
        ((*ESTIMATE, option), value)
        for option in ("--num-classes", "--embed-dim", "--feature-dim", "--ranks")
        for value in (*NEVER, "-5", "0")
    ],
    *[((*SWEEP, option), value) for option in ("--rates", "--clusters", "--seeds", "--limit") for value in NEVER],
    *[
        ((*FIGURES, option), value)
        for option in ("--groups", "--members", "--perceptual", "--cluster")
        for value in NEVER
    ],
    *[(("figures", "patches", "none", "--out", "out", "--images", "none.png", "--count"), value) for value in NEVER],
    *[((*EVAL, option), value) for option in ("--limit", "--batch-size", "--workers", "--step") for value in NEVER],
    *[
        ((*KMEANS, option), value)
        for option in ("--rows", "--k", "--seed", "--memory-gb", "--threads")
        for value in NEVER
    ],
]


def run(words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines on stderr of a tool that refuses its arguments."""
    monkeypatch.syspath_prepend(str(TOOLS))
    main = importlib.import_module(words[0]).main
    assert run_tool(lambda: main(list(words[1:]))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


@pytest.mark.parametrize("words", sorted({words for words, _ in MISTAKES}), ids=" ".join)
def test_an_argument_mistake_is_one_line_and_exit_code_2(
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in [value for other, value in MISTAKES if other == words]:
        # "-1" alone would be taken for an option by the shell's reader, not by argparse; "=" is what always works.
        lines = run((*words[:-1], f"{words[-1]}={value}"), capsys, monkeypatch)
        assert len(lines) == 1 and lines[0].startswith(f"error: {words[-1]} is {value[:40]}, expected a "), lines
        assert len(lines[0]) < 200
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*KMEANS, "--rows", "10", "--k", "100"), "--k is 100 for 10 rows, expected at most one cluster per row"),
        (("bench", "--suite", "balance", "--rows", "10", "--k", "100"), "--k is 100 for 10 rows"),
        (("bench", "--suite", "planted", "--rows", "10", "--k", "100"), "--k is 100 for 10 rows"),
        (("bench", "--suite", "levels", "--rows", "10"), "--k is 1,024 for 10 rows"),
    ],
)
def test_more_clusters_than_rows_are_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    assert run_tool(lambda: importlib.import_module("bench").main([*words[1:], "--device", "cpu"])) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (CLUSTER, "one of the arguments --k --assign-only is required"),
        ((*CLUSTER, "--k", "4", "--metric", "angle"), "--metric: invalid choice: 'angle'"),
        (("synthesize", "tables"), "kind: invalid choice: 'tables'"),
        ((*EMBED, "--batchsize", "4"), "unrecognized arguments: --batchsize 4"),
        (("index_shards",), "the following arguments are required: shards"),
        (
            ("cluster", "--embeddings", "s3://bucket/teacher", "--out", "out", "--k", "4"),
            "--embeddings is s3://bucket/te",
        ),
        (
            ("embed", "--shards", "x", "--out", "s3://bucket/teacher", "--model", "none"),
            "--out is s3://bucket/te",
        ),
    ],
)
def test_what_argparse_refuses_is_one_line_too(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = run(words, capsys, monkeypatch)
    assert line.startswith(f"error: {message}") and line.endswith("; see --help")


def test_every_option_with_a_number_has_a_checked_type() -> None:
    for path in (*TOOLS.glob("*.py"), *TOOLS.glob("benchmarks/*.py")):
        text = path.read_text()
        assert "type=int" not in text.replace("type=integer(", "") and "type=float" not in text, path
        assert "argparse.ArgumentParser(" not in text, path
    assert issubclass(importlib.import_module("argtypes").ToolParser, argparse.ArgumentParser)
