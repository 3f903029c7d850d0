"""A small finished pipeline (shards, teacher embeddings, clusters) that the trainer's tests share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_offline import run as run_tool_inside
from test_offline import save_model


@dataclass(frozen=True)
class Pipeline:
    root: Path
    shards: Path
    teacher: Path
    labels: Path

    def run_file(self, name: str, **changes: Any) -> Path:
        """A run file with every term on; `changes` are "section__key" of the megacid block or DeepSpeed's own keys."""
        block: dict[str, Any] = {
            "run": {"name": name, "dir": str(self.root / "runs"), "total_steps": 6, "save_every": 3, "log_every": 2},
            "student": {"model": "digits-student"},
            "data": {"shards": str(self.shards), "teacher": str(self.teacher), "labels": str(self.labels)},
            "loss": {
                "contrastive": 0.5,
                "instance": 1.0,
                "cluster": 0.5,
                "mse": 0.1,
                "alpha": 1.0,
                "beta": 0.5,
                "gamma": 0.5,
            },
            "classifier": {"sample_rate": 0.5, "scale": 16.0},
            "schedule": {"warmup_steps": 2},
        }
        tree: dict[str, Any] = {
            "train_batch_size": 16, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        }  # fmt: skip
        for key, value in changes.items():
            section, _, field = key.partition("__")
            if field:
                block[section][field] = value
            else:
                tree[key] = value
        path = self.root / f"{name}.json"
        path.write_text(json.dumps({**tree, "megacid": block}))
        return path


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
