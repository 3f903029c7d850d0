"""The cost estimate before a clustering, and the method that is chosen by the number of clusters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from offline_data import load_tool, run, write_embeddings

from megacid.offline.cluster.cost import assignment_flop, describe_cost, measured_rate
from megacid.offline.cluster.state import KMeansSettings
from megacid.storage.metadata import read_meta

CPU = torch.device("cpu")


def test_flop_count_includes_every_comparison() -> None:
    flat = KMeansSettings(k=100, iterations=7)
    assert assignment_flop(flat, 1000, 16) == (2 * 16 * 1000 * 100 * 7, 2 * 16 * 1000 * 100)
    sampled = KMeansSettings(k=100, iterations=7, train_sample=250)
    assert assignment_flop(sampled, 1000, 16)[0] == assignment_flop(flat, 1000, 16)[0] / 4
    # 10 cells; 10 centroids in each, 7 times, then those of 3 cells, twice.
    levels = KMeansSettings(k=100, iterations=7, method="hierarchical", refine=2, refine_cells=3)
    assert assignment_flop(levels, 1000, 16)[0] == 2 * 16 * 1000 * (10 + 10 * 7 + 30 * 2)


def test_estimate_names_rows_clusters_ranks_and_memory() -> None:
    settings = KMeansSettings(k=40, iterations=3, train_sample=500, memory_gb=2.5)
    assert measured_rate(settings, 8, CPU) > 0
    text = describe_cost(settings, 2000, 8, 4, CPU)
    for part in (
        "2,000 rows of width 8",
        "40 clusters (flat)",
        "500 rows (12.5 per cluster)",
        "4 ranks",
        "memory bound 2.5 GB",
    ):
        assert part in text


@pytest.mark.parametrize(("seconds", "expected"), [(3.21, "3.21 s"), (600.0, "10 min"), (7.2e4, "20 h")])
def test_durations_have_a_readable_unit(seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = KMeansSettings(k=4, iterations=1)
    fit, labels = assignment_flop(settings, 100, 8)
    monkeypatch.setattr("megacid.offline.cluster.cost.measured_rate", lambda *_: (fit + labels) / seconds)
    assert f"about {expected} of distance computation" in describe_cost(settings, 100, 8, 1, CPU)


# ---- the default method ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "method", "init"),
    [
        (("--k", 64), "flat", "k-means++"),  # the demo
        (("--k", 511), "flat", "k-means++"),
        (("--k", 512), "hierarchical", "k-means++"),
        (("--k", 1_000_000), "hierarchical", "k-means++"),
        (("--k", 64, "--method", "hierarchical"), "hierarchical", "k-means++"),
        (("--k", 4096, "--method", "flat"), "flat", "k-means++"),
        (("--k", 4097, "--method", "flat"), "flat", "random"),
        (("--k", 512, "--init", "random"), "hierarchical", "random"),
        (("--k", 8, "--init", "random"), "flat", "random"),
    ],
)
def test_the_default_is_the_fastest_method_at_that_number_of_clusters(
    arguments: tuple[object, ...], method: str, init: str
) -> None:
    tool = load_tool("cluster")
    args = tool.arguments(["--embeddings", "x", "--out", "y", *map(str, arguments)])
    settings = tool.settings_of(args)
    assert (settings.method, settings.init) == (method, init)
    # The options and the settings have the same defaults.
    assert (settings.refine, settings.refine_cells) == (KMeansSettings(1).refine, KMeansSettings(1).refine_cells)


def test_default_reaches_the_objective_of_a_flat_fit_and_records_its_method(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 16))[rng.integers(400, size=6000)] + 0.5 * rng.normal(size=(6000, 16))
    embeddings = write_embeddings(
        tmp_path / "emb", (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16), 2
    )
    metas = []
    for out, more in (
        ("default", ()),
        ("flat", ("--method", "flat")),
        ("random", ("--method", "flat", "--init", "random")),
    ):
        run("cluster", "--embeddings", embeddings, "--out", tmp_path / out, "--k", 512, "--iterations", 8, *more)
        metas.append(read_meta(tmp_path / out, expect="cluster"))
    default, flat, random = metas
    assert [meta["method"] for meta in metas] == ["hierarchical", "flat", "flat"]
    assert default["final_objective"] > random["final_objective"]
    assert default["final_objective"] > 0.997 * flat["final_objective"]
