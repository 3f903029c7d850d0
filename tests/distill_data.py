"""A run file that distils from the output of tools/embed.py, and the data that it opens."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megacid.config.load import load_run
from megacid.config.schema import RunFile
from megacid.data.batch import Batch
from megacid.distributed.parallel import Parallel
from megacid.training.open_data import Data, open_data


def run_file(stage: Path, *settings: str) -> RunFile:
    """12 steps of 7 of the pairs in stage/shards, with random crops and the teacher in stage/emb."""
    block = {
        "run": {"name": "views", "total_steps": 12, "dir": str(stage), "seed": 3},
        "student": {"model": "digits-student"},
        "data": {
            "shards": str(stage / "shards"), "teacher": str(stage / "emb"), "augment": "random_resized_crop",
            "error_budget": 0.1,
        },
        "loss": {"instance": 1.0},
    }  # fmt: skip
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    tree = {"train_batch_size": 7, "gradient_clipping": 1.0, "optimizer": optimizer, "megacid": block}
    (stage / "run.json").write_text(json.dumps(tree))
    return load_run(stage / "run.json", list(settings), world=1)


def data_of(run: RunFile) -> Data:
    return open_data(run, Parallel(0, 1, 0, torch.device("cpu"), None))


def same(a: Batch, b: Batch) -> bool:
    names = ("image", "text", "sample_id", "teacher_image", "teacher_text")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
