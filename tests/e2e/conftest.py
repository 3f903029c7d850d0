"""A small finished pipeline (shards, teacher embeddings, clusters) that the trainer's tests share."""

from __future__ import annotations

import pytest
from offline_data import run as run_tool_inside
from offline_data import save_model
from train_run import Pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    root = tmp_path_factory.mktemp("pipeline")
    made = Pipeline(root, root / "scenes" / "train", root / "teacher", root / "clusters")
    run_tool_inside(
        "synthesize",
        "scenes",
        "--out",
        root / "scenes",
        "--num",
        72,
        "--clusters",
        12,
        "--size",
        32,
        "--samples-per-shard",
        30,
    )
    model = save_model(root / "model", seed=3)
    run_tool_inside("embed", "--shards", made.shards, "--out", made.teacher, "--model", f"local-dir:{model}")
    run_tool_inside("cluster", "--embeddings", made.teacher, "--out", made.labels, "--k", 13, "--iterations", 3)
    return made
